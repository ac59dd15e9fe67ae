"""What the job's script decides when its ranks have left: with scontrol's words given here, and in test_requeue.py for
real."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from barlow import history
from barlow.files import read_status, write_json, write_status
from slurm.states import record_failure, tell_others

ROOT = Path(__file__).parents[3]
RUNNING = "JobId=7 JobName=x Requeue=1 Restarts=0 JobState=RUNNING Reason=None Partition=main NumNodes=2"
RUNNING += " StartTime=2026-01-02T10:00:00 PreemptTime=None ExcNodeList=(null)"
KILLED = "start 0\nsrun: error: n2: task 1: Killed\n"
Settle = Callable[..., tuple[int, list[str]]]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    run = tmp_path / "run"
    for sub in ("logs/submitit", "checkpoints"):
        (run / sub).mkdir(parents=True)
    write_status(run, state="running", attempts=1, why="", job="7", attempt="7.0")
    return run


@pytest.fixture
def settle(folder: Path, tmp_path: Path) -> Settle:
    """settle(shown, said, code, most): the job's exit code, and what scontrol was asked to do."""

    def decide(shown: str = RUNNING, said: str = "start 0\n", code: int = 1, most: int = 3) -> tuple[int, list[str]]:
        asked = tmp_path / "asked"
        asked.write_text("")
        script = f"case $* in *show\\ job*) echo '{shown}';; *hostnames*) echo n1;; *) echo $* >>{asked};; esac"
        nodes = "printf 'n1 idle\\nn2 alloc\\nn3 idle\\nn4 down*\\n'"
        for name, body in {"scontrol": script, "sinfo": nodes}.items():
            (tmp_path / name).write_text(f"#!/bin/sh\n{body}\n")
            (tmp_path / name).chmod(0o755)
        (folder / "logs" / "submitit" / "7_0_log.out").write_text(said)
        environment = {key: value for key, value in os.environ.items() if not key.startswith(("SLURM", "BARLOW"))}
        environment |= {"SLURM_JOB_ID": "7", "PATH": f"{tmp_path}:{os.environ['PATH']}"}
        command = [sys.executable, "-m", "slurm.job.settle", str(folder), str(code), "--max-failures", str(most)]
        done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=30)
        assert "Traceback" not in done.stderr, done.stderr
        return done.returncode, asked.read_text().splitlines()

    return decide


def events(folder: Path) -> list[str]:
    return [event["event"] for event in history.read(folder)]


def fail(folder: Path, **facts: Any) -> None:
    known: dict[str, Any] = {"rank": 1, "error": "ValueError: bad", "traceback": "...", "exit_code": 1, "host": "n2"}
    record_failure(folder, "7.0", **known | facts)


def test_a_finished_run_stays_finished(folder: Path, settle: Settle) -> None:
    write_status(folder, state="finished")
    assert settle(code=1) == (0, [])


def test_a_run_that_was_told_to_stop_goes_back(folder: Path, settle: Settle) -> None:
    write_status(folder, state="preempted", why="SIGTERM; saved at step 9")
    assert settle(code=75) == (75, ["requeue 7"])
    assert read_status(folder)["state"] == "pending"
    assert events(folder) == ["stopped", "requeued"]


def test_what_an_earlier_start_said_does_not_count(folder: Path, settle: Settle) -> None:
    write_status(folder, state="preempted", attempt="7.00", why="SIGTERM; saved at step 9")
    assert settle(code=0) == (0, [])


@pytest.mark.parametrize("how", ["Terminated", "User defined signal 2"])
def test_a_rank_told_before_it_could_hear_was_told_all_the_same(folder: Path, settle: Settle, how: str) -> None:
    assert settle(said=KILLED.replace("Killed", how))[1] == ["requeue 7"]
    assert "stopped" in events(folder) or "SIGUSR2" in read_status(folder)["why"]


def test_a_killed_rank_sends_the_job_back(folder: Path, settle: Settle) -> None:
    fail(folder, rank=0, host="n1", error="RuntimeError: Connection closed by peer")  # what followed from it
    assert settle(said=KILLED, code=137) == (75, ["requeue 7"])
    told = history.read(folder)[0]
    assert (told["event"], told["rank"], told["host"], told["kind"]) == ("failed", 1, "n2", "killed")
    assert read_status(folder)["why"] == "rank 1 on n2 was killed by SIGKILL"


def test_a_killed_rank_is_the_cause_though_a_peer_was_told_before_another_failed(folder: Path, settle: Settle) -> None:
    """srun tells all others to stop; one heard that, another found its connection gone a moment later."""
    tell_others(folder, "7.0", "SIGTERM; then RuntimeError")
    fail(folder, rank=0, host="n1", error="RuntimeError: Connection reset by peer")
    assert settle(said=KILLED + "srun: error: n1: task 0: Exited with exit code 1\n", code=137)[1] == ["requeue 7"]
    told = history.read(folder)[0]
    assert (told["event"], told["rank"], told["kind"]) == ("failed", 1, "killed")


def test_a_peer_that_fails_because_one_was_told_is_no_failure(folder: Path, settle: Settle) -> None:
    """It lost its connection to a rank that had left, and was the first to end."""
    tell_others(folder, "7.0", "SIGTERM outside training")
    fail(folder, rank=0, host="n1", error="RuntimeError: Connection closed by peer")
    assert settle(said="start 0\nsrun: error: n1: task 0: Exited with exit code 1\n")[1] == ["requeue 7"]
    assert events(folder) == ["stopped", "requeued"]


def test_damaged_files_do_not_lose_the_job(folder: Path, settle: Settle) -> None:
    for name in ("status.json", "logs/failure.json", "checkpoints/latest.json"):
        (folder / name).write_text('{"state": "runn')
    assert settle(said=KILLED, code=137)[1] == ["requeue 7"]


def test_what_peers_are_told_because_one_failed_is_no_stop(folder: Path, settle: Settle) -> None:
    tell_others(folder, "7.0", "SIGTERM outside training")
    said = "start 0\nsrun: error: n2: task 1: Exited with exit code 9\n"
    said += "srun: error: n1: task 0: Exited with exit code 75\n"
    assert settle(said=said)[1] == ["requeue 7"]
    assert [event["why"] for event in history.read(folder) if event["event"] == "failed"] == [
        "n2: task 1: Exited with exit code 9"
    ]


def test_what_the_watchdog_found_is_the_reason_of_its_kill(folder: Path, settle: Settle) -> None:
    fail(folder, rank=0, host="n1", error="has not moved", kind="stuck")
    assert settle(said=KILLED)[1] == ["requeue 7"]
    assert read_status(folder)["why"] == "rank 0 on n1: has not moved"


def test_a_users_error_does_not_go_back(folder: Path, settle: Settle) -> None:
    fail(folder, exit_code=2, error="no such shards")
    assert settle(code=2) == (2, [])
    assert (read_status(folder)["state"], read_status(folder)["why"]) == ("failed", "no such shards")


def test_failing_at_the_same_step_again_and_again_ends_it(folder: Path, settle: Settle) -> None:
    write_json(folder / "checkpoints" / "latest.json", {"step": 40})
    fail(folder)
    assert settle() == (75, ["requeue 7"])
    assert settle() == (75, ["requeue 7", "update JobId=7 ExcNodeList=n2"])  # the second time on n2
    write_json(folder / "checkpoints" / "latest.json", {"step": 50})  # progress: counted anew
    assert settle()[0] == settle()[0] == 75
    assert settle() == (1, [])
    status = read_status(folder)
    assert status["state"] == "failed"
    assert status["why"].startswith("3 starts have failed without a checkpoint newer than step 50; the last: rank 1")


def test_the_count_begins_anew_when_it_is_submitted_again(folder: Path, settle: Settle) -> None:
    fail(folder)
    assert settle(most=2)[0] == 75
    history.note(folder, "submitted", job="8")
    assert settle(most=2)[0] == 75
    assert settle(most=2)[0] == 1


def test_preemptions_are_never_too_many(folder: Path, settle: Settle) -> None:
    for _ in range(5):
        tell_others(folder, "7.0", "SIGTERM outside training")
        assert settle(most=1) == (75, ["requeue 7"])


def test_a_time_limit_that_always_comes_too_soon_ends_it(folder: Path, settle: Settle) -> None:
    for code in (75, 1):  # the last of which nothing takes for a wish to go back
        tell_others(folder, "7.0", "SIGUSR2 outside training")
        assert settle(code=75, most=2)[0] == code
    assert read_status(folder)["why"].startswith("2 starts have failed without a checkpoint newer than step 0")
    assert "the time limit came before a checkpoint" in read_status(folder)["why"]


def test_a_bad_node_is_avoided_at_once_and_with_those_that_were(folder: Path, settle: Settle) -> None:
    fail(folder, host="n3", kind="node", error="node n3: its clock is off")
    shown = RUNNING.replace("ExcNodeList=(null)", "ExcNodeList=n1").replace("NumNodes=2", "NumNodes=1")
    assert settle(shown)[1] == ["requeue 7", "update JobId=7 ExcNodeList=n1,n3"]
    assert [event.get("nodes") for event in history.read(folder)] == [None, ["n3"], None]


def test_a_node_that_is_needed_is_not_avoided(folder: Path, settle: Settle) -> None:
    fail(folder, kind="node")
    assert settle(RUNNING.replace("NumNodes=2", "NumNodes=3"))[1] == ["requeue 7"]  # n4 is down
    assert "excluded" not in events(folder)


@pytest.mark.parametrize(
    ("shown", "state"),
    [
        ("JobState=CANCELLED Reason=None Restarts=0", "cancelled"),
        ("JobState=COMPLETING Reason=None Restarts=1", "pending"),  # put back by an operator
        ("JobState=PENDING Reason=BeginTime Restarts=1", "pending"),
        ("JobState=FAILED Reason=NonZeroExitCode Restarts=0", "failed"),
    ],
)
def test_what_slurm_decides_is_left_to_it(folder: Path, settle: Settle, shown: str, state: str) -> None:
    write_status(folder, state="preempted", why="SIGTERM; saved at step 9")
    assert settle(f"JobId=7 Requeue=1 {shown}", code=75) == (1, [])  # not 75, which RequeueExit may mean
    assert read_status(folder)["state"] == state


def test_a_job_at_its_time_limit_goes_back_though_its_ranks_did_not_leave(folder: Path, settle: Settle) -> None:
    assert settle("JobId=7 Requeue=1 JobState=COMPLETING Reason=TimeLimit Restarts=0", said=KILLED)[1] == ["requeue 7"]
    assert read_status(folder)["state"] == "pending"


def test_a_full_disk_does_not_keep_it_from_going_back(folder: Path, settle: Settle) -> None:
    (folder / ".status.lock").unlink()
    (folder / ".status.lock").mkdir()
    (folder / history.FILE).mkdir()
    assert settle(said=KILLED)[1] == ["requeue 7"]


def test_a_job_that_may_not_be_requeued_says_so(folder: Path, settle: Settle) -> None:
    assert settle(RUNNING.replace("Requeue=1", "Requeue=0"), said=KILLED) == (75, [])
    assert "may not be requeued" in read_status(folder)["why"]


def test_without_scontrol_the_exit_code_asks(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (folder / "logs" / "submitit" / "7_0_log.out").write_text(KILLED)
    environment = {"SLURM_JOB_ID": "7", "PATH": str(tmp_path / "empty"), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "slurm.job.settle", str(folder), "1"]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=30)
    assert done.returncode == 75
    assert json.loads((folder / "status.json").read_text())["why"] == "rank 1 on n2 was killed by SIGKILL"
