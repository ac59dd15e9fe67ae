"""A rank's pulse: where it is, and by when it is heard of again. Written by the loop, read by a watchdog beside it.

A small file in memory, mapped by both: a beat costs about a microsecond and nothing waits for it. Torch-free."""

from __future__ import annotations

import mmap
import os
import struct
import time
from dataclasses import dataclass
from pathlib import Path

LAYOUT = struct.Struct("<Qdq24sQ")  # beats, deadline, step, phase, beats again: equal when nothing is half written
TRIES = 100  # to see a beat whole; writing one takes less than a microsecond
VARIABLE = "BARLOW_PULSE"  # the path of the file, in a rank's environment


@dataclass(frozen=True)
class Beat:
    number: int  # beats so far; 0: none yet
    deadline: float  # CLOCK_MONOTONIC by which the next beat comes, or something is wrong
    step: int
    phase: str  # what the rank is doing: start, data, step, save, evaluate


class Pulse:
    """The writing end. Without a path, as for a process that nobody watches, beats go nowhere."""

    def __init__(self, path: str | None = None) -> None:
        self._number = 0
        self._map: mmap.mmap | None = None
        if path:
            with open(path, "r+b") as file:
                self._map = mmap.mmap(file.fileno(), LAYOUT.size)
            self._number = LAYOUT.unpack(self._map[:])[0]

    def beat(self, step: int, phase: str, within: float) -> None:
        """At `step`, about to do `phase`; the next beat comes within so many seconds."""
        if self._map is None:
            return
        self._number += 1
        deadline = time.monotonic() + within
        self._map[:] = LAYOUT.pack(self._number, deadline, step, phase.encode()[:24], self._number)


def of_this_rank() -> Pulse:
    return Pulse(os.environ.get(VARIABLE))


def create(path: Path, within: float) -> None:
    """A file for a pulse whose first beat must come within so many seconds."""
    path.write_bytes(LAYOUT.pack(0, time.monotonic() + within, 0, b"start", 0))


def look(path: Path) -> Beat:
    """The newest beat. One that stays half written, as by a process stopped in it, is taken as it is."""
    for _ in range(TRIES):
        number, deadline, step, phase, again = LAYOUT.unpack(path.read_bytes())
        if number == again:
            break
    return Beat(number, deadline, step, phase.rstrip(b"\0").decode(errors="replace"))
