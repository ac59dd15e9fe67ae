"""What happened to a run: history.jsonl in its folder, a line an event, oldest first. Torch-free.

Rank 0 and the job's script append to it; whoever must know how often something went wrong, and where, reads it."""

from __future__ import annotations

import errno
import json
import os
import time
from pathlib import Path
from typing import Any

FILE = "history.jsonl"


def note(folder: Path, event: str, **facts: Any) -> None:
    """Append an event: one write, on the disk when this returns, so that no process can tear another's line.

    Events: submitted, start, stopped (told to, and saved), failed, requeued, excluded, cancelled, finished."""
    told = {"time": round(time.time(), 2), "attempt": os.environ.get("BARLOW_ATTEMPT", ""), "event": event} | facts
    line = (json.dumps(told) + "\n").encode()
    handle = os.open(folder / FILE, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        size = os.fstat(handle).st_size
        if size and os.pread(handle, 1, size - 1) != b"\n":  # cut short by a disk that was full
            line = b"\n" + line
        if os.write(handle, line) < len(line):  # this one, too
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder / FILE))
        os.fsync(handle)
    finally:
        os.close(handle)


def later(start: str, than: str) -> bool:
    """Whether a start, as JOB.RESTARTS names it, is of the same job as another one, and came after it."""
    (job, _, number), (other, _, before) = start.rpartition("."), than.rpartition(".")
    return job == other != "" and number.isdigit() and before.isdigit() and int(number) > int(before)


def read(folder: Path) -> list[dict[str, Any]]:
    """All events; a line that a full disk has cut short is left out."""
    events = []
    try:
        lines = (folder / FILE).read_text(errors="replace").splitlines()
    except OSError:  # none yet, or none that can be read
        return []
    for line in lines:
        try:
            events.append(json.loads(line))
        except ValueError:
            continue
    return events
