"""The two views of an image: `draw` makes every random decision, `apply` carries them out, deterministically.

This is the definition of the views, on any device, and what a faster kernel is compared with. The operations and their
parameters mean what torchvision means by them, in the order of the Barlow Twins reference: crop, flip, colour jitter,
grayscale, blur, solarize, normalise. On a GPU nothing here waits for it.

Pixels stay float32 in 0..1 from the crop to the end; the reference, PIL, goes back to 8 bits after every operation, and
in the crop after each direction. So its crop differs by up to 1.5/255, or more where bicubic overshoots black or white;
its blur, which approximates the Gaussian, by 1/255 on average; and a whole view of a natural image by 1.5/255.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import lru_cache
from itertools import permutations

import torch
from torch import Tensor

from barlow import config
from barlow.data import chance

BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)
ORDERS = tuple(permutations(range(4)))
UNCHANGED = (1.0, 1.0, 1.0, 0.0)  # the factors that change nothing
ATTEMPTS = 10  # at a box; each has a slot of four random words to itself, then come three more slots
SWITCHES, FACTORS, OTHERS = ATTEMPTS, ATTEMPTS + 1, ATTEMPTS + 2
LUMA = (0.2989, 0.587, 0.114)  # torchvision's weights of red, green and blue in a gray value
RADIUS = 8  # of the blur, in pixels: four times the widest sigma of the reference
CHUNK = 32  # images at a time on a CPU: what is in work stays in its cache


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


@lru_cache(maxsize=64)
def constant(values: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A few numbers as a tensor, made once: to copy them to a GPU at every call would wait for it."""
    return torch.tensor(values, dtype=dtype, device=device)


def may_ask(x: Tensor) -> bool:
    """Whether rows can be picked by what they hold: to ask a GPU which would wait for it, so there all are computed."""
    return x.device.type == "cpu"


# -------------------------------------------------------------------------------------------------------------- draw


def draw(views: config.Views, view: int, seed: int, epoch: int, ids: Tensor, height: int, width: int) -> Params:
    """The parameters of `view` (0: a, 1: b) for the samples `ids` [n] of `height` x `width` pixels, on ids' device.

    A row depends on (seed, epoch, id, view) alone, to the bit: there are only integer operations, and + - * / sqrt in
    float64 one at a time, which every device must round in the same way. (Division is by tensors only: by a number,
    a GPU multiplies with its reciprocal.)
    """
    p = (views.a, views.b)[view]
    words = chance.words(seed, chance.Use.VIEWS, epoch, ids, slots=OTHERS + 1, lane=view)  # [n, 13, 4]
    flip, jitter, gray, blur = words[:, SWITCHES].unbind(1)
    order, sigma, solarize, _ = words[:, OTHERS].unbind(1)

    spread = (views.brightness, views.contrast, views.saturation)
    limits = [(max(0.0, 1 - x), 1 + x) for x in spread] + [(-views.hue, views.hue)]
    factors = torch.stack([between(words[:, FACTORS, j], *limits[j]).to(torch.float32) for j in range(4)], dim=1)
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


def happens(bits: Tensor, probability: float) -> Tensor:
    """bool: true with this probability, always for 1 and never for 0."""
    return bits < round(probability * 2**32)


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
    halvings = max(0, math.ceil(math.log2(4 * limit))) if limit > 0 else 0
    x = x * 0.5**halvings
    y = torch.ones_like(x)
    for k in range(11, 0, -1):
        y = y * x
        y = y * (1 / k)
        y = y + 1
    for _ in range(halvings):
        y = y * y
    return y


# ------------------------------------------------------------------------------------------------------------- apply


def pair(
    images: Tensor,
    ids: Tensor,
    views: config.Views,
    seed: int,
    epoch: int,
    mean: Sequence[float],
    std: Sequence[float],
) -> list[Tensor]:
    """Both views [n, 3, size, size] float32 of `images` [n, H, W, 3] uint8, whose sample ids are `ids` [n]."""
    height, width = images.shape[1:3]
    params = [draw(views, view, seed, epoch, ids, height, width) for view in (0, 1)]
    return [apply(images, p, views.size, mean, std) for p in params]


@torch.no_grad()
def apply(
    images: Tensor,
    params: Params,
    size: int,
    mean: Sequence[float],
    std: Sequence[float],
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """The views [n, 3, size, size], normalised, of `images` [n, H, W, 3] uint8, both on one device.

    Computed in float32, or in float64 where that is the `dtype` asked for. Autocast does not reach inside; TF32, if
    someone has switched it on for matrix products, does (errors of 1e-3).
    """
    device, work = images.device, torch.float64 if dtype == torch.float64 else torch.float32
    centre = constant(tuple(mean), work, device)[:, None, None]
    spread = constant(tuple(std), work, device)[:, None, None]
    out = torch.empty(len(images), 3, size, size, dtype=dtype, device=device)
    step = CHUNK if device.type == "cpu" else max(len(images), 1)
    with torch.autocast(device.type, enabled=False):
        for start in range(0, len(images), step):
            rows = slice(start, start + step)
            p = params[rows]
            x = crop(images[rows], p.boxes, p.flip, size, work)
            x = jitter(x, p.order, p.factors)
            x = grayscale(x, p.gray)
            x = blur(x, p.sigma)
            x = solarize(x, p.solarize)
            out[rows] = x.sub_(centre).div_(spread)
    return out


def crop(images: Tensor, boxes: Tensor, flip: Tensor, size: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """uint8 [n, H, W, 3] -> [n, 3, size, size] in 0..1: each box by torchvision's antialiased bicubic, then mirrored.

    A row of the view is a weighted sum of the source's rows, and likewise its columns: two matrix products an image.
    Most weights are 0, and still they take less time than a gather. Clamped to 0..1, as the reference's 8 bits are:
    bicubic overshoots at edges.
    """
    n, H, W, _ = images.shape
    top, left, height, width = boxes.unbind(1)
    rows = bicubic(top, height, torch.zeros_like(flip), size, H).to(dtype)  # [n, size, H]
    columns = (bicubic(left, width, flip, size, W) * (1 / 255)).to(dtype)  # [n, size, W]
    x = torch.bmm(rows, images.reshape(n, H, W * 3).to(dtype))
    x = x.view(n, size, W, 3).permute(0, 3, 1, 2).reshape(n, 3 * size, W)
    return torch.bmm(x, columns.transpose(1, 2)).view(n, 3, size, size).clamp_(0, 1)


def bicubic(start: Tensor, length: Tensor, mirror: Tensor, size: int, source: int) -> Tensor:
    """Weights [n, size, source] float64 that scale `length` [n] pixels from `start` [n] on, of a line of `source`.

    Keys' cubic with a = -1/2, widened by the scale where it shrinks, over no pixel outside the box. Only as many taps
    are computed as the widest box needs, and then put in their places.
    """
    n, device = len(start), start.device
    scale = length[:, None].to(torch.float64) / size  # [n, 1] pixels of the source in one of the view
    widen = scale.clamp(min=1)
    i = torch.arange(size, device=device)
    i = torch.where(mirror[:, None], size - 1 - i, i)
    centre = (i + 0.5) * scale  # [n, size], from the box's start
    first = torch.floor(centre - 2 * widen + 0.5)
    taps = 2 * math.ceil(2 * max(source / size, 1)) + 1
    at = first[..., None] + torch.arange(taps, device=device)  # [n, size, taps]
    inside = (at >= 0) & (at < length[:, None, None])
    weights = cubic((at + 0.5 - centre[..., None]) / widen[..., None]) * inside
    weights = weights / weights.sum(dim=2, keepdim=True)
    place = torch.where(inside, at.to(torch.int64) + start[:, None, None], source)  # what is outside: one column more
    dense = torch.zeros(n, size, source + 1, dtype=torch.float64, device=device)
    return dense.scatter_(2, place, weights)[..., :source]


def cubic(x: Tensor) -> Tensor:
    """Keys' cubic, a = -1/2: its pieces are 0 where they meet and at 2, so each is clamped to its part, and added."""
    x = x.abs()
    near, far = x.clamp(max=1), x.clamp(1, 2)
    return (1.5 * near - 2.5) * near * near + 1 - 0.5 * (((far - 5) * far + 8) * far - 4)


def jitter(x: Tensor, order: Tensor, factors: Tensor) -> Tensor:
    """Brightness, contrast, saturation and hue of x [n, 3, h, w], each image in its own order.

    All but hue blend a pixel with 0, with the image's mean gray or with the pixel's own gray: in step k every image has
    a colour matrix and an offset, which are 1 and 0 (and exact) for those whose turn is hue.
    """
    n, _, h, w = x.shape
    luma = constant(LUMA, x.dtype, x.device)
    factors = factors.to(x.dtype)
    turn = order[..., None] == torch.arange(4, device=x.device)  # [n, step, operation]
    kept = factors.gather(1, order).masked_fill(turn[..., HUE], 1)  # [n, step]
    to_mean, to_gray = (1 - kept) * turn[..., CONTRAST], (1 - kept) * turn[..., SATURATION]
    identity = torch.eye(3, dtype=x.dtype, device=x.device)
    matrices = kept[..., None, None] * identity + to_gray[..., None, None] * luma  # [n, step, 3, 3]
    x = x.view(n, 3, h * w)
    for k in range(4):
        offset = (x.mean(dim=2) * luma).sum(dim=1) * to_mean[:, k]
        x = torch.baddbmm(offset[:, None, None], matrices[:, k], x).clamp_(0, 1)
        mine = turn[:, k, HUE] & (factors[:, HUE] != 0)
        if may_ask(x):
            rows = torch.nonzero(mine).flatten()
            x[rows] = turn_hue(x[rows], factors[rows, HUE])
        else:
            x = torch.where(mine[:, None, None], turn_hue(x, factors[:, HUE]), x)
    return x.view(n, 3, h, w)


def turn_hue(x: Tensor, shift: Tensor) -> Tensor:
    """x [m, 3, p] with its hue turned by shift [m] (1: the whole circle); saturation and value of HSV are kept.

    Hue in sixths of the circle: red 0, green 2, blue 4. A channel is at the maximum within 1 of its own place, falls
    linearly to the minimum at 2, and stays there. Comparisons are kept as floats: a `where` takes ten times as long.
    """
    r, g, b = x.unbind(1)
    low, high = x.amin(dim=1), x.amax(dim=1)
    chroma = high - low
    divisor = chroma.clamp(min=1e-12)  # a gray pixel has no hue; whatever it gets has no effect
    red = high.clone().eq_(r)
    green = high.clone().eq_(g).mul_(1 - red)
    blue = (1 - red).sub_(green)
    hue = ((g - b) / divisor).mul_(red)
    hue += ((b - r) / divisor).add_(2).mul_(green)
    hue += ((r - g) / divisor).add_(4).mul_(blue)
    hue += 6 * shift[:, None]
    hue -= torch.floor(hue * (1 / 6)).mul_(6)  # [m, p] in 0..6
    fall = torch.stack((2 - (hue - 3).abs_(), (hue - 2).abs_().sub_(1), (hue - 4).abs_().sub_(1)), dim=1)
    return fall.clamp_(0, 1).mul_(-chroma[:, None]).add_(high[:, None])


def grayscale(x: Tensor, gray: Tensor) -> Tensor:
    """x [n, 3, h, w] with the images of `gray` [n] turned to gray, in three equal channels."""
    identity = torch.eye(3, dtype=x.dtype, device=x.device)
    matrices = torch.where(gray[:, None, None], constant(LUMA, x.dtype, x.device), identity)  # [n, 3, 3]
    return torch.bmm(matrices, x.flatten(2)).view_as(x)


def blur(x: Tensor, sigma: Tensor) -> Tensor:
    """x [n, 3, h, w] under a Gaussian of `sigma` [n] pixels, cut at RADIUS, mirrored at the edges; 0: unchanged.

    The same as torchvision's gaussian_blur with a kernel of 2 * RADIUS + 1 and this sigma. Matrix products again: at 48
    pixels they take a third of the time of a grouped convolution; at 96 twice the time, but few images of view b blur.
    """
    rows = torch.nonzero(sigma).flatten() if may_ask(x) else torch.arange(len(x), device=x.device)
    taps = torch.arange(-RADIUS, RADIUS + 1, device=x.device)
    width = sigma[rows, None].to(x.dtype).clamp(min=1e-3)  # so narrow a Gaussian is exactly one pixel
    kernels = torch.softmax(-0.5 * (taps / width) ** 2, dim=1)  # [m, taps]
    down, across = line_filters(kernels, x.shape[2]), line_filters(kernels, x.shape[3])
    y = torch.bmm(x[rows].flatten(1, 2), across.transpose(1, 2)).view(len(rows), *x.shape[1:])
    for channel in range(3):
        x[rows, channel] = torch.bmm(down, y[:, channel])
    return x


def line_filters(kernels: Tensor, side: int) -> Tensor:
    """Kernels [m, taps] as matrices [m, side, side] that filter a line, mirrored at its ends without doubling them."""
    at = torch.arange(side, device=kernels.device) + torch.arange(-RADIUS, RADIUS + 1, device=kernels.device)[:, None]
    period = max(2 * (side - 1), 1)
    at = (at % period).minimum(-at % period)  # [taps, side], the pixel on which a tap falls
    places = at[..., None] == torch.arange(side, device=kernels.device)  # [taps, side, side]
    return (kernels @ places.to(kernels.dtype).flatten(1)).view(len(kernels), side, side)


def solarize(x: Tensor, mask: Tensor) -> Tensor:
    """x [n, 3, h, w] with values from one half on inverted, in the images of `mask` [n]: the lesser of x and 1 - x."""
    return torch.minimum(x, (mask.to(x.dtype)[:, None, None, None] - x).abs_())
