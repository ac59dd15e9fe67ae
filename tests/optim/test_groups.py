"""Which parameter goes where, and in which order."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from barlow.optim.groups import head_and_backbone, weights_and_biases, weights_and_biases_apart


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


class Pair(nn.Module):
    """A classifier, whose backbone stands before its head, as modules are registered."""

    def __init__(self, frozen: bool) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).requires_grad_(not frozen)
        self.head = nn.Sequential(nn.Linear(4, 5, bias=False), nn.BatchNorm1d(5), nn.Linear(5, 2))


HEAD = ["head.0.weight", "head.1.weight", "head.1.bias", "head.2.weight", "head.2.bias"]
BACKBONE = ["backbone.0.weight", "backbone.0.bias", "backbone.1.weight", "backbone.1.bias"]


def named(model: nn.Module, groups: list[dict]) -> list[list[str]]:
    names = {id(p): name for name, p in model.named_parameters()}
    return [[names[id(p)] for p in group["params"]] for group in groups]


def test_head_and_backbone_hold_each_parameter_once_and_a_frozen_one_never() -> None:
    learning, frozen = Pair(frozen=False), Pair(frozen=True)
    assert named(learning, head_and_backbone(learning)) == [HEAD, BACKBONE]
    assert named(frozen, head_and_backbone(frozen)) == [HEAD]
    assert all(group.keys() == {"params"} for group in head_and_backbone(learning))  # all are decayed


@pytest.mark.parametrize("frozen", [False, True])
def test_weights_and_biases_apart_are_always_four_of_which_the_second_ones_are_not_decayed(frozen: bool) -> None:
    model = Pair(frozen)
    groups = weights_and_biases_apart(model)
    assert [group.get("weight_decay") for group in groups] == [None, 0.0, None, 0.0]
    weights, rest, *of_backbone = named(model, groups)
    assert weights == ["head.0.weight", "head.2.weight"]
    assert sorted(weights + rest) == sorted(HEAD)
    if frozen:
        assert of_backbone == [[], []]
        return
    assert of_backbone == [["backbone.0.weight"], BACKBONE[1:]]
    optimizer = torch.optim.SGD(groups, lr=1.0, weight_decay=0.5)  # takes them as they are
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    decayed = [name for name, p in model.named_parameters() if not torch.equal(p, before[name])]
    assert decayed == ["backbone.0.weight", *weights]
    assert torch.equal(model.get_parameter("head.0.weight"), 0.5 * before["head.0.weight"])
