"""RandAugment as FixMatch uses it: two of fourteen operations, each with a strength drawn anew for every image.

The text (FixMatch, appendix) is what is done here: operations with replacement, every strength uniform in its range,
every operation carried out. Where published code differs from it:

- Google's FixMatch and kekmodel's, which BarlowMatch runs as RandAugmentMC(n=2, m=10), carry an operation out with
  probability 1/2 only, at one of nine strengths: v/10 of the range for v in 1..9. So a quarter of their images is left
  as it is, and a rotation by -30..30 degrees comes in steps of 3 degrees, without 0.
- Google's code enhances (brightness, contrast, colour, sharpness) by 0.28..1.72, so it also brightens, keeps 1 to 4
  bits in posterize, and moves by up to 9 pixels whatever the size; kekmodel's has the ranges of the text.
- What comes into the picture from outside is gray in Google's code; here it is black, PIL's own, as in kekmodel's.
"""

from __future__ import annotations

import torch
from torch import Tensor

from barlow.data import chance
from barlow.data.augment import constant
from barlow.data.draw import below
from barlow.data.operations import Op, Policy

RANGES: dict[Op, tuple[float, float]] = {
    Op.AUTOCONTRAST: (1, 1),
    Op.BRIGHTNESS: (0.05, 0.95),
    Op.COLOR: (0.05, 0.95),
    Op.CONTRAST: (0.05, 0.95),
    Op.EQUALIZE: (1, 1),
    Op.IDENTITY: (0, 0),
    Op.POSTERIZE: (4, 9),  # below 9, cut to whole bits: 4 to 8 of them
    Op.ROTATE: (-30, 30),
    Op.SHARPNESS: (0.05, 0.95),
    Op.SHEAR_X: (-0.3, 0.3),
    Op.SHEAR_Y: (-0.3, 0.3),
    Op.SOLARIZE: (0, 1),
    Op.TRANSLATE_X: (-0.3, 0.3),
    Op.TRANSLATE_Y: (-0.3, 0.3),
}


def draw(seed: int, epoch: int, ids: Tensor, lane: int = 0, depth: int = 2) -> Policy:
    """What the samples `ids` [n] get; a row depends on (seed, epoch, id, lane) alone, to the bit."""
    words = chance.words(seed, chance.Use.RANDAUGMENT, epoch, ids, slots=depth, lane=lane)  # [n, depth, 4]
    which = below(words[..., 0], len(RANGES))
    op = constant(tuple(RANGES), torch.int64, ids.device)[which]
    amount = scaled(which, words[..., 1].to(torch.float64) * 2.0**-32, tuple(RANGES.values()))
    return Policy(op, amount, torch.zeros_like(op), torch.zeros(*op.shape, 2, device=ids.device))


def scaled(which: Tensor, level: Tensor, ranges: tuple[tuple[float, float], ...]) -> Tensor:
    """float32: levels in 0..1, float64, as amounts of the range that `which` says."""
    low, high = constant(sum(ranges, ()), torch.float64, level.device).view(-1, 2).unbind(1)
    return (level * (high - low)[which] + low[which]).to(torch.float32)
