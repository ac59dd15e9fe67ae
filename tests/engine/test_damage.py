"""Damaged checkpoints are skipped and told; what merely cannot be read now is no damage, and nothing is lost by it."""

from __future__ import annotations

import builtins
import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from barlow.engine import checkpoint
from barlow.engine.checkpoint import Checkpoints


def state(value: float) -> dict:
    return {
        "model": {"w": torch.full((1000,), value)},
        "optimizer": {"state": {0: {"mu": torch.ones(3)}}},
        "config": {"a": [1]},
    }


def saved(folder: Path, steps: list[int], keep: int = 10, every: int = 0) -> Checkpoints:
    checkpoints = Checkpoints(folder, keep, every)
    for step in steps:
        checkpoints.save(step, state(float(step)))
    checkpoints.wait()
    return checkpoints


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.glob("*.pt"))


def test_a_damaged_one_does_not_count_as_kept(tmp_path: Path) -> None:
    checkpoints = saved(tmp_path, [1, 2, 3], keep=3)
    (tmp_path / "step-000000003.pt").write_bytes(b"")
    assert checkpoints.newest()[0] == tmp_path / "step-000000002.pt"
    checkpoints.save(4, state(4.0))
    checkpoints.wait()
    assert names(tmp_path) == ["step-000000001.pt", "step-000000002.pt", "step-000000004.pt"]


DAMAGE = {
    "cut": "bytes instead of",
    "flip": "its hash is not the one recorded",
    "missing": "step-000000003.pt: No such file",
    "no record": "step-000000003.json: No such file",
    "empty record": "its record is damaged",
    "garbage record": "its record is damaged",
    "record of another kind": "its record is damaged",
    "record of another step": "its record is that of step-000000002.pt, step 2",
    "latest names nothing": "",
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_falls_back_and_is_told(tmp_path: Path, damage: str) -> None:
    checkpoints = saved(tmp_path, [1, 2, 3])
    newest = tmp_path / "step-000000003.pt"
    data = bytearray(newest.read_bytes())
    if damage == "cut":
        newest.write_bytes(data[:-1])
    elif damage == "flip":
        data[len(data) // 2] ^= 1
        newest.write_bytes(data)
    elif damage == "missing":
        newest.unlink()
    elif damage == "no record":
        newest.with_suffix(".json").unlink()
    elif damage == "empty record":
        newest.with_suffix(".json").write_text("")
    elif damage == "garbage record":
        newest.with_suffix(".json").write_bytes(b"\xff\x00{")
    elif damage == "record of another kind":
        newest.with_suffix(".json").write_text("[3]")
    elif damage == "record of another step":
        newest.with_suffix(".json").write_text((tmp_path / "step-000000002.json").read_text())
    else:
        (tmp_path / "latest.json").write_text('{"file": "step-000000009.pt"}')
    path, told = checkpoints.newest()
    if not DAMAGE[damage]:
        assert (path, told) == (newest, [])
        return
    assert path == tmp_path / "step-000000002.pt"
    assert len(told) == 1
    assert told[0].startswith("checkpoint step-000000003.pt skipped: ")
    assert DAMAGE[damage] in told[0]
    checkpoints.save(4, state(4.0))  # what is left of it goes
    checkpoints.wait()
    assert checkpoints.newest() == (tmp_path / "step-000000004.pt", [])
    assert not list(tmp_path.glob("step-000000003.*"))


def test_a_new_save_replaces_a_damaged_later_one(tmp_path: Path) -> None:
    checkpoints = saved(tmp_path, [10, 20, 30], keep=1)
    newest = tmp_path / "step-000000030.pt"
    newest.write_bytes(newest.read_bytes()[:-1])
    checkpoints.save(10, state(1.0))  # a run that fell back and comes by again
    checkpoints.wait()
    path, told = checkpoints.newest()
    assert path == tmp_path / "step-000000010.pt"
    assert told == []
    assert json.loads((tmp_path / "latest.json").read_text())["step"] == 10


@pytest.mark.parametrize("number", [errno.ESTALE, errno.EIO, errno.ETIMEDOUT, errno.EACCES])
@pytest.mark.parametrize("what", ["folder", "record", "weights", "size"])
def test_what_a_sick_file_server_does_not_give_is_no_damage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str, number: int
) -> None:
    saved(tmp_path, [1, 2, 3])
    before = sorted(path.name for path in tmp_path.iterdir())
    opened, listed, stat = builtins.open, os.listdir, Path.stat

    def refuse(*_: Any) -> Any:
        raise OSError(number, os.strerror(number))

    def may_open(file: Any, *words: Any, **named: Any) -> Any:
        return refuse() if what == "weights" and str(file).endswith(".pt") else opened(file, *words, **named)

    with monkeypatch.context() as sick:
        if what == "folder":
            sick.setattr(os, "listdir", lambda where: refuse() if where == tmp_path else listed(where))
        elif what == "record":
            sick.setattr(Path, "read_bytes", refuse)
        elif what == "weights":
            sick.setattr(builtins, "open", may_open)
        else:
            sick.setattr(Path, "stat", lambda path, **word: refuse() if path.suffix == ".pt" else stat(path, **word))
        with pytest.raises(OSError, match=os.strerror(number)):
            Checkpoints(tmp_path, 1).tidy()
    assert sorted(path.name for path in tmp_path.iterdir()) == before
    again = Checkpoints(tmp_path, 9)
    again.tidy()
    assert again.newest() == (tmp_path / "step-000000003.pt", [])


def test_a_run_of_which_no_checkpoint_is_good_does_not_begin_anew(tmp_path: Path) -> None:
    saved(tmp_path, [1, 2])
    for step in (1, 2):
        (tmp_path / f"step-{step:09d}.pt").write_bytes(b"")
    with pytest.raises(RuntimeError, match=r"no checkpoint in .* can be read \(.*0 bytes.*move them away"):
        Checkpoints(tmp_path, 1).tidy()
    assert names(tmp_path) == ["step-000000001.pt", "step-000000002.pt"]


@pytest.mark.parametrize("half", ["step-000000002.pt", "step-000000002.json", ".step-000000002.pt.4242"])
def test_what_a_first_save_that_was_cut_leaves_is_no_checkpoint(tmp_path: Path, half: str) -> None:
    (tmp_path / half).write_bytes(b"half")
    checkpoints = Checkpoints(tmp_path, 1)
    checkpoints.tidy()
    assert checkpoints.newest()[0] is None


def test_what_is_kept_for_good_outlives_damage_and_later_ones_are_put_aside(tmp_path: Path) -> None:
    saved(tmp_path, [2, 4, 6, 7], keep=9)
    for step in (4, 6, 7):
        (tmp_path / f"step-{step:09d}.pt").write_bytes(b"")
    again = Checkpoints(tmp_path, 1, every=2)
    again.tidy()
    again.save(5, state(5.0))
    again.finish()
    assert names(tmp_path) == [
        "damaged-step-000000006.pt",
        "damaged-step-000000007.pt",
        *(f"step-{step:09d}.pt" for step in (2, 4, 5)),
    ]
    assert (tmp_path / "damaged-step-000000006.json").exists()
    assert Checkpoints(tmp_path, 1).newest() == (tmp_path / "step-000000005.pt", [])


def test_a_weights_file_that_cannot_be_read_is_no_users_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved(tmp_path, [1])

    def sick(*_: Any, **__: Any) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(torch, "load", sick)
    with pytest.raises(OSError, match="Input/output error"):
        checkpoint.load(tmp_path / "step-000000001.pt")
