"""python benchmarks/minimal.py FOLDER BATCH MODEL [lightly]: what one would write without this project.

ImageFolder, a DataLoader with workers, two augmented views by torchvision, timm's network, Barlow Twins' loss (by hand,
or lightly's, with lightly's transform), SGD. For startup.py and memory.py: it says "step" and the time after each step,
and waits for a line on its input, or ends with it."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any

import timm
import torch
from torch import nn
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

SIZE = 96


class Twice:
    def __init__(self, transform: Callable[[Any], Any]) -> None:
        self.transform = transform

    def __call__(self, image: Any) -> list[Any]:
        return [self.transform(image), self.transform(image)]


def views() -> Callable[[Any], Any]:
    steps = [v2.RandomResizedCrop(SIZE), v2.RandomHorizontalFlip(), v2.ColorJitter(0.4, 0.4, 0.2, 0.1)]
    steps += [v2.GaussianBlur(9), v2.ToImage(), v2.ToDtype(torch.float32, scale=True)]
    return Twice(v2.Compose(steps))


def loss_of(za: torch.Tensor, zb: torch.Tensor) -> torch.Tensor:
    za, zb = (nn.functional.batch_norm(z, None, None, training=True) for z in (za, zb))
    c = za.T @ zb / len(za)
    return (c.diagonal() - 1).square().sum() + 0.005 * (c - c.diagonal().diag()).square().sum()


def main(folder: str, batch: int, name: str, with_lightly: bool) -> None:
    transform, loss = views(), loss_of
    if with_lightly:
        from lightly.loss import BarlowTwinsLoss
        from lightly.transforms import BYOLTransform, BYOLView1Transform, BYOLView2Transform

        transform = BYOLTransform(BYOLView1Transform(input_size=SIZE), BYOLView2Transform(input_size=SIZE))
        loss = BarlowTwinsLoss()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    backbone: Any = timm.create_model(name, num_classes=0)
    n = backbone.num_features
    model = nn.Sequential(backbone, nn.Linear(n, 512), nn.BatchNorm1d(512), nn.ReLU(), nn.Linear(512, 512)).to(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    data = ImageFolder(folder, transform)
    loader = torch.utils.data.DataLoader(data, batch, shuffle=True, num_workers=2, drop_last=True)
    for pair, _ in loader:
        error = loss(*(model(view.to(device)) for view in pair))
        error.backward()
        optimizer.step()
        optimizer.zero_grad()
        error.item()
        print("step", time.monotonic(), flush=True)
        if not sys.stdin.readline():
            break


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), sys.argv[3], "lightly" in sys.argv[4:])
