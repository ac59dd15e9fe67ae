"""`cifar10:DIR`: CIFAR-10 as its authors' python batches, or as JPEG files train/CLASS/N.jpg and test/CLASS/N.jpg.

The test set is `val`.
"""

from __future__ import annotations

import pickle
from dataclasses import replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np

from barlow.data.sources import Source, Split, choose, folder
from barlow.errors import UserError

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
FILES = {"train": tuple(f"data_batch_{i}" for i in range(1, 6)), "val": ("test_batch",)}


def read(root: Path, splits: tuple[str, ...]) -> Source:
    for place in (root, root / "cifar-10-batches-py", root / "cifar10"):
        if (place / FILES["train"][0]).is_file():
            chosen = choose(tuple(FILES), splits, str(place))
            return Source(CLASSES, tuple(_batches(place, name) for name in chosen), side=32)
        if (place / "train").is_dir() and (place / "test").is_dir():
            chosen = choose(tuple(FILES), splits, str(place))
            source = folder.read(place, tuple("test" if name == "val" else name for name in chosen))
            if source.classes != CLASSES:
                raise UserError(f"{place}: its class folders are not CIFAR-10's: use folder:{place}")
            return replace(source, splits=tuple(_test_is_val(split) for split in source.splits))
    raise UserError(f"{root} is not CIFAR-10: that has data_batch_1 to 5 and test_batch, or train/CLASS and test/CLASS")


def _test_is_val(split: Split) -> Split:
    return replace(split, name="val") if split.name == "test" else split


def _batches(root: Path, split: str) -> Split:
    keys, names, labels = [], [], []
    for file in FILES[split]:
        images, classes, filenames = _batch(str(root / file))
        keys += [(file, row) for row in range(len(images))]
        names += [f"{file}/{name}" for name in filenames]
        labels += classes
    return Split(split, keys, names, np.array(labels, dtype=np.int64), partial(_image, str(root)))


def _image(root: str, key: tuple[str, int]) -> np.ndarray:
    file, row = key
    images, _, _ = _batch(f"{root}/{file}")
    return np.ascontiguousarray(images[row].reshape(3, 32, 32).transpose(1, 2, 0))


@lru_cache(maxsize=2)
def _batch(path: str) -> tuple[np.ndarray, list[int], list[str]]:
    """Images [n, 3072] uint8 (a plane a colour), labels and file names of one batch file."""
    try:
        with open(path, "rb") as file:
            content = _Unpickler(file, encoding="latin1").load()
        images, labels, names = np.asarray(content["data"]), list(map(int, content["labels"])), content["filenames"]
    except FileNotFoundError:
        raise UserError(f"{path}: no such file (CIFAR-10 has data_batch_1 to 5 and test_batch)") from None
    except Exception as error:  # unpickling raises anything
        raise UserError(f"{path}: not a CIFAR-10 python batch ({type(error).__name__})") from None
    if images.dtype != np.uint8 or images.shape != (len(labels), 3072) or len(names) != len(labels):
        raise UserError(f"{path}: {len(labels)} labels and {len(names)} names do not fit images {images.shape}")
    if labels and not 0 <= min(labels) <= max(labels) < len(CLASSES):
        raise UserError(f"{path}: labels from {min(labels)} to {max(labels)}, CIFAR-10 has 0 to 9")
    return images, labels, names


class _Unpickler(pickle.Unpickler):
    """A pickle may run any code; a CIFAR-10 batch needs no more than to build an array."""

    def find_class(self, module: str, name: str) -> Any:
        modules = ("numpy", "numpy.core.multiarray", "numpy._core.multiarray", "_codecs")
        if module in modules and name in ("_reconstruct", "ndarray", "dtype", "encode"):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"{module}.{name}")
