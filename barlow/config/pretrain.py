"""Pretraining: one backbone, two views, no labels."""

from __future__ import annotations

from dataclasses import dataclass, field

from barlow.config.checks import above_0, at_least_1, below_1, not_negative, of_splits, of_training, of_views, refuse
from barlow.config.parts import BarlowTwins, Data, Knn, Lars, Model, Views
from barlow.config.runs import Training


@dataclass(frozen=True)
class Pretrain(Training):
    """Pretrain a backbone without labels."""

    data: Data = field(default_factory=lambda: Data(dir="data/shapes"))
    views: Views = field(default_factory=Views)
    model: Model = field(default_factory=Model)
    objective: BarlowTwins = field(default_factory=BarlowTwins)
    optim: Lars = field(default_factory=Lars)
    knn: Knn = field(default_factory=Knn)

    def __post_init__(self) -> None:
        rates = ("optim.lr", "optim.lr_biases", "optim.weight_decay", "optim.eta", "optim.end_lr")
        rules = of_training(self) + at_least_1(self, ("knn.k", "views.size")) + not_negative(self, rates)
        rules += not_negative(self, ("optim.warmup_epochs", "objective.lambd", "objective.scale"))
        rules += not_negative(self, ("knn.every_epochs", "knn.size", "data.limit"))
        rules += above_0(self, ("model.width", "knn.temperature")) + below_1(self, ("optim.momentum",))
        projector = min(self.model.projector, default=0) >= 1
        rules += [("model.projector", projector, "the widths of its layers, as in 2048 2048 2048")]
        refuse(self, rules + of_splits(self, "data.splits", "unlabeled train") + of_views(self))
