"""The views of images: `make` for any kinds of view, `pair` for the two of Barlow Twins.

`apply` is their definition, on any device, and what the kernel is compared with that takes its place on a GPU. The
operations are those of augment.py, in the order of the Barlow Twins reference: crop, flip, colour jitter, grayscale,
blur, solarize, normalise. On a GPU nothing here waits for it.

A whole view of a natural image differs by 1.5/255 on average from the reference's, whose operations are PIL's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from barlow import config, kernels
from barlow.data import augment, fused_views
from barlow.data.augment import constant
from barlow.data.draw import Kind, Params, both, draw_kind
from barlow.errors import UserError
from barlow.kernels import Kernels

CHUNK = 32  # images at a time on a CPU: what is in work stays in its cache
By = Literal["auto", "fused", "reference"]  # as Speed.views


def pair(
    images: Tensor,
    ids: Tensor,
    views: config.Views,
    seed: int,
    epoch: int,
    mean: Sequence[float],
    std: Sequence[float],
    dtype: torch.dtype = torch.float32,
    by: By = "auto",
) -> list[Tensor]:
    """Both views [n, 3, size, size] of `images` [n, H, W, 3] uint8, whose sample ids are `ids` [n]; as `make`."""
    return make(images, ids, both(views), seed, epoch, mean, std, dtype, by)


def make(
    images: Tensor,
    ids: Tensor,
    kinds: Sequence[Kind],
    seed: int,
    epoch: int,
    mean: Sequence[float],
    std: Sequence[float],
    dtype: torch.dtype = torch.float32,
    by: By = "auto",
) -> list[Tensor]:
    """A view of each kind, channels last in memory: weak and strong ones, or large and small ones, are kinds too.

    The place of a kind is its lane: a view is a function of (seed, epoch, id, its place and kind) alone.
    """
    fused, _ = kernels_for(images.device, by)
    if fused and dtype in fused_views.DTYPES:
        return fused_views.make(fused, images, ids, kinds, seed, epoch, mean, std, dtype)
    height, width = images.shape[1:3]
    drawn = [draw_kind(kind, lane, seed, epoch, ids, height, width) for lane, kind in enumerate(kinds)]
    return [apply(images, p, kind.ranges.size, mean, std, dtype) for p, kind in zip(drawn, kinds, strict=True)]


def way(device: torch.device, by: By = "auto") -> str:
    """How views are made here, for the log; a UserError if it is asked for what cannot be had."""
    fused, why = kernels_for(device, by)
    return "views by our CUDA kernel" if fused else f"views by torch's operations ({why})"


def kernels_for(device: torch.device, by: By) -> tuple[Kernels | None, str]:
    """The kernels, or why there are none."""
    if by == "reference":
        return None, "as asked"
    fused, why = kernels.load("views", device), kernels.why_not("views", device)
    if by == "fused" and not fused:
        raise UserError(f"--speed.views fused: there is no kernel here ({why}); give auto or reference")
    return fused, why


@torch.no_grad()
def apply(
    images: Tensor,
    params: Params,
    size: int,
    mean: Sequence[float],
    std: Sequence[float],
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """The views [n, 3, size, size], normalised, channels last, of `images` [n, H, W, 3] uint8, both on one device.

    Computed in float32, or in float64 where that is the `dtype` asked for. Autocast does not reach inside; TF32, if
    someone has switched it on for matrix products, does (errors of 1e-3).
    """
    device, work = images.device, torch.float64 if dtype == torch.float64 else torch.float32
    centre = constant(tuple(mean), work, device)[:, None, None]
    spread = constant(tuple(std), work, device)[:, None, None]
    shape = (len(images), 3, size, size)
    out = torch.empty(shape, dtype=dtype, device=device, memory_format=torch.channels_last)
    step = CHUNK if device.type == "cpu" else max(len(images), 1)
    with torch.autocast(device.type, enabled=False):
        for start in range(0, len(images), step):
            rows = slice(start, start + step)
            p = params[rows]
            x = augment.crop(images[rows], p.boxes, p.flip, size, work)
            x = augment.jitter(x, p.order, p.factors)
            x = augment.grayscale(x, p.gray)
            x = augment.blur(x, p.sigma)
            x = augment.solarize(x, p.solarize)
            out[rows] = x.sub_(centre).div_(spread)
    return out
