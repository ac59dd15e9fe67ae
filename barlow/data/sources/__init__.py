"""Where images come from: `shapes`, `folder:DIR`, `cifar10:DIR`, `stl10:DIR`, `nyu:DIR`, all read into one form."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from barlow.errors import UserError

KINDS = ("shapes", "folder", "cifar10", "stl10", "nyu")
SPLITS = ("unlabeled", "train", "val", "test")


@dataclass(frozen=True)
class Split:
    """A part of a source. Image i is `load(keys[i])`: uint8 [height, width, 3], RGB; both can go to another process."""

    name: str
    keys: Sequence[Any]
    names: Sequence[str]
    labels: np.ndarray
    """int64 [count]; -1: missing."""
    load: Callable[[Any], np.ndarray]
    measure: Callable[[Any], tuple[int, int]] | None = None
    """Width and height of an image from its header alone; None: the source's `side`."""
    folds: tuple[tuple[int, ...], ...] = ()
    """Fixed subsets of the split to train on (STL-10), as places in it."""

    @property
    def count(self) -> int:
        return len(self.keys)

    def image(self, i: int) -> np.ndarray:
        return self.load(self.keys[i])


@dataclass(frozen=True)
class Source:
    classes: tuple[str, ...]
    splits: tuple[Split, ...]
    side: int | None = None
    """Side of every image, where the source promises one; None: only the images know."""


def parse(spec: str) -> tuple[str, Path | None]:
    """`kind` or `kind:DIR`, checked as far as that is possible without looking at the disk."""
    kind, colon, folder = spec.partition(":")
    if kind not in KINDS:
        close = difflib.get_close_matches(kind, KINDS, n=1)
        hint = f"did you mean {close[0]}?" if close else "use shapes, folder:DIR, cifar10:DIR, stl10:DIR or nyu:DIR"
        raise UserError(f"unknown source {spec!r}: {hint}")
    if kind == "shapes":
        if colon:
            raise UserError(f"source {spec!r}: shapes makes its own images, write just shapes")
        return kind, None
    if not folder:
        raise UserError(f"source {spec!r} lacks its directory: write {kind}:DIR")
    return kind, Path(folder).expanduser().absolute()


def open_source(spec: str, splits: Sequence[str] = ()) -> Source:
    """The source that `spec` names, with these splits (default: all it has) in the order of SPLITS.

    Lists files and reads labels, but no images. What is missing or does not fit together is a UserError.
    """
    kind, folder = parse(spec)
    if folder is not None:
        if not folder.is_dir():
            what = "is not a directory" if folder.exists() else "no such directory"
            raise UserError(f"{folder}: {what} (source {spec})")
        if not any(folder.iterdir()):
            raise UserError(f"{folder}: the directory is empty (source {spec})")
    reader = importlib.import_module(f"barlow.data.sources.{kind}")
    source: Source = reader.read(folder, tuple(splits)) if folder else reader.read(tuple(splits))
    for split in source.splits:
        if not split.count:
            raise UserError(f"split {split.name} of {spec} has no images")
    return source


def choose(available: Sequence[str], wanted: Sequence[str], where: str) -> list[str]:
    """The wanted ones (none given: all) of the splits a source has, in the order of SPLITS."""
    for name in wanted:
        if name not in available:
            raise UserError(f"no split {name!r} in {where}: it has {', '.join(available)}")
    return [name for name in SPLITS if name in available and (not wanted or name in wanted)]
