"""FixMatch's strong view: two operations of RandAugment or of CTAugment, then CutOut, on top of a weak view.

BarlowMatch's text (3.3.1) names both, "RandAugment and CTAugment followed by CutOut", and does not say how they go
together; here each image gets one of the two, by a fair coin of its own. Its code has RandAugment alone (kind
"randaugment"), on an image mirrored but not cropped. In FixMatch a weak view of its own lies beneath, and so here.
"""

from __future__ import annotations

import torch
from torch import Tensor

from barlow import config
from barlow.data import chance, cutout, operations, randaugment
from barlow.data.augment import constant
from barlow.data.ctaugment import Bins
from barlow.data.operations import Policy


@torch.no_grad()
def strong(
    images: Tensor, ids: Tensor, knobs: config.Strong, bins: Bins | None, seed: int, epoch: int, lane: int = 0
) -> Tensor:
    """uint8 [n, 3, h, w], weak views of the samples `ids` [n] -> the same, distorted. `bins`: of CTAugment, if used."""
    x = operations.apply(images, draw(ids, knobs, bins, seed, epoch, lane))
    share = constant((knobs.cutout,), torch.float64, images.device).expand(len(ids))
    return cutout.cut(x, cutout.centres(seed, epoch, ids, lane), share)


def draw(ids: Tensor, knobs: config.Strong, bins: Bins | None, seed: int, epoch: int, lane: int = 0) -> Policy:
    """The two operations of each sample, a function of (seed, epoch, id, lane) and of the bins as they are."""
    if knobs.kind == "randaugment":
        return randaugment.draw(seed, epoch, ids, lane)
    assert bins is not None
    learned = bins.draw(seed, epoch, ids, lane)
    if knobs.kind == "ctaugment":
        return learned
    word = chance.words(seed, chance.Use.STRONG, epoch, ids, slots=1, lane=lane)[:, 0, 0]
    return either(word < 1 << 31, randaugment.draw(seed, epoch, ids, lane), learned)


def either(first: Tensor, a: Policy, b: Policy) -> Policy:
    """Row by row: of a where `first` [n], else of b."""
    one = first[:, None]
    return Policy(
        op=torch.where(one, a.op, b.op),
        amount=torch.where(one, a.amount, b.amount),
        method=torch.where(one, a.method, b.method),
        centre=torch.where(one[..., None], a.centre, b.centre),
    )
