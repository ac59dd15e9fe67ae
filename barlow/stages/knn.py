"""k nearest neighbours on frozen features: how good is what was learned, with nothing more to train.

An image votes for its class with exp(cosine / temperature); images without a label (-1) neither vote nor count."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from barlow import config, dist
from barlow.data.loader import Loader
from barlow.data.shards import Index

Encode = Callable[[Tensor], Tensor]  # [n, 3, h, w] normalised -> [n, d]


def evaluate(
    backbone: nn.Module, index: Index, knobs: config.Knn, size: int, device: torch.device, workers: int
) -> Iterator[tuple[str, float]]:
    """Yields knn_top1 of the backbone's features; nothing where train or val has no labels."""
    was_training = backbone.training
    backbone.eval()
    try:
        top1 = accuracy(backbone, index, knobs, size, device, workers)
    finally:
        backbone.train(was_training)
    if top1 is not None:
        yield "knn_top1", top1


def baselines(
    untrained: nn.Module, index: Index, knobs: config.Knn, size: int, device: torch.device, workers: int
) -> Iterator[tuple[str, float]]:
    """What no learning at all gives: the pixels themselves, and the same network as it was initialised."""
    for name, encode in (("knn_top1_pixels", pixels), ("knn_top1_untrained", untrained.eval())):
        top1 = accuracy(encode, index, knobs, size, device, workers)
        if top1 is not None:
            yield name, top1


def pixels(images: Tensor) -> Tensor:
    return images.flatten(1)


def accuracy(
    encode: Encode, index: Index, knobs: config.Knn, size: int, device: torch.device, workers: int
) -> float | None:
    """Top-1 of val by the neighbours in train, in per cent."""
    if any(name not in index.splits or index.splits[name].labeled == 0 for name in ("train", "val")):
        return None
    train, train_labels = features(encode, index, "train", size, device, workers)
    val, val_labels = features(encode, index, "val", size, device, workers)
    predicted = classify(train, train_labels, val, len(index.classes), knobs.k, knobs.temperature)
    return 100 * (predicted == val_labels).double().mean().item()


def classify(train: Tensor, labels: Tensor, queries: Tensor, classes: int, k: int, temperature: float) -> Tensor:
    """The class of each query by its k nearest neighbours in train."""
    train = F.normalize(train.float(), dim=1)
    predicted = []
    for chunk in queries.split(1024):  # 1024 x train similarities at a time
        similarity, nearest = (F.normalize(chunk.float(), dim=1) @ train.T).topk(min(k, len(train)), dim=1)
        votes = torch.zeros(len(chunk), classes, dtype=torch.float64, device=train.device)
        votes.scatter_add_(1, labels[nearest], (similarity.double() / temperature).exp())
        predicted.append(votes.argmax(1))
    return torch.cat(predicted)


@torch.no_grad()
def features(
    encode: Encode, index: Index, split: str, size: int, device: torch.device, workers: int, batch: int = 256
) -> tuple[Tensor, Tensor]:
    """Features and labels of the labelled images of a split. Each rank does its share; all get the whole."""
    loader = Loader(index, [split], workers=workers, pin=device.type == "cuda")
    share = -(-len(loader) // dist.world_size())  # equal shares; the last ones repeat the last image
    mine = np.minimum(np.arange(dist.rank() * share, (dist.rank() + 1) * share), len(loader) - 1)
    mean = torch.tensor(index.mean, device=device).view(1, 3, 1, 1)
    std = torch.tensor(index.std, device=device).view(1, 3, 1, 1)
    found, labels = [], []
    for part in loader.batches(np.split(mine, range(batch, len(mine), batch))):
        images = part.images.to(device, non_blocking=True).permute(0, 3, 1, 2).float() / 255  # [n, 3, h, w]
        if images.shape[-1] != size:
            images = F.interpolate(images, (size, size), mode="bicubic", antialias=True, align_corners=False).clamp(
                0, 1
            )
        found.append(encode((images - mean) / std).float())
        labels.append(part.labels.to(device))
    whole = dist.gather(torch.cat(found))[: len(loader)]
    all_labels = dist.gather(torch.cat(labels))[: len(loader)]
    return whole[all_labels >= 0], all_labels[all_labels >= 0]
