"""Checkpoints: whole or absent, verified, the newest good one used, the state that was asked for and no later one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from barlow.engine import checkpoint
from barlow.engine.checkpoint import Checkpoints
from barlow.errors import UserError


def state(value: float) -> dict:
    return {
        "model": {"w": torch.full((1000,), value)},
        "optimizer": {"state": {0: {"mu": torch.ones(3)}}},
        "config": {"a": [1]},
    }


def saved(folder: Path, steps: list[int], keep: int = 10) -> Checkpoints:
    checkpoints = Checkpoints(folder, keep)
    for step in steps:
        checkpoints.save(step, state(float(step)))
    checkpoints.wait()
    return checkpoints


def test_round_trip_and_latest(tmp_path: Path) -> None:
    path, told = saved(tmp_path, [5, 10]).newest()
    assert path is not None
    assert told == []
    found = torch.load(path, weights_only=True)
    assert set(found) == {"model", "optimizer", "step", "config"}
    assert found["step"] == 10
    assert torch.equal(found["model"]["w"], torch.full((1000,), 10.0))
    assert json.loads((tmp_path / "latest.json").read_text())["file"] == path.name
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]


def test_what_is_saved_is_the_state_at_the_call(tmp_path: Path) -> None:
    checkpoints, now = Checkpoints(tmp_path, 2), state(1.0)
    checkpoints.save(1, now)
    now["model"]["w"].fill_(2.0)  # training goes on while the thread writes
    now["optimizer"]["state"][0]["mu"].zero_()
    checkpoints.wait()
    found = checkpoint.load(tmp_path / "step-000000001.pt")
    assert found["model"]["w"].unique().tolist() == [1.0]
    assert found["optimizer"]["state"][0]["mu"].sum() == 3


def test_keeps_the_newest(tmp_path: Path) -> None:
    saved(tmp_path, [1, 2, 3, 4, 5], keep=2)
    assert sorted(p.name for p in tmp_path.glob("*.pt")) == ["step-000000004.pt", "step-000000005.pt"]


@pytest.mark.parametrize("damage", ["cut", "flip", "missing", "empty record"])
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
    else:
        newest.with_suffix(".json").write_text("")
    path, told = checkpoints.newest()
    assert path == tmp_path / "step-000000002.pt"
    assert len(told) == 1
    assert "step-000000003.pt skipped" in told[0]


def test_a_full_disk_keeps_the_old_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoints = saved(tmp_path, [1], keep=1)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    checkpoints.save(2, state(2.0))
    checkpoints.wait()
    assert "No space left" in checkpoints.failed
    with pytest.raises(UserError, match="make room"):
        checkpoints.finish()
    assert checkpoints.newest()[0] == tmp_path / "step-000000001.pt"
    assert {p.name for p in tmp_path.iterdir()} == {"step-000000001.pt", "step-000000001.json", "latest.json"}


def test_another_architecture_is_refused_in_one_line() -> None:
    with pytest.raises(
        UserError, match=r"another architecture \(weight: \(3, 2\) in the checkpoint, \(4, 2\) in the model\)"
    ):
        checkpoint.load_weights(torch.nn.Linear(2, 4), torch.nn.Linear(2, 3).state_dict(), "x.pt")


def test_find(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(UserError, match="no good checkpoint"):
        checkpoint.find(str(tmp_path))
    with pytest.raises(UserError, match="no checkpoint"):
        checkpoint.find(str(tmp_path / "nothing.pt"))
    saved(tmp_path / "checkpoints", [4])
    assert checkpoint.find(str(tmp_path)).name == "step-000000004.pt"


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


def test_half_written_files_of_a_killed_process_are_removed(tmp_path: Path) -> None:
    checkpoints = saved(tmp_path, [1])
    (tmp_path / ".step-000000002.pt.4242").write_bytes(b"half")
    checkpoints.tidy()
    assert {p.name for p in tmp_path.iterdir()} == {"step-000000001.pt", "step-000000001.json", "latest.json"}


@pytest.mark.parametrize("content", [b"", b"no checkpoint at all", None])
def test_a_file_that_is_no_checkpoint_is_one_line(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "weights.pt"
    if content is None:
        torch.save({"w": torch.ones(2)}, path)
    else:
        path.write_bytes(content)
    with pytest.raises(UserError, match=r"is no checkpoint \(.+\): name a run folder"):
        checkpoint.load(path)
