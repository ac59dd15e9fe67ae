"""The reference recipe of Barlow Twins as its users run it, written from the paper's description: what we compare with.

Images from an ImageFolder, both views made by PIL in a DataLoader's workers; a step in NCHW, eager, float16 with a
GradScaler on a GPU, the loss through the D x D matrix, LARS in a loop over the tensors. The network is the one it is
compared with, so that both do the same work. cuDNN chooses its algorithms as each has it set.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from PIL import Image, ImageFilter, ImageOps
from torch import Tensor, nn

Views = Sequence[Tensor]
Loss = Callable[[Tensor, Tensor], Tensor]


@contextmanager
def cudnn(deterministic: bool, benchmark: bool) -> Iterator[None]:
    """How cuDNN chooses its algorithms, which is set for the whole process, while one contestant runs."""
    flags = torch.backends.cudnn
    before = flags.deterministic, flags.benchmark
    flags.deterministic, flags.benchmark = deterministic, benchmark
    try:
        yield
    finally:
        flags.deterministic, flags.benchmark = before


# To be put around a step: one that is timed, and the one before it that warms up.
as_published = cudnn(deterministic=False, benchmark=True)
as_trained = cudnn(deterministic=True, benchmark=False)  # ours, by stages/pretrain.py


class Step:
    """A step of training, called with two views [n, 3, h, w]."""

    def __init__(self, backbone: nn.Module, projector: nn.Module, loss: Loss | None, device: torch.device) -> None:
        model = nn.Sequential(backbone, projector)
        self.model = model.to(device).to(memory_format=torch.contiguous_format)
        self.loss = loss or dxd(projector, device)
        self.optimizer = LoopLars(self.model.parameters())
        self.device = device
        self.scaler = torch.amp.GradScaler(device.type, enabled=device.type == "cuda")

    @as_published
    def __call__(self, views: Views) -> Tensor:
        a, b = (view.to(self.device, non_blocking=True) for view in views)
        self.optimizer.zero_grad()
        with torch.autocast(self.device.type, torch.float16, enabled=self.device.type == "cuda"):
            loss = self.loss(self.model(a), self.model(b))
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return loss.detach()


def dxd(projector: nn.Module, device: torch.device, lambd: float = 0.0051) -> Loss:
    """The paper's pseudocode: batch norm without affine, one product of matrices, the diagonal and the rest of it."""
    width = [layer.out_features for layer in projector.modules() if isinstance(layer, nn.Linear)][-1]
    norm = nn.BatchNorm1d(width, affine=False).to(device)

    def loss(z_a: Tensor, z_b: Tensor) -> Tensor:
        c = norm(z_a).T @ norm(z_b) / len(z_a)
        on_diagonal = (torch.diagonal(c) - 1).pow(2).sum()
        off_diagonal = c.flatten()[:-1].view(width - 1, width + 1)[:, 1:].pow(2).sum()
        return on_diagonal + lambd * off_diagonal

    return loss


class LoopLars(torch.optim.Optimizer):
    """LARS tensor by tensor, for tensors of two dimensions and more; plain momentum for the rest."""

    def __init__(self, params: Iterator[nn.Parameter], lr: float = 0.1) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": 1e-6, "momentum": 0.9, "eta": 0.001})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                g = p.grad
                if p.ndim > 1:
                    g = g.add(p, alpha=group["weight_decay"])
                    p_norm, g_norm, one = p.norm(), g.norm(), torch.ones_like(g[0, 0].sum())
                    q = torch.where(g_norm > 0, group["eta"] * p_norm / g_norm, one)
                    g = g.mul(torch.where(p_norm > 0, q, one))
                state = self.state[p]
                if "mu" not in state:
                    state["mu"] = torch.zeros_like(p)
                state["mu"].mul_(group["momentum"]).add_(g)
                p.add_(state["mu"], alpha=-group["lr"])


class Pair:
    """Both views of a picture, by PIL."""

    def __init__(self, size: int, mean: Sequence[float], std: Sequence[float]) -> None:
        self.views = [view(size, mean, std, blur, solarize) for blur, solarize in ((1.0, 0.0), (0.1, 0.2))]

    def __call__(self, image: Image.Image) -> list[Tensor]:
        return [make(image) for make in self.views]


def view(size: int, mean: Sequence[float], std: Sequence[float], blur: float, solarize: float) -> Any:
    from torchvision import transforms as t

    steps = [t.RandomResizedCrop(size, interpolation=t.InterpolationMode.BICUBIC), t.RandomHorizontalFlip()]
    steps += [t.RandomApply([t.ColorJitter(0.4, 0.4, 0.2, 0.1)], 0.8), t.RandomGrayscale(0.2)]
    steps += [t.RandomApply([t.Lambda(blurred)], blur), t.RandomApply([t.Lambda(ImageOps.solarize)], solarize)]
    return t.Compose([*steps, t.ToTensor(), t.Normalize(mean, std)])


def blurred(image: Image.Image) -> Image.Image:
    return image.filter(ImageFilter.GaussianBlur(random.uniform(0.1, 2.0)))


def batches(files: str, pair: Pair, batch: int, workers: int, pin: bool) -> Generator[Views, None, None]:
    """Of random images, without end: the epochs of so few as are here would end every few steps, and with each the
    workers run dry."""
    from torch.utils.data import DataLoader, RandomSampler
    from torchvision.datasets import ImageFolder

    folder = ImageFolder(files, pair)
    sampler = RandomSampler(folder, replacement=True, num_samples=1 << 40)
    loader: Any = DataLoader(folder, batch, sampler=sampler, num_workers=workers, pin_memory=pin)
    for views, _ in loader:
        yield views
