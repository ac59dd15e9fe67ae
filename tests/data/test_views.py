"""Views: what is drawn has the right distribution and depends on the sample alone; what is applied is torchvision's.

Pixels are compared in 0..1. The tolerances are the promises: 2e-4 to the chain of torchvision's operations on floats,
and to PIL's what its 8 bits between operations leave.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import fields, replace
from functools import lru_cache

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter, ImageOps
from torch import Tensor
from torch._subclasses.fake_tensor import DynamicOutputShapeException, FakeTensorMode
from torchvision.transforms import InterpolationMode, RandomResizedCrop
from torchvision.transforms.v2 import functional as F

from barlow.config import View, Views
from barlow.data import augment, chance
from barlow.data import views as V
from barlow.data.views import Params, apply, draw, pair

BICUBIC = InterpolationMode.BICUBIC
OPERATIONS = (F.adjust_brightness, F.adjust_contrast, F.adjust_saturation, F.adjust_hue)
MEAN, STD = (0.48, 0.45, 0.40), (0.31, 0.27, 0.24)
PLAIN = ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))


def noise(n: int, height: int, width: int, fade: float = 1.0, seed: int = 0) -> Tensor:
    """uint8 [n, h, w, 3] from black to white, each finer scale `fade` times as strong as the one before.

    1: as strong at the scale of a pixel as at others, hard to get right; 1/2: the finer the fainter, as in photographs.
    """
    generator = torch.Generator().manual_seed(seed)
    x = torch.zeros(n, 3, height, width)
    for k, side in enumerate((2, 5, 12, 24, 48, height)):
        coarse = torch.rand(n, 3, side, side, generator=generator) - 0.5
        x += fade**k * torch.nn.functional.interpolate(coarse, (height, width), mode="bilinear")
    return ((x + 0.5).clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous()


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


# -------------------------------------------------------------------------------------------------------------- draw


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
    return list(V.central_box(ratio, height, width))


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
    assert V.central_box((3 / 4, 4 / 3), height, width) == expected
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
    error = (V.exp(x, limit) - x.exp()) / x.exp()
    assert error.abs().max() < 1e-14


# ---------------------------------------------------------------------------------------------------------------- apply


def reference(image: Tensor, p: Params, i: int, size: int) -> Tensor:
    """Row i of p on one image [h, w, 3] by torchvision's own functions, on floats."""
    x = image.permute(2, 0, 1).float() / 255
    x = F.resized_crop(x, *p.boxes[i].tolist(), [size, size], BICUBIC, antialias=True).clamp(0, 1)
    x = F.horizontal_flip(x) if p.flip[i] else x
    for operation in p.order[i].tolist():
        x = OPERATIONS[operation](x, p.factors[i, operation].item())
    x = F.rgb_to_grayscale(x, 3) if p.gray[i] else x
    x = F.gaussian_blur(x, [17, 17], [p.sigma[i].item()]) if p.sigma[i] else x
    x = F.solarize(x, 0.5) if p.solarize[i] else x
    return F.normalize(x, list(MEAN), list(STD))


@pytest.mark.parametrize("view", [0, 1])
@pytest.mark.parametrize(
    ("size", "height", "width"),
    [(32, 32, 32), (48, 96, 96), (96, 96, 96), (96, 32, 32), (224, 128, 128), (50, 61, 128)],
)
def test_apply_is_the_chain_of_torchvision_s_functions(view: int, size: int, height: int, width: int) -> None:
    n = 12 if size == 224 else 40  # more than one piece
    images = noise(n, height, width)
    p = draw(Views(size=size), view, 0, 0, torch.arange(n), height, width)
    ours = apply(images, p, size, MEAN, STD)
    assert ours.shape == (n, 3, size, size)
    for i in range(n):
        difference = (ours[i] - reference(images[i], p, i, size)).abs() * torch.tensor(STD)[:, None, None]
        assert difference.max() < 2e-4, i  # the crop's 1e-4, times the largest factors


def floats(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255


def in_pil(image: Tensor, p: Params, i: int, size: int) -> Tensor:
    """Row i of p on one image [h, w, 3] as the reference does it: PIL, 8 bits after each operation."""
    x = F.resized_crop(Image.fromarray(image.numpy()), *p.boxes[i].tolist(), [size, size], BICUBIC)
    x = F.horizontal_flip(x) if p.flip[i] else x
    for operation in p.order[i].tolist():
        x = OPERATIONS[operation](x, p.factors[i, operation].item())
    x = F.rgb_to_grayscale(x, 3) if p.gray[i] else x
    x = x.filter(ImageFilter.GaussianBlur(p.sigma[i].item())) if p.sigma[i] else x
    return floats(ImageOps.solarize(x, 128) if p.solarize[i] else x)


def test_apply_is_near_the_chain_in_pil() -> None:
    images = noise(64, 96, 96, fade=0.5)
    for view in (0, 1):
        p = draw(Views(size=48), view, 0, 0, torch.arange(64), 96, 96)
        ours = apply(images, p, 48, *PLAIN)
        theirs = torch.stack([in_pil(images[i], p, i, 48) for i in range(64)])
        difference = (ours - theirs).abs().mean(dim=(1, 2, 3))
        assert difference.mean() < 2 / 255
        assert difference.max() < 4 / 255


@pytest.mark.parametrize("size", [32, 96])
def test_params_that_do_nothing_return_the_image(size: int) -> None:
    images = noise(40, size, size)
    x = apply(images, unchanged(40, size, size), size, *PLAIN)
    assert (x - images.permute(0, 3, 1, 2) / 255).abs().max() < 1e-6
    normal = apply(images, unchanged(40, size, size), size, MEAN, STD)
    expected = F.normalize(images.permute(0, 3, 1, 2) / 255, list(MEAN), list(STD))
    assert (normal - expected).abs().max() < 1e-5


def test_a_view_does_not_depend_on_its_batch() -> None:
    images = noise(70, 96, 96)
    p = draw(Views(size=48), 1, 0, 0, torch.arange(70), 96, 96)
    whole = apply(images, p, 48, MEAN, STD)
    rows = torch.tensor([69, 3, 31, 32, 3])
    assert torch.equal(apply(images[rows], p[rows], 48, MEAN, STD), whole[rows])
    assert torch.equal(apply(images[:1], p[:1], 48, MEAN, STD), whole[:1])


def test_float32_is_near_float64() -> None:
    images = noise(40, 96, 96)
    for view in (0, 1):
        p = draw(Views(), view, 0, 0, torch.arange(40), 96, 96)
        narrow, wide = apply(images, p, 96, *PLAIN), apply(images, p, 96, *PLAIN, dtype=torch.float64)
        assert wide.dtype == torch.float64
        assert (narrow - wide).abs().max() < 5e-6


def test_apply_computes_in_float32_whatever_is_asked_of_it_or_around_it() -> None:
    images = noise(8, 96, 96)
    p = draw(Views(size=48), 0, 0, 0, torch.arange(8), 96, 96)
    x = apply(images, p, 48, MEAN, STD)
    assert torch.equal(apply(images, p, 48, MEAN, STD, dtype=torch.bfloat16), x.bfloat16())
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(apply(images, p, 48, MEAN, STD), x)


def test_apply_changes_none_of_what_it_is_given() -> None:
    images = noise(8, 48, 48)
    p = draw(Views(size=48), 1, 0, 0, torch.arange(8), 48, 48)
    before = images.clone(), Params(*(getattr(p, f.name).clone() for f in fields(Params)))
    first = apply(images, p, 48, MEAN, STD)
    assert torch.equal(images, before[0])
    assert same(p, before[1])
    assert torch.equal(apply(images, p, 48, MEAN, STD), first)


@pytest.mark.parametrize("value", [0, 1, 127, 128, 255])
def test_constant_images_stay_constant(value: int) -> None:
    images = torch.full((30, 33, 47, 3), value, dtype=torch.uint8)
    images[15:, ..., 1] = 200
    x = apply(images, draw(Views(size=48), 1, 0, 0, torch.arange(30), 33, 47), 48, *PLAIN)
    assert ((x >= -1e-6) & (x <= 1 + 1e-6)).all()
    assert (x.amax(dim=(2, 3)) - x.amin(dim=(2, 3))).max() < 1e-5


def test_an_empty_batch_gives_empty_views() -> None:
    images, ids = torch.zeros(0, 96, 96, 3, dtype=torch.uint8), torch.zeros(0, dtype=torch.int64)
    assert [tuple(x.shape) for x in pair(images, ids, Views(size=48), 0, 0, MEAN, STD)] == [(0, 3, 48, 48)] * 2


def test_pair_draws_and_applies_both_views() -> None:
    views = Views(size=48)
    images, ids = noise(6, 96, 64), torch.tensor([3, 1, 4, 15, 9, 2])
    both = pair(images, ids, views, 7, 2, MEAN, STD)
    assert len(both) == 2
    for view, x in enumerate(both):
        assert torch.equal(x, apply(images, draw(views, view, 7, 2, ids, 96, 64), 48, MEAN, STD))
    assert not torch.equal(both[0], both[1])


# ---------------------------------------------------------------------------------------------------------- on a GPU


def test_the_way_of_a_gpu_gives_the_same_views(monkeypatch: pytest.MonkeyPatch) -> None:
    images, ids = noise(40, 96, 96), torch.arange(40)
    expected = pair(images, ids, Views(size=48), 0, 0, *PLAIN)
    monkeypatch.setattr(augment, "may_ask", lambda x: False)
    for ours, theirs in zip(pair(images, ids, Views(size=48), 0, 0, *PLAIN), expected, strict=True):
        assert (ours - theirs).abs().max() < 1e-6


@pytest.mark.skipif(torch.__version__ < "2.10", reason="torch 2.9 has no CUDA tensors of shape alone without a GPU")
def test_no_value_is_asked_of_a_gpu() -> None:
    """On tensors that have a device and a shape but no values, whatever needs a value to go on fails."""
    augment.constant.cache_clear()
    with FakeTensorMode():
        images = torch.zeros(8, 96, 64, 3, dtype=torch.uint8, device="cuda")
        with pytest.raises(DynamicOutputShapeException):
            torch.nonzero(images)
        views = pair(images, torch.arange(8, device="cuda"), Views(size=48), 0, 0, MEAN, STD)
        assert [(tuple(x.shape), x.device.type) for x in views] == [((8, 3, 48, 48), "cuda")] * 2
    augment.constant.cache_clear()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_a_gpu_draws_the_same_bits() -> None:
    wide = Views(scale=(0.01, 1.0), ratio=(0.1, 10.0), hue=0.5, brightness=1.7)
    for views, height, width in ((Views(), 96, 96), (Views(), 32, 128), (wide, 57, 91)):
        for view in (0, 1):
            ids = torch.arange(20_000) * 77_777
            here = draw(views, view, 5, 1, ids, height, width)
            assert same(here, draw(views, view, 5, 1, ids.cuda(), height, width))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize(("size", "side"), [(48, 96), (96, 96), (224, 128)])
def test_a_gpu_applies_the_same_views_without_a_wait(size: int, side: int) -> None:
    images, ids = noise(64, side, side), torch.arange(64)
    here = pair(images, ids, Views(size=size), 0, 0, *PLAIN)
    on_gpu = (images.cuda(), ids.cuda(), Views(size=size), 0, 0, *PLAIN)
    pair(*on_gpu)  # makes the constants
    torch.cuda.set_sync_debug_mode("error")
    try:
        there = pair(*on_gpu)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for a, b in zip(here, there, strict=True):
        assert (a - b.cpu()).abs().max() < 1e-5
