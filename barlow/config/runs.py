"""What all runs have in common."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from barlow.config.parts import Checkpoint, Head, Labelled, Network, Preflight, Shards, Speed, Watch, Weak


@dataclass(frozen=True)
class Run:
    run: str = ""
    """Name of the run; a second command of the same name resumes it. Default: the recipe's name, and the
    stage's, but of pretraining."""
    runs_dir: str = "runs"
    """Where run folders are made."""
    seed: int = 0
    device: Literal["auto", "cpu", "cuda"] = "auto"
    data: Shards = field(default_factory=Shards)
    watch: Watch = field(default_factory=Watch)
    preflight: Preflight = field(default_factory=Preflight)


@dataclass(frozen=True)
class Training(Run):
    epochs: int = 100
    batch_size: int = 512
    """Global: over all ranks."""
    precision: Literal["auto", "bf16", "float32"] = "auto"
    """auto: bf16 on a GPU, float32 on a CPU."""
    log_every: int = 10
    """Steps between two printed lines; metrics.jsonl has every step."""
    speed: Speed = field(default_factory=Speed)
    checkpoint: Checkpoint = field(default_factory=Checkpoint)


@dataclass(frozen=True)
class Classifying(Training):
    """Training of a classifier, by whatever method."""

    from_run: str = ""
    """The run to start from, its folder or one of its checkpoints: a pretrained backbone's or a
    classifier's, whose head FixMatch takes too. Empty: from nothing."""
    labels: tuple[str, ...] = ()
    """Answered requests: CSV files with more labels."""
    size: int = 0
    """Side of an image as the network sees it, in pixels; 0: as the run's that it starts from."""
    labelled: Labelled = field(default_factory=Labelled)
    view: Weak = field(default_factory=Weak)
    model: Network = field(default_factory=Network)
    head: Head = field(default_factory=Head)
    evaluate_every: int = 1
    """Epochs between two evaluations on val (there is one at the end); 0: at the end alone."""
    val_limit: int = 0
    """Judge on so many images of val, drawn by the seed; 0: on all."""
