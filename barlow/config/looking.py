"""What is asked of a trained network: which images to have labelled, and what it looks at in them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from barlow.config.checks import at_least_1, not_negative, of_labels, of_run, of_splits, refuse
from barlow.config.parts import Labelled
from barlow.config.runs import Run

Choice = Literal["kmeans", "k-centre", "typical", "random"]
"""The rules by which images are chosen."""


@dataclass(frozen=True)
class Request(Run):
    """Choose the images whose labels would help most."""

    from_run: str = ""
    """The run whose backbone sees the images: its folder, or one of its checkpoints."""
    rule: Choice = "kmeans"
    """kmeans: farthest from the labelled ones' centres. k-centre: also far from each other. typical: amid images like
    it, of which none is labelled. random: the control."""
    count: int = 12800
    """Images to choose."""
    oracle: bool = False
    """Answer the request with the labels that the shards have: a simulated person."""
    pool: tuple[str, ...] = ("unlabeled",)
    """Splits to choose from; what is labelled already is never chosen."""
    limit: int = 0
    """Look only at so many images of the pool, drawn by the seed; 0: at all."""
    labels: tuple[str, ...] = ()
    """Earlier requests that were answered: CSV files."""
    size: int = 0
    """Side at which images are seen, in pixels; 0: as the run's that it starts from."""
    labelled: Labelled = field(default_factory=Labelled)

    def __post_init__(self) -> None:
        rules = of_run(self) + of_labels(self) + at_least_1(self, ("count",)) + not_negative(self, ("size", "limit"))
        refuse(self, rules + of_splits(self, "pool", "unlabeled"))


@dataclass(frozen=True)
class Visualize(Run):
    """Show what in an image speaks for a class."""

    from_run: str = ""
    """The classifier's run: its folder, or one of its checkpoints."""
    split: str = "val"
    ids: tuple[int, ...] = ()
    """Sample ids; none: `count` of the split, drawn by the seed, of as many classes as there are."""
    count: int = 16
    target: Literal["predicted", "label"] = "predicted"
    """The class that is looked for."""
    size: int = 0
    """Side at which images are seen, in pixels; 0: as the classifier was trained."""

    def __post_init__(self) -> None:
        refuse(self, of_run(self) + at_least_1(self, ("count",)) + not_negative(self, ("size",)))
