"""A classifier learns as a whole, or its head alone: then nothing of the backbone moves, whatever it is told."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from barlow import config
from barlow.models import classifier
from barlow.models.classifier import Classifier

NETWORK = config.Network("resnet10t", "small", 0.125)
HEAD = config.Head(widths=(8,), dropout=0.5)


def built(frozen: bool) -> Classifier:
    torch.manual_seed(0)
    return classifier.build(NETWORK, HEAD, 5, frozen)


def images(n: int = 6) -> torch.Tensor:
    return torch.randn(n, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def moved(model: nn.Module, before: dict[str, torch.Tensor]) -> set[str]:
    return {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}


@pytest.mark.parametrize("frozen", [False, True])
def test_a_step_moves_all_or_the_head_alone(frozen: bool) -> None:
    model = built(frozen).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    logits = model(images())
    assert logits.shape == (6, 5)
    logits.square().sum().backward()
    optimizer.step()
    changed = moved(model, before)
    assert changed == {name for name in before if name.startswith("head.") or not frozen}
    assert all((p.grad is None) == frozen for p in model.backbone.parameters())


def test_a_frozen_backbone_is_in_eval_mode_whatever_the_head_is_in() -> None:
    model = built(frozen=True)
    for mode in (True, False, True):
        assert model.train(mode) is model
        assert {part.training for part in model.head.modules()} == {mode}
        assert {part.training for part in model.backbone.modules()} == {False}
    learning = built(frozen=False)
    for mode in (False, True):
        assert {part.training for part in learning.train(mode).modules()} == {mode}


def test_frozen_or_not_it_says_the_same_of_whole_images() -> None:
    with torch.no_grad():
        assert torch.equal(built(True).eval()(images()), built(False).eval()(images()))
    free = built(False).eval()
    assert not torch.equal(free(images()), free(images()[:1]).expand(6, 5))


@pytest.mark.parametrize("frozen", [False, True])
def test_asked_without_gradient_it_turns_none_on(frozen: bool) -> None:
    model = built(frozen)
    with torch.no_grad():
        assert not model.backbone(images()).requires_grad
        assert not model(images()).requires_grad
        model.head = torch.nn.Identity()
        assert not model(images()).requires_grad
    assert model(images()).requires_grad == (not frozen)


def test_the_network_is_the_one_that_is_named() -> None:
    wide, narrow = (classifier.build(config.Network("resnet18", "cifar", width), HEAD, 3) for width in (0.25, 0.125))
    of_wide, of_narrow = (sum(p.numel() for p in model.backbone.parameters()) for model in (wide, narrow))
    assert of_wide > 3 * of_narrow
    assert wide.head[-1].out_features == 3  # type: ignore[index]
    assert wide(images(2)).shape == (2, 3)
