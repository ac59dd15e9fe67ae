"""`nyu:DIR`: 800 classes of 96 px images, {unlabeled,train,val}/{i}.png with {split}_label_tensor.pt.

Missing labels are -1.
"""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path

import numpy as np

from barlow.data.sources import Source, Split, choose
from barlow.data.sources.files import load
from barlow.errors import UserError

CLASSES = 800


def read(root: Path, splits: tuple[str, ...]) -> Source:
    available = [name for name in ("unlabeled", "train", "val") if (root / name).is_dir()]
    if not available:
        raise UserError(f"no images in {root}: it wants unlabeled/, train/ or val/ with 0.png, 1.png, ...")
    names = choose(available, splits, str(root))
    return Source(tuple(str(c) for c in range(CLASSES)), tuple(_split(root, name) for name in names), side=96)


def _split(root: Path, split: str) -> Split:
    stems = (entry.name[:-4] for entry in os.scandir(root / split) if entry.name.endswith(".png"))
    numbers = sorted(int(stem) for stem in stems if stem.isdecimal() and stem == str(int(stem)))
    if not numbers:
        raise UserError(f"no images in {root / split}: it wants 0.png, 1.png, ...")
    labels = np.full(numbers[-1] + 1, -1, dtype=np.int64)
    path = root / f"{split}_label_tensor.pt"
    if path.exists():
        given = _labels(path)
        if len(given) > len(labels):
            raise UserError(f"{path}: {len(given)} labels, but the last image is {split}/{numbers[-1]}.png")
        labels[: len(given)] = given
    names = [f"{split}/{i}.png" for i in numbers]
    return Split(split, keys=names, names=names, labels=labels[numbers], load=partial(load, str(root)))


def _labels(path: Path) -> np.ndarray:
    import torch

    try:
        labels = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises nearly anything on a broken file
        raise UserError(f"{path}: torch cannot load it ({type(error).__name__})") from None
    if not isinstance(labels, torch.Tensor):
        raise UserError(f"{path}: a {type(labels).__name__}, where a tensor is wanted")
    if labels.dim() != 1 or labels.is_floating_point():
        raise UserError(f"{path}: {labels.dtype} of shape {list(labels.shape)}, where one integer an image is wanted")
    low, high = (int(labels.min()), int(labels.max())) if len(labels) else (0, 0)
    if low < -1 or high >= CLASSES:
        raise UserError(f"{path}: labels from {low} to {high}, where 0 to 799 or -1 are wanted")
    return labels.long().numpy()
