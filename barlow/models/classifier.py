"""A classifier: a backbone and a head on its features, of which the backbone may stay as it is."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from barlow import config
from barlow.models import backbone as backbones
from barlow.models import heads


class Classifier(nn.Module):
    """Images [n, 3, h, w] -> logits [n, classes].

    A frozen backbone gets no gradient and keeps its statistics: it is in eval mode whatever the head is in."""

    def __init__(self, backbone: nn.Module, head: nn.Module, frozen: bool = False) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = head
        self.frozen = frozen
        if frozen:
            backbone.requires_grad_(False)
            backbone.eval()

    def forward(self, images: Tensor) -> Tensor:
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
            features = self.backbone(images)  # [n, features]
        logits: Tensor = self.head(features)
        return logits

    def train(self, mode: bool = True) -> Classifier:
        super().train(mode)
        if self.frozen:
            self.backbone.eval()
        return self


def build(network: config.Network, head: config.Head, classes: int, frozen: bool = False) -> Classifier:
    """With weights of its own: those of another run are laid over them afterwards."""
    assert network.stem, "what a network leaves open is settled before it is built"
    model = config.Model(backbone=network.backbone, stem=network.stem, width=network.width or 1.0)
    backbone = backbones.build(model)
    n_features = cast(int, backbone.num_features)
    return Classifier(backbone, heads.classifier(n_features, head, classes), frozen)
