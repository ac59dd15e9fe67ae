"""The weak view against PIL and numpy, and what is drawn for it; floats for a network."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import functional as F

from barlow import config
from barlow.data import chance
from barlow.data.draw import ATTEMPTS, draw_boxes
from barlow.data.weak import normalised, reflected, resized, shifted, weak
from tests.data.test_operations import pictures

MEAN, STD = (0.48, 0.45, 0.40), (0.31, 0.27, 0.24)
SHIFT, CROP = config.Weak(kind="shift"), config.Weak()


def photos(height: int, width: int, n: int = 40) -> Tensor:
    """uint8 [n, h, w, 3], as the loader gives them."""
    return pictures(height, width).repeat(n // 8 + 1, 1, 1, 1)[:n].permute(0, 2, 3, 1).contiguous()


def test_a_shift_is_a_crop_of_the_image_padded_by_reflection() -> None:
    images = photos(24, 32)
    generator = torch.Generator().manual_seed(0)
    down, right = torch.randint(-4, 5, (2, 40), generator=generator)
    flip = torch.rand(40, generator=generator) < 0.5
    ours = shifted(images, down, right, flip)
    for i in range(40):
        image = images[i].numpy()[:, ::-1] if flip[i] else images[i].numpy()
        padded = np.pad(image, ((4, 4), (4, 4), (0, 0)), mode="reflect")
        y, x = 4 - down[i].item(), 4 - right[i].item()
        assert np.array_equal(ours[i].permute(1, 2, 0).numpy(), padded[y : y + 24, x : x + 32])


def test_reflection_does_not_double_the_ends() -> None:
    assert reflected(torch.arange(-3, 8), 5).tolist() == [3, 2, 1, 0, 1, 2, 3, 4, 3, 2, 1]


@pytest.mark.parametrize(("height", "width", "size"), [(96, 96, 96), (32, 32, 48), (57, 40, 32)])
def test_a_crop_is_pil_s(height: int, width: int, size: int) -> None:
    images = photos(height, width)
    words = chance.words(0, chance.Use.WEAK, 0, torch.arange(40), slots=ATTEMPTS)
    boxes = draw_boxes(words, (0.1, 1.0), (0.5, 2.0), height, width).long()
    flip = torch.arange(40) % 3 == 0
    ours = resized(images, boxes, flip, size)
    for i, (top, left, h, w) in enumerate(boxes.tolist()):
        image = Image.fromarray(images[i].numpy()).crop((left, top, left + w, top + h))
        wide = image.resize((size, h), Image.Resampling.BICUBIC)  # lines first, whatever the version of PIL
        image = wide.resize((size, size), Image.Resampling.BICUBIC)
        image = F.horizontal_flip(image) if flip[i] else image
        assert np.array_equal(ours[i].permute(1, 2, 0).numpy(), np.array(image)), i


def moves(seed: int, epoch: int, ids: Tensor, lane: int = 0, flip: float = 0.0) -> Tensor:
    """Where the pixel in the middle came from, [n, 2]: seen in an image whose values are its coordinates."""
    y, x = torch.meshgrid(torch.arange(32), torch.arange(32), indexing="ij")
    images = torch.stack((y, x, x), dim=-1).to(torch.uint8).expand(len(ids), -1, -1, -1)
    knobs = config.Weak(kind="shift", flip=flip)
    return weak(images, ids, knobs, 32, seed, epoch, lane)[:, :2, 16, 16].long()


def test_shifts_are_uniform_up_to_an_eighth_of_the_side_and_samples_are_independent() -> None:
    ids = torch.arange(9000)
    at = moves(0, 0, ids)
    counts = torch.stack([torch.bincount(at[:, k], minlength=32) for k in range(2)]).double()
    assert (counts[:, :12] == 0).all()
    assert (counts[:, 21:] == 0).all()
    expected = 9000 / 9
    assert (((counts[:, 12:21] - expected) ** 2 / expected).sum(dim=1) < 8 + 4 * 16**0.5).all()
    assert abs(torch.corrcoef(at.double().T)[0, 1]) < 4 / 9000**0.5
    for other in (moves(1, 0, ids), moves(0, 1, ids), moves(0, 0, ids, lane=1), moves(0, 0, ids + 9000)):
        assert 0.005 < (other == at).all(dim=1).float().mean() < 0.02  # 1/81


def test_the_mirror_has_its_probability() -> None:
    ids = torch.arange(4000)
    images = photos(16, 16, 1).expand(4000, -1, -1, -1)
    plain = config.Weak(kind="crop", scale=(1.0, 1.0), flip=0.0)
    upright = weak(images[:1], ids[:1], plain, 16, 0, 0)
    for probability in (0.0, 0.3, 1.0):
        x = weak(images, ids, config.Weak(kind="crop", scale=(1.0, 1.0), flip=probability), 16, 0, 0)
        mirrored = (x == upright.flip(3)).flatten(1).all(dim=1)
        assert (mirrored | (x == upright).flatten(1).all(dim=1)).all()
        assert abs(mirrored.float().mean() - probability) <= 4 * (probability * (1 - probability) / 4000) ** 0.5


def test_crops_are_squares_of_the_area_asked_for() -> None:
    y, x = torch.meshgrid(torch.arange(96), torch.arange(96), indexing="ij")
    images = torch.stack((y, x, x), dim=-1).to(torch.uint8).expand(500, -1, -1, -1)
    view = weak(images, torch.arange(500), config.Weak(scale=(0.25, 0.81), flip=0), 96, 0, 0).float()
    extent = (view[:, :2].amax(dim=(2, 3)) - view[:, :2].amin(dim=(2, 3)) + 1) / 96
    assert (extent[:, 0] - extent[:, 1]).abs().max() <= 2 / 96
    assert 0.24 < (extent**2).min() < 0.27
    assert 0.79 < (extent**2).max() < 0.84


@pytest.mark.parametrize("knobs", [SHIFT, CROP], ids=["shift", "crop"])
@pytest.mark.parametrize(("height", "width", "size"), [(32, 32, 32), (48, 40, 32), (24, 24, 32)])
def test_a_view_has_its_size_and_does_not_depend_on_its_batch(
    knobs: config.Weak, height: int, width: int, size: int
) -> None:
    images, ids = photos(height, width, 300), torch.arange(300) * 7
    before = images.clone()
    whole = weak(images, ids, knobs, size, 3, 1, 2)
    assert (whole.dtype, tuple(whole.shape)) == (torch.uint8, (300, 3, size, size))
    halves = [weak(images[rows], ids[rows], knobs, size, 3, 1, 2) for rows in (slice(150), slice(150, 300))]
    assert torch.equal(torch.cat(halves), whole)
    rows = torch.tensor([299, 128, 3, 3])
    assert torch.equal(weak(images[rows], ids[rows], knobs, size, 3, 1, 2), whole[rows])
    assert torch.equal(images, before)
    assert weak(images[:0], ids[:0], knobs, size, 3, 1, 2).shape == (0, 3, size, size)


def test_a_shift_of_an_image_of_another_size_begins_with_resizing_it() -> None:
    images, ids = photos(48, 40, 8), torch.arange(8)
    small = [Image.fromarray(x.numpy()).resize((32, 48), Image.Resampling.BICUBIC).resize((32, 32)) for x in images]
    expected = weak(torch.from_numpy(np.stack([np.array(x) for x in small])), ids, SHIFT, 32, 0, 0)
    assert torch.equal(weak(images, ids, SHIFT, 32, 0, 0), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_normalised_is_torchvision_s(dtype: torch.dtype) -> None:
    images = pictures(32, 40)
    before = images.clone()
    x = normalised(images, MEAN, STD, dtype)
    expected = F.normalize(images.double() / 255, list(MEAN), list(STD))
    assert x.dtype == dtype
    assert x.is_contiguous(memory_format=torch.channels_last)
    assert (x.double() - expected).abs().max() < {torch.float32: 1e-6, torch.bfloat16: 0.01, torch.float64: 1e-14}[
        dtype
    ]
    assert torch.equal(images, before)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("knobs", [SHIFT, CROP], ids=["shift", "crop"])
@pytest.mark.parametrize(("side", "size"), [(32, 32), (96, 96), (128, 96)])
def test_a_gpu_gives_the_same_bits_without_a_wait(knobs: config.Weak, side: int, size: int) -> None:
    images, ids = photos(side, side, 400), torch.arange(400)
    there = images.cuda(), ids.cuda(), knobs, size, 0, 0
    normalised(weak(*there), MEAN, STD)  # makes the constants
    torch.cuda.set_sync_debug_mode("error")
    try:
        view = weak(*there)
        x = normalised(view, MEAN, STD)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    here = weak(images, ids, knobs, size, 0, 0)
    assert torch.equal(view.cpu(), here)
    assert (x.cpu() - normalised(here, MEAN, STD)).abs().max() < 1e-6
