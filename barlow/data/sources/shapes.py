"""`shapes`: the embedded set, drawn on the fly. The splits are stretches of one endless sequence of pictures."""

from __future__ import annotations

import numpy as np

from barlow.data import shapes
from barlow.data.sources import Source, Split, choose

COUNTS = {"unlabeled": 5000, "train": 1000, "val": 1000}
SEED = 0
SIDE = 96


def read(splits: tuple[str, ...]) -> Source:
    return Source(shapes.CLASSES, tuple(_split(name) for name in choose(tuple(COUNTS), splits, "shapes")), side=SIDE)


def _split(name: str) -> Split:
    names = list(COUNTS)
    first = sum(COUNTS[earlier] for earlier in names[: names.index(name)])
    keys = range(first, first + COUNTS[name])
    # Classes take turns in the sequence.
    labels = np.arange(keys.start, keys.stop, dtype=np.int64) % len(shapes.CLASSES)
    if name == "unlabeled":
        labels = np.full(len(keys), -1, dtype=np.int64)
    return Split(name, keys, names=[f"shapes[{i}]" for i in keys], labels=labels, load=_image)


def _image(index: int) -> np.ndarray:
    return shapes.render(index, SEED, SIDE)[0]
