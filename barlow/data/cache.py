"""The samples of a rank decoded once, from the start on in its memory or on its GPU: steps pay for no decoding.

What comes out is what the Loader gives, to the bit. As uint8, 512,000 images of 96 px take 14.2 GB.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable
from contextlib import closing

import numpy as np
import torch
from torch import Tensor

from barlow.data.loader import FAR_AHEAD, Batch, Loader, ahead
from barlow.errors import UserError

CHUNK = 1 << 24
"""Bytes of images that are decoded at a time: some times this much passes through memory of its own."""
Told = Callable[[int, int], None]
"""Called while images are decoded: how many are, and of how many."""


def cached(
    loader: Loader, where: str, device: torch.device, memory: int, told: Told, training: int = 0
) -> Loader | Cache:
    """The loader itself for "none"; else what gives the same batches from decoded images: "ram", of which this rank may
    take `memory` bytes, or "gpu", of which training will yet take `training`. That there is no room is a UserError
    before anything is decoded."""
    if where == "none":
        return loader
    if where == "gpu" and device.type != "cuda":
        raise UserError("--data.cache gpu: this run is on a CPU: give --data.cache ram, or none")
    need = len(loader) * loader.size**2 * 3
    if where == "ram":
        free, whose, choice = memory, "this rank may take", "ask for more memory (--mem), or give --data.cache none"
    else:
        free = torch.cuda.mem_get_info(device)[0] - training
        whose, choice = "its GPU has left beside gradients and momenta", "give --data.cache ram, or none"
    if need > free:
        what = f"{len(loader):,} images of {loader.size} px take {need / 1e9:,.2f} GB"
        raise UserError(f"--data.cache {where}: {what} decoded, {whose} {max(free, 0) / 1e9:,.2f} GB: {choice}")
    if where == "ram":
        return loader.over(decoded(loader, torch.device("cpu"), told).numpy())
    return Cache(loader, decoded(loader, device, told))


def decoded(loader: Loader, device: torch.device, told: Told) -> Tensor:
    """All images in the order of their positions, uint8 [len, size, size, 3] on the device; never twice in memory."""
    count, size = len(loader), loader.size
    images = torch.empty(count, size, size, 3, dtype=torch.uint8, device=device)
    step = max(1, CHUNK // (size * size * 3))
    chunks = [np.arange(first, min(first + step, count)) for first in range(0, count, step)]
    done = 0
    with closing(loader.batches(chunks)) as batches:
        for batch in batches:
            images[done : done + len(batch.ids)].copy_(batch.images, non_blocking=True)
            done += len(batch.ids)
            told(done, count)
    return images


class Cache:
    """Decoded images on a device; batches as the loader gives them, but there. Nothing waits for a GPU: picking images
    out is work for the stream that is current where a batch is asked for."""

    def __init__(self, loader: Loader, images: Tensor) -> None:
        self.size = loader.size
        self.images = images
        self.labels, self.ids = (
            torch.from_numpy(column).to(images.device) for column in (loader.samples.labels, loader.samples.ids)
        )

        self.row = np.arange(len(images))  # what asks it for a position that is not there is told here, not by a GPU

    def __len__(self) -> int:
        return len(self.images)

    def batches(self, positions: Iterable[np.ndarray]) -> Generator[Batch, None, None]:
        """A batch for each array of positions, in memory of its own. What goes wrong with the positions is raised here,
        after the batches before it."""
        with closing(ahead(positions, FAR_AHEAD)) as orders:
            for wanted in orders:
                yield self.pick(wanted)

    def pick(self, positions: np.ndarray) -> Batch:
        at = torch.from_numpy(self.row[positions])
        if self.images.is_cuda:
            at = at.pin_memory().to(self.images.device, non_blocking=True)
        return Batch(*(column.index_select(0, at) for column in (self.images, self.labels, self.ids)))
