"""FixMatch's weak view: an image moved or cropped, and mirrored; and the last step of any view, to a network's floats.

`shift` is FixMatch's own for small images: moved by up to an eighth of the side, mirrored at the border. `crop` is what
BarlowMatch says (3.3.1): random cropping, resizing, flipping. It crops squares, as BarlowMatch's code does (which takes
75 to 80 % of the area, with PIL's bilinear filter); resizing is PIL's bicubic, bit for bit.

Views stay 8-bit images, [n, 3, size, size], so that the operations of the strong view can follow; the same bits on
every device, whatever the batch. The `lane` tells apart the views of one sample: labelled, weak, under the strong one.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from barlow import config
from barlow.data import chance
from barlow.data.augment import constant
from barlow.data.draw import ATTEMPTS, below, draw_boxes, happens
from barlow.data.resample import lines, placed, resampled

CHUNK = 64  # images at a time on a CPU: what is in work stays in its cache
PART = 8  # of the side: the longest shift
SQUARE = (1.0, 1.0)


@torch.no_grad()
def weak(images: Tensor, ids: Tensor, knobs: config.Weak, size: int, seed: int, epoch: int, lane: int = 0) -> Tensor:
    """uint8 [n, H, W, 3], whose sample ids are `ids` [n] -> uint8 [n, 3, size, size]."""
    n, height, width, _ = images.shape
    words = chance.words(seed, chance.Use.WEAK, epoch, ids, slots=ATTEMPTS + 1, lane=lane)
    down, right, mirror, _ = words[:, ATTEMPTS].unbind(1)
    flip = happens(mirror, knobs.flip)
    if knobs.kind == "crop":
        boxes = draw_boxes(words[:, :ATTEMPTS], knobs.scale, SQUARE, height, width).to(torch.int64)
        return resized(images, boxes, flip, size)
    if (height, width) != (size, size):
        whole = constant((0, 0, height, width), torch.int64, ids.device).expand(n, 4)
        images = resized(images, whole, torch.zeros_like(flip), size).permute(0, 2, 3, 1)
    most = size // PART
    return shifted(images, below(down, 2 * most + 1) - most, below(right, 2 * most + 1) - most, flip)


def shifted(images: Tensor, down: Tensor, right: Tensor, flip: Tensor) -> Tensor:
    """uint8 [n, h, w, 3] -> [n, 3, h, w], mirrored, then moved by pixels; what comes in is the image's reflection."""
    n, h, w, _ = images.shape
    row = reflected(torch.arange(h, device=down.device) - down[:, None], h)
    column = reflected(torch.arange(w, device=down.device) - right[:, None], w)
    column = torch.where(flip[:, None], w - 1 - column, column)
    place = (row[:, :, None] * w + column[:, None, :]).view(n, 1, h * w).expand(n, 3, h * w)
    return images.permute(0, 3, 1, 2).reshape(n, 3, h * w).gather(2, place).view(n, 3, h, w)


def reflected(at: Tensor, side: int) -> Tensor:
    """Places up to a side outside a line as places on it, without doubling its ends."""
    at = at.abs()
    return torch.minimum(at, (2 * (side - 1) - at).abs())


def resized(images: Tensor, boxes: Tensor, flip: Tensor, size: int) -> Tensor:
    """uint8 [n, H, W, 3] -> [n, 3, size, size]: boxes [n, 4] (top, left, height, width) by PIL's bicubic, mirrored."""
    H, W = images.shape[1:3]
    pieces = []
    step = CHUNK if images.device.type == "cpu" else max(len(images), 1)
    for start in range(0, max(len(images), 1), step):
        rows = slice(start, start + step)
        top, left, height, width = boxes[rows].unbind(1)
        down = placed(lines(("bicubic",), range(1, H + 1), size, images.device)[0, height - 1], top, H)
        across = placed(lines(("bicubic",), range(1, W + 1), size, images.device)[0, width - 1], left, W)
        across = torch.where(flip[rows, None, None], across.flip(1), across)
        pieces.append(resampled(images[rows].permute(0, 3, 1, 2), down, across))
    return torch.cat(pieces)


@torch.no_grad()
def normalised(
    images: Tensor, mean: Sequence[float], std: Sequence[float], dtype: torch.dtype = torch.float32
) -> Tensor:
    """uint8 [n, 3, h, w] -> what a network takes: from 0..1, less the mean, over the deviation; channels last."""
    work = torch.float64 if dtype == torch.float64 else torch.float32
    centre = constant(tuple(mean), work, images.device)[:, None, None]
    spread = constant(tuple(std), work, images.device)[:, None, None]
    x = images.to(work, memory_format=torch.channels_last)
    return x.mul_(1 / 255).sub_(centre).div_(spread).to(dtype)
