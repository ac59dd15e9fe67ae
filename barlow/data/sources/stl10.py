"""`stl10:DIR`: STL-10's binary files. The test set is `val`; the ten folds of the training set are kept."""

from __future__ import annotations

from functools import lru_cache, partial
from pathlib import Path

import cv2
import numpy as np

from barlow.data.sources import Source, Split, choose
from barlow.errors import UserError

SIDE = 96
FILES = {"unlabeled": "unlabeled", "train": "train", "val": "test"}


def read(root: Path, splits: tuple[str, ...]) -> Source:
    inner = root / "stl10_binary"
    root = inner if inner.is_dir() else root
    classes = tuple(_text(root / "class_names.txt").split())
    names = choose(tuple(FILES), splits, str(root))
    return Source(classes, tuple(_split(root, name, len(classes)) for name in names), side=SIDE)


def _split(root: Path, split: str, classes: int) -> Split:
    file = f"{FILES[split]}_X.bin"
    images = _images(str(root / file))
    count = len(images)
    labels = np.full(count, -1, dtype=np.int64)
    if split != "unlabeled":
        labels = _labels(root / f"{FILES[split]}_y.bin", count, classes)
    return Split(
        split,
        keys=range(count),
        names=[f"{file}[{i}]" for i in range(count)],
        labels=labels,
        load=partial(_image, str(root / file)),
        folds=_folds(root / "fold_indices.txt", count) if split == "train" else (),
    )


def _image(path: str, i: int) -> np.ndarray:
    # Stored column by column: [colour, x, y] -> [x, y, colour] -> [y, x, colour]; six times as fast as in numpy.
    return cv2.transpose(cv2.merge(list(_images(path)[i])))


@lru_cache(maxsize=4)
def _images(path: str) -> np.ndarray:
    """[count, 3, 96, 96] uint8, memory-mapped: the unlabeled file is 2.6 GB."""
    size = _size(Path(path))
    if size == 0 or size % (3 * SIDE * SIDE):
        raise UserError(f"{path}: {size} bytes are no whole number of 96x96 images: cut short, or not STL-10")
    return np.memmap(path, dtype=np.uint8, mode="r").reshape(-1, 3, SIDE, SIDE)


def _labels(path: Path, count: int, classes: int) -> np.ndarray:
    """1 to 10 in the file, 0 to 9 here."""
    _size(path)
    labels = np.fromfile(path, dtype=np.uint8).astype(np.int64) - 1
    if len(labels) != count:
        raise UserError(f"{path}: {len(labels)} labels for {count} images")
    if labels.min() < 0 or labels.max() >= classes:
        raise UserError(f"{path}: labels from {labels.min() + 1} to {labels.max() + 1}, STL-10 has 1 to {classes}")
    return labels


def _folds(path: Path, count: int) -> tuple[tuple[int, ...], ...]:
    try:
        folds = tuple(tuple(int(word) for word in line.split()) for line in _text(path).splitlines() if line.strip())
    except ValueError:
        raise UserError(f"{path}: not lines of image numbers") from None
    if any(not 0 <= i < count for fold in folds for i in fold):
        raise UserError(f"{path}: names images beyond the {count} of the training set")
    return folds


def _size(path: Path) -> int:
    if not path.is_file():
        raise UserError(f"{path}: no such file; STL-10's binaries have it (--splits takes a part of them)")
    return path.stat().st_size


def _text(path: Path) -> str:
    _size(path)
    return path.read_text()
