"""What all runs have in common."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from barlow.config.parts import Checkpoint, Preflight, Speed, Watch


@dataclass(frozen=True)
class Run:
    run: str = ""
    """Name of the run; a second command of the same name resumes it. Default: the recipe's name."""
    runs_dir: str = "runs"
    """Where run folders are made."""
    seed: int = 0
    device: Literal["auto", "cpu", "cuda"] = "auto"
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
