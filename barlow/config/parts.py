"""The sections that configs are made of."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True)
class Shards:
    dir: str = ""
    """Folder of shards, as launchers/shards.py writes it. Empty: that of the run to start from."""
    source: str = ""
    """Where the shards come from if the folder has none yet: shapes, folder:DIR, cifar10:DIR, stl10:DIR, nyu:DIR."""
    workers: int = 0
    """Decoding threads a rank; 0: this rank's share of the cores it may use."""
    stage: str = ""
    """A folder on each node's own disk to copy the shards to first, such as /local/scratch; empty: read them where they
    are."""
    mean: tuple[float, ...] = ()
    """What is taken from red, green and blue, in 0..1; empty: as the run to start from, or the mean of the data."""
    std: tuple[float, ...] = ()
    """What they are divided by; the same."""


@dataclass(frozen=True)
class Data(Shards):
    splits: tuple[str, ...] = ("unlabeled",)
    """Splits whose images are learned from without their labels."""
    limit: int = 0
    """Use only so many images of these splits, drawn by the seed; 0: all."""
    cache: Literal["none", "ram", "gpu"] = "none"
    """Where a rank keeps these splits decoded, as uint8, from the start on: in memory, or on its GPU."""


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
    norms: Literal["auto", "fused", "reference"] = "auto"
    """Batch norms with their ReLU and addition by our CUDA kernels, or by torch's operations; auto: by torch's, for
    nothing measured yet says that ours gain."""


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
class Network:
    """The backbone of a classifier; what is left open is as in the run that it starts from."""

    backbone: str = ""
    stem: Literal["", "imagenet", "small", "dense", "cifar"] = ""
    width: float = 0.0


@dataclass(frozen=True)
class Head:
    """What stands on the backbone: linear layers, each but the last with batch norm, ReLU and dropout."""

    widths: tuple[int, ...] = (8192, 8192, 8192)
    """Of all layers but the last, which has as many outputs as there are classes."""
    dropout: float = 0.1
    norm_input: bool = False
    """A batch norm of the features before the first layer."""


@dataclass(frozen=True)
class Labelled:
    """Which labels are used."""

    splits: tuple[str, ...] = ("train",)
    """Splits whose labels may be."""
    per_class: int = 0
    """So many of them a class, drawn by `seed`; 0: all."""
    seed: int = 0


@dataclass(frozen=True)
class Weak:
    """The weak view."""

    kind: Literal["crop", "shift"] = "crop"
    """crop: a random part, resized. shift: moved by up to an eighth of the side, mirrored at the border."""
    scale: tuple[float, float] = (0.25, 1.0)
    """Area of the crop, as a share of the image."""
    flip: float = 0.5
    """Probability."""


@dataclass(frozen=True)
class Strong:
    """The strong view: the weak one, two operations of its own for each image, then CutOut."""

    kind: Literal["randaugment", "ctaugment", "both"] = "both"
    """both: one of the two for each image, by a fair coin."""
    cutout: float = 0.5
    """Side of the square cut out, as a share of the view's; 0: none."""
    decay: float = 0.99
    """Of CTAugment's weights."""
    threshold: float = 0.8
    """The least weight of a bin that CTAugment draws from."""


@dataclass(frozen=True)
class Adam:
    lr: float = 1e-2
    """Of the head."""
    lr_backbone: float = 1e-5
    weight_decay: float = 1e-3
    schedule: Literal["constant", "cosine"] = "constant"
    """cosine: half a cosine down to 0 over the run."""


@dataclass(frozen=True)
class Sgd:
    lr: float = 0.03
    """Of the head; it falls as cos(7 pi k / 16 K) over the run's K steps."""
    lr_backbone: float = 0.03
    momentum: float = 0.9
    nesterov: bool = True
    weight_decay: float = 5e-4
    """Of tensors of two dimensions and more."""
