"""CutOut (DeVries and Taylor, 2017): a gray square somewhere in the image, the last step of FixMatch's strong view.

The centre lies anywhere in the image, so a square near the border is cut there, and hides less. The gray is 127, as in
FixMatch's CTAugment; its RandAugment blackens to the mean of the normalised image, which is nearly the same.
"""

from __future__ import annotations

import torch
from torch import Tensor

from barlow.data import chance

GRAY = 127


def centres(seed: int, epoch: int, ids: Tensor, lane: int = 0) -> Tensor:
    """float32 [n, 2]: row and column, as shares of the height and the width."""
    return chance.uniform(chance.words(seed, chance.Use.CUTOUT, epoch, ids, slots=1, lane=lane)[:, 0, :2])


def cut(images: Tensor, centre: Tensor, share: Tensor) -> Tensor:
    """uint8 [n, 3, h, w], each with a square hidden: `share` [n] of the shorter side, an even number of pixels."""
    h, w = images.shape[2:]
    half = torch.floor(share.to(torch.float64) * (min(h, w) / 2)).to(torch.int64)
    rows, columns = (within(centre[:, k], half, side) for k, side in enumerate((h, w)))
    return images.masked_fill((rows[:, :, None] & columns[:, None, :])[:, None], GRAY)


def within(centre: Tensor, half: Tensor, side: int) -> Tensor:
    """bool [n, side]: the pixels of a line that the square covers."""
    middle = torch.floor(centre.to(torch.float64) * side).to(torch.int64)[:, None]
    at = torch.arange(side, device=centre.device)
    return (at >= middle - half[:, None]) & (at < middle + half[:, None])
