"""What a network says of whole images: its features, or a classifier's logits, and how often these are right."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from barlow import dist
from barlow.data.loader import Loader
from barlow.data.shards import Index

Encode = Callable[[Tensor], Tensor]  # [n, 3, h, w] normalised -> [n, d]


@torch.no_grad()
def outputs(
    encode: Encode,
    loader: Loader,
    positions: np.ndarray,
    index: Index,
    size: int,
    device: torch.device,
    beat: Callable[[], object] = lambda: None,
    batch: int = 256,
) -> Tensor:
    """What `encode` makes of the images at `positions` [m] as they are, resized to `size`: [m, d] float32, in their
    order. Each rank does its share; all get the whole. `beat` is called after each batch."""
    share = -(-len(positions) // dist.world_size())  # equal shares; the last ones repeat the last image
    mine = positions[np.minimum(np.arange(dist.rank() * share, (dist.rank() + 1) * share), len(positions) - 1)]
    mean = torch.tensor(index.mean, device=device).view(1, 3, 1, 1)
    std = torch.tensor(index.std, device=device).view(1, 3, 1, 1)
    found = []
    for part in loader.batches(np.split(mine, range(batch, len(mine), batch))):
        images = whole(part.images.to(device, non_blocking=True), size)
        found.append(encode((images - mean) / std).float())
        beat()
    return dist.gather(torch.cat(found))[: len(positions)]


def whole(images: Tensor, size: int) -> Tensor:
    """uint8 [n, h, w, 3] -> [n, 3, size, size] in 0..1."""
    x = images.permute(0, 3, 1, 2).float() / 255
    if x.shape[-1] == size:
        return x
    return F.interpolate(x, (size, size), mode="bicubic", antialias=True, align_corners=False).clamp(0, 1)


def top(logits: Tensor, labels: Tensor, ks: Sequence[int]) -> list[float]:
    """In per cent, how often the label is among the k most likely classes, for each k; fewer classes than k: 100."""
    best = logits.topk(min(max(ks), logits.shape[1]), dim=1).indices  # [n, k]
    hits = best == labels[:, None]
    return [100 * hits[:, :k].any(dim=1).double().mean().item() for k in ks]
