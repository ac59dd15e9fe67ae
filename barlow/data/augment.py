"""What is done to the images of a view: crop (and flip), colour jitter, grayscale, blur, solarize.

Each works on a batch, with parameters of its own for every image, on any device; on a GPU nothing here waits for it.
The parameters mean what torchvision means by them. What is given as x may be overwritten.

Pixels stay floats in 0..1 from the crop to the end; the reference, PIL, goes back to 8 bits after every operation, and
in the crop after each direction. So its crop differs by up to 1.5/255, or more where bicubic overshoots black or white;
and its blur, which approximates the Gaussian, by 1/255 on average.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor

BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)
LUMA = (0.2989, 0.587, 0.114)  # torchvision's weights of red, green and blue in a gray value
RADIUS = 8  # of the blur, in pixels: four times the widest sigma of the reference


@lru_cache(maxsize=64)
def constant(values: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A few numbers as a tensor, made once: to copy them to a GPU at every call would wait for it."""
    return torch.tensor(values, dtype=dtype, device=device)


def may_ask(x: Tensor) -> bool:
    """Whether rows can be picked by what they hold: to ask a GPU which would wait for it, so there all are computed."""
    return x.device.type == "cpu"


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
