"""Which rank is to blame when ranks no longer move, by what their watchdogs last wrote: heartbeats/rank_R.json."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from barlow.files import read_json

Heartbeat = Mapping[str, Any]  # attempt, rank, node, pid, step, phase, late, still, process, time

PHASES = ("start", "save", "evaluate", "data", "step")  # with as many steps done, in this order
HELD = {"T": "stopped", "t": "traced", "Z": "a zombie", "D": "waiting for a disk or a device"}  # as /proc/PID/stat says
ENDED = "X"


def file(folder: Path, rank: int) -> Path:
    return folder / "heartbeats" / f"rank_{rank}.json"


def read_heartbeats(folder: Path, attempt: str, world: int) -> dict[int, Heartbeat]:
    """The newest of each rank that has written any in this attempt."""
    found: dict[int, Heartbeat] = {}
    for rank in range(world):
        with contextlib.suppress(OSError, ValueError):
            beat = read_json(file(folder, rank))
            if beat.get("attempt") == attempt:
                found[rank] = beat
    return found


def unheard(ranks: Mapping[int, Heartbeat], before: Mapping[int, float], world: int) -> set[int]:
    """Ranks that have written nothing since, `before` being the times of what there was then.

    Times of one rank are compared with one another only: clocks of nodes differ."""
    missing = set(range(world)) - set(ranks)
    return missing | {r for r, beat in ranks.items() if beat["time"] == before.get(r) and beat["process"] != ENDED}


def guilty(ranks: Mapping[int, Heartbeat], silent: Collection[int]) -> int | None:
    """A rank that cannot run; else one that is not heard of; else the one least far. None: that one has time still."""
    alive = {rank: beat for rank, beat in ranks.items() if rank not in silent and beat["process"] != ENDED}
    held = [rank for rank, beat in alive.items() if beat["process"] in ("TtZD" if is_late(beat) else "TtZ")]
    if held or silent:
        return min(held or silent)
    last = min(alive, key=lambda rank: (place(alive[rank]), rank))
    return last if is_late(alive[last]) else None


def is_late(beat: Heartbeat) -> bool:
    return beat["late"] > 0 and beat["process"] != ENDED


def place(beat: Heartbeat) -> tuple[int, int]:
    """How far a rank is."""
    return beat["step"], PHASES.index(beat["phase"]) if beat["phase"] in PHASES else len(PHASES)


def words(rank: int, ranks: Mapping[int, Heartbeat], silent: Collection[int], unheard_for: float) -> str:
    """What is wrong with the guilty one."""
    if rank not in ranks:
        return "has never been heard of: it did not start, or not in this run folder"
    beat = ranks[rank]
    after, phase = f"after step {beat['step']}", f"in: {beat['phase']}"
    if rank in silent:
        return f"has not been heard of for {unheard_for:.0f} s {after} ({phase}): its node or its watchdog is gone"
    held = f"; process {HELD[beat['process']]}" if beat["process"] in HELD else ""
    nobody = nobody_in_particular(rank, ranks, silent)
    return f"has not moved for {beat['still']:.0f} s {after} ({phase}{held})" + ", nor has any other rank" * nobody


def nobody_in_particular(rank: int, ranks: Mapping[int, Heartbeat], silent: Collection[int]) -> bool:
    """Whether the guilty one only stands for all: they wait at the same place, and none is known to be held up."""
    if silent or rank not in ranks or ranks[rank]["process"] in HELD:
        return False
    return len(ranks) > 1 and all(place(each) == place(ranks[rank]) for each in ranks.values())
