"""What srun said: of which rank first, and since the last start."""

from __future__ import annotations

from pathlib import Path

import pytest

from slurm.job.srun import first_words, killed_rank

KILLED = """\
srun: error: n3: task 2: Killed
srun: launch/slurm: _step_signal: Terminating StepId=7.0
srun: error: n1: tasks 0-1: Terminated
"""
RAISED = "srun: error: n2: task 1: Exited with exit code 1\nsrun: error: n3: task 2: Killed\n"
PREEMPTED = """\
srun: error: n4: task 3: Killed
slurmstepd-n1: error: *** JOB 7 ON n1 CANCELLED AT 2026-11-20T05:29:15 DUE TO PREEMPTION ***
srun: error: n1: task 0: Killed
start 1
"""


def run_folder(tmp_path: Path, said: str) -> Path:
    (tmp_path / "logs" / "submitit").mkdir(parents=True)
    (tmp_path / "logs" / "submitit" / "7_0_log.out").write_text(said)
    return tmp_path


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        (KILLED, (2, "n3", "was killed by SIGKILL")),
        (PREEMPTED + KILLED, (2, "n3", "was killed by SIGKILL")),
        ("srun: error: n1: tasks 1-2: Segmentation fault (core dumped)\n", (1, "n1", "was killed by SIGSEGV")),
        ("srun: error: n1: task 0: Out Of Memory\n", (0, "n1", "was ended: Out Of Memory")),
        (RAISED, None),
        (PREEMPTED, None),
        (PREEMPTED + RAISED, None),
        ("", None),
    ],
)
def test_the_rank_that_was_killed(tmp_path: Path, said: str, expected: tuple[int, str, str] | None) -> None:
    assert killed_rank(run_folder(tmp_path, said), "7") == expected


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        (KILLED, "n3: task 2: Killed"),
        (PREEMPTED + RAISED, "n2: task 1: Exited with exit code 1"),
        ("srun: error: Unable to create step\nsrun: error: Aborting\n", "Aborting"),
        (PREEMPTED, ""),
    ],
)
def test_what_it_said_first(tmp_path: Path, said: str, expected: str) -> None:
    assert first_words(run_folder(tmp_path, said), "7") == expected


def test_a_job_without_a_log_has_said_nothing(tmp_path: Path) -> None:
    assert killed_rank(tmp_path, "7") is None
    assert first_words(tmp_path, "7") == ""
