"""Which parameter goes where, and in which order."""

from __future__ import annotations

import torch
from torch import nn

from barlow.optim.groups import weights_and_biases


class Mixed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.temperature = nn.Parameter(torch.tensor(1.0))  # 0-d
        self.conv = nn.Conv2d(3, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.frozen = nn.Linear(4, 4).requires_grad_(False)
        self.last = nn.Linear(4, 2, bias=False)
        self.again = self.last  # shared: once


def test_weights_then_the_rest_in_the_model_s_order() -> None:
    model = Mixed()
    weights, biases = weights_and_biases(model)
    names = {id(p): name for name, p in model.named_parameters()}
    assert [names[id(p)] for p in weights["params"]] == ["conv.weight", "last.weight"]
    assert [names[id(p)] for p in biases["params"]] == ["temperature", "conv.bias", "norm.weight", "norm.bias"]
    assert (biases["weight_decay"], biases["adapt"]) == (0.0, False)
    assert weights.keys() == {"params"}
