"""Resizing is PIL's, bit for bit, with every filter, up and down, from any part of an image."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from barlow.data.resample import METHODS, line, lines, placed, resampled
from tests.data.test_operations import RESAMPLING, pictures

CPU = torch.device("cpu")


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("height", "width", "size"), [(96, 96, 32), (40, 57, 48), (33, 47, 96)])
def test_a_part_of_an_image_is_resized_as_pil_does(method: str, height: int, width: int, size: int) -> None:
    images = pictures(height, width).repeat(4, 1, 1, 1)
    n = len(images)
    generator = torch.Generator().manual_seed(size)
    h, w = (torch.randint(1, side + 1, (n,), generator=generator) for side in (height, width))
    h[0], w[0] = height, width
    top, left = (torch.rand(n, generator=generator) * (side - k + 1) for side, k in ((height, h), (width, w)))
    top, left = top.long(), left.long()
    down = placed(lines((method,), range(1, height + 1), size, CPU)[0, h - 1], top, height)
    across = placed(lines((method,), range(1, width + 1), size, CPU)[0, w - 1], left, width)
    ours = resampled(images, down, across)
    assert ours.shape == (n, 3, size, size)
    for i in range(n):
        x, y, right, bottom = left[i].item(), top[i].item(), (left + w)[i].item(), (top + h)[i].item()
        image = Image.fromarray(images[i].permute(1, 2, 0).numpy()).crop((x, y, right, bottom))
        wide = image.resize((size, image.height), RESAMPLING[method])  # lines first, whatever the version of PIL
        expected = np.array(wide.resize((size, size), RESAMPLING[method]))
        assert np.array_equal(ours[i].permute(1, 2, 0).numpy(), expected), (i, y, x, bottom, right)


@pytest.mark.parametrize("method", METHODS)
def test_a_line_of_any_length_is_scaled_as_pil_does(method: str) -> None:
    row = pictures(4, 100)[1:2]  # noise
    for length in range(1, 101):
        image = Image.fromarray(row[0, :, :, :length].permute(1, 2, 0).numpy())
        expected = np.array(image.resize((32, 4), RESAMPLING[method]))
        across = torch.from_numpy(line(method, length, 32)).double()[None]
        ours = resampled(row[..., :length], torch.eye(4, dtype=torch.float64)[None] * 2**22, across)
        assert np.array_equal(ours[0].permute(1, 2, 0).numpy(), expected), length


@pytest.mark.parametrize("method", METHODS)
def test_a_line_of_its_own_length_stays(method: str) -> None:
    for size in (1, 7, 32, 96):
        assert np.array_equal(line(method, size, size), np.eye(size, dtype=np.int32) << 22)


def test_the_sums_of_the_products_are_exact_in_float64() -> None:
    """Whole numbers below 2^53, whatever is added up first: so no device and no order can change them."""
    for method in METHODS:
        for length in (1, 32, 200, 1024):
            assert np.abs(line(method, length, 32).astype(np.int64)).sum(axis=1).max() * 255 < 2**32
