"""Training a classifier on labels: on a pretrained backbone, or from nothing."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from barlow.config.checks import not_negative, of_classifier, of_labels, of_training, refuse
from barlow.config.parts import Adam, Head, Labelled, Network, Shards, Weak
from barlow.config.runs import Training


@dataclass(frozen=True)
class Finetune(Training):
    """Train a classifier on labelled images."""

    from_run: str = ""
    """The run whose backbone to start from: its folder, or one of its checkpoints. Empty: from nothing."""
    form: Literal["full", "head", "linear"] = "full"
    """full: backbone and head learn. head: the backbone stays as it is. linear: the same, with one linear layer."""
    labels: tuple[str, ...] = ()
    """Answered requests: CSV files with more labels."""
    size: int = 0
    """Side of an image as the network sees it, in pixels; 0: as the run's that it starts from."""
    data: Shards = field(default_factory=Shards)
    labelled: Labelled = field(default_factory=Labelled)
    view: Weak = field(default_factory=Weak)
    model: Network = field(default_factory=Network)
    head: Head = field(default_factory=Head)
    optim: Adam = field(default_factory=Adam)
    evaluate_every: int = 1
    """Epochs between two evaluations on val (there is one at the end); 0: at the end alone."""
    val_limit: int = 0
    """Judge on so many images of val, drawn by the seed; 0: on all."""

    def __post_init__(self) -> None:
        rules = of_training(self) + of_labels(self) + of_classifier(self)
        refuse(
            self,
            rules
            + not_negative(
                self, ("optim.lr", "optim.lr_backbone", "optim.weight_decay", "evaluate_every", "val_limit")
            ),
        )
