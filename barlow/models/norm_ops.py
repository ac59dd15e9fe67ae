"""The parts of a batch norm with its ReLU and sum, as operators that torch.compile takes as they are.

Each is defined here in plain torch, on any device and in any precision, and that is what runs on a CPU; on a GPU
kernels/norm.cu does the same. They see activations as rows [n, channels], the layout of channels_last. Statistics and
their use are operators apart, for between them stand the collectives of W ranks:

    moments -> merge of ranks -> apply        sums -> sum over ranks -> gradient

Moments are 2 * channels + 1 numbers in one: means, biased variances, and the count of rows.
"""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor

from barlow import kernels
from barlow.kernels import Kernels

DTYPES = (torch.float32, torch.bfloat16)  # of activations; all else is float32 in the kernels
THREADS, MERGING, CHANNELS = 256, 512, 8  # as in norm.cu
ACROSS = 32  # columns of a block, at most: a warp reads 512 bytes of a row
BLOCKS = 792  # six for each of 132 processors, on which two or three at a time have room: whole waves
LEAST, MOST = 8, 128  # rows of a thread: fewer are not worth its start, more would cost digits
Weights = tuple["Tensor | None", "Tensor | None", float]  # weight, bias, eps


class Tiling(ctypes.Structure):
    """As in norm.cu."""

    _fields_ = [("rows", ctypes.c_int64)] + [
        (name, ctypes.c_int) for name in ("channels", "bf16", "wide", "across", "tiles", "deep")
    ]


# ---------------------------------------------------------------------------------------------------------- definition


def split(moments: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean [C], biased variance [C], count [1] of moments [..., 2 C + 1]."""
    channels = moments.shape[-1] // 2
    mean, variance, count = moments.split([channels, channels, 1], dim=-1)
    return mean, variance, count


def moments_of(x: Tensor) -> Tensor:
    """x [n, C] -> [2 C + 1]."""
    x = wide(x)
    mean = x.mean(0)
    return torch.cat([mean, (x - mean).square().mean(0), mean.new_full((1,), len(x))])


def merged(parts: Tensor) -> Tensor:
    """Of the moments [P, 2 C + 1] of parts, those of all rows: [2 C + 1]."""
    means, variances, counts = split(parts)
    share = counts / counts.sum()
    mean = (share * means).sum(0)
    return torch.cat([mean, (share * (variances + (means - mean).square())).sum(0), counts.sum(0)])


def applied(x: Tensor, added: Tensor | None, moments: Tensor, by: Weights, relu: bool) -> Tensor:
    """relu(normalised x [n, C] + added [n, C]), either of which may be left out, in the dtype of x."""
    weight, bias, eps = by
    mean, variance, _ = split(moments)
    y = (wide(x) - mean) * (variance + eps).rsqrt()
    y = y if weight is None else y * weight
    y = y if bias is None else y + bias
    y = y if added is None else y + added
    return (y.relu() if relu else y).to(x.dtype)


def sums_of(grad: Tensor, x: Tensor, moments: Tensor, by: Weights, relu: bool) -> Tensor:
    """Sums [2, C] over rows of g x^ and of g, x^ being x normalised, and g what ReLU lets through of `grad`."""
    mean, variance, _ = split(moments)
    g = let_through(grad, x, moments, by, relu)
    return torch.stack([(g * (wide(x) - mean) * (variance + by[2]).rsqrt()).sum(0), g.sum(0)])


def masked_sums_of(grad: Tensor, x: Tensor, y: Tensor, moments: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The same where something was added before ReLU made y; and g, which is the gradient of what was added."""
    g = torch.where(y <= 0, 0, grad)
    return sums_of(g, x, moments, (None, None, eps), relu=False), g


def gradient_of(grad: Tensor, x: Tensor, moments: Tensor, sums: Tensor, by: Weights, relu: bool) -> Tensor:
    """The gradient of x [n, C]: weight / deviation * (g - mean(g) - x^ mean(g x^)), of all rows that were counted."""
    weight, _, eps = by
    mean, variance, count = split(moments)
    inverse = (variance + eps).rsqrt()
    along, shift = sums / count
    g = let_through(grad, x, moments, by, relu) - (wide(x) - mean) * inverse * along - shift
    return (g * inverse if weight is None else g * inverse * weight).to(x.dtype)


def let_through(grad: Tensor, x: Tensor, moments: Tensor, by: Weights, relu: bool) -> Tensor:
    """ReLU is not asked what it has cut off: that is found again from x, which backward reads anyway."""
    g = wide(grad)
    return torch.where(applied(wide(x), None, moments, by, relu=False) <= 0, 0, g) if relu else g


def wide(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


# ------------------------------------------------------------------------------------------------------------- kernels


def tiling(*tensors: Tensor) -> tuple[Tiling, int]:
    """How a kernel goes through tensors [n, C] of one shape and dtype, and in how many runs of rows. The shape alone
    decides, as long as all of them begin where a vector may."""
    rows, channels = tensors[0].shape
    assert all(t.is_contiguous() and t.shape == (rows, channels) and t.dtype == tensors[0].dtype for t in tensors)
    bf16 = tensors[0].dtype == torch.bfloat16
    n = 8 if bf16 else 4
    if channels % n or any(t.data_ptr() % 16 for t in tensors):
        n = 1
    columns = channels // n
    across = min(ACROSS, 1 << (columns - 1).bit_length())
    tiles, threads = -(-columns // across), THREADS // across
    each = min(max(-(-rows * tiles // (BLOCKS * threads)), LEAST), MOST)
    return Tiling(rows, channels, bf16, n > 1, across, tiles, each * threads), -(-rows // (each * threads))


def launch_moments(found: Kernels, x: Tensor) -> Tensor:
    how, runs = tiling(x)
    parts = x.new_empty(runs, 2 * how.channels + 1, dtype=torch.float32)
    found.launch("norm_moments", runs * how.tiles, THREADS, 4 * THREADS * 17, x, parts, how)
    return parts[0] if runs == 1 else launch_merge(found, parts)


def launch_merge(found: Kernels, parts: Tensor) -> Tensor:
    out, channels = parts.new_empty(parts.shape[1]), parts.shape[1] // 2
    numbers = ctypes.c_int(len(parts)), ctypes.c_int(channels)
    found.launch("norm_merge", -(-channels // CHANNELS), MERGING, 4 * MERGING, parts, *numbers, out)
    return out


def launch_apply(found: Kernels, x: Tensor, added: Tensor | None, moments: Tensor, by: Weights, relu: bool) -> Tensor:
    y = torch.empty_like(x)
    how, runs = tiling(x, y) if added is None else tiling(x, added, y)
    numbers = *passed(by), ctypes.c_int(relu)
    found.launch("norm_apply", runs * how.tiles, THREADS, 0, x, address(added), moments, *numbers, y, how)
    return y


def launch_sums(
    found: Kernels, grad: Tensor, x: Tensor, y: Tensor | None, moments: Tensor, by: Weights, relu: bool
) -> tuple[Tensor, Tensor | None]:
    g = None if y is None else torch.empty_like(x)
    how, runs = tiling(grad, x) if y is None or g is None else tiling(grad, x, y, g)
    sums = moments.new_empty(2, how.channels)
    parts = sums if runs == 1 else moments.new_empty(runs, 2, how.channels)
    rest = *passed(by), ctypes.c_int(relu), address(g), parts, how
    found.launch("norm_sums", runs * how.tiles, THREADS, 4 * THREADS * 16, grad, x, address(y), moments, *rest)
    if runs > 1:
        numbers = ctypes.c_int(runs), ctypes.c_int(sums.numel())
        found.launch("norm_total", -(-sums.numel() // CHANNELS), MERGING, 4 * MERGING, parts, *numbers, sums)
    return sums, g


def launch_gradient(
    found: Kernels, grad: Tensor, x: Tensor, moments: Tensor, sums: Tensor, by: Weights, relu: bool
) -> Tensor:
    out = torch.empty_like(x)
    how, runs = tiling(grad, x, out)
    numbers = *passed(by), ctypes.c_int(relu)
    found.launch("norm_gradient", runs * how.tiles, THREADS, 0, grad, x, moments, sums, *numbers, out, how)
    return out


def passed(by: Weights) -> tuple[Any, Any, ctypes.c_float]:
    weight, bias, eps = by
    return address(weight), address(bias), ctypes.c_float(eps)


def address(tensor: Tensor | None) -> Any:
    return ctypes.c_void_p(None) if tensor is None else tensor


# ----------------------------------------------------------------------------------------------------------- operators


def rows(x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """[n, C, ...] -> [n * ..., C]: a view of what is channels last."""
    return x.to(dtype or x.dtype).movedim(1, -1).reshape(-1, x.shape[1]).contiguous()


def shaped(y: Tensor, x: Tensor) -> Tensor:
    """The way back, for rows y of a tensor like x."""
    return y.view(x.movedim(1, -1).shape).movedim(-1, 1)


def like(x: Tensor) -> Tensor:
    return x.new_empty(x.movedim(1, -1).shape).movedim(-1, 1)


def kernels_for(x: Tensor) -> Kernels | None:
    return kernels.load("norm", x.device) if x.dtype in DTYPES and x.numel() else None


def _moments(x: Tensor) -> Tensor:
    found = kernels_for(x)
    return launch_moments(found, rows(x)) if found else moments_of(rows(x))


def _merge(parts: Tensor) -> Tensor:
    found = kernels_for(parts)
    return launch_merge(found, parts.contiguous()) if found else merged(parts)


def _apply(x: Tensor, added: Tensor | None, moments: Tensor, *by: Any) -> Tensor:
    found, x_rows = kernels_for(x), rows(x)
    more = None if added is None else rows(added, x.dtype)
    if found:
        return shaped(launch_apply(found, x_rows, more, moments, single(by), by[3]), x)
    return shaped(applied(x_rows, more, moments, by[:3], by[3]), x)


def _sums(grad: Tensor, x: Tensor, moments: Tensor, *by: Any) -> Tensor:
    found, g, x_rows = kernels_for(x), rows(grad, x.dtype), rows(x)
    if found:
        return launch_sums(found, g, x_rows, None, moments, single(by), by[3])[0]
    return sums_of(g, x_rows, moments, by[:3], by[3])


def _masked_sums(grad: Tensor, x: Tensor, y: Tensor, moments: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    found, g, x_rows, y_rows = kernels_for(x), rows(grad, x.dtype), rows(x), rows(y)
    if found:
        sums, kept = launch_sums(found, g, x_rows, y_rows, moments, (None, None, eps), True)
        assert kept is not None
    else:
        sums, kept = masked_sums_of(g, x_rows, y_rows, moments, eps)
    return sums, shaped(kept, x)


def _gradient(grad: Tensor, x: Tensor, moments: Tensor, sums: Tensor, *by: Any) -> Tensor:
    found, g, x_rows = kernels_for(x), rows(grad, x.dtype), rows(x)
    if found:
        return shaped(launch_gradient(found, g, x_rows, moments, sums.contiguous(), single(by), by[3]), x)
    return shaped(gradient_of(g, x_rows, moments, sums, by[:3], by[3]), x)


def single(by: tuple[Any, ...]) -> Weights:
    """Weight, bias, eps as the kernels have them."""
    weight, bias = (None if each is None else each.float().contiguous() for each in by[:2])
    return weight, bias, by[2]


def _operators() -> torch.library.Library:
    """As in barlow.dist, to whose library these belong."""
    library = torch.library.Library("barlow", "FRAGMENT")
    by = "Tensor? weight, Tensor? bias, float eps, bool relu"
    made: list[tuple[str, Any, Any]] = [
        ("norm_moments(Tensor x) -> Tensor", _moments, lambda x: wide(x.new_empty(2 * x.shape[1] + 1))),
        ("norm_merge(Tensor parts) -> Tensor", _merge, lambda parts: parts.new_empty(parts.shape[1])),
        (
            f"norm_apply(Tensor x, Tensor? added, Tensor moments, {by}) -> Tensor",
            _apply,
            lambda x, added, moments, *by: like(x),
        ),
        (
            f"norm_sums(Tensor grad, Tensor x, Tensor moments, {by}) -> Tensor",
            _sums,
            lambda grad, x, moments, *by: moments.new_empty(2, x.shape[1]),
        ),
        (
            "norm_masked_sums(Tensor grad, Tensor x, Tensor y, Tensor moments, float eps) -> (Tensor, Tensor)",
            _masked_sums,
            lambda grad, x, y, moments, eps: (moments.new_empty(2, x.shape[1]), like(x)),
        ),
        (
            f"norm_gradient(Tensor grad, Tensor x, Tensor moments, Tensor sums, {by}) -> Tensor",
            _gradient,
            lambda grad, x, moments, sums, *by: like(x),
        ),
    ]
    for schema, run, fake in made:
        library.define(schema)
        name = schema.split("(")[0]
        library.impl(name, run, "CompositeExplicitAutograd")
        torch.library.register_fake(f"barlow::{name}", fake, lib=library)
    return library


_library = _operators()  # as long as this lives, they do
