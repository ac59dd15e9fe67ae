"""A rank's pulse: seen by another process, whole, and cheap."""

from __future__ import annotations

import multiprocessing
import struct
import time
from pathlib import Path

import pytest

from barlow import pulse


def test_before_the_first_beat(tmp_path: Path) -> None:
    pulse.create(tmp_path / "pulse", 30)
    seen = pulse.look(tmp_path / "pulse")
    assert (seen.number, seen.step, seen.phase) == (0, 0, "start")
    assert 29 < seen.deadline - time.monotonic() <= 30


def test_a_beat_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pulse.create(tmp_path / "pulse", 30)
    monkeypatch.setenv(pulse.VARIABLE, str(tmp_path / "pulse"))
    pulse.of_this_rank().beat(16, "data", 5)
    rank = pulse.of_this_rank()  # a second one counts on
    rank.beat(17, "evaluate", float("inf"))
    assert pulse.look(tmp_path / "pulse") == pulse.Beat(2, float("inf"), 17, "evaluate")
    rank.beat(18, "a phase with far too long a name", 5)
    assert pulse.look(tmp_path / "pulse").phase == "a phase with far too lon"


def test_beats_that_nobody_watches_go_nowhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(pulse.VARIABLE, raising=False)
    pulse.of_this_rank().beat(1, "step", 5)


def beat_on(path: Path) -> None:
    rank = pulse.Pulse(str(path))
    for step in range(10**9):
        rank.beat(step, f"{step}", 5)


def test_no_beat_is_seen_half(tmp_path: Path) -> None:
    path = tmp_path / "pulse"
    pulse.create(path, 5)
    writer = multiprocessing.get_context("fork").Process(target=beat_on, args=(path,), daemon=True)
    writer.start()
    while pulse.look(path).number == 0:
        time.sleep(0.001)
    seen, end = {pulse.look(path)}, time.monotonic() + 10
    while len(seen) < 500 and time.monotonic() < end:
        seen.add(pulse.look(path))
    writer.kill()
    writer.join()
    assert len(seen) == 500
    assert all(beat.number == beat.step + 1 and beat.phase == f"{beat.step}" for beat in seen)


def test_a_beat_that_stays_half_written_does_not_hold_up_who_looks(tmp_path: Path) -> None:
    path = tmp_path / "pulse"
    pulse.create(path, 5)
    pulse.Pulse(str(path)).beat(3, "data", 5)
    with open(path, "r+b") as file:
        file.write(struct.pack("<Q", 2))  # stopped right there
    assert (pulse.look(path).number, pulse.look(path).step) == (2, 3)
