"""A backbone as other code takes it: from a run's folder, or from nothing but its checkpoint's file."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from barlow.config import Data, Model, Pretrain
from barlow.data.shards import read_index
from barlow.engine.checkpoint import Checkpoints
from barlow.errors import UserError
from barlow.pretrained import load
from barlow.stages import pretrain
from barlow.stages.training import described

CONFIG = Pretrain(
    model=Model("resnet18", "dense", 0.125, projector=(16, 16)),
    data=Data(splits=("unlabeled",), mean=(0.4, 0.5, 0.6)),
)


def saved(folder: Path, data: Path, config: Pretrain) -> torch.nn.Module:
    """A checkpoint as the stage saves it; returns its backbone."""
    objective = pretrain.build(config, torch.device("cpu"))
    objective(list(torch.randn(2, 8, 3, 32, 32)))  # batch norms have seen something
    index = read_index(data).normalising(config.data.mean, config.data.std)
    (folder / "checkpoints").mkdir(parents=True)
    checkpoints = Checkpoints(folder / "checkpoints", 1)
    checkpoints.save(7, {"model": objective.state_dict(), **described(config, index, ["hash"])})
    checkpoints.finish()
    return objective.backbone.eval()


def test_it_is_the_backbone_that_was_saved(tmp_path: Path, tiny_data: Path) -> None:
    expected = saved(tmp_path / "run", tiny_data, CONFIG)
    images = torch.rand(4, 3, 32, 32)
    alone = tmp_path / "alone.pt"
    shutil.copy(tmp_path / "run" / "checkpoints" / "step-000000007.pt", alone)
    for where in (tmp_path / "run", str(alone)):
        backbone, mean, std = load(where)
        assert not backbone.training
        assert mean.flatten().tolist() == pytest.approx([0.4, 0.5, 0.6])
        assert std.flatten().tolist() == pytest.approx(read_index(tiny_data).std)
        with torch.no_grad():
            features = backbone((images - mean) / std)
            torch.testing.assert_close(features, expected((images - mean) / std))  # in another memory format
        assert features.shape == (4, backbone.num_features)


@pytest.mark.slow
def test_a_plain_one_is_timms(tmp_path: Path, tiny_data: Path) -> None:
    import timm

    model = replace(CONFIG.model, stem="imagenet", width=1.0)
    expected = saved(tmp_path, tiny_data, replace(CONFIG, model=model))
    theirs = timm.create_model("resnet18", num_classes=0).eval()
    theirs.load_state_dict(load(tmp_path).backbone.state_dict())
    images = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(theirs(images), expected(images))


def test_what_is_no_run_s_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no checkpoint"):
        load(tmp_path / "nowhere")
    torch.save({"model": {}}, tmp_path / "other.pt")
    with pytest.raises(UserError, match="does not say of what network"):
        load(tmp_path / "other.pt")
