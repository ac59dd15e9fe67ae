"""Where a run begins and ends: the device, what it goes on from, a disk that is full. What is not the user's doing is
no user's error."""

from __future__ import annotations

import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from barlow import history, stop
from barlow.config import Pretrain
from barlow.data.shards import read_index
from barlow.engine import loop, run
from barlow.engine.checkpoint import Checkpoints
from barlow.errors import BadNode, Preempted, UserError
from barlow.files import read_json, read_status
from barlow.recipes import PRETRAIN
from barlow.stages import pretrain, training


@pytest.mark.parametrize("gpus", [0, 1])
def test_a_node_without_the_gpus_it_was_chosen_for_is_a_bad_one(monkeypatch: pytest.MonkeyPatch, gpus: int) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    for name, value in (("WORLD_SIZE", "4"), ("LOCAL_RANK", "1"), ("SLURMD_NODENAME", "n7")):
        monkeypatch.setenv(name, value)
    with pytest.raises(BadNode, match=r"^node n7: .*GPU"):
        training.choose_device("cuda")
    if gpus:
        with pytest.raises(UserError, match="more ranks on a machine than its 1 GPUs: give --gpus-per-node"):
            training.choose_device("auto")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("WORLD_SIZE", "1")
    with pytest.raises(UserError, match="torch sees no GPU here"):
        training.choose_device("cuda")
    assert training.choose_device("auto") == torch.device("cpu")


@pytest.mark.parametrize("fault", ["unreadable", "no memory"])
def test_the_runs_own_checkpoint_that_one_rank_cannot_load_is_no_users_error(
    tmp_path: Path, tiny_data: Path, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    checkpoints = Checkpoints(tmp_path, 1)
    checkpoints.save(3, {"model": {"w": torch.ones(3)}})
    checkpoints.finish()

    def load(*_: object, **__: object) -> None:
        raise OSError(5, "Input/output error") if fault == "unreadable" else RuntimeError("can't allocate memory")

    monkeypatch.setattr(torch, "load", load)
    objective, config = pretrain.build(Pretrain(), torch.device("cpu")), Pretrain()
    optimizer = pretrain.Lars(objective.parameters())
    with pytest.raises((OSError, RuntimeError), match=r"Input/output error|allocate"):
        pretrain.restore(checkpoints, objective, optimizer, config, read_index(tiny_data))


def test_a_first_save_finds_memory_for_the_momentum_too(tmp_path: Path) -> None:
    objective = pretrain.build(PRETRAIN["shapes"], torch.device("cpu"))
    optimizer = pretrain.Lars(pretrain.weights_and_biases(objective), lr=0.1)
    before = kinds(training.with_state(optimizer, ["momentum"])["state"])
    for p in objective.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    assert before == kinds(optimizer.state_dict()["state"])


def kinds(state: dict[int, dict[str, torch.Tensor]]) -> dict[tuple[int, str], Any]:
    return {(at, name): (t.shape, t.stride(), t.dtype) for at, kept in state.items() for name, t in kept.items()}


@pytest.fixture
def tiny(tmp_path: Path, tiny_data: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a run of three steps that is about to begin, in this very process."""
    monkeypatch.setattr(stop, "_told", "")
    monkeypatch.setattr(stop, "_listening", True)
    monkeypatch.setattr(loop, "AGAIN", 0.0)
    config = PRETRAIN["shapes"]
    config = replace(
        config,
        run="tiny",
        runs_dir=str(tmp_path),
        device="cpu",
        epochs=1,
        batch_size=32,
        data=replace(config.data, dir=str(tiny_data), workers=1),
        knn=replace(config.knn, every_epochs=0, baselines=False),
        views=replace(config.views, size=32),
        model=replace(config.model, width=0.125, projector=(32, 32)),
    )
    return run.prepare(config, "", Path(__file__).parents[2])


def full_for(times: int, refused: list[str], monkeypatch: pytest.MonkeyPatch, state: str) -> None:
    """The disk refuses so many writes of status.json with that state."""
    whole = training.write_status

    def write_status(*words: Any, **changes: Any) -> bool:
        if changes.get("state") == state and len(refused) < times:
            refused.append(state)
            raise OSError(28, "No space left on device")
        return whole(*words, **changes)

    monkeypatch.setattr(training, "write_status", write_status)


def test_a_disk_that_is_full_at_the_very_end_is_waited_for(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refused: list[str] = []
    full_for(3, refused, monkeypatch, "finished")
    pretrain.main(str(tiny))
    assert len(refused) == 3
    assert (read_status(tiny)["state"], read_json(tiny / "results.json")["steps"]) == ("finished", 3)
    assert [event["event"] for event in history.read(tiny)] == ["start", "finished"]


def test_a_run_that_is_told_to_stop_on_a_full_disk_still_says_so(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    full_for(99, [], monkeypatch, "preempted")
    stop.note(signal.SIGTERM)
    with pytest.raises(Preempted, match="SIGTERM; saved at step 1"):
        pretrain.main(str(tiny))
