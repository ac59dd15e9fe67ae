"""CTAugment, "control theory augment" (ReMixMatch 3.2.2, FixMatch's appendix): as strong as the model can bear.

Two operations an image, each uniform among nineteen. The range of each one's parameter is cut into bins, whose weights
m begin at 1. In every step each labelled image goes through two operations with uniform bins (`probe`); omega, how near
the model's answer comes to the label, is drawn into the weights of the bins that were used (`update`), by
m <- rho m + (1 - rho) omega. Unlabelled images draw bins in proportion to weights, but none of 0.8 or less (`draw`).

Where the texts and the code of Google's FixMatch and ReMixMatch disagree:

- Omega. ReMixMatch's text: 1 - sum |p_model - p| / 2L. With L classes that is never below 1 - 1/L, so from five classes
  on no weight can fall to 0.8, and nothing is ever learned. The code, and so here: 1 - sum |p_model - p| / 2, which is
  the probability of the label.
- Bins to draw from. The text: weights above 0.8, in proportion. It does not say what happens where none is; the code
  compares (m + 1 - rho) / max(m + 1 - rho) instead, always. Here: the text, and where it leaves no bin the code.
- Ranges. Brightness, contrast, colour and sharpness: 0..1 in the text, 0.1..2 in the code. Translation: up to 0.3 of
  the side in the text; 0.3 of a pixel in the code, which does nothing. Posterize: 17 bins in the text, 8 in the code.
  Here: the text.
- The model that answers a probe is, in the code, the average of the weights (EMA), in evaluation mode.
- Several uses of one bin in a step: the code updates one after another, and so here, though all at once: see `update`.
  (Its code for ImageNet averages them.)
"""

from __future__ import annotations

import torch
from torch import Tensor

from barlow.data import chance
from barlow.data.draw import below
from barlow.data.operations import Op, Policy
from barlow.data.randaugment import scaled
from barlow.data.resample import METHODS

BINS = 17
DEPTH = 2
RANGES: dict[Op, tuple[float, float]] = {  # in the order of Op, which is that of the rows of the weights
    Op.IDENTITY: (0, 0),
    Op.AUTOCONTRAST: (0, 1),
    Op.EQUALIZE: (0, 1),
    Op.INVERT: (0, 1),
    Op.POSTERIZE: (1, 9),  # below 9, cut to whole bits: 1 to 8 of them
    Op.SOLARIZE: (0, 1),
    Op.BRIGHTNESS: (0, 1),
    Op.CONTRAST: (0, 1),
    Op.COLOR: (0, 1),
    Op.SHARPNESS: (0, 1),
    Op.SMOOTH: (0, 1),
    Op.BLUR: (0, 1),
    Op.ROTATE: (-45, 45),
    Op.SHEAR_X: (-0.3, 0.3),
    Op.SHEAR_Y: (-0.3, 0.3),
    Op.TRANSLATE_X: (-0.3, 0.3),
    Op.TRANSLATE_Y: (-0.3, 0.3),
    Op.RESCALE: (0.5, 1),
    Op.CUTOUT: (0, 0.5),
}


def match(probabilities: Tensor, labels: Tensor) -> Tensor:
    """Omega, float64 [n]: 1 - sum |p_model - p| / 2 for answers [n, classes] that add up to 1 and labels [n] int64."""
    return probabilities.gather(1, labels[:, None])[:, 0].to(torch.float64)


class Bins:
    """The weights; all that CTAugment learns, and what a checkpoint has to hold of it.

    weights | float64 [19, 17] | a row an operation (the identity's is never used)
    methods | float64 [6]      | of the filters that rescale may use
    """

    def __init__(self, device: torch.device | str = "cpu", decay: float = 0.99, threshold: float = 0.8) -> None:
        self.decay, self.threshold = decay, threshold
        self.weights = torch.ones(len(Op), BINS, dtype=torch.float64, device=device)
        self.methods = torch.ones(len(METHODS), dtype=torch.float64, device=device)

    def state_dict(self) -> dict[str, Tensor]:
        return {"weights": self.weights.clone(), "methods": self.methods.clone()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.weights = state["weights"].to(self.weights).view_as(self.weights).clone()
        self.methods = state["methods"].to(self.methods).view_as(self.methods).clone()

    def draw(self, seed: int, epoch: int, ids: Tensor, lane: int = 0) -> Policy:
        """What the samples `ids` [n] get by the weights as they are; else a row depends on (seed, epoch, id, lane)."""
        words = drawn(seed, chance.Use.CTAUGMENT, epoch, ids, lane)
        op = below(words[..., 0], len(Op))
        place = pick(words[..., 1], self.open(self.weights)[op])
        method = pick(words[..., 3], self.open(self.methods).expand(*op.shape, -1))
        return policy(op, place, method, words)

    def probe(self, seed: int, epoch: int, ids: Tensor, lane: int = 0) -> tuple[Policy, Tensor]:
        """The same with all bins alike, for labelled images; and which were taken, int64 [n, 2, 3]: Op, bin, method."""
        words = drawn(seed, chance.Use.PROBE, epoch, ids, lane)
        op, place, method = (below(words[..., k], n) for k, n in ((0, len(Op)), (1, BINS), (3, len(METHODS))))
        return policy(op, place, method, words), torch.stack((op, place, method), dim=-1)

    def open(self, weights: Tensor) -> Tensor:
        """Weights [..., bins] with 0 for those that are not to be drawn: see the beginning of this file."""
        above = weights * (weights > self.threshold)
        relative = weights + (1 - self.decay)
        relative = relative / relative.amax(dim=-1, keepdim=True)
        relative = relative * (relative >= self.threshold)
        return torch.where((above > 0).any(dim=-1, keepdim=True), above, relative)

    @torch.no_grad()
    def update(self, chosen: Tensor, omega: Tensor) -> None:
        """Learn from probes: what was `chosen` [N, 2, 3] and how well the model bore it, `omega` [N].

        Of a global batch in its global order, all ranks get the same bits. One after another, each use of a bin maps
        its weight m to rho m + (1 - rho) omega. Such maps compose to maps of their kind, so neighbours are joined two
        by two until one is left: the same but for the last bits, in few steps, and in an order that is always the same.
        """
        uses = chosen.flatten(0, 1)
        op, place, method = uses.unbind(1)
        place = torch.where(op == Op.IDENTITY, -1, op * BINS + place)
        method = torch.where(op == Op.RESCALE, method, -1)
        bins, methods = (torch.arange(x.numel(), device=x.device) for x in (self.weights, self.methods))
        used = torch.cat((place[:, None] == bins, method[:, None] == methods), dim=1)  # [uses, bins]
        shift = (1 - self.decay) * omega.to(torch.float64).repeat_interleave(chosen.shape[1], output_size=len(uses))
        factors = torch.ones_like(used, dtype=torch.float64).masked_fill_(used, self.decay)
        shifts = shift[:, None] * used
        while len(factors) > 1:
            if len(factors) % 2:
                factors, shifts = padded(factors, 1.0), padded(shifts, 0.0)
            shifts = shifts[0::2] * factors[1::2] + shifts[1::2]
            factors = factors[0::2] * factors[1::2]
        m = torch.cat((self.weights.flatten(), self.methods))
        m = m * factors.prod(dim=0) + shifts.sum(dim=0)  # of the one row that is left, or none
        self.weights, self.methods = m[: len(bins)].view_as(self.weights), m[len(bins) :]


def drawn(seed: int, use: chance.Use, epoch: int, ids: Tensor, lane: int) -> Tensor:
    """Words [n, 2, 8]: operation, bin, place in the bin, method; the centre's row and column, two to spare."""
    return chance.words(seed, use, epoch, ids, slots=2 * DEPTH, lane=lane).view(len(ids), DEPTH, 8)


def pick(bits: Tensor, weights: Tensor) -> Tensor:
    """int64 [...]: an index into weights [..., k] in 0..1, drawn in proportion to them, in whole numbers of 2^-24."""
    upto = torch.floor(weights * 2.0**24).to(torch.int64).cumsum(dim=-1)
    return (upto <= below(bits, upto[..., -1])[..., None]).sum(dim=-1)


def policy(op: Tensor, place: Tensor, method: Tensor, words: Tensor) -> Policy:
    level = (place + words[..., 2].to(torch.float64) * 2.0**-32) * (1 / BINS)
    ranges = tuple(RANGES[op] for op in Op)
    return Policy(op, scaled(op, level, ranges), method, chance.uniform(words[..., 4:6]))


def padded(x: Tensor, value: float) -> Tensor:
    return torch.cat((x, torch.full_like(x[:1], value)))
