"""What is applied is torchvision's chain of operations; any kinds of view come from it.

Pixels are compared in 0..1. The tolerances are the promises: 2e-4 to the chain of torchvision's operations on floats,
and to PIL's what its 8 bits between operations leave.
"""

from __future__ import annotations

from dataclasses import fields

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter, ImageOps
from torch import Tensor
from torch._subclasses.fake_tensor import DynamicOutputShapeException, FakeTensorMode
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as F

from barlow import kernels
from barlow.config import View, Views
from barlow.data import augment, fused_views
from barlow.data.draw import Kind, Params, both, draw, draw_kind
from barlow.data.views import apply, make, pair, way
from barlow.errors import UserError
from tests.data.test_draw import same, unchanged

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


def test_what_the_kernel_cannot_give_is_given_without_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "load", lambda *_: "kernels that are not to be called")
    a, b = pair(noise(4, 96, 96), torch.arange(4), Views(size=32), 0, 0, MEAN, STD, torch.float64)
    assert a.dtype == b.dtype == torch.float64


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


def test_views_of_any_kinds_are_drawn_by_their_places() -> None:
    small = Kind(Views(size=24, scale=(0.05, 0.14)), View(blur=0))
    kinds = [Kind(Views(size=48), View()), small, small]
    images, ids = noise(3, 40, 40), torch.tensor([7, 8, 1])
    found = make(images, ids, kinds, 1, 2, MEAN, STD)
    for lane, (x, kind) in enumerate(zip(found, kinds, strict=True)):
        p = draw_kind(kind, lane, 1, 2, ids, 40, 40)
        assert torch.equal(x, apply(images, p, kind.ranges.size, MEAN, STD))
        assert x.is_contiguous(memory_format=torch.channels_last)


def test_views_come_in_the_type_asked_for() -> None:
    images, ids = noise(3, 40, 40), torch.arange(3)
    wide = pair(images, ids, Views(size=32), 0, 0, MEAN, STD)
    for a, b in zip(pair(images, ids, Views(size=32), 0, 0, MEAN, STD, dtype=torch.bfloat16), wide, strict=True):
        assert torch.equal(a, b.bfloat16())
        assert a.is_contiguous(memory_format=torch.channels_last)


def test_how_views_are_made_is_said() -> None:
    cpu = torch.device("cpu")
    assert way(cpu) == "views by torch's operations (not on a GPU)"
    assert way(cpu, "reference") == "views by torch's operations (as asked)"
    with pytest.raises(UserError, match=r"--speed.views fused: .*not on a GPU.*; give auto or reference") as told:
        way(cpu, "fused")
    assert "\n" not in str(told.value)


def test_the_kernel_is_taken_where_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """The choice alone: tests/kernels has the kernel."""
    told: list[tuple[object, ...]] = []

    def record(*arguments: object) -> list[Tensor]:
        told.append(arguments)
        return []

    monkeypatch.setattr(kernels, "load", lambda name, device: name)
    monkeypatch.setattr(fused_views, "make", record)
    images, ids = noise(2, 40, 40), torch.arange(2)
    assert pair(images, ids, Views(), 5, 6, MEAN, STD, dtype=torch.bfloat16, by="fused") == []
    assert told == [("views", images, ids, both(Views()), 5, 6, MEAN, STD, torch.bfloat16)]
    assert way(images.device) == "views by our CUDA kernel"
    assert len(pair(images, ids, Views(size=8), 5, 6, MEAN, STD, by="reference")) == 2
    assert len(told) == 1


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
        ids = torch.arange(8, device="cuda")
        views = pair(images, ids, Views(size=48), 0, 0, MEAN, STD, by="reference")
        assert [(tuple(x.shape), x.device.type) for x in views] == [((8, 3, 48, 48), "cuda")] * 2
    augment.constant.cache_clear()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize(("size", "side"), [(48, 96), (96, 96), (224, 128)])
def test_a_gpu_applies_the_same_views_without_a_wait(size: int, side: int) -> None:
    images, ids = noise(64, side, side), torch.arange(64)
    here = pair(images, ids, Views(size=size), 0, 0, *PLAIN)
    on_gpu = (images.cuda(), ids.cuda(), Views(size=size), 0, 0, *PLAIN)
    pair(*on_gpu, by="reference")  # makes the constants
    torch.cuda.set_sync_debug_mode("error")
    try:
        there = pair(*on_gpu, by="reference")
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for a, b in zip(here, there, strict=True):
        assert (a - b.cpu()).abs().max() < 1e-5
