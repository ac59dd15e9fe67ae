"""Small JSON files: never half written, no change lost."""

from __future__ import annotations

import os
from multiprocessing import get_context
from pathlib import Path

import pytest

from barlow.files import read_json, read_status, write_json, write_status


def test_a_file_that_is_not_there_is_empty(tmp_path: Path) -> None:
    assert read_json(tmp_path / "status.json") == {}


def test_a_write_cut_short_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "status.json"
    write_json(path, {"step": 1})

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_json(path, {"step": 2})
    assert read_json(path) == {"step": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["status.json"]


def count(folder: Path, name: str) -> None:
    for i in range(50):
        write_status(folder, (), **{name: i})


def test_a_state_that_is_final_stays(tmp_path: Path) -> None:
    assert write_status(tmp_path, unless=("finished",), state="running", step=1)
    assert write_status(tmp_path, state="finished")
    assert not write_status(tmp_path, unless=("finished",), state="cancelled", step=2)
    assert read_status(tmp_path).items() >= {"state": "finished", "step": 1}.items()


def test_changes_of_several_processes_are_all_kept(tmp_path: Path) -> None:
    processes = [get_context("fork").Process(target=count, args=(tmp_path, name)) for name in "abcd"]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    status = read_status(tmp_path)
    assert {name: status[name] for name in "abcd"} == dict.fromkeys("abcd", 49)
