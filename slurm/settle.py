"""python -m slurm.settle RUN_FOLDER: what a job's script does last, should its ranks have ended without a word.

A rank that is killed (memory full, a broken node) leaves no traceback and no state: this says in status.json that the
run has failed, and why. A rank that was told to stop before its Python stood is no failure: the job goes back."""

from __future__ import annotations

import os
import re
import signal
import sys
from pathlib import Path

from barlow.files import read_status, write_status
from slurm.follow import killed_rank, output_of
from slurm.job import EARLY, attempt, preempted, requeue, running, show_job
from slurm.states import record_killed

TERMINATED = "was killed by SIGTERM"


def settle(folder: Path) -> None:
    """Only where SLURM does not end the job, nor put it back: then the word is SLURM's."""
    shown, state, job = show_job(), read_status(folder).get("state"), os.environ["SLURM_JOB_ID"]
    if not running(shown) or state not in ("pending", "running", "failed"):
        return
    if killed := killed_rank(folder, job):
        rank, host, how = killed
        if not (state != "failed" and preempted(shown) and how == TERMINATED and requeue(folder, shown, EARLY)):
            record_killed(folder, attempt(os.environ), rank, host, how)
    elif state != "failed":
        said = re.findall(r"^srun: error: (.+)", output_of(folder, job), re.MULTILINE)
        why = [line for line in said if ": task" in line][:1] or said[-1:]  # the first rank to end, or srun's own end
        write_status(folder, state="failed", why=why[0] if why else f"job {job}: its ranks ended before the run")


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a moment more does no harm
    settle(Path(sys.argv[1]))
