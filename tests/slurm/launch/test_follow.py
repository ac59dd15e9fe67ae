"""What is said of a job's end: its cause, not what followed from it."""

from __future__ import annotations

from pathlib import Path

import pytest

from barlow.files import read_json, read_status, write_status
from slurm.launch.follow import report
from slurm.states import State, record_failure

KILLED = """\
srun: error: n3: task 2: Killed
srun: launch/slurm: _step_signal: Terminating StepId=7.0
srun: error: n1: tasks 0-1: Terminated
"""
RAISED = "srun: error: n2: task 1: Exited with exit code 1\nsrun: error: n3: task 2: Killed\n"


def run_folder(tmp_path: Path, said: str) -> Path:
    (tmp_path / "logs" / "submitit").mkdir(parents=True)
    (tmp_path / "logs" / "submitit" / "7_0_log.out").write_text(said)
    return tmp_path


@pytest.mark.parametrize(
    ("state", "said", "failure", "code", "told", "why"),
    [
        ("COMPLETED", "", "", 0, "", ""),
        ("FAILED", RAISED, "ValueError: x", 1, "rank 1 on", "ValueError: x"),
        ("FAILED", KILLED, "", 1, "rank 2 on n3 was killed by SIGKILL", "rank 2 on n3 was killed by SIGKILL"),
        ("FAILED", KILLED, "peer is gone", 1, "rank 2 on n3 was killed by SIGKILL", "rank 2 on n3 was killed"),
        ("TIMEOUT", KILLED, "", 1, "job 7 ended: timeout on n[1-4]", "job 7 ended: timeout"),
        ("NODE_FAIL", KILLED, "peer is gone", 1, "job 7 ended: node_fail on n[1-4]", "job 7 ended: node_fail"),
        ("CANCELLED", KILLED, "", 1, "job 7 ended: cancelled on n[1-4]", "job 7 ended: cancelled"),
    ],
)
def test_report(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    state: str,
    said: str,
    failure: str,
    code: int,
    told: str,
    why: str,
) -> None:
    folder = run_folder(tmp_path, said)
    write_status(folder, state="running", why="")
    if failure:
        record_failure(folder, "7.1", 1, failure, "trace of it\n", 1)
    assert report(folder, "7", State(state, "None", "n[1-4]")) == code
    assert capsys.readouterr().err.startswith(told)
    assert why in read_status(folder)["why"]
    assert (read_status(folder)["state"] == "cancelled") == (state == "CANCELLED")
    if "SIGKILL" in why or "was killed" in why:
        assert read_json(folder / "logs" / "failure.json")["rank"] == 2


def test_a_finished_run_that_slurm_has_forgotten(tmp_path: Path) -> None:
    folder = run_folder(tmp_path, "")
    write_status(folder, state="finished")
    assert report(folder, "7", State()) == 0
    write_status(folder, state="running")
    assert report(folder, "7", State()) == 1


def test_failures_of_other_jobs_are_not_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = run_folder(tmp_path, RAISED)
    record_failure(folder, "6.0", 1, "of last week", "trace\n", 1)
    assert report(folder, "7", State("FAILED", "None", "n1")) == 1
    assert "of last week" not in capsys.readouterr().err
