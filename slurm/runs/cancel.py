"""End runs for good: a job by scancel, also while it waits, a run here by a signal to its launcher."""

from __future__ import annotations

import os
import signal
import socket
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from barlow import history
from barlow.errors import UserError
from barlow.files import read_status, write_status
from slurm.runs.standing import Run, launcher, look
from slurm.squeue import end_jobs

WHY = "cancelled with jobs.py"
PATIENCE = 60.0  # seconds for ranks to save, and for SLURM to end the job
EVERY = 1.0  # seconds between two looks


def cancel(runs: Sequence[Run], sure: bool) -> int:
    """End those that wait or run, and stay until they have. `sure`: without asking first."""
    for run in runs:
        if not run.alive:
            print(f"run {run.name} is not under way: {run}")
    living = [run for run in runs if run.alive]
    if not living or not (sure or confirmed(living)):
        return 0
    for run in living:
        refuse_elsewhere(run)
    if error := end_jobs([run.job for run in living if run.job]):
        raise UserError(f"nothing was cancelled: {error}")
    for run in living:
        if run.here:
            os.kill(launcher(run.folder)[1], signal.SIGTERM)
        write_status(run.folder, unless=("finished",), state="cancelled", why=WHY)
        print(f"run {run.name} was {run}: {told(run)}", flush=True)
    left = wait([run.folder for run in living])
    for folder in left:
        print(f"run {folder.name} still ends after {PATIENCE:.0f} s: jobs.py list says when it has", file=sys.stderr)
    return 1 if left else 0


def confirmed(living: Sequence[Run]) -> bool:
    if not sys.stdin.isatty():
        raise UserError("give --yes: there is no terminal to ask on")
    named = ", ".join(f"{run.name} ({run})" for run in living)
    return input(f"cancel {named}? [y/N] ").strip().lower() in ("y", "yes")


def refuse_elsewhere(run: Run) -> None:
    """What is not within reach from here: another SLURM's job, whose number may be a stranger's here, and a launcher on
    another machine. The number of one on this machine must still be its own."""
    if run.queued.alive:
        return
    if run.job and not run.here:
        raise UserError(
            f"run {run.name}: SLURM does not know job {run.job} here, or does not answer: nothing was cancelled"
        )
    host, pid, _ = launcher(run.folder)
    if host and host != socket.gethostname():
        raise UserError(f"run {run.name} runs on {host}: give the same command there")
    lock = run.folder / "logs" / "launcher.lock"
    try:
        if any(os.path.samefile(file, lock) for file in Path(f"/proc/{pid}/fd").iterdir() if file.exists()):
            return
    except OSError:
        pass
    raise UserError(f"run {run.name}: process {pid}, its launcher, is not yours to end, or no longer there")


def told(run: Run) -> str:
    if run.here:
        return f"its launcher (process {launcher(run.folder)[1]}) is told to end; ranks save first"
    return f"job {run.job} is cancelled" + (f" on {run.queued.nodes}; ranks may save first" if run.queued.nodes else "")


def wait(folders: Sequence[Path]) -> list[Path]:
    """Until all have ended, and have said so: a rank's last word on the way may be another. Returns those left."""
    left, deadline = list(folders), time.monotonic() + PATIENCE
    while left and time.monotonic() < deadline:
        time.sleep(EVERY)
        runs, _ = look(left)
        left = [run.folder for run in runs if run.alive]
        for run in runs:
            if not run.alive:
                write_status(run.folder, unless=("finished", "cancelled"), state="cancelled", why=WHY)
                note(run.folder)
                print(f"run {run.name} is {read_status(run.folder)['state']}", flush=True)
    return left


def note(folder: Path) -> None:
    """In its history, unless the job's last line has done so, or the run has finished meanwhile."""
    events = [event.get("event") for event in history.read(folder)]
    if read_status(folder)["state"] == "cancelled" and events[-1:] != ["cancelled"]:
        history.note(folder, "cancelled", why=WHY)
