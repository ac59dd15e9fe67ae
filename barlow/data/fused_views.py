"""The views of a batch by our CUDA kernels, two launches and one for each further size: what views.py does without.

draw.py and views.py define what comes out; here is what the kernels of kernels/views.cu are told. A table of 16 words a
row carries the parameters from the one to the other, so no host waits and nothing of a sample reaches another.
"""

from __future__ import annotations

import ctypes
import functools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from barlow.data.augment import constant
from barlow.data.chance import WORD, Use
from barlow.data.draw import Kind, Params, central_box, factor_ranges, halvings, threshold
from barlow.kernels.launch import Kernels

DTYPES = (torch.float32, torch.bfloat16)  # of views
COLUMNS = 16  # of a row of parameters, each of four bytes
WIDEST = 672  # threads in a block, at most: the kernel's limit, and a line of 224 pixels each
STATIC_SHARED = 512  # bytes that the kernel has besides those of the launch, at most


class Drawing(ctypes.Structure):
    """As in views.cu."""

    _fields_ = [(name, ctypes.c_uint32) for name in ("seed_low", "seed_high", "epoch", "use")] + [
        (name, ctypes.c_int) for name in ("images", "views", "height", "width")
    ]


class Making(ctypes.Structure):
    """As in views.cu."""

    _fields_ = [
        *((name, ctypes.c_int) for name in ("images", "views", "height", "width")),
        *((name, ctypes.c_int) for name in ("size", "row_taps", "column_taps", "wide")),
        ("scale", ctypes.c_float * 3),
        ("shift", ctypes.c_float * 3),
    ]


def make(
    kernels: Kernels,
    images: Tensor,
    ids: Tensor,
    kinds: Sequence[Kind],
    seed: int,
    epoch: int,
    mean: Sequence[float],
    std: Sequence[float],
    dtype: torch.dtype = torch.bfloat16,
) -> list[Tensor]:
    """A view [n, 3, size, size] of each kind, channels last, of `images` [n, H, W, 3] uint8; its place is its lane.

    Views of one size are made in one launch, and lie in one tensor.
    """
    assert images.dtype == torch.uint8
    assert ids.dtype == torch.int64
    images, (height, width) = images.contiguous(), images.shape[1:3]
    lanes = sorted(range(len(kinds)), key=lambda lane: kinds[lane].ranges.size)
    table = draw(kernels, [kinds[lane] for lane in lanes], lanes, seed, epoch, ids, height, width)
    made: dict[int, Tensor] = {}
    done = 0
    while done < len(lanes):
        size = kinds[lanes[done]].ranges.size
        alike = [lane for lane in lanes if kinds[lane].ranges.size == size]
        out = torch.empty(len(alike), len(images), size, size, 3, dtype=dtype, device=images.device)
        apply(kernels, images, table[done : done + len(alike)], out, mean, std)
        made |= {lane: view.permute(0, 3, 1, 2) for lane, view in zip(alike, out, strict=True)}
        done += len(alike)
    return [made[lane] for lane in range(len(kinds))]


def draw(
    kernels: Kernels,
    kinds: Sequence[Kind],
    lanes: Sequence[int],
    seed: int,
    epoch: int,
    ids: Tensor,
    height: int,
    width: int,
) -> Tensor:
    """The parameters of each kind for the samples `ids` [n], a table [kinds, n, 16] int32: see `unpack`."""
    table = torch.empty(len(kinds), len(ids), COLUMNS, dtype=torch.int32, device=ids.device)
    if not table.numel():
        return table
    ranges = constant(described(tuple(kinds), height, width), torch.float64, ids.device)
    order = constant(tuple(lanes), torch.int64, ids.device)
    what = Drawing(seed & WORD, seed >> 32 & WORD, epoch & WORD, int(Use.VIEWS), len(ids), len(kinds), height, width)
    blocks = math.ceil(len(kinds) * len(ids) / 128)
    kernels.launch("views_draw", blocks, 128, 0, ids.contiguous(), ranges, order, table, what)
    return table


@functools.lru_cache(maxsize=64)
def described(kinds: tuple[Kind, ...], height: int, width: int) -> tuple[float, ...]:
    """A Range of views.cu for each kind. Spans are taken here, in Python's float64, as the definition has them."""
    told: list[float] = []
    for views, chances in kinds:
        low, high = math.log(views.ratio[0]), math.log(views.ratio[1])
        told += [views.scale[0], views.scale[1] - views.scale[0]]
        told += [low, high - low, halvings(max(abs(low), abs(high)))]
        factors = factor_ranges(views)
        told += [least for least, _ in factors] + [most - least for least, most in factors]
        told += [views.sigma[0], views.sigma[1] - views.sigma[0]]
        often = (chances.flip, chances.jitter, chances.gray, chances.blur, chances.solarize)
        told += [threshold(probability) for probability in often]
        told += central_box(views.ratio, height, width)
    return tuple(float(number) for number in told)


def apply(
    kernels: Kernels, images: Tensor, table: Tensor, out: Tensor, mean: Sequence[float], std: Sequence[float]
) -> None:
    """Fill `out` [views, n, size, size, 3], bfloat16 or float32, by `table` [views, n, 16]; all are contiguous."""
    views, n, size = out.shape[:3]
    if not out.numel():
        return
    height, width = images.shape[1:3]
    row_taps, column_taps = (max(4, -(-4 * side // size)) for side in (height, width))
    scale, shift = [1 / s for s in std], [-m / s for m, s in zip(mean, std, strict=True)]
    three = ctypes.c_float * 3
    wide = out.dtype == torch.float32
    what = Making(n, views, height, width, size, row_taps, column_taps, wide, three(*scale), three(*shift))

    canvas = 4 * size * (3 * size | 1)
    tables = 4 * size * (row_taps + column_taps + 2)
    threads = min(-(-3 * size // 32) * 32, WIDEST)
    if canvas + tables + STATIC_SHARED <= kernels.shared_limit:
        kernels.launch("views_apply", n * views, threads, canvas + tables, images, table, out, what)
    else:
        blocks = min(n * views, 2 * processors(out.device))  # as many canvases as blocks can work at once
        scratch = torch.empty(blocks, canvas // 4, dtype=torch.float32, device=out.device)
        kernels.launch("views_apply_large", blocks, threads, tables, images, table, out, what, scratch)


@functools.cache
def processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def pack(params: Params) -> Tensor:
    """A row of parameters as the kernels have it: [n, 16] int32."""
    whole = [params.boxes, params.order]
    whole += [flag[:, None] for flag in (params.flip, params.gray, params.solarize)]
    floats = torch.cat([params.factors, params.sigma[:, None]], dim=1).view(torch.int32)
    return torch.cat([*(part.to(torch.int32) for part in whole), floats], dim=1)


def unpack(table: Tensor) -> Params:
    """The other way: a table [n, 16] as Params."""
    floats = table[:, 11:].contiguous().view(torch.float32)
    flip, gray, solarize = table[:, 8:11].bool().unbind(1)
    order = table[:, 4:8].to(torch.int64)
    return Params(table[:, :4], flip, order, floats[:, :4], gray, floats[:, 4], solarize)
