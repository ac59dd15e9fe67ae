"""What happens to jobs on a cluster, made to happen on the development one: daemons die, nodes go, others need room.

Nothing here knows what a job runs. `folder` is the development cluster's, `job` a job's number as text."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from barlow.errors import UserError
from slurm import devcluster

SAVED_WITHIN = 10.0  # seconds; slurmctld writes its state within five
TASK = b"submitit.core._submit"  # in the command of every rank


@dataclass(frozen=True)
class Job:
    """What scontrol says of a job; `state` is empty while slurmctld does not answer, or once it has forgotten."""

    state: str = ""
    reason: str = ""
    restarts: int = 0
    seconds: int = 0  # that this start has run
    began: str = ""


@dataclass(frozen=True)
class Rank:
    node: str
    process: int
    watchdog: int  # 0: none


def look(folder: Path, job: str) -> Job:
    said = devcluster.ask(folder, "scontrol", "--oneliner", "show", "job", job)
    facts = dict(re.findall(r"(\w+)=(\S*)", said))
    if "JobState" not in facts:
        return Job()
    days, _, clock = facts["RunTime"].rpartition("-")
    hours, minutes, seconds = map(int, clock.split(":"))
    ran = ((int(days or 0) * 24 + hours) * 60 + minutes) * 60 + seconds
    return Job(facts["JobState"], facts["Reason"], int(facts["Restarts"]), ran, facts["StartTime"])


def tell(folder: Path, *command: str) -> str:
    """Have a SLURM client do something; what it refuses is an error."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("SLURM")}
    environment["SLURM_CONF"] = str(folder / "slurm.conf")
    done = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, timeout=60)
    if done.returncode:
        raise UserError(f"{' '.join(command)}: {done.stderr.strip()}")
    return done.stdout.strip()


def ranks(job: str, restarts: int) -> dict[int, Rank]:
    """The ranks of this start of the job that live on this machine. A rank's watchdog is a fork of it."""
    parents: dict[int, int] = {}
    found: dict[int, dict[str, str]] = {}
    for pid, environment in of_job(job).items():
        with contextlib.suppress(OSError):
            place = Path(f"/proc/{pid}")
            of_start = "SLURM_PROCID" in environment and int(environment.get("SLURM_RESTART_COUNT", "0")) == restarts
            if of_start and TASK in (place / "cmdline").read_bytes().split(b"\0") and name_of(pid) != "srun":
                parents[pid] = int((place / "stat").read_text().rpartition(")")[2].split()[1])
                found[pid] = environment
    return {
        int(at["SLURM_PROCID"]): Rank(
            at["SLURMD_NODENAME"], pid, next((other for other in found if parents[other] == pid), 0)
        )
        for pid, at in found.items()
        if parents[pid] not in found
    }


def of_job(job: str) -> dict[int, dict[str, str]]:
    """All live processes that carry the job's number, with their environment."""
    found = {}
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            words = (entry / "environ").read_bytes()
            if f"SLURM_JOB_ID={job}\0".encode() not in words:
                continue
            if (entry / "stat").read_text().rpartition(")")[2].split()[0] not in "ZX":
                pairs = (word.partition("=") for word in words.decode(errors="replace").split("\0"))
                found[int(entry.name)] = {key: value for key, _, value in pairs}
    return found


def process_of(folder: Path, daemon: str) -> int:
    """The process of `slurmctld`, or of the slurmd of a node; 0 if it does not live."""
    with contextlib.suppress(OSError, ValueError):
        pid = int((folder / f"{daemon}.pid").read_text())
        name = "slurmctld" if daemon == "slurmctld" else "slurmd"
        state = Path(f"/proc/{pid}/stat").read_text()
        if f"({name})" in state and ") Z" not in state:
            return pid
    return 0


def alive(folder: Path, daemon: str) -> int:
    """The same of a daemon that must live: signals to process 0 go to whoever asks."""
    if not (pid := process_of(folder, daemon)):
        raise UserError(f"{daemon} does not run in {folder}")
    return pid


def end(folder: Path, daemon: str, number: int = signal.SIGKILL) -> None:
    """By this signal, and return when it is gone."""
    os.kill(alive(folder, daemon), number)
    until(lambda: not process_of(folder, daemon), 30, f"{daemon} lives on")


def start(folder: Path, daemon: str) -> None:
    """Start a daemon that has ended. The one before may hold its port for a moment longer."""
    words = ["slurmctld"] if daemon == "slurmctld" else ["slurmd", "-N", daemon]
    for last in (False,) * 20 + (True,):
        try:
            devcluster.start(folder, *words)
            break
        except UserError:
            if last:
                raise
            time.sleep(0.5)
    until(lambda: bool(process_of(folder, daemon)), 30, f"{daemon} does not run")
    if daemon == "slurmctld":
        until(lambda: bool(devcluster.node_states(folder)), 60, "slurmctld does not answer")


def wait_until_saved(folder: Path) -> None:
    """What slurmctld has not written yet is lost with it: a job of that moment comes up twice and is held, its node
    drained ("Duplicate jobid"), and only an operator can help."""
    began, state = time.time(), folder / "state" / "job_state"
    # It writes within five seconds of a change, and not at all without one.
    until(lambda: state.stat().st_mtime > began, 6.0)


def lose_node(folder: Path, node: str) -> None:
    """As when its power fails: its slurmd and all that jobs run there are gone at once."""
    os.kill(alive(folder, node), signal.SIGKILL)
    while victims := on_node(folder, node):
        for pid in victims:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.05)


def on_node(folder: Path, node: str) -> list[int]:
    """What jobs run on a node: the slurmstepd first, who would tell of their tasks' end, then the tasks."""
    tasks, steps = [], set()
    for pid, name in devcluster.processes(folder).items():
        with contextlib.suppress(OSError):
            place = Path(f"/proc/{pid}")
            if (
                name not in devcluster.DAEMONS
                and f"SLURMD_NODENAME={node}\0".encode() in (place / "environ").read_bytes()
            ):
                tasks.append(pid)
                steps.add(int((place / "stat").read_text().rpartition(")")[2].split()[1]))
    return [*(pid for pid in steps if name_of(pid) == "slurmstepd"), *tasks]


def name_of(pid: int) -> str:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/comm").read_text().strip()
    return ""


def is_down(folder: Path, node: str) -> bool:
    return devcluster.node_states(folder).get(node, "").startswith("down")


def preempt(folder: Path, seconds: int, grace: int) -> None:
    """Have an urgent job take every node for so long, the job there given `grace` seconds; returns when it is gone."""
    tell(folder, "scontrol", "update", "PartitionName=main", f"GraceTime={grace}")
    nodes = len(devcluster.node_states(folder))
    options = ["--partition=urgent", f"--nodes={nodes}", "--exclusive", "--output=/dev/null", "--job-name=urgent"]
    urgent = tell(folder, "sbatch", "--parsable", *options, f"--wrap=sleep {seconds}")
    until(lambda: look(folder, urgent).state in ("COMPLETED", ""), 120 + grace + seconds, "the urgent job waits")
    tell(folder, "scontrol", "update", "PartitionName=main", "GraceTime=0")


def limit(folder: Path, job: str) -> Callable[[], None]:
    """Let the job's time limit come within a minute; call what this returns when it is in the queue again."""
    before = dict(re.findall(r"(\w+)=(\S*)", tell(folder, "scontrol", "--oneliner", "show", "job", job)))["TimeLimit"]
    minutes = look(folder, job).seconds // 60 + 1
    tell(folder, "scontrol", "update", f"JobId={job}", f"TimeLimit={minutes}")

    def set_back() -> None:
        tell(folder, "scontrol", "update", f"JobId={job}", f"TimeLimit={before}")

    return set_back


def until(true: Callable[[], bool], seconds: float, complaint: str = "") -> bool:
    """Wait for it; after so many seconds complain, or without a complaint return False."""
    deadline = time.monotonic() + seconds
    while not true():
        if time.monotonic() > deadline:
            if complaint:
                raise UserError(f"{complaint} after {seconds:.0f} s")
            return False
        time.sleep(0.1)
    return True
