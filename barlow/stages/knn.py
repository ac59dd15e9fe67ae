"""k nearest neighbours on frozen features: how good is what was learned, with nothing more to train.

An image votes for its class with exp(cosine / temperature); images without a label (-1) neither vote nor count."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from barlow import config
from barlow.data.loader import Loader
from barlow.data.shards import Index
from barlow.stages.outputs import Encode, outputs


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


def features(
    encode: Encode, index: Index, split: str, size: int, device: torch.device, workers: int
) -> tuple[Tensor, Tensor]:
    """Features and labels of the labelled images of a split. Each rank does its share; all get the whole."""
    loader = Loader(index, [split], workers=workers, pin=device.type == "cuda")
    labelled = np.flatnonzero(loader.samples.labels >= 0)
    labels = torch.from_numpy(loader.samples.labels[labelled].astype(np.int64))
    return outputs(encode, loader, labelled, index, size, device), labels.to(device)
