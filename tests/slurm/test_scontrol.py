"""What scontrol's words mean, and a slurmctld that is away for a while."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from slurm import scontrol
from slurm.scontrol import ask, cancelled, preempted, running, value

TIMES = "StartTime=2026-01-02T10:00:00 EndTime=Unknown"


@pytest.mark.parametrize(
    ("shown", "restarts", "expected"),
    [
        ("JobState=COMPLETING Reason=None Requeue=1 Restarts=0 BatchFlag=1", "0", True),  # scancel
        ("JobState=CANCELLED Reason=None Requeue=1 Restarts=2 BatchFlag=1", "2", True),
        ("JobState=COMPLETING Reason=None Requeue=1 Restarts=1 BatchFlag=1", "0", False),  # goes back to the queue
        ("JobState=COMPLETING Reason=TimeLimit Requeue=1 Restarts=0 BatchFlag=1", "0", False),
        ("JobState=RUNNING Reason=None Requeue=0 Restarts=0 BatchFlag=1", "0", False),
    ],
)
def test_whether_a_job_was_cancelled(
    monkeypatch: pytest.MonkeyPatch, shown: str, restarts: str, expected: bool
) -> None:
    monkeypatch.setenv("SLURM_RESTART_COUNT", restarts)
    assert cancelled(shown) == expected


@pytest.mark.parametrize(
    ("shown", "expected"),
    [
        (f"PreemptTime=2026-01-02T10:05:00 {TIMES}", True),
        (f"PreemptTime=2026-01-02T09:05:00 {TIMES}", False),  # of an earlier start
        (f"PreemptTime=None {TIMES}", False),
        (TIMES, False),
    ],
)
def test_whether_this_start_was_preempted(shown: str, expected: bool) -> None:
    assert preempted(shown) == expected


def test_values() -> None:
    shown = "JobId=7 JobState=SIGNALING Reason=None NumNodes=4 ExcNodeList=(null) Requeue=1"
    assert (value(shown, "JobId"), value(shown, "ExcNodeList"), value(shown, "Nodes")) == ("7", "", "")
    assert running(shown)
    assert not running("JobState=PENDING")


def scontrol_script(folder: Path, body: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "scontrol").write_text(f"#!/bin/sh\n{body}\n")
    (folder / "scontrol").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")


@pytest.mark.parametrize(
    "complaint",
    [
        "slurm_load_jobs error: Unable to contact slurm controller (connect failure)",
        "slurm_load_jobs error: Zero Bytes were transmitted or received",
        "slurm_load_jobs error: Slurm backup controller in standby mode",
        "something that nobody has thought of",
    ],
)
def test_a_slurmctld_that_is_away_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, complaint: str
) -> None:
    away = f"test -e {tmp_path}/back && echo here && exit; touch {tmp_path}/back; echo '{complaint}' >&2; exit 1"
    scontrol_script(tmp_path, away, monkeypatch)
    monkeypatch.setattr(scontrol, "BETWEEN", 0.01)
    assert ask("scontrol", "show", "job", "7", patience=5) == "here\n"


def test_a_refusal_is_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scontrol_script(tmp_path, "echo 'Requested operation is presently disabled for job 7' >&2; exit 1", monkeypatch)
    began = time.monotonic()
    assert ask("scontrol", "requeue", "7", patience=60) is None
    assert time.monotonic() - began < 5


def test_without_scontrol(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert not scontrol.there()
    assert ask("scontrol", "show", "job", "7", patience=60) is None
