"""Which rank is to blame, from what all of them last said."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from barlow.files import write_json
from slurm.job import blame


def said(step: int, phase: str, late: float = 5.0, process: str = "S", time: float = 100.0) -> dict[str, Any]:
    return {"step": step, "phase": phase, "late": late, "still": 25.0, "process": process, "time": time}


def alike(ranks: int) -> dict[int, dict[str, Any]]:
    return {rank: said(7, "step") for rank in range(ranks)}


@pytest.mark.parametrize(
    ("others", "guilty"),
    [
        ({}, 0),  # all alike: the first stands for all
        ({2: said(7, "data")}, 2),
        ({2: said(6, "step"), 3: said(7, "start")}, 2),
        ({1: said(7, "save"), 2: said(7, "evaluate")}, 1),  # saving comes before the next step
        ({1: said(7, "evaluate"), 2: said(7, "data")}, 1),
        ({1: said(7, "data", late=-20)}, None),  # that one still has time, and so have those who wait for it
        ({1: said(7, "data"), 3: said(7, "step", process="T")}, 3),
        ({3: said(7, "step", late=-20, process="T")}, 3),  # will not use its time
        ({3: said(7, "step", process="D")}, 3),
        ({3: said(7, "step", late=-20, process="D")}, 0),  # reads from a disk just now
        ({1: said(1, "data", process="X")}, 0),  # has left in peace
    ],
)
def test_who_is_to_blame(others: Mapping[int, dict[str, Any]], guilty: int | None) -> None:
    assert blame.guilty({**alike(4), **others}, ()) == guilty


def test_one_that_is_not_heard_of() -> None:
    ranks = {**alike(4), 1: said(6, "step")}
    assert blame.guilty(ranks, {3}) == 3
    assert blame.guilty({**ranks, 2: said(7, "step", process="T")}, {3}) == 2
    assert blame.guilty(alike(2), {2, 3}) == 2


def test_heard_since() -> None:
    """Clocks are not compared: rank 1's is an hour behind."""
    before = {0: 100.0, 1: -3500.0, 2: 99.0, 3: 90.0}
    now = {1: said(7, "step", time=-3499.0), 2: said(7, "step", time=99.0), 3: said(7, "step", process="X", time=90.0)}
    assert blame.unheard({0: said(7, "step", time=101.0), **now}, before, 5) == {2, 4}


def test_words() -> None:
    ranks = {**alike(3), 1: said(7, "data"), 2: said(7, "step", process="D")}
    assert blame.words(1, ranks, (), 0) == "has not moved for 25 s after step 7 (in: data)"
    assert blame.words(0, alike(2), (), 0) == "has not moved for 25 s after step 7 (in: step), nor has any other rank"
    assert blame.words(0, alike(1), (), 0) == "has not moved for 25 s after step 7 (in: step)"
    waiting = "has not moved for 25 s after step 7 (in: step; process waiting for a disk or a device)"
    assert blame.words(2, ranks, (), 0) == waiting
    gone = "has not been heard of for 31 s after step 7 (in: step): its node or its watchdog is gone"
    assert blame.words(0, ranks, {0}, 31.2) == gone
    assert blame.words(9, ranks, {9}, 31.2).startswith("has never been heard of")


def test_only_heartbeats_of_this_attempt_count(tmp_path: Path) -> None:
    (tmp_path / "heartbeats").mkdir()
    for rank, attempt in enumerate(("7.1", "7.0", "7.1")):
        write_json(blame.file(tmp_path, rank), {"attempt": attempt, "rank": rank})
    blame.file(tmp_path, 2).write_text("{")  # as a broken disk leaves it
    assert list(blame.read_heartbeats(tmp_path, "7.1", 4)) == [0]
