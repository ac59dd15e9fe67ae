"""Cross-entropy over the global batch: its value and gradient by definition, and ranks against one."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from barlow import config, dist
from barlow.models.classifier import Classifier
from barlow.models.heads import classifier as head
from barlow.objectives.supervised import Supervised, supervised_loss
from barlow.stages.training import distribute

Ranks = Callable[..., list[Any]]
CLASSES = 4


def drawn(n: int = 6) -> tuple[Tensor, Tensor]:
    chance = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(n, CLASSES, dtype=torch.float64, generator=chance)
    return logits, torch.randint(0, CLASSES, (n,), generator=chance)


def test_value_gradient_and_accuracy_by_definition() -> None:
    logits, labels = drawn()
    loss, metrics = supervised_loss(logits.requires_grad_(), labels)
    loss.backward()
    expected, right = 0.0, 0
    for x, y in zip(logits.tolist(), labels.tolist(), strict=True):
        expected -= math.log(math.exp(x[y]) / sum(map(math.exp, x))) / len(labels)
        right += x[y] == max(x)
    assert loss.item() == pytest.approx(expected, rel=1e-12)
    assert metrics["top1"].item() == pytest.approx(100 * right / len(labels))
    assert 0 < right < len(labels)
    assert not metrics["top1"].requires_grad
    target = torch.nn.functional.one_hot(labels, CLASSES)
    torch.testing.assert_close(logits.grad, (logits.softmax(1) - target).detach() / len(labels), rtol=1e-12, atol=1e-12)


def test_half_precision_logits_are_summed_in_float32() -> None:
    logits, labels = drawn()
    loss, metrics = supervised_loss(logits.bfloat16(), labels)
    assert loss.dtype == metrics["top1"].dtype == torch.float32
    assert loss.item() == pytest.approx(supervised_loss(logits, labels)[0].item(), rel=2e-2)


def backbone() -> torch.nn.Sequential:
    nn = torch.nn
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten())


def train(frozen: bool) -> dict[str, Any]:
    """Three steps of gradient descent on this rank's part of a batch of 12."""
    torch.manual_seed(0)
    knobs = config.Head(widths=(7,), dropout=0.0, norm_input=True)
    objective = Supervised(Classifier(backbone(), head(16, knobs, CLASSES), frozen)).double()
    model = distribute(objective, torch.device("cpu"))
    chance = torch.Generator().manual_seed(1)
    images = torch.randn(12, 3, 4, 4, dtype=torch.float64, generator=chance)
    labels = torch.randint(0, CLASSES, (12,), generator=chance)
    given = [part.chunk(dist.world_size())[dist.rank()] for part in (images, labels)]
    learning = {name: p for name, p in objective.named_parameters() if p.requires_grad}
    seen = []
    for _ in range(3):
        model.zero_grad()
        loss, metrics = model(given)
        loss.backward()
        seen.append({"loss": loss.detach(), **metrics})
        grads = {name: p.grad.clone() for name, p in learning.items() if p.grad is not None}
        with torch.no_grad():
            for name, p in learning.items():
                p.sub_(0.1 * grads[name])
    return {"seen": seen, "grads": grads, "state": objective.state_dict()}


def train_cases() -> list[dict[str, Any]]:
    return [train(False), train(True)]


@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_equal_one_rank(on_ranks: Ranks, world_size: int) -> None:
    """Loss, gradients and statistics. Frozen, the backbone keeps its own, though its norms were made global ones."""
    answers, untouched = on_ranks(world_size, train_cases), backbone().state_dict()
    for case, one in enumerate(train_cases()):
        of_backbone = [name for name in one["grads"] if name.startswith("classifier.backbone.")]
        assert len(of_backbone) == (0 if case else 4)
        for rank in (answer[case] for answer in answers):
            for part in ("seen", "grads", "state"):
                torch.testing.assert_close(rank[part], one[part], rtol=1e-10, atol=1e-10)
            moved = not torch.equal(
                rank["state"]["classifier.backbone.1.running_mean"], untouched["1.running_mean"].double()
            )
            assert moved == (case == 0)
