"""The schedules against the reference's formula, written out, and their shape."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch

from barlow.optim.schedule import fixmatch_cosine, half_cosine, scaled, warmup_cosine


def reference(step: int, epochs: int, steps_per_epoch: int, batch_size: int, base: float) -> float:
    """What Barlow Twins' reference implementation sets: 10 epochs up, then down to a thousandth, times batch / 256."""
    total, warmup = epochs * steps_per_epoch, 10 * steps_per_epoch
    if step < warmup:
        return base * batch_size / 256 * step / warmup
    q = (1 + math.cos(math.pi * (step - warmup) / (total - warmup))) / 2
    return base * (batch_size / 256 * q + batch_size / 256 / 1000 * (1 - q))


def test_every_step_is_the_reference_s() -> None:
    peak = scaled(0.2, 2048)
    for step in range(30 * 7):
        ours = warmup_cosine(step, 30 * 7, 10 * 7, peak, 0.001 * peak)
        assert ours == pytest.approx(reference(step, 30, 7, 2048, 0.2), rel=1e-12)


def test_the_rate_scales_with_the_batch() -> None:
    assert scaled(0.2, 256) == 0.2
    assert scaled(0.2, 1024) == pytest.approx(0.8)
    assert scaled(0.0048, 128) == pytest.approx(0.0024)


def test_up_then_down_between_its_ends() -> None:
    rates = [warmup_cosine(step, 1000, 100, 0.8, 0.0008) for step in range(1001)]
    assert rates[0] == 0.0
    assert rates[100] == max(rates) == 0.8
    assert rates[550] == pytest.approx((0.8 + 0.0008) / 2)
    assert rates[1000] == pytest.approx(0.0008)
    assert all(a < b for a, b in pairwise(rates[:101]))
    assert all(a > b for a, b in pairwise(rates[100:]))


def test_edges() -> None:
    assert warmup_cosine(0, 10, 0, 1.0, 0.1) == 1.0  # no warm-up: starts at the peak
    assert warmup_cosine(3, 4, 10, 1.0, 0.1) == pytest.approx(0.3)  # shorter than its warm-up
    assert warmup_cosine(4, 4, 4, 1.0, 0.1) == 1.0  # warm-up and no more
    assert warmup_cosine(99, 10, 2, 1.0, 0.1) == pytest.approx(0.1)  # past the end
    assert warmup_cosine(5, 100, 2.5, 1.0, 0.0) == pytest.approx((1 + math.cos(math.pi * 2.5 / 97.5)) / 2)


def test_fixmatch_s_cosine_is_the_paper_s() -> None:
    """eta cos(7 pi k / 16 K), BarlowMatch 3.3.2: some values by hand, and each against the definition."""
    for k in range(401):
        ours = fixmatch_cosine(k, 400, 0.03)
        assert ours == pytest.approx(0.03 * math.cos((7 / 16) * math.pi * (k / 400)), rel=1e-12)
    assert fixmatch_cosine(0, 400, 0.03) == 0.03
    assert fixmatch_cosine(16, 28, 1.0) == pytest.approx(math.sqrt(0.5))  # an eighth of the circle
    assert fixmatch_cosine(400, 400, 1.0) == pytest.approx(0.1950903220161283)  # cos(7 pi / 16): never down to 0
    rates = [fixmatch_cosine(k, 1000, 1.0) for k in range(1001)]
    assert all(a > b > 0 for a, b in pairwise(rates))


def test_half_a_cosine_is_torch_s() -> None:
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=0.4)
    theirs = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=50)
    for step in range(50):
        assert half_cosine(step, 50, 0.4) == pytest.approx(theirs.get_last_lr()[0], rel=1e-9)
        optimizer.step()
        theirs.step()
    assert half_cosine(50, 50, 0.4) == pytest.approx(0.0)
