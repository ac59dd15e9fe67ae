"""history.jsonl: a line an event, whoever writes it, also next to a line that a full disk has cut short."""

from __future__ import annotations

import multiprocessing
import os
import time
from pathlib import Path

import pytest

from barlow import history


def test_what_happened_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert history.read(tmp_path) == []
    assert history.read(tmp_path / "never") == []
    monkeypatch.setenv("BARLOW_ATTEMPT", "7.0")
    history.note(tmp_path, "start", step=0, ranks=4)
    monkeypatch.delenv("BARLOW_ATTEMPT")
    history.note(tmp_path, "failed", step=20, why="a\nb\u2028c", attempt="7.1")
    start, failed = history.read(tmp_path)
    assert abs(time.time() - start.pop("time")) < 10
    assert start == {"attempt": "7.0", "event": "start", "step": 0, "ranks": 4}
    assert (failed["attempt"], failed["event"], failed["why"]) == ("7.1", "failed", "a\nb\u2028c")
    assert (tmp_path / history.FILE).read_text().count("\n") == 2


def note_many(folder: Path, rank: int) -> None:
    for step in range(50):
        history.note(folder, "stopped", rank=rank, step=step, why="x" * 500)


def test_lines_of_several_processes_stay_whole(tmp_path: Path) -> None:
    processes = [multiprocessing.get_context("fork").Process(target=note_many, args=(tmp_path, r)) for r in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    events = history.read(tmp_path)
    assert len(events) == 200
    for rank in range(4):
        assert [event["step"] for event in events if event["rank"] == rank] == list(range(50))


def test_a_line_cut_short_takes_no_other_along(tmp_path: Path) -> None:
    history.note(tmp_path, "start", step=0)
    with open(tmp_path / history.FILE, "a") as file:
        file.write('{"time": 1.0, "event": "fai')
    history.note(tmp_path, "requeued", why="failed")
    history.note(tmp_path, "start", step=20)
    assert [event["event"] for event in history.read(tmp_path)] == ["start", "requeued", "start"]


def test_no_room_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that fills up takes a part of the line without an error."""
    write = os.write
    monkeypatch.setattr(os, "write", lambda handle, data: write(handle, data[:20]))
    with pytest.raises(OSError, match="No space left"):
        history.note(tmp_path, "start", step=0)
    monkeypatch.undo()
    history.note(tmp_path, "failed", step=0)
    assert [event["event"] for event in history.read(tmp_path)] == ["failed"]
