"""Checkpoints: whole or absent, verified, the newest good one used, the state that was asked for and no later one."""

from __future__ import annotations

import json
import resource
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from barlow.engine import checkpoint, snapshot
from barlow.engine.checkpoint import Checkpoints
from barlow.errors import UserError


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


@contextmanager
def no_file_beyond(size: int) -> Iterator[None]:
    """A disk that refuses what would make a file longer, in the middle of a write, as a full one does."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


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
    assert names(tmp_path) == ["step-000000004.pt", "step-000000005.pt"]


def test_keeps_those_of_every_so_many_steps_for_good(tmp_path: Path) -> None:
    checkpoints = saved(tmp_path, [2, 4, 6, 8, 9, 10], keep=1, every=4)
    assert names(tmp_path) == ["step-000000004.pt", "step-000000008.pt", "step-000000010.pt"]
    assert [p.stem for p in sorted(tmp_path.glob("step-*.json"))] == [name[:-3] for name in names(tmp_path)]
    assert checkpoints.newest() == (tmp_path / "step-000000010.pt", [])


def test_a_full_disk_keeps_the_old_ones(tmp_path: Path) -> None:
    checkpoints = saved(tmp_path, [1], keep=1)
    whole = {"step-000000001.pt", "step-000000001.json", "latest.json"}
    with no_file_beyond(2000):
        checkpoints.save(2, state(2.0))
        checkpoints.wait()
    assert checkpoints.take_news()[1:] == [f"warning: {checkpoints.failed}"]
    assert "the checkpoint of step 2 was not written: [Errno 27] File too large" in checkpoints.failed
    with pytest.raises(OSError, match="make room"):
        checkpoints.finish()
    assert checkpoints.newest()[0] == tmp_path / "step-000000001.pt"
    assert {p.name for p in tmp_path.iterdir()} == whole
    with no_file_beyond(0):  # and not even its record
        checkpoints.save(2, state(2.0))
        checkpoints.wait()
    assert {p.name for p in tmp_path.iterdir()} == whole
    checkpoints.save(3, state(3.0))  # there is room again
    checkpoints.finish()
    assert names(tmp_path) == ["step-000000003.pt"]


def test_no_older_one_goes_before_the_new_one_is_durable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoints = saved(tmp_path, [1], keep=1)

    def broken(*_: object) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(checkpoint, "sync_folder", broken)
    checkpoints.save(2, state(2.0))
    with pytest.raises(OSError, match="Input/output error"):
        checkpoints.finish()
    assert "step-000000001.pt" in names(tmp_path)
    monkeypatch.setattr(checkpoint, "write_json", broken)
    checkpoints.save(3, state(3.0))
    with pytest.raises(OSError, match="Input/output error"):
        checkpoints.finish()
    assert "step-000000001.pt" in names(tmp_path)
    assert "step-000000003.pt" not in names(tmp_path)  # no use without its record


def test_never_two_at_once_and_what_became_of_each_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoints, write, room = Checkpoints(tmp_path, 9), torch.save, threading.Event()
    under_way: list[int] = []

    def slow(*words: Any) -> None:
        under_way.append(words[0]["step"])
        assert len(under_way) == 1
        room.wait(10)
        write(*words)
        under_way.remove(words[0]["step"])

    monkeypatch.setattr(torch, "save", slow)
    assert not checkpoints.busy
    assert checkpoints.seconds == 0.0
    checkpoints.save(1, state(1.0))
    assert checkpoints.busy
    assert checkpoints.take_news() == []
    threading.Timer(0.2, room.set).start()
    checkpoints.save(2, state(2.0))
    checkpoints.finish()
    assert not checkpoints.busy
    news = checkpoints.take_news()
    assert [line.split(" written in ")[0] for line in news] == ["checkpoint of step 1", "checkpoint of step 2"]
    assert "s (stall 0." in news[0]
    assert news[0].endswith(" MB)")
    assert checkpoints.take_news() == []
    assert 0 < checkpoints.seconds < 10


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


def test_find_a_run_s_best_its_checkpoints_or_one_of_them(tmp_path: Path) -> None:
    for name in ("checkpoints", "best"):
        (tmp_path / name).mkdir()
    saved(tmp_path / "checkpoints", [4, 8])
    with pytest.raises(UserError, match=f"no good checkpoint in {tmp_path}/best"):
        checkpoint.find(str(tmp_path / "best"))
    saved(tmp_path / "best", [6], keep=1)
    newest, best = tmp_path / "checkpoints" / "step-000000008.pt", tmp_path / "best" / "step-000000006.pt"
    assert checkpoint.find(str(tmp_path)) == newest
    assert checkpoint.find(str(tmp_path / "checkpoints")) == newest
    assert checkpoint.find(str(tmp_path / "best")) == best
    assert checkpoint.find(str(newest.with_name("step-000000004.pt"))).name == "step-000000004.pt"
    newest.write_bytes(newest.read_bytes()[:-1])  # damaged: the one before it
    assert checkpoint.find(str(tmp_path)).name == "step-000000004.pt"
    assert checkpoint.load(best)["model"]["w"][0] == 6.0


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


def test_a_state_of_all_kinds_is_copied_whole_and_again_into_the_same_memory(tmp_path: Path) -> None:
    tied = torch.arange(6.0).reshape(2, 3)
    image = torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last)
    large = torch.randn(3_000_000)  # more than one piece
    kinds: dict[str, Any] = {
        "model": {
            "a": tied,
            "b": tied.detach(),
            "t": tied.t(),
            "image": image,
            "large": large,
            "step": torch.tensor(3),
        },
        "optimizer": {
            0: torch.ones(2, 2).expand(3, 2, 2),
            1: torch.tensor([], dtype=torch.long),
            "lr": 0.5,
            "no": None,
        },
        "half": [torch.ones(5, dtype=torch.bfloat16), torch.tensor([True, False]), "text", (1, 2)],
        "parameter": torch.nn.Parameter(torch.ones(3)),
        "part": torch.arange(100)[10:20:2],
    }
    checkpoints = Checkpoints(tmp_path, 9)
    for step in (1, 2):
        large += step  # in place, as an optimizer does
        checkpoints.save(step, kinds)
        checkpoints.wait()
        found = checkpoint.load(tmp_path / f"step-{step:09d}.pt")
        assert set(found) == {"step", *kinds}
        assert found["step"] == step
        for name, tensor in kinds["model"].items():
            assert torch.equal(found["model"][name], tensor), name
        assert found["model"]["a"].data_ptr() == found["model"]["b"].data_ptr()  # written once
        assert found["model"]["image"].is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(found["optimizer"][0], kinds["optimizer"][0])
        assert found["optimizer"][1].numel() == 0
        assert (found["optimizer"]["lr"], found["optimizer"]["no"]) == (0.5, None)
        assert torch.equal(found["half"][0], kinds["half"][0])
        assert found["half"][1].tolist() == [True, False]
        assert found["half"][2:] == ["text", [1, 2]]
        assert torch.equal(found["parameter"], torch.ones(3))
        assert found["part"].tolist() == [10, 12, 14, 16, 18]


def test_the_memory_of_a_snapshot_is_kept_for_the_next(tmp_path: Path) -> None:
    checkpoints, value = Checkpoints(tmp_path, 1), state(1.0)
    checkpoints.prepare({"step": 0, **value})
    checkpoints.wait()
    made = {place: host.address for place, host in checkpoints._snapshot._host.items()}
    assert set(made) == {("model", "w"), ("optimizer", "state", 0, "mu")}
    for step in (1, 2):
        checkpoints.save(step, value)
        checkpoints.wait()
    assert {place: host.address for place, host in checkpoints._snapshot._host.items()} == made
    checkpoints.save(3, {"model": {"w": torch.ones(7)}})  # another shape
    checkpoints.finish()
    assert checkpoint.load(tmp_path / "step-000000003.pt")["model"]["w"].shape == (7,)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("room", [True, False])
def test_on_a_gpu_it_is_the_state_at_the_call_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, room: bool) -> None:
    if not room:
        monkeypatch.setattr(snapshot, "_free", lambda _: 0)
    weights = torch.zeros(50_000_000, device="cuda")
    count = torch.tensor(0)
    checkpoints = Checkpoints(tmp_path, 1)
    for step in (1, 2, 3):
        weights += 1
        count += 1
        checkpoints.save(step, {"model": {"w": weights, "tied": weights.detach()}, "count": count})
        for _ in range(20):  # training goes on at once
            weights += 1000
        weights -= 20_000
        checkpoints.finish()
        found = checkpoint.load(tmp_path / f"step-{step:09d}.pt")
        assert found["model"]["w"].device.type == "cpu"
        assert found["model"]["w"].unique().tolist() == [step]
        assert found["model"]["tied"].data_ptr() == found["model"]["w"].data_ptr()
        assert found["count"] == step
    assert all(host.memory.is_pinned() for host in checkpoints._snapshot._host.values() if host.memory.numel() > 1)
