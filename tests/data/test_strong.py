"""The strong view: one of the two policies an image, then CutOut; nothing of it waits for a GPU."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import DynamicOutputShapeException, FakeTensorMode

from barlow import config
from barlow.data import augment, cutout, operations, randaugment, weak
from barlow.data.ctaugment import Bins, match
from barlow.data.operations import apply
from barlow.data.strong import draw, strong
from tests.data.test_ctaugment import learned
from tests.data.test_operations import many
from tests.data.test_randaugment import same

RANDAUGMENT, CTAUGMENT, BOTH = (config.Strong(kind=kind) for kind in ("randaugment", "ctaugment", "both"))


def test_a_strong_view_is_its_policy_and_then_cutout() -> None:
    images, ids, bins = many(100), torch.arange(100) * 3, learned()
    half = torch.full((100,), 0.5)
    expected = cutout.cut(apply(images, randaugment.draw(1, 2, ids, 4)), cutout.centres(1, 2, ids, 4), half)
    assert torch.equal(strong(images, ids, RANDAUGMENT, None, 1, 2, 4), expected)
    expected = cutout.cut(apply(images, bins.draw(1, 2, ids, 4)), cutout.centres(1, 2, ids, 4), half)
    assert torch.equal(strong(images, ids, CTAUGMENT, bins, 1, 2, 4), expected)
    bare = strong(images, ids, config.Strong(kind="randaugment", cutout=0), None, 1, 2, 4)
    assert torch.equal(bare, apply(images, randaugment.draw(1, 2, ids, 4)))


def test_of_both_each_image_gets_one_by_a_fair_coin() -> None:
    ids, bins = torch.arange(10_000), learned()
    p = draw(ids, BOTH, bins, 1, 2)
    random, learnt = randaugment.draw(1, 2, ids), bins.draw(1, 2, ids)
    heads = (p.op == random.op).all(dim=1) & (p.amount == random.amount).all(dim=1)
    assert same(p[heads], random[heads])
    assert same(p[~heads], learnt[~heads])
    assert abs(heads.float().mean() - 0.5) < 4 * 0.5 / 100
    again = draw(ids, BOTH, bins, 1, 3)
    others = (again.op == randaugment.draw(1, 3, ids).op).all(dim=1)
    assert abs((others & heads).float().mean() - 0.25) < 0.02


@pytest.mark.parametrize("knobs", [RANDAUGMENT, CTAUGMENT, BOTH], ids=lambda knobs: knobs.kind)
def test_a_view_does_not_depend_on_its_batch(knobs: config.Strong) -> None:
    images, ids, bins = many(300), torch.arange(300) * 11, learned()
    before = images.clone()
    whole = strong(images, ids, knobs, bins, 0, 5)
    halves = [strong(images[rows], ids[rows], knobs, bins, 0, 5) for rows in (slice(150), slice(150, 300))]
    assert torch.equal(torch.cat(halves), whole)
    assert torch.equal(images, before)
    for other in ((1, 5, 0), (0, 6, 0), (0, 5, 1)):
        assert (strong(images, ids, knobs, bins, *other) != whole).flatten(1).any(dim=1).float().mean() > 0.8
    assert strong(images[:0], ids[:0], knobs, bins, 0, 5).shape == (0, 3, 32, 32)


# ---------------------------------------------------------------------------------------------------------- on a GPU


def one_step(images: Tensor, ids: Tensor, labels: Tensor, bins: Bins) -> tuple[Tensor, Tensor]:
    """All that FixMatch does with views in a step."""
    view = weak.weak(images, ids, config.Weak(kind="shift"), 32, 0, 0, 1)
    crop = weak.weak(images, ids, config.Weak(), 32, 0, 0, 2)
    policy, chosen = bins.probe(0, 0, ids)
    answers = weak.normalised(apply(view, policy), (0.5, 0.5, 0.5), (0.2, 0.2, 0.2)).mean(dim=2).softmax(dim=2)[:, 0]
    bins.update(chosen, match(answers, labels))
    return view, strong(crop, ids, BOTH, bins, 0, 0)


def test_the_way_of_a_gpu_gives_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    ids, bins = torch.arange(200), learned()
    expected = strong(many(200), ids, BOTH, bins, 0, 0)
    monkeypatch.setattr(operations, "may_ask", lambda x: False)
    assert torch.equal(strong(many(200), ids, BOTH, bins, 0, 0), expected)


@pytest.mark.skipif(torch.__version__ < "2.10", reason="torch 2.9 has no CUDA tensors of shape alone without a GPU")
def test_no_value_is_asked_of_a_gpu() -> None:
    """On tensors that have a device and a shape but no values, whatever needs a value to go on fails."""
    caches = (augment.constant, operations.rotations, operations.lines)
    for cache in caches:
        cache.cache_clear()
    with FakeTensorMode():
        images = torch.zeros(8, 40, 40, 3, dtype=torch.uint8, device="cuda")
        with pytest.raises(DynamicOutputShapeException):
            torch.nonzero(images)
        ids, labels = (torch.zeros(8, dtype=torch.int64, device="cuda") for _ in range(2))
        for view in one_step(images, ids, labels, Bins("cuda")):
            assert (tuple(view.shape), view.dtype, view.device.type) == ((8, 3, 32, 32), torch.uint8, "cuda")
    for cache in caches:
        cache.cache_clear()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_a_gpu_gives_the_same_views_without_a_wait() -> None:
    images, ids = many(448, 40).permute(0, 2, 3, 1).contiguous(), torch.arange(448)
    labels = ids % 10
    here, there = learned(), Bins("cuda")
    there.load_state_dict(here.state_dict())
    on_gpu = images.cuda(), ids.cuda(), labels.cuda()
    one_step(*on_gpu, Bins("cuda"))  # makes the constants
    torch.cuda.set_sync_debug_mode("error")
    try:
        theirs = one_step(*on_gpu, there)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    view, crop = theirs
    assert torch.equal(view.cpu(), weak.weak(images, ids, config.Weak(kind="shift"), 32, 0, 0, 1))
    here.load_state_dict(there.state_dict())  # the answers are floats, whose last bits may differ
    expected = strong(weak.weak(images, ids, config.Weak(), 32, 0, 0, 2), ids, BOTH, here, 0, 0)
    assert torch.equal(crop.cpu(), expected)
