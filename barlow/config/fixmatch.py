"""FixMatch: a classifier learns from a few labelled images and, where it is sure, from its own answers."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from barlow.config.checks import (
    above_0,
    at_least_1,
    below_1,
    not_negative,
    of_classifier,
    of_splits,
    probabilities,
    refuse,
)
from barlow.config.parts import Data, Sgd, Strong
from barlow.config.runs import Classifying


@dataclass(frozen=True)
class FixMatch(Classifying):
    """Train a classifier on labelled and unlabelled images together."""

    epochs: int = 40
    """Passes over the unlabelled images."""
    batch_size: int = 64
    """Labelled images of a step, over all ranks."""
    mu: int = 7
    """Unlabelled images for each labelled one of a step."""
    threshold: float = 0.9
    """An answer counts from this probability on."""
    lambda_u: float = 1.0
    """Weight of the unlabelled loss."""
    temperature: float = 1.0
    """Logits are divided by it before the probability is compared with the threshold."""
    batches: Literal["one", "two"] = "one"
    """one: all views go through the network at once. two: strong views by themselves, and batch norms remember the
    statistics of the others alone, which are those of the images that will be judged."""
    align: float = 0.0
    """Decay of the mean answer by which answers are weighed, so that each class comes as often as among the labels,
    those that were asked for left out (ReMixMatch's distribution alignment); 0: they count as they are."""
    ema: float = 0.0
    """Decay of the average of the weights, which is what is evaluated then; 0: none."""
    data: Data = field(default_factory=Data)
    strong: Strong = field(default_factory=Strong)
    optim: Sgd = field(default_factory=Sgd)

    def __post_init__(self) -> None:
        rules = of_classifier(self) + at_least_1(self, ("mu",))
        rules += probabilities(self, ("threshold", "strong.cutout", "strong.threshold", "strong.decay"))
        rules += not_negative(self, ("lambda_u", "optim.lr", "optim.lr_backbone", "optim.weight_decay", "data.limit"))
        rules += above_0(self, ("temperature",)) + below_1(self, ("align", "ema", "optim.momentum"))
        refuse(self, rules + of_splits(self, "data.splits", "unlabeled train"))
