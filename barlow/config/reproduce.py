"""A paper's whole chain: what each of its stages is asked to do, and how much smaller all of it may be made."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from barlow.config.checks import above_0, refuse
from barlow.config.finetune import Finetune
from barlow.config.fixmatch import FixMatch
from barlow.config.looking import Choice, Request, Visualize
from barlow.config.parts import Data, Labelled
from barlow.config.pretrain import Pretrain
from barlow.config.runs import Run


@dataclass(frozen=True)
class Reproduce:
    """Run a paper's chain, then print its table beside the paper's."""

    run: str = ""
    """Name of the chain; its runs are called NAME,LINK. The same command again goes on with it."""
    runs_dir: str = "runs"
    """Where run folders are made."""
    scale: float = 1.0
    """Below 1: a rehearsal with so much less data, fewer epochs and narrower layers."""
    seed: int = 0
    device: Literal["auto", "cpu", "cuda"] = "auto"
    data: Data = field(default_factory=Data)
    """Of all stages; mean and std as well."""
    labelled: Labelled = field(default_factory=Labelled)
    """Of all stages."""
    answered: tuple[str, ...] = ()
    """The request, answered by people: CSV files. None: the labels that the shards have, if they have them."""
    rules: tuple[Choice, ...] = ("kmeans",)
    """How images are chosen for the request: once, and trained with, for each of these."""
    pretrain: Pretrain = field(default_factory=Pretrain)
    finetune: Finetune = field(default_factory=Finetune)
    fixmatch: FixMatch = field(default_factory=FixMatch)
    request: Request = field(default_factory=Request)
    visualize: Visualize = field(default_factory=Visualize)

    def __post_init__(self) -> None:
        refuse(self, above_0(self, ("scale",)))
        plain = "/" not in self.run and "," not in self.run and not self.run.startswith(".")
        refuse(
            self,
            [
                ("run", plain, "a plain name, without commas; --runs-dir says where its folders go"),
                ("scale", self.scale <= 1, "1 or less"),
                ("rules", len(set(self.rules)) == len(self.rules) > 0, "one rule or more, each once"),
                ("rules", len(self.rules) == 1 or not self.answered, "one: --answered is to the request of one rule"),
            ],
        )


@dataclass(frozen=True)
class Table(Run):
    """What the runs of a chain have come to, beside what the paper says."""

    title: str = ""
    rows: tuple[str, ...] = ()
    """Of the table: the methods."""
    columns: tuple[str, ...] = ()
    """Which labels: those there were, and those asked for by each rule."""
    runs: tuple[str, ...] = ()
    """Names of the runs, row by row and column by column."""
    paper: tuple[float, ...] = ()
    """Of each row: train accuracy, val accuracy, and val accuracy with the labels asked for."""
    notes: tuple[str, ...] = ()
