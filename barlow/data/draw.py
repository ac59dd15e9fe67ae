"""What is random in a view: `draw` makes every decision of it, from counters alone.

This is the definition, on any device; views.cu has the same operations one by one, and is held to the same bits.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from itertools import permutations
from typing import NamedTuple

import torch
from torch import Tensor

from barlow import config
from barlow.data import chance
from barlow.data.augment import constant

ORDERS = tuple(permutations(range(4)))
UNCHANGED = (1.0, 1.0, 1.0, 0.0)  # the factors that change nothing
ATTEMPTS = 10  # at a box; each has a slot of four random words to itself, then come three more slots
SWITCHES, FACTORS, OTHERS = ATTEMPTS, ATTEMPTS + 1, ATTEMPTS + 2


class Kind(NamedTuple):
    """What a view is drawn from."""

    ranges: config.Views  # size, crop, strengths of the colours, blur
    chances: config.View  # how often each is done


def both(views: config.Views) -> tuple[Kind, Kind]:
    """The kinds of a pair."""
    return Kind(views, views.a), Kind(views, views.b)


@dataclass(frozen=True)
class Params:
    """All that makes one view of n images, a row an image: small flat tensors, the same bits wherever they are drawn.

    field    | type, shape    | meaning
    ---------|----------------|---------------------------------------------------------------------------------
    boxes    | int32 [n, 4]   | crop: top, left, height, width, in pixels of the source, inside it
    flip     | bool [n]       | mirror left and right
    order    | int64 [n, 4]   | column k: the k-th operation (0 brightness, 1 contrast, 2 saturation, 3 hue)
    factors  | float32 [n, 4] | column j: the factor of operation j, hue in circles; 1, 1, 1, 0 where not jittered
    gray     | bool [n]       | turn to gray
    sigma    | float32 [n]    | standard deviation of the blur, in pixels of the view; 0 where not blurred
    solarize | bool [n]       | invert the values of one half and above
    """

    boxes: Tensor
    flip: Tensor
    order: Tensor
    factors: Tensor
    gray: Tensor
    sigma: Tensor
    solarize: Tensor

    def __getitem__(self, rows: slice | Tensor) -> Params:
        return Params(*(getattr(self, field.name)[rows] for field in fields(self)))


def draw(views: config.Views, view: int, seed: int, epoch: int, ids: Tensor, height: int, width: int) -> Params:
    """The parameters of `view` (0: a, 1: b) for the samples `ids` [n] of `height` x `width` pixels, on ids' device."""
    return draw_kind(both(views)[view], view, seed, epoch, ids, height, width)


def draw_kind(kind: Kind, lane: int, seed: int, epoch: int, ids: Tensor, height: int, width: int) -> Params:
    """The same for a view of any kind; its `lane` tells it apart from the other views of a sample.

    A row depends on (seed, epoch, id, lane) alone, to the bit: there are only integer operations, and + - * / sqrt in
    float64 one at a time, which every device must round in the same way. (Division is by tensors only: by a number,
    a GPU multiplies with its reciprocal.)
    """
    views, p = kind
    words = chance.words(seed, chance.Use.VIEWS, epoch, ids, slots=OTHERS + 1, lane=lane)  # [n, 13, 4]
    flip, jitter, gray, blur = words[:, SWITCHES].unbind(1)
    order, sigma, solarize, _ = words[:, OTHERS].unbind(1)

    limits = enumerate(factor_ranges(views))
    factors = torch.stack([between(words[:, FACTORS, j], *limit).to(torch.float32) for j, limit in limits], dim=1)
    unchanged = constant(UNCHANGED, torch.float32, ids.device)
    orders = constant(sum(ORDERS, ()), torch.int64, ids.device).view(-1, 4)
    return Params(
        boxes=draw_boxes(words[:, :ATTEMPTS], views.scale, views.ratio, height, width),
        flip=happens(flip, p.flip),
        order=orders[below(order, len(ORDERS))],
        factors=torch.where(happens(jitter, p.jitter)[:, None], factors, unchanged),
        gray=happens(gray, p.gray),
        sigma=between(sigma, *views.sigma).to(torch.float32) * happens(blur, p.blur),
        solarize=happens(solarize, p.solarize),
    )


def factor_ranges(views: config.Views) -> list[tuple[float, float]]:
    """Of brightness, contrast, saturation and hue."""
    spread = (views.brightness, views.contrast, views.saturation)
    return [(max(0.0, 1 - x), 1 + x) for x in spread] + [(-views.hue, views.hue)]


def happens(bits: Tensor, probability: float) -> Tensor:
    """bool: true with this probability, always for 1 and never for 0."""
    return bits < threshold(probability)


def threshold(probability: float) -> int:
    return round(probability * 2**32)


def below(bits: Tensor, n: int | Tensor) -> Tensor:
    """int64, uniform in 0..n-1."""
    return bits * n >> 32


def between(bits: Tensor, low: float, high: float) -> Tensor:
    """float64, uniform in [low, high)."""
    return bits.to(torch.float64) * 2.0**-32 * (high - low) + low


def draw_boxes(
    words: Tensor, scale: tuple[float, float], ratio: tuple[float, float], height: int, width: int
) -> Tensor:
    """Boxes [n, 4] int32 of a random resized crop, from words [n, attempts, 4].

    An attempt draws an area, the logarithm of an aspect ratio and a corner; the first that lies in the image is taken.
    Where none does, it is torchvision's fallback: the largest central box of an allowed aspect ratio.
    """
    low, high = math.log(ratio[0]), math.log(ratio[1])
    area = between(words[..., 0], *scale) * (height * width)
    aspect = exp(between(words[..., 1], low, high), max(abs(low), abs(high)))
    w = torch.sqrt(area * aspect).round().to(torch.int64)
    h = torch.sqrt(area / aspect).round().to(torch.int64)
    fits = (w > 0) & (w <= width) & (h > 0) & (h <= height)
    top, left = below(words[..., 2], height - h + 1), below(words[..., 3], width - w + 1)
    boxes = torch.stack((top, left, h, w), dim=-1)  # [n, attempts, 4]

    preference = torch.arange(words.shape[1], 0, -1, device=words.device) * fits  # [n, attempts]; 0: does not fit
    best, first = preference.max(dim=1)
    chosen = boxes[torch.arange(len(boxes), device=words.device), first]
    fallback = constant(central_box(ratio, height, width), torch.int64, words.device)
    return torch.where((best > 0)[:, None], chosen, fallback).to(torch.int32)


def central_box(ratio: tuple[float, float], height: int, width: int) -> tuple[int, int, int, int]:
    """Top, left, height, width of the largest central box whose width over height is within `ratio`."""
    h, w = height, width
    if width / height < ratio[0]:
        h = round(width / ratio[0])
    elif width / height > ratio[1]:
        w = round(height * ratio[1])
    return (height - h) // 2, (width - w) // 2, h, w


def exp(x: Tensor, limit: float) -> Tensor:
    """e**x in float64 for |x| <= limit, to about 1e-15 of it, and in the same bits everywhere, as no library's exp is.

    x is halved, which is exact, until |x| <= 1/4; there the Taylor series up to x**11 errs by 0.25**12 / 12! = 1.3e-16;
    and the result is squared as often. Every product and sum is an operation of its own, so that none are fused.
    """
    times = halvings(limit)
    x = x * 0.5**times
    y = torch.ones_like(x)
    for k in range(11, 0, -1):
        y = y * x
        y = y * (1 / k)
        y = y + 1
    for _ in range(times):
        y = y * y
    return y


def halvings(limit: float) -> int:
    return max(0, math.ceil(math.log2(4 * limit))) if limit > 0 else 0
