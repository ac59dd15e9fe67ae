"""PIL's resizing, bit for bit: images of 8 bits, each with a crop of its own, scaled to one size by any of its filters.

PIL's weights are whole numbers of 2^-22, and after each direction it goes back to 8 bits. Here they are computed on the
host, once for each length of a line, with PIL's formulas. What is done with them are matrix products of whole numbers
in float64, exact in any order of summation, and so the same on every device. Lines are always scaled before columns; so
did PIL until its version 13, which begins with the columns of some images that shrink.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

PRECISION = 22  # bits after the point
HAMMING = (float(np.float32(0.54)), float(np.float32(0.46)))  # PIL's constants are of single precision


def box(x: float) -> float:
    return 1.0 if -0.5 < x <= 0.5 else 0.0


def bilinear(x: float) -> float:
    return max(1 - abs(x), 0.0)


def hamming(x: float) -> float:
    return sinc(x) * (HAMMING[0] + HAMMING[1] * math.cos(x * math.pi)) if abs(x) < 1 else 0.0


def bicubic(x: float) -> float:
    x = abs(x)
    if x < 1:
        return (1.5 * x - 2.5) * x * x + 1
    return (((x - 5) * x + 8) * x - 4) * -0.5 if x < 2 else 0.0


def lanczos(x: float) -> float:
    return sinc(x) * sinc(x / 3) if -3 <= x < 3 else 0.0


def sinc(x: float) -> float:
    return math.sin(x * math.pi) / (x * math.pi) if x else 1.0


FILTERS: dict[str, tuple[Callable[[float], float], float]] = {  # with how far it reaches
    "lanczos": (lanczos, 3.0),
    "bicubic": (bicubic, 2.0),
    "bilinear": (bilinear, 1.0),
    "box": (box, 0.5),
    "hamming": (hamming, 1.0),
}
METHODS = (*FILTERS, "nearest")  # FixMatch's six for CTAugment's rescale, in its order; "anti-alias" is Lanczos


def line(method: str, length: int, size: int) -> np.ndarray:
    """int32 [size, length]: the weights that scale a line of `length` pixels to `size`."""
    weights = np.zeros((size, length), dtype=np.int32)
    scale = length / size
    if method == "nearest":
        at = scale * 0.5
        for i in range(size):  # PIL adds up the steps, with their roundings
            weights[i, int(at)] = 1 << PRECISION
            at += scale
        return weights
    function, reach = FILTERS[method]
    widen = max(scale, 1.0)
    for i in range(size):
        centre = (i + 0.5) * scale
        first, last = max(int(centre - reach * widen + 0.5), 0), min(int(centre + reach * widen + 0.5), length)
        taps = [function((x - centre + 0.5) * (1 / widen)) for x in range(first, last)]
        total = sum_in_order(taps)
        fixed = [tap / total * (1 << PRECISION) for tap in taps]
        weights[i, first:last] = [int(x - 0.5) if x < 0 else int(x + 0.5) for x in fixed]
    return weights


def sum_in_order(values: list[float]) -> float:
    """As PIL adds; Python's own sum takes care of the roundings."""
    total = 0.0
    for value in values:
        total += value
    return total


@lru_cache(maxsize=32)
def lines(methods: tuple[str, ...], lengths: range, size: int, device: torch.device) -> Tensor:
    """int32 [methods, lengths, size, longest]: `line` for each, zeros behind the shorter ones."""
    table = np.zeros((len(methods), len(lengths), size, max(lengths)), dtype=np.int32)
    for m, method in enumerate(methods):
        for k, length in enumerate(lengths):
            table[m, k, :, :length] = line(method, length, size)
    return torch.from_numpy(table).to(device)


def placed(weights: Tensor, start: Tensor, source: int) -> Tensor:
    """Weights [n, size, longest] for what begins at `start` [n] of a line of `source`: float64 [n, size, source]."""
    longest = weights.shape[2]
    at = torch.arange(source, device=start.device) - start[:, None]  # [n, source]
    outside = (at < 0) | (at >= longest)
    weights = weights.gather(2, at.clamp(0, longest - 1)[:, None].expand(-1, weights.shape[1], -1))
    return weights.masked_fill(outside[:, None], 0).to(torch.float64)


def resampled(images: Tensor, down: Tensor, across: Tensor) -> Tensor:
    """uint8 [n, 3, H, W] under the weights of its columns [n, h, H] and of its rows [n, w, W]: uint8 [n, 3, h, w]."""
    n, channels, H, W = images.shape
    x = torch.bmm(images.reshape(n, channels * H, W).to(torch.float64), across.transpose(1, 2))
    x = rounded(x).view(n, channels, H, across.shape[1])
    return rounded(down[:, None] @ x).to(torch.uint8)


def rounded(x: Tensor) -> Tensor:
    """From whole numbers of 2^-22 to whole ones in 0..255, halves up."""
    return x.add_(2.0 ** (PRECISION - 1)).mul_(2.0**-PRECISION).floor_().clamp_(0, 255)
