"""What scontrol says of the job that this process belongs to, and what it is asked to do with it."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time

PATIENCE = 4 * 3600.0  # seconds for a slurmctld that is away to come back: without it the job would be lost
BETWEEN = 2.0
REFUSED = (  # for good; anything else that it complains of may be over when it is asked again
    "Invalid job id",
    "already completing",
    "Job has already finished",
    "Access/permission denied",
    "presently disabled",
    "not allowed",
    "Invalid",
)


def there() -> bool:
    """Whether this node has it: a container may not."""
    return shutil.which("scontrol") is not None


def show_job(patience: float = PATIENCE) -> str:
    """One line; empty without scontrol, or if SLURM has forgotten the job."""
    return ask("scontrol", "--oneliner", "show", "job", os.environ["SLURM_JOB_ID"], patience=patience) or ""


def value(shown: str, key: str) -> str:
    """Of KEY=VALUE in what `show_job` says; empty if absent or (null)."""
    found = re.search(rf"(?:^| ){key}=(\S*)", shown)
    return found.group(1).replace("(null)", "") if found else ""


def running(shown: str) -> bool:
    """Also SIGNALING: what a running job is while a signal is under way to it."""
    return value(shown, "JobState") in ("RUNNING", "SIGNALING")


def preempted(shown: str) -> bool:
    """Whether SLURM has asked this start of the job to make room."""
    at = value(shown, "PreemptTime")
    return at[:1].isdigit() and at >= value(shown, "StartTime")


def cancelled(shown: str) -> bool:
    """Whether SLURM ends the job for good, and not for its time limit: one that it puts back has a restart more."""
    ends = value(shown, "JobState") in ("CANCELLED", "COMPLETING") and value(shown, "Reason") != "TimeLimit"
    return ends and value(shown, "Restarts") == os.environ.get("SLURM_RESTART_COUNT", "0")


def may_requeue(shown: str) -> bool:
    return value(shown, "Requeue") == "1"


def requeue() -> bool:
    """Put the job back into the queue. SLURM ends what is left of it within KillWait seconds."""
    return ask("scontrol", "requeue", os.environ["SLURM_JOB_ID"], patience=PATIENCE) is not None


def exclude(nodes: set[str], shown: str) -> bool:
    """Keep the waiting job off these nodes, besides those that it avoids already."""
    names = ",".join(filter(None, [value(shown, "ExcNodeList"), *sorted(nodes)]))
    job = os.environ["SLURM_JOB_ID"]
    return ask("scontrol", "update", f"JobId={job}", f"ExcNodeList={names}", patience=10) is not None


def excluded(shown: str) -> set[str]:
    """Nodes that the job avoids already."""
    names = value(shown, "ExcNodeList")
    return set((ask("scontrol", "show", "hostnames", names) or names).split()) if names else set()


def nodes(shown: str) -> dict[str, bool]:
    """Nodes of the job's partitions, and whether each is neither down nor drained."""
    said = ask("sinfo", "--noheader", "--Node", f"--partition={value(shown, 'Partition')}", "--format=%N %t")
    states = dict(line.split() for line in (said or "").splitlines())
    return {node: state.rstrip("*$~#!%@^-") in ("idle", "alloc", "mix", "comp") for node, state in states.items()}


def ask(*command: str, patience: float = 0.0) -> str | None:
    """What it says; None if it refuses. While slurmctld does not answer, it is asked again."""
    deadline = time.monotonic() + patience
    while True:
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=60)
            if done.returncode == 0:
                return done.stdout
            said = done.stderr.strip().replace("\n", "; ")
        except subprocess.TimeoutExpired:
            said = "no answer after 60 s"
        except OSError as error:
            print(f"{' '.join(command)}: {error}", file=sys.stderr)
            return None
        if any(word in said for word in REFUSED) or time.monotonic() >= deadline:
            print(f"{' '.join(command)}: {said}", file=sys.stderr)
            return None
        time.sleep(BETWEEN)
