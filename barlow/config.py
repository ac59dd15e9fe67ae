"""Every knob. Frozen, torch-free values: a recipe is one, the command line overrides it by name, nothing else does."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from math import inf
from operator import attrgetter
from typing import Literal

from barlow.errors import UserError


@dataclass(frozen=True)
class Data:
    dir: str = "data/shapes"
    """Folder of shards, as launchers/shards.py writes it."""
    source: str = ""
    """Where the shards come from if the folder has none yet: shapes, folder:DIR, cifar10:DIR, stl10:DIR, nyu:DIR."""
    splits: tuple[str, ...] = ("unlabeled",)
    """Splits to pretrain on."""
    workers: int = 0
    """Decoding threads a rank; 0: this rank's share of the cores it may use."""
    cache: Literal["none", "ram", "gpu"] = "none"
    """Where a rank keeps its splits decoded, as uint8, from the start on: in memory, or on its GPU."""
    stage: str = ""
    """A folder on each node's own disk to copy the shards to first, such as /local/scratch; empty: read them where they
    are."""


@dataclass(frozen=True)
class View:
    """One view of the pair: each number is a probability, unless it says otherwise."""

    flip: float = 0.5
    jitter: float = 0.8
    gray: float = 0.2
    blur: float = 1.0
    solarize: float = 0.0


@dataclass(frozen=True)
class Views:
    size: int = 96
    """Side of a view in pixels."""
    scale: tuple[float, float] = (0.08, 1.0)
    """Area of the crop, as a share of the image."""
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    """Width over height of the crop."""
    brightness: float = 0.4
    contrast: float = 0.4
    saturation: float = 0.2
    hue: float = 0.1
    sigma: tuple[float, float] = (0.1, 2.0)
    """Range of the blur's standard deviation, in pixels."""
    a: View = field(default_factory=View)
    b: View = field(default_factory=lambda: View(blur=0.1, solarize=0.2))


@dataclass(frozen=True)
class Model:
    backbone: str = "resnet18"
    """Any ResNet or Wide-ResNet of timm."""
    stem: Literal["imagenet", "small", "dense", "cifar"] = "small"
    """imagenet: 7x7 stride 2, pool. small: 3x3 stride 2, pool. dense: 3x3 stride 1, pool. cifar: dense without pool."""
    width: float = 1.0
    """Multiplies the channels of every stage."""
    zero_init_residual: bool = False
    """Start every residual branch at zero."""
    projector: tuple[int, ...] = (8192, 8192, 8192)
    """Widths of the projector's layers."""
    init: str = ""
    """A run folder or a checkpoint whose weights to start from."""


@dataclass(frozen=True)
class BarlowTwins:
    lambd: float = 0.0051
    """Weight of the off-diagonal term."""
    scale: float = 1.0
    """Factor of the whole loss."""
    form: Literal["auto", "dxd", "nxn"] = "auto"
    """Compute through the cross-correlation (D x D) or the Gram matrices (N x N); auto: the cheaper."""


@dataclass(frozen=True)
class Lars:
    lr: float = 0.2
    """Learning rate of the weights at a global batch of 256; it scales with the batch."""
    lr_biases: float = 0.0048
    """The same for biases and norms (1-d parameters)."""
    weight_decay: float = 1e-6
    momentum: float = 0.9
    eta: float = 0.001
    """Trust coefficient."""
    clip: bool = False
    """Never let the adapted rate of a layer exceed the learning rate."""
    warmup_epochs: float = 10
    end_lr: float = 0.001
    """Where the cosine ends, as a share of the peak."""
    backend: Literal["auto", "fused", "apex", "foreach"] = "auto"
    """Our CUDA kernels, NVIDIA's apex, or torch's foreach functions; auto: the first that this machine has."""


@dataclass(frozen=True)
class Speed:
    """How a step is carried out, not what it computes; auto: what pays on this device."""

    compile: Literal["auto", "on", "off"] = "auto"
    """torch.compile for backbone, projector and loss; auto: on a GPU."""
    graphs: Literal["auto", "off"] = "auto"
    """CUDA graphs of what is compiled; auto: where one rank trains alone on a GPU."""
    views: Literal["auto", "fused", "reference"] = "auto"
    """Views by our CUDA kernel, or by torch's operations."""


@dataclass(frozen=True)
class Checkpoint:
    every_steps: int = 500
    """Save after so many steps (and at the end)."""
    every_minutes: float = 10.0
    """Save also when the last save began so many minutes ago; 0: by steps alone."""
    keep: int = 3
    """Newest checkpoints kept."""
    keep_every: int = 0
    """Keep for good those of every so many steps; 0: none."""


@dataclass(frozen=True)
class Watch:
    """When a rank that does not move is ended, so that its job starts again."""

    seconds: float = 300.0
    """Without a step for so long, a rank has stopped."""
    start: float = 1800.0
    """The same until the first step, and for an evaluation: imports, compilation, whole images."""


@dataclass(frozen=True)
class Preflight:
    """What each node must have before training starts."""

    skip: bool = False
    clock: float = 30.0
    """Seconds that a node's clock may differ from the first one's."""
    bandwidth: float = 0.0
    """Least GB/s of an all-reduce between all ranks; 0: measured and told, not required."""
    hashes: bool = True
    """Read each node's shards and compare their hashes."""


@dataclass(frozen=True)
class Knn:
    every_epochs: int = 10
    """Evaluate on train and val after so many epochs (and at the end); 0: never."""
    k: int = 20
    temperature: float = 0.07
    size: int = 0
    """Side at which whole images are looked at, in pixels; 0: the views'. Crops enlarge what is in a picture, so a
    larger side than the views' often shows more."""
    baselines: bool = False
    """At the end also raw pixels and the untrained backbone."""


@dataclass(frozen=True)
class Pretrain:
    """Pretrain a backbone without labels."""

    run: str = ""
    """Name of the run; a second command of the same name resumes it. Default: the recipe's name."""
    runs_dir: str = "runs"
    """Where run folders are made."""
    epochs: int = 100
    batch_size: int = 512
    """Global: over all ranks."""
    seed: int = 0
    device: Literal["auto", "cpu", "cuda"] = "auto"
    precision: Literal["auto", "bf16", "float32"] = "auto"
    """auto: bf16 on a GPU, float32 on a CPU."""
    log_every: int = 10
    """Steps between two printed lines; metrics.jsonl has every step."""
    data: Data = field(default_factory=Data)
    views: Views = field(default_factory=Views)
    model: Model = field(default_factory=Model)
    objective: BarlowTwins = field(default_factory=BarlowTwins)
    optim: Lars = field(default_factory=Lars)
    speed: Speed = field(default_factory=Speed)
    checkpoint: Checkpoint = field(default_factory=Checkpoint)
    watch: Watch = field(default_factory=Watch)
    preflight: Preflight = field(default_factory=Preflight)
    knn: Knn = field(default_factory=Knn)

    def __post_init__(self) -> None:
        check(self)
        check_views(self.views)


def check(c: Pretrain) -> None:
    """Refuse values that no run can have."""
    counts = ("epochs", "log_every", "checkpoint.every_steps", "checkpoint.keep", "knn.k", "views.size")
    rules = [(name, attrgetter(name)(c) >= 1, "1 or more") for name in counts]
    rates = ("optim.lr", "optim.lr_biases", "optim.weight_decay", "optim.eta", "optim.warmup_epochs", "optim.end_lr")
    not_negative = [*rates, "objective.lambd", "objective.scale", "data.workers", "knn.every_epochs", "knn.size"]
    not_negative += ["checkpoint.every_minutes", "checkpoint.keep_every", "preflight.clock", "preflight.bandwidth"]
    rules += [(name, 0 <= attrgetter(name)(c) < inf, "0 or more") for name in not_negative]
    above_zero = ("model.width", "knn.temperature", "watch.seconds", "watch.start")
    rules += [(name, 0 < attrgetter(name)(c) < inf, "a number above 0") for name in above_zero]
    rules += [
        ("batch_size", c.batch_size >= 2, "2 or more, for a batch is standardised over its images"),
        ("optim.momentum", 0 <= c.optim.momentum < 1, "0 or more, and less than 1"),
        ("model.projector", min(c.model.projector, default=0) >= 1, "the widths of its layers, as in 2048 2048 2048"),
        ("data.splits", bool(c.data.splits), "at least one split, as in unlabeled train"),
        ("run", "/" not in c.run and not c.run.startswith("."), "a plain name; --runs-dir says where its folder goes"),
    ]
    for name, ok, give in rules:
        if not ok:
            raise UserError(f"--{name.replace('_', '-')} is {attrgetter(name)(c)!r}: give {give}")


def check_views(v: Views) -> None:
    """Refuse what no view can be drawn with."""
    rules = [
        ("scale", 0 < v.scale[0] <= v.scale[1] <= 1, "two shares of the image, as in 0.08 1.0"),
        ("ratio", 0 < v.ratio[0] <= v.ratio[1] < inf, "two widths over height, the lesser first, as in 0.75 1.33"),
        ("sigma", 0 <= v.sigma[0] <= v.sigma[1] <= 2, "two numbers of pixels up to 2, the lesser first, as in 0.1 2.0"),
        ("hue", 0 <= v.hue <= 0.5, "0 to 0.5, which is half the circle to either side"),
    ]
    rules += [(name, 0 <= getattr(v, name) < inf, "0 or more") for name in ("brightness", "contrast", "saturation")]
    probabilities = [f"{view}.{knob.name}" for view in ("a", "b") for knob in fields(View)]
    rules += [(name, 0 <= attrgetter(name)(v) <= 1, "a probability, 0 to 1") for name in probabilities]
    for name, ok, give in rules:
        if not ok:
            raise UserError(f"--views.{name} is {attrgetter(name)(v)}: give {give}")
