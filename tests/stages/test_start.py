"""Where a run begins: the device, and what it goes on from. What is not the user's doing is no user's error."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from barlow.config import Pretrain
from barlow.data.shards import read_index
from barlow.engine.checkpoint import Checkpoints
from barlow.errors import BadNode, UserError
from barlow.stages import pretrain


@pytest.mark.parametrize("gpus", [0, 1])
def test_a_node_without_the_gpus_it_was_chosen_for_is_a_bad_one(monkeypatch: pytest.MonkeyPatch, gpus: int) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    for name, value in (("WORLD_SIZE", "4"), ("LOCAL_RANK", "1"), ("SLURMD_NODENAME", "n7")):
        monkeypatch.setenv(name, value)
    with pytest.raises(BadNode, match=r"^node n7: .*GPU"):
        pretrain.choose_device("cuda")
    if gpus:
        with pytest.raises(UserError, match="more ranks on a machine than its 1 GPUs: give --gpus-per-node"):
            pretrain.choose_device("auto")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("WORLD_SIZE", "1")
    with pytest.raises(UserError, match="torch sees no GPU here"):
        pretrain.choose_device("cuda")
    assert pretrain.choose_device("auto") == torch.device("cpu")


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
