"""What is drawn has the right distribution and depends on the sample alone."""

from __future__ import annotations

import hashlib
import math
from dataclasses import fields, replace
from functools import lru_cache

import pytest
import torch
from torch import Tensor
from torchvision.transforms import RandomResizedCrop

from barlow.config import View, Views
from barlow.data import chance
from barlow.data.draw import Kind, Params, central_box, draw, draw_kind, exp


def unchanged(n: int, height: int, width: int) -> Params:
    """Params that do nothing."""
    return Params(
        boxes=torch.tensor([0, 0, height, width], dtype=torch.int32).repeat(n, 1),
        flip=torch.zeros(n, dtype=torch.bool),
        order=torch.arange(4).repeat(n, 1),
        factors=torch.tensor([1.0, 1.0, 1.0, 0.0]).repeat(n, 1),
        gray=torch.zeros(n, dtype=torch.bool),
        sigma=torch.zeros(n),
        solarize=torch.zeros(n, dtype=torch.bool),
    )


def same(a: Params, b: Params) -> bool:
    return all(torch.equal(getattr(a, f.name).cpu(), getattr(b, f.name).cpu()) for f in fields(Params))


def test_params_are_small_flat_tensors() -> None:
    p = draw(Views(), 0, 0, 0, torch.arange(7), 96, 96)
    layout = {f.name: (getattr(p, f.name).dtype, tuple(getattr(p, f.name).shape)) for f in fields(Params)}
    assert layout == {
        "boxes": (torch.int32, (7, 4)),
        "flip": (torch.bool, (7,)),
        "order": (torch.int64, (7, 4)),
        "factors": (torch.float32, (7, 4)),
        "gray": (torch.bool, (7,)),
        "sigma": (torch.float32, (7,)),
        "solarize": (torch.bool, (7,)),
    }


@pytest.mark.parametrize("view", [0, 1])
def test_a_sample_s_params_do_not_depend_on_its_batch(view: int) -> None:
    ids = torch.tensor([5, 0, 99_999, 17, 4_000_000_000, 18])
    whole = draw(Views(), view, 3, 8, ids, 96, 64)
    shuffled = torch.tensor([4, 2, 0, 5, 3, 1])
    assert same(draw(Views(), view, 3, 8, ids[shuffled], 96, 64), whole[shuffled])
    for i in range(len(ids)):
        assert same(draw(Views(), view, 3, 8, ids[i : i + 1], 96, 64), whole[i : i + 1])


def test_seed_epoch_id_and_view_all_count() -> None:
    drawn = [
        draw(Views(), view, seed, epoch, ids, 96, 96)
        for view in (0, 1)
        for seed in (0, 1)
        for epoch in (0, 1)
        for ids in (torch.arange(40), torch.arange(40, 80))
    ]
    factors = torch.cat([p.factors[:, 3] for p in drawn])
    jittered = factors[factors != 0]
    assert len(jittered.unique()) == len(jittered) > 0.7 * len(factors)


def test_kinds_have_ranges_and_chances_of_their_own_and_lanes_their_own_stream() -> None:
    ids = torch.arange(50)
    small = Kind(Views(size=48, scale=(0.05, 0.14)), View(flip=1, blur=0))
    p = draw_kind(small, 1, 7, 2, ids, 96, 96)
    assert p.flip.all()
    assert (p.sigma == 0).all()
    assert (p.boxes[:, 2] * p.boxes[:, 3]).max() < 0.15 * 96**2
    assert same(p, draw(Views(scale=(0.05, 0.14), b=small.chances), 1, 7, 2, ids, 96, 96))
    assert not same(p, draw_kind(small, 2, 7, 2, ids, 96, 96))


def test_draw_never_changes() -> None:
    """Runs in progress depend on these very bits: if this fails, the code is wrong, not the test."""
    digest = hashlib.sha256()
    for view, height, width in ((0, 96, 96), (1, 96, 96), (0, 32, 128)):
        p = draw(Views(), view, 2024, 5, torch.arange(2000), height, width)
        for f in fields(Params):
            digest.update(getattr(p, f.name).numpy().tobytes())
    assert digest.hexdigest() == "779faa5b4cc709ca96d205d6e2b9066a730d3167cb7c8d4bd63d1856308ce4e4"


@lru_cache(maxsize=2)
def many(view: int) -> Params:
    """20,000 rows, for their distribution."""
    return draw(Views(), view, 1, 0, torch.arange(20_000) * 3 + 1, 96, 96)


def share(mask: Tensor, probability: float) -> bool:
    """Within four standard deviations of what n trials give; exactly so for 0 and 1."""
    n = len(mask)
    return abs(mask.double().mean().item() - probability) <= 4 * math.sqrt(probability * (1 - probability) / n)


def uniform_in(x: Tensor, low: float, high: float) -> bool:
    """In the range, to its ends, with a uniform's mean and variance (four standard deviations of each)."""
    u = (x.double() - low) / (high - low)
    n = len(u)
    ends = -1e-6 <= u.min() < 10 / n and 1 - 10 / n < u.max() <= 1 + 1e-6
    mean = abs(u.mean().item() - 1 / 2) < 4 * math.sqrt(1 / 12 / n)
    variance = abs(u.var().item() - 1 / 12) < 4 * math.sqrt(1 / 180 / n)
    return bool(ends and mean and variance)


@pytest.mark.parametrize("view", [0, 1])
def test_probabilities_and_ranges(view: int) -> None:
    p, expected = many(view), (Views().a, Views().b)[view]
    jittered = (p.factors != torch.tensor([1.0, 1.0, 1.0, 0.0])).any(dim=1)
    assert share(p.flip, expected.flip)
    assert share(jittered, expected.jitter)
    assert share(p.gray, expected.gray)
    assert share(p.sigma > 0, expected.blur)
    assert share(p.solarize, expected.solarize)
    for column, (low, high) in enumerate([(0.6, 1.4), (0.6, 1.4), (0.8, 1.2), (-0.1, 0.1)]):
        assert uniform_in(p.factors[jittered, column], low, high)
    assert uniform_in(p.sigma[p.sigma > 0], 0.1, 2.0)


def test_decisions_are_independent() -> None:
    a, b = many(0), many(1)
    columns = [a.boxes[:, 0], a.flip, a.factors[:, 0] != 1, a.gray, a.order[:, 0], a.sigma]
    columns += [b.boxes[:, 1], b.flip, b.factors[:, 0] != 1, b.gray, b.order[:, 0], b.sigma > 0, b.solarize]
    correlation = torch.corrcoef(torch.stack([column.double() for column in columns]))
    assert (correlation - torch.eye(len(columns))).abs().max() < 4.5 / math.sqrt(20_000)


def test_all_orders_come_equally_often() -> None:
    order = many(0).order
    assert torch.equal(order.sort(dim=1).values, torch.arange(4).expand_as(order))
    counts = order.unique(dim=0, return_counts=True)[1].double()
    expected = len(order) / 24
    assert len(counts) == 24
    assert ((counts - expected) ** 2 / expected).sum() < 23 + 4 * math.sqrt(2 * 23)


def test_probabilities_of_zero_and_one_and_empty_ranges_are_exact() -> None:
    ids = torch.arange(2000)
    never = draw(Views(a=View(0, 0, 0, 0, 0), scale=(1, 1), ratio=(1, 1)), 0, 0, 0, ids, 96, 96)
    assert same(never, replace(unchanged(2000, 96, 96), order=never.order))
    always = draw(Views(a=View(1, 1, 1, 1, 1), brightness=0, contrast=3), 0, 0, 0, ids, 96, 96)
    assert always.flip.all()
    assert always.gray.all()
    assert always.solarize.all()
    assert (always.sigma >= 0.1).all()
    assert (always.factors[:, 0] == 1).all()
    assert uniform_in(always.factors[:, 1], 0, 4)


def boxes_in_python(
    words: list[list[int]], scale: tuple[float, float], ratio: tuple[float, float], height: int, width: int
) -> list[int]:
    """The definition: ten attempts from the words of a sample, then the fallback."""
    for area, aspect, top, left in words[:10]:
        target = (scale[0] + (scale[1] - scale[0]) * area / 2**32) * height * width
        low, high = math.log(ratio[0]), math.log(ratio[1])
        shape = math.exp(low + (high - low) * aspect / 2**32)
        w, h = round(math.sqrt(target * shape)), round(math.sqrt(target / shape))
        if 0 < w <= width and 0 < h <= height:
            return [top * (height - h + 1) // 2**32, left * (width - w + 1) // 2**32, h, w]
    return list(central_box(ratio, height, width))


@pytest.mark.parametrize(
    ("views", "height", "width"),
    [
        (Views(), 96, 96),
        (Views(), 32, 128),
        (Views(), 57, 33),
        (Views(scale=(0.9, 1.0), ratio=(0.5, 2.0)), 96, 96),  # most first attempts fail
        (Views(scale=(0.8, 1.0), ratio=(0.1, 10.0)), 48, 64),  # and some tenth ones
        (Views(scale=(0.0001, 0.001)), 32, 32),  # boxes of a pixel and of none
    ],
)
def test_boxes_are_those_of_the_definition(views: Views, height: int, width: int) -> None:
    ids = torch.arange(300)
    words = chance.words(4, chance.Use.VIEWS, 2, ids, slots=10, lane=1).tolist()
    expected = [boxes_in_python(w, views.scale, views.ratio, height, width) for w in words]
    boxes = draw(views, 1, 4, 2, ids, height, width).boxes
    assert boxes.tolist() == expected
    assert (boxes[:, :2] >= 0).all()
    assert (boxes[:, 2:] >= 1).all()
    assert (boxes[:, :2] + boxes[:, 2:] <= torch.tensor([height, width])).all()


@pytest.mark.parametrize(("height", "width"), [(96, 96), (32, 128), (128, 32), (40, 50), (57, 91)])
def test_the_fallback_is_torchvision_s(height: int, width: int) -> None:
    never_fits = RandomResizedCrop(8, scale=(9.0, 9.0))
    expected = never_fits.get_params(torch.zeros(3, height, width), [9.0, 9.0], [3 / 4, 4 / 3])
    assert central_box((3 / 4, 4 / 3), height, width) == expected
    boxes = draw(Views(scale=(9.0, 9.0)), 0, 0, 0, torch.arange(3), height, width).boxes
    assert boxes.tolist() == [list(expected)] * 3


def test_area_and_aspect_are_distributed_as_torchvision_s() -> None:
    boxes = many(0).boxes.double()
    area, aspect = boxes[:, 2] * boxes[:, 3] / 96**2, (boxes[:, 3] / boxes[:, 2]).log()
    assert 0.08 - 0.01 < area.min() < 0.09
    assert 0.98 < area.max() <= 1
    slack = 2 / 27  # rounding both sides of a box of 27 pixels
    assert aspect.abs().max() <= math.log(4 / 3) + slack
    torch.manual_seed(0)
    crop = RandomResizedCrop(8)
    image = torch.zeros(3, 96, 96)
    theirs = torch.tensor([crop.get_params(image, [0.08, 1.0], [3 / 4, 4 / 3]) for _ in range(4000)]).double()
    for ours, other in (
        (area, theirs[:, 2] * theirs[:, 3] / 96**2),
        (aspect, (theirs[:, 3] / theirs[:, 2]).log()),
        (boxes[:, 0], theirs[:, 0]),
        (boxes[:, 1], theirs[:, 1]),
    ):
        error = math.sqrt(ours.var().item() / len(ours) + other.var().item() / len(other))
        assert abs(ours.mean().item() - other.mean().item()) < 4 * error
        assert ours.std().item() == pytest.approx(other.std().item(), rel=0.06)


@pytest.mark.parametrize("limit", [0.0, 0.1, math.log(4 / 3), 1.0, math.log(10), 7.0])
def test_exp_is_exp(limit: float) -> None:
    x = torch.linspace(-limit, limit, 10_001, dtype=torch.float64)
    error = (exp(x, limit) - x.exp()) / x.exp()
    assert error.abs().max() < 1e-14


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_a_gpu_draws_the_same_bits() -> None:
    wide = Views(scale=(0.01, 1.0), ratio=(0.1, 10.0), hue=0.5, brightness=1.7)
    for views, height, width in ((Views(), 96, 96), (Views(), 32, 128), (wide, 57, 91)):
        for view in (0, 1):
            ids = torch.arange(20_000) * 77_777
            here = draw(views, view, 5, 1, ids, height, width)
            assert same(here, draw(views, view, 5, 1, ids.cuda(), height, width))
