"""Where a run stands: the first failure of a start, in its folder, and what squeue says of its job."""

from __future__ import annotations

import json
import os
import socket
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from barlow.files import read_json, write_json, write_status

BY_WATCHDOG = ("stuck", "hung")  # kinds of failure that a watchdog records before it kills the rank
VAIN = "waits for "
UNREACHABLE = "UNREACHABLE"  # ours, for a slurmctld that does not answer just now
WAITING = {"PENDING", "CONFIGURING", "REQUEUED", "REQUEUE_HOLD", "RESV_DEL_HOLD", "SPECIAL_EXIT", UNREACHABLE}
ACTIVE = {"RUNNING", "COMPLETING", "SUSPENDED", "STOPPED", "RESIZING", "SIGNALING", "STAGE_OUT", "PREEMPTED"}


@dataclass(frozen=True)
class State:
    """What squeue says of a job. `name` is empty once SLURM has forgotten it."""

    name: str = ""
    reason: str = ""
    nodes: str = ""
    run: str = ""  # the job's name
    left: str = ""  # of its time limit, as SLURM writes times
    starts: str = ""  # when it has started, or is thought to

    @property
    def alive(self) -> bool:
        """Waiting or running. PREEMPTED counts: it is what a job passes through on its way back to the queue."""
        return self.name in WAITING | ACTIVE

    def __str__(self) -> str:
        if self.name in WAITING:
            return self.name.lower() + (f": {self.reason}" if self.reason != "None" else "")
        return self.name.lower() + (f" on {self.nodes}" if self.nodes else "")


def job_state(job: str) -> State:
    command = ["squeue", "--noheader", "--states=all", f"--jobs={job}", "--format=%T|%r|%N|%j"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    except subprocess.TimeoutExpired:
        return State(UNREACHABLE, "squeue waits for slurmctld")
    if done.returncode == 0 and done.stdout.strip():
        return State(*done.stdout.splitlines()[0].strip().split("|", 3))
    if "Invalid job id" in done.stderr or done.returncode == 0:
        return State()
    return State(UNREACHABLE, done.stderr.strip().replace("\n", "; "))


def in_vain(need: str, state: str, why: str) -> str:
    """Why a run cannot start: one that it needs is in this state. The cause is told, not what followed from it."""
    if why.startswith(VAIN):
        return why
    became = {"failed": "failed", "cancelled": "was cancelled"}.get(state, f"is {state}")
    return f"{VAIN}{need}, which {became}" + (f": {why}" if why else "")


def record_failure(
    folder: Path,
    attempt: str,
    rank: int,
    error: str,
    traceback: str,
    exit_code: int,
    host: str = "",
    kind: str = "crash",
) -> bool:
    """Leave logs/failure.json if this is the first rank to fail in this attempt: the others' errors follow from it.

    `kind`: crash (it raised), stuck (it no longer moved), hung (nor did any other), node (its node is not fit), killed
    (by a signal)."""
    logs = folder / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    host = host or os.environ.get("SLURMD_NODENAME") or socket.gethostname()
    failure = {"attempt": attempt, "rank": rank, "host": host, "error": error, "kind": kind}
    failure |= {"traceback": traceback, "exit_code": exit_code, "told": why_told(folder, attempt)}
    try:
        with open(logs / f"failure-{attempt}.json", "x") as claim:
            json.dump(failure, claim, indent=1)
    except FileExistsError:
        return False
    write_json(logs / "failure.json", failure)
    write_status(folder, unless=("finished",), state="failed", why=f"rank {rank} on {host}: {error}")
    return True


def tell_others(folder: Path, attempt: str, why: str) -> None:
    """A rank of this start leaves, for it was told to: what others then fail of follows from that."""
    with open(folder / "logs" / f"told-{attempt}", "a") as file:
        file.write(why + "\n")


def why_told(folder: Path, attempt: str) -> str:
    """What the first rank to leave so said; empty if none did."""
    try:
        return (folder / "logs" / f"told-{attempt}").read_text().split("\n")[0]
    except OSError:
        return ""


def record_killed(folder: Path, attempt: str, rank: int, host: str, error: str) -> None:
    """The same for a rank that could not: it was killed, and what others said of it is no cause but a consequence."""
    failure = {"attempt": attempt, "rank": rank, "host": host, "error": error, "kind": "killed"}
    write_json(folder / "logs" / "failure.json", failure | {"traceback": "", "exit_code": 1})
    write_status(folder, unless=("finished",), state="failed", why=f"rank {rank} on {host} {error}")


def read_failure(folder: Path, attempt: str) -> dict[str, Any]:
    """The first failure of this attempt; if `attempt` ends in a dot, of any attempt of that job. Empty: none."""
    failure = read_json(folder / "logs" / "failure.json")
    found = str(failure.get("attempt", ""))
    return failure if found == attempt or (attempt.endswith(".") and found.startswith(attempt)) else {}
