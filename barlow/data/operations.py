"""The operations of RandAugment and CTAugment on batches of 8-bit images: each image its own, each as PIL does it.

They equal PIL's bit for bit (on x86, where PIL's compiler fuses no product with a sum), on any device; on a GPU nothing
here waits for it. They are five families, and one step runs an image through all of them, though only one changes it:
look-up tables, blends with a filtered image, moves, rescaling, CutOut. Where rows can be picked by what they hold, on a
CPU, a family sees only its own; elsewhere it sees all, and gives the others parameters that change nothing.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from enum import IntEnum
from functools import lru_cache

import torch
from torch import Tensor

from barlow.data.augment import constant, may_ask
from barlow.data.cutout import cut
from barlow.data.resample import METHODS, lines, placed, resampled


class Op(IntEnum):
    """The operations, and what the amount of each means. Checkpoints hold these numbers: a new one goes to the end."""

    IDENTITY = 0
    AUTOCONTRAST = 1  # 0 the image .. 1 each channel's darkest value black, its lightest white
    EQUALIZE = 2  # 0 the image .. 1 each channel's histogram as flat as can be
    INVERT = 3  # 0 the image .. 1 its negative
    POSTERIZE = 4  # whole bits that are kept of each value
    SOLARIZE = 5  # values from this share of 256 on are inverted
    BRIGHTNESS = 6  # 0 black .. 1 the image .. more
    CONTRAST = 7  # 0 its mean gray .. 1 the image .. more
    COLOR = 8  # 0 gray .. 1 the image .. more
    SHARPNESS = 9  # 0 smoothed .. 1 the image .. more
    SMOOTH = 10  # 0 the image .. 1 under PIL's SMOOTH, of 3 x 3
    BLUR = 11  # 0 the image .. 1 under PIL's BLUR, of 5 x 5
    ROTATE = 12  # degrees, rounded to whole ones, at most 45 either way
    SHEAR_X = 13  # pixels to the side for each down
    SHEAR_Y = 14  # pixels down for each to the side
    TRANSLATE_X = 15  # share of the width, rounded to whole pixels
    TRANSLATE_Y = 16  # share of the height, the same
    RESCALE = 17  # share of the sides that a central crop keeps before it is scaled up again
    CUTOUT = 18  # side of the gray square, as a share of the shorter side


TABLES = (Op.AUTOCONTRAST, Op.EQUALIZE, Op.INVERT, Op.POSTERIZE, Op.SOLARIZE, Op.BRIGHTNESS, Op.CONTRAST)
BLENDS = (Op.COLOR, Op.SHARPNESS, Op.SMOOTH, Op.BLUR)
MOVES = (Op.ROTATE, Op.SHEAR_X, Op.SHEAR_Y, Op.TRANSLATE_X, Op.TRANSLATE_Y)
STEEPEST = 45  # degrees
CHUNK = 128  # images at a time on a CPU: what is in work stays in its cache


@dataclass(frozen=True)
class Policy:
    """What is done to each of n images, `depth` operations one after another; small tensors, the same bits everywhere.

    field  | type, shape              | meaning
    -------|--------------------------|-----------------------------------------------------------
    op     | int64 [n, depth]         | an Op
    amount | float32 [n, depth]       | how much, in the operation's own unit
    method | int64 [n, depth]         | of RESCALE: which of resample.METHODS
    centre | float32 [n, depth, 2]    | of CUTOUT: row and column, as shares of the height and width
    """

    op: Tensor
    amount: Tensor
    method: Tensor
    centre: Tensor

    def __getitem__(self, rows: slice | Tensor | tuple[slice, int | slice]) -> Policy:
        return Policy(*(getattr(self, field.name)[rows] for field in fields(self)))


@torch.no_grad()
def apply(images: Tensor, policy: Policy) -> Tensor:
    """uint8 [n, 3, h, w] -> the same, changed by the policy; the images given stay as they are."""
    if not may_ask(images):
        return all_steps(images, policy)
    pieces = [slice(start, start + CHUNK) for start in range(0, max(len(images), 1), CHUNK)]
    return torch.cat([all_steps(images[rows].clone(), policy[rows]) for rows in pieces])


def all_steps(images: Tensor, policy: Policy) -> Tensor:
    for k in range(policy.op.shape[1]):
        step = policy[:, k]
        for members, change in FAMILIES:
            if may_ask(images):
                rows = torch.nonzero(one_of(step.op, members)).flatten()
                if len(rows):
                    images[rows] = change(images[rows], step[rows])
            else:
                images = change(images, step)
    return images


def one_of(op: Tensor, members: tuple[Op, ...]) -> Tensor:
    return (op[:, None] == constant(members, torch.int64, op.device)).any(dim=1)


def only(step: Policy, op: Op, otherwise: float) -> Tensor:
    """float64 [n]: the amount where the operation is this one."""
    return torch.where(step.op == op, step.amount, otherwise).to(torch.float64)


def blend(a: Tensor, b: Tensor, share: Tensor) -> Tensor:
    """uint8: from a (0) to b (1) and beyond, in float32 and cut to whole numbers, as PIL's blend."""
    a = a.to(torch.float32)
    return (a + share * (b.to(torch.float32) - a)).clamp_(0, 255).to(torch.uint8)


def gray(images: Tensor) -> Tensor:
    """int32 [n, h, w], as PIL's convert("L")."""
    r, g, b = images.to(torch.int32).unbind(1)
    return (19595 * r + 38470 * g + 7471 * b + 0x8000) >> 16


# ---------------------------------------------------------------------------------------------------- look-up tables


def look_up(images: Tensor, step: Policy) -> Tensor:
    """Every value of a channel goes to another one: by blends of two tables of 256, from `start` to `end`."""
    n, _, h, w = images.shape
    values = images.reshape(n, 3, h * w).to(torch.int64)
    value = torch.arange(256, device=images.device)
    op, amount = step.op[:, None, None], step.amount[:, None, None]

    bits = torch.floor(amount).to(torch.int64).clamp(0, 8)
    threshold = torch.floor(amount * 256).to(torch.int64)
    end = value.expand(n, 3, 256)
    end = torch.where(op == Op.AUTOCONTRAST, stretched(values), end)
    end = torch.where(op == Op.EQUALIZE, equalized(values), end)
    inverted = (op == Op.INVERT) | ((op == Op.SOLARIZE) & (value >= threshold))
    end = torch.where(inverted, 255 - value, end)
    end = torch.where(op == Op.POSTERIZE, (value >> (8 - bits)) << (8 - bits), end)

    start = torch.where(op == Op.BRIGHTNESS, 0, value)
    start = torch.where(op == Op.CONTRAST, mean_gray(images), start)
    share = torch.where((op == Op.POSTERIZE) | (op == Op.SOLARIZE), 1.0, amount)
    return blend(start, end, share).gather(2, values).view_as(images)


def stretched(values: Tensor) -> Tensor:
    """Tables [n, 3, 256] of autocontrast for channels [n, 3, p]; a channel of one value stays."""
    low, high = values.amin(dim=2, keepdim=True), values.amax(dim=2, keepdim=True)
    value = torch.arange(256, device=values.device)
    spread = (high - low).clamp(min=1).to(torch.float64)
    scale = torch.full_like(spread, 255) / spread
    table = value * scale
    table = (table - low * scale).clamp(0, 255).to(torch.int64)
    return torch.where(high > low, table, value)


def equalized(values: Tensor) -> Tensor:
    """Tables [n, 3, 256] of equalize for channels [n, 3, p]: how many pixels lie below, in steps of p/255.

    The pixels of the lightest value do not count in the step; where it is 0, as with one value only, all stays.
    """
    n, channels, pixels = values.shape
    counts = torch.zeros(n, channels, 256, dtype=torch.int64, device=values.device)
    counts.scatter_add_(2, values, torch.ones_like(values))
    lightest = counts.gather(2, values.amax(dim=2, keepdim=True))
    step = (pixels - lightest) // 255
    below = counts.cumsum(dim=2) - counts
    table = ((below + step // 2) // step.clamp(min=1)).clamp(max=255)
    return torch.where(step > 0, table, torch.arange(256, device=values.device))


def mean_gray(images: Tensor) -> Tensor:
    """int64 [n, 1, 1], rounded."""
    pixels = images.shape[2] * images.shape[3]
    total = gray(images).sum(dim=(1, 2), dtype=torch.int64)
    return ((2 * total + pixels) // (2 * pixels))[:, None, None]


# -------------------------------------------------------------------------------------- blends with a filtered image


def mix(images: Tensor, step: Policy) -> Tensor:
    op, amount = step.op[:, None, None, None], step.amount[:, None, None, None]
    small = images.to(torch.int16)
    other = torch.where((op == Op.SHARPNESS) | (op == Op.SMOOTH), smoothed(small), small)
    other = torch.where(op == Op.BLUR, blurred(small), other)
    other = torch.where(op == Op.COLOR, gray(images)[:, None].to(torch.int16), other)
    away = (op == Op.SMOOTH) | (op == Op.BLUR)  # from the image to the other; else from the other to the image
    return blend(torch.where(away, small, other), torch.where(away, other, small), amount)


def smoothed(x: Tensor) -> Tensor:
    """int16 [..., h, w] under PIL's SMOOTH: 5 in the middle of eight 1, over 13; the border stays."""
    y = x.clone()
    inner = x[..., 1:-1, 1:-1]
    y[..., 1:-1, 1:-1] = (2 * (sums(x, 3) + 4 * inner) + 13) // 26
    return y


def blurred(x: Tensor) -> Tensor:
    """int16 [..., h, w] under PIL's BLUR: the rim of a square of 5, over 16; a border of two stays."""
    y = x.clone()
    y[..., 2:-2, 2:-2] = (sums(x, 5) - sums(x, 3)[..., 1:-1, 1:-1] + 8) >> 4
    return y


def sums(x: Tensor, side: int) -> Tensor:
    """Of all squares of this side."""
    for dim in (-1, -2):
        inside = x.shape[dim] - side + 1
        total = x.narrow(dim, 0, inside)
        for k in range(1, side):
            total = total + x.narrow(dim, k, inside)
        x = total
    return x


# ------------------------------------------------------------------------------------------------------------- moves


def move(images: Tensor, step: Policy) -> Tensor:
    """The nearest pixel of the source, black outside, found with PIL's numbers of 16 bits after the point."""
    n, _, h, w = images.shape
    a, b, c, d, e, f = matrices(step, h, w)[..., None, None].unbind(1)
    y, x = torch.arange(h, device=images.device)[:, None], torch.arange(w, device=images.device)
    column, row = (a * x + b * y + c) >> 16, (d * x + e * y + f) >> 16  # [n, h, w]
    inside = (column >= 0) & (column < w) & (row >= 0) & (row < h)
    place = torch.where(inside, row * w + column, 0).view(n, 1, h * w).expand(n, 3, h * w)
    return images.reshape(n, 3, h * w).gather(2, place).view(n, 3, h, w) * inside[:, None]


def matrices(step: Policy, height: int, width: int) -> Tensor:
    """int64 [n, 6], of 2^-16: from a pixel of the view to the source's, (a x + b y + c, d x + e y + f)."""
    shear_x, shear_y = only(step, Op.SHEAR_X, 0), only(step, Op.SHEAR_Y, 0)
    right = torch.floor(only(step, Op.TRANSLATE_X, 0) * width + 0.5)
    down = torch.floor(only(step, Op.TRANSLATE_Y, 0) * height + 0.5)
    one = torch.ones_like(shear_x)
    sheared = torch.stack((one, shear_x, shear_x * 0.5 + 0.5 + right, shear_y, one, shear_y * 0.5 + 0.5 + down), dim=1)
    fixed = torch.floor(sheared * 65536 + 0.5).to(torch.int64)
    degrees = torch.round(only(step, Op.ROTATE, 0)).to(torch.int64).clamp(-STEEPEST, STEEPEST)
    turned = rotations(height, width, step.op.device)[degrees + STEEPEST]
    return torch.where((step.op == Op.ROTATE)[:, None], turned, fixed)


@lru_cache(maxsize=64)
def rotations(height: int, width: int, device: torch.device) -> Tensor:
    """int64 [91, 6]: the matrix of every whole angle, from the host's sine and cosine, rounded as PIL's."""
    rows = []
    for degrees in range(-STEEPEST, STEEPEST + 1):
        angle = -math.radians(degrees)
        cos, sin = round(math.cos(angle), 15), round(math.sin(angle), 15)
        x, y = width / 2, height / 2
        c, f = cos * -x + sin * -y + x, -sin * -x + cos * -y + y
        row = (cos, sin, c + cos * 0.5 + sin * 0.5, -sin, cos, f + -sin * 0.5 + cos * 0.5)
        rows.append([math.floor(v * 65536 + 0.5) for v in row])
    return torch.tensor(rows, device=device)


# ----------------------------------------------------------------------------------------------- rescaling and CutOut


def rescale(images: Tensor, step: Policy) -> Tensor:
    method = torch.where(step.op == Op.RESCALE, step.method, METHODS.index("nearest"))
    across, down = (enlarged(method, only(step, Op.RESCALE, 1), side) for side in (images.shape[3], images.shape[2]))
    return resampled(images, down, across)


def enlarged(method: Tensor, share: Tensor, side: int) -> Tensor:
    """Weights [n, side, side] that scale the middle of a line up to the whole."""
    most = math.ceil(side / 4)
    margin = torch.round((1 - share) * (side / 2)).to(torch.int64).clamp(0, most)
    lengths = range(side, side - 2 * most - 1, -2)  # by the margin
    return placed(lines(METHODS, lengths, side, share.device)[method, margin], margin, side)


def hide(images: Tensor, step: Policy) -> Tensor:
    return cut(images, step.centre, only(step, Op.CUTOUT, 0))


FAMILIES = ((TABLES, look_up), (BLENDS, mix), (MOVES, move), ((Op.RESCALE,), rescale), ((Op.CUTOUT,), hide))
