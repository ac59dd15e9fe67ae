"""Training a classifier on labels: on a pretrained backbone, or from nothing."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from barlow.config.checks import not_negative, of_classifier, refuse
from barlow.config.parts import Adam
from barlow.config.runs import Classifying


@dataclass(frozen=True)
class Finetune(Classifying):
    """Train a classifier on labelled images."""

    form: Literal["full", "head", "linear"] = "full"
    """full: backbone and head learn. head: the backbone stays as it is. linear: the same, with one linear layer."""
    optim: Adam = field(default_factory=Adam)

    def __post_init__(self) -> None:
        rules = of_classifier(self) + not_negative(self, ("optim.lr", "optim.lr_backbone", "optim.weight_decay"))
        refuse(self, rules)
