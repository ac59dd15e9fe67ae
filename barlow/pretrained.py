"""The backbone of a run, for code of your own:

    from barlow.pretrained import load

    backbone, mean, std = load("runs/mine")        # or runs/mine/best, or a .pt file: the file alone is enough
    features = backbone((images - mean) / std)     # images [n, 3, h, w], RGB in 0..1 -> [n, backbone.num_features]

Its weights have timm's names and shapes, all of them where the stem is `imagenet` and the width 1."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from barlow.config import Model
from barlow.engine.checkpoint import find, load_weights, part
from barlow.engine.checkpoint import load as read
from barlow.engine.origin import network_of
from barlow.errors import UserError
from barlow.models.backbone import build


class Pretrained(NamedTuple):
    backbone: nn.Module  # in evaluation mode, on the CPU
    mean: Tensor  # [3, 1, 1], of the pixels that it was trained on
    std: Tensor


def load(where: str | Path) -> Pretrained:
    """Of the newest good checkpoint of a run, pretrained or fine-tuned, or of the .pt file that `where` names."""
    path = find(str(where))
    stored = read(path)
    if not {"config", "mean", "std"} <= stored.keys():
        raise UserError(f"{path} does not say of what network and pixels it is: no run of this version has saved it")
    network = network_of(stored["config"])
    backbone = build(Model(network.backbone, network.stem, network.width))  # type: ignore[arg-type]
    load_weights(backbone, part(stored, "backbone"), str(path))
    mean, std = (torch.tensor(stored[name]).view(3, 1, 1) for name in ("mean", "std"))
    return Pretrained(backbone.eval(), mean, std)
