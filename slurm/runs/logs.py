"""A rank's log: its last lines, and what follows them until the run has ended."""

from __future__ import annotations

import re
import sys
import time
from pathlib import Path

from barlow.errors import UserError
from slurm.runs.facts import tail
from slurm.runs.standing import Run, look

EVERY = 0.5  # seconds between two looks at the log
ASK_EVERY = 3.0  # seconds between two looks at the run
LINGER = 60.0  # seconds after which a preempted job does not come back


def show(run: Run, rank: int, lines: int, follow: bool) -> int:
    """Print the end of a log and, with `follow`, what is added: until the run ends, however often its job starts again.

    Returns 0, but 1 if a run that was followed has not finished."""
    log = run.folder / "logs" / f"rank_{rank}.log"
    known = sorted(int(path.stem[5:]) for path in log.parent.glob("rank_*.log") if re.fullmatch(r"rank_\d+", path.stem))
    if not log.exists() and known:
        raise UserError(f"--rank {rank}: run {run.name} has logs of ranks {known[0]} to {known[-1]}")
    if not log.exists() and not (follow and run.alive):
        raise UserError(f"run {run.name} has no log yet: it is {run}")
    size = log.stat().st_size if log.exists() else 0
    write(b"".join(tail(log, lines)))
    if not follow:
        return 0
    ended = watch(run.folder, log, size)
    print(f"run {run.name} is {ended}" + (f": {ended.why}" if ended.why else ""), file=sys.stderr)
    return 0 if ended.state == "finished" else 1


def watch(folder: Path, log: Path, seen: int) -> Run:
    """Print what is added to a log, byte `seen` first, until its run has ended; returns how it stands then."""
    asked = preempted = 0.0
    while True:
        if time.monotonic() - asked >= ASK_EVERY:
            asked, run = time.monotonic(), look([folder])[0][0]
            preempted = (preempted or asked) if run.state == "preempted" else 0.0
        if log.exists():
            with open(log, "rb") as file:
                file.seek(seen)
                new = file.read()
            write(new)
            seen += len(new)
        if not run.alive or (preempted and time.monotonic() - preempted > LINGER):
            return run
        time.sleep(EVERY)


def write(text: bytes) -> None:
    """As it is: a letter may be cut in two where a log is read while it is written."""
    sys.stdout.buffer.write(text)
    sys.stdout.flush()
