"""The operations on images, each against torchvision's own and, where it differs, PIL's.

Pixels are compared in 0..1. The tolerances are the promises: 1e-5 to torchvision's operations on floats, 1e-4 to its
crop (whose weights are float32), and to PIL what its roundings to 8 bits leave.
"""

from __future__ import annotations

import math
from itertools import permutations

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as F

from barlow.config import View, Views
from barlow.data.augment import HUE, blur, crop, grayscale, jitter, solarize
from barlow.data.draw import draw

BICUBIC = InterpolationMode.BICUBIC
ORDERS = tuple(permutations(range(4)))
OPERATIONS = (F.adjust_brightness, F.adjust_contrast, F.adjust_saturation, F.adjust_hue)


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


def colours(n: int, side: int = 24) -> Tensor:
    """float32 [n, 3, side, side] in 0..1 with gray, black, white and pure pixels, and ties between channels."""
    x = noise(n, side, side, seed=9).permute(0, 3, 1, 2).float() / 255
    x[:, :, 0] = x[:, :1, 0]
    x[:, 1, 1] = x[:, 0, 1]
    x[:, 2, 2] = x[:, 1, 2]
    x[:, 0, 3] = x[:, 2, 3]
    x[:, :, 4] = torch.tensor([0.0, 1.0]).repeat(side // 2)
    x[:, :, 5] = (x[:, :, 5] > 0.5).float()
    return x


def floats(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255


@pytest.mark.parametrize("size", [32, 48, 96, 224])
@pytest.mark.parametrize(("height", "width"), [(32, 32), (57, 96), (96, 96), (128, 75)])
def test_crop_is_torchvision_s_antialiased_bicubic(size: int, height: int, width: int) -> None:
    images = noise(24, height, width)
    boxes = draw(Views(), 0, 0, 0, torch.arange(24), height, width).boxes
    boxes[0] = torch.tensor([0, 0, height, width])
    boxes[1] = torch.tensor([3, 5, 1, 1])
    boxes[2] = torch.tensor([height - 2, width - 3, 2, 3])
    boxes[3] = torch.tensor([0, width - 1, height, 1])
    flip = torch.arange(24) % 2 == 1
    ours = crop(images, boxes, flip, size)
    assert ours.dtype == torch.float32
    for i, (top, left, h, w) in enumerate(boxes.tolist()):
        x = images[i].permute(2, 0, 1).float() / 255
        expected = F.resized_crop(x, top, left, h, w, [size, size], BICUBIC, antialias=True).clamp(0, 1)
        expected = F.horizontal_flip(expected) if flip[i] else expected
        assert (ours[i] - expected).abs().max() < 1e-4, (i, top, left, h, w)


def test_crop_is_pil_s_but_for_its_roundings() -> None:
    for size, side in ((48, 96), (96, 96), (32, 57), (224, 96)):
        images = (40 + noise(12, side, side, seed=side) * 0.7).to(torch.uint8)  # nothing overshoots black or white
        boxes = draw(Views(), 0, 0, 0, torch.arange(12), side, side).boxes
        ours = crop(images, boxes, torch.zeros(12, dtype=torch.bool), size)
        for i, (top, left, h, w) in enumerate(boxes.tolist()):
            image = Image.fromarray(images[i].numpy()).crop((left, top, left + w, top + h))
            image = image.resize((size, size), Image.Resampling.BICUBIC)
            assert (ours[i] - floats(image)).abs().max() <= 1.5 / 255


def one_factor(operation: int, values: Tensor) -> Tensor:
    factors = torch.tensor([1.0, 1.0, 1.0, 0.0]).repeat(len(values), 1)
    factors[:, operation] = values
    return factors


@pytest.mark.parametrize("operation", range(4))
def test_a_jitter_operation_is_torchvision_s(operation: int) -> None:
    values = torch.linspace(-0.5, 0.5, 21) if operation == HUE else torch.linspace(0, 3, 21)
    x = colours(len(values))
    order = torch.arange(4).repeat(len(values), 1)
    ours = jitter(x.clone(), order, one_factor(operation, values))
    for i, value in enumerate(values.tolist()):
        expected = OPERATIONS[operation](x[i], value)
        assert (ours[i] - expected).abs().max() < 1e-5, value


def test_jitter_works_in_each_of_the_24_orders() -> None:
    order = torch.tensor(ORDERS)
    x = colours(24)
    strong = Views(brightness=0.8, contrast=0.8, saturation=0.8, hue=0.5, a=View(jitter=1))
    factors = draw(strong, 0, 0, 0, torch.arange(24), 96, 96).factors
    ours = jitter(x.clone(), order, factors)
    for i in range(24):
        expected = x[i]
        for operation in order[i].tolist():
            expected = OPERATIONS[operation](expected, factors[i, operation].item())
        assert (ours[i] - expected).abs().max() < 1e-5
    one = jitter(x[:1].expand(24, -1, -1, -1).clone(), order, factors[:1].expand(24, -1))
    assert len(one.flatten(1).unique(dim=0)) > 12  # the order matters


def test_factors_that_change_nothing_are_exact() -> None:
    x = colours(24)
    assert torch.equal(jitter(x.clone(), torch.tensor(ORDERS), one_factor(0, torch.ones(24))), x)


def test_grayscale_is_torchvision_s_and_leaves_the_others_alone() -> None:
    x = colours(6)
    mask = torch.tensor([True, False, True, True, False, False])
    ours = grayscale(x.clone(), mask)
    assert (ours[mask] - F.rgb_to_grayscale(x[mask], 3)).abs().max() < 1e-6
    assert torch.equal(ours[~mask], x[~mask])


@pytest.mark.parametrize("shape", [(9, 9), (32, 32), (48, 31), (96, 96)])
def test_blur_is_torchvision_s_gaussian_of_17_taps(shape: tuple[int, int]) -> None:
    sigma = torch.tensor([0.0, 0.1, 0.3, 0.77, 0.0, 1.3, 2.0])
    x = torch.rand(7, 3, *shape, generator=torch.Generator().manual_seed(0))
    ours = blur(x.clone(), sigma)
    assert torch.equal(ours[sigma == 0], x[sigma == 0])
    for i in torch.nonzero(sigma).flatten().tolist():
        expected = F.gaussian_blur(x[i], [17, 17], [sigma[i].item()])
        assert (ours[i] - expected).abs().max() < 1e-5


def test_blur_reaches_over_the_edge_of_images_smaller_than_itself() -> None:
    x = torch.rand(1, 3, 4, 1, generator=torch.Generator().manual_seed(0))
    line = x[0, 0, :, 0].double()
    mirrored = torch.cat([line, line[1:3].flip(0)]).repeat(9)  # period 6: 0 1 2 3 2 1
    weights = torch.exp(-0.5 * (torch.arange(-8, 9) / 1.7).double() ** 2)
    expected = [(mirrored[24 + i - 8 : 24 + i + 9] * weights).sum().item() / weights.sum().item() for i in range(4)]
    assert blur(x, torch.tensor([1.7]))[0, 0, :, 0].tolist() == pytest.approx(expected, abs=1e-6)


def test_blur_is_near_pil_s_approximation_of_one() -> None:
    images = noise(8, 96, 96, fade=0.5)
    for i, sigma in enumerate((0.1, 0.3, 0.6, 0.9, 1.2, 1.5, 1.8, 2.0)):
        ours = blur(images[i : i + 1].permute(0, 3, 1, 2).float() / 255, torch.tensor([sigma]))[0]
        theirs = floats(Image.fromarray(images[i].numpy()).filter(ImageFilter.GaussianBlur(sigma)))
        difference = (ours - theirs)[:, 8:-8, 8:-8].abs()  # at the edges PIL repeats the last pixel
        assert difference.mean() < 1 / 255, sigma
        assert difference.max() < 4 / 255, sigma


def test_solarize_is_torchvision_s_and_leaves_the_others_alone() -> None:
    x = colours(4)
    x[0, 0, 0, :3] = torch.tensor([0.5, math.nextafter(0.5, 0), 127 / 255])
    mask = torch.tensor([True, False, True, False])
    ours = solarize(x.clone(), mask)
    assert torch.equal(ours[mask], F.solarize(x[mask], 0.5))
    assert torch.equal(ours[~mask], x[~mask])
