"""`folder:DIR`: a folder a class, as torchvision's ImageFolder has it, perhaps within train/, val/, test/.

Images in unlabeled/, beside them, have no class.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np

from barlow.data.sources import SPLITS, Source, Split, choose
from barlow.data.sources.files import images_below, load, measure, subfolders
from barlow.errors import UserError


def read(folder: Path, splits: tuple[str, ...]) -> Source:
    """Classes are numbered over all labelled splits together, so a class that val lacks does not shift val's labels."""
    parts = _parts(folder)
    chosen = choose(tuple(parts), splits, str(folder))
    labelled = [place for name, place in parts.items() if name != "unlabeled"]
    classes = sorted({name for place in labelled for name in subfolders(folder / place)})
    return Source(tuple(classes), tuple(_split(folder, name, parts[name], classes) for name in chosen))


def _parts(folder: Path) -> dict[str, str]:
    """Split -> its folder below DIR ("." when DIR itself holds the classes)."""
    below = subfolders(folder)
    named = [name for name in SPLITS if name in below]
    # VOC has a class `train` beside its other classes: only a folder that holds folders is a split there.
    if named and (len(named) == len(below) or any(subfolders(folder / name) for name in named)):
        return {name: name for name in named}
    if below:
        return {"train": "."}
    if images_below(folder, "."):
        raise UserError(f"{folder} holds images but no folders: move them to {folder}/unlabeled, or one folder a class")
    raise UserError(f"no images in {folder}: it wants one folder a class, or train/, val/, test/, unlabeled/")


def _split(root: Path, name: str, place: str, classes: list[str]) -> Split:
    names, labels = [], []
    if name == "unlabeled":
        names = images_below(root, place)
        labels = [-1] * len(names)
    else:
        below = subfolders(root / place)
        if not below and images_below(root, place):
            raise UserError(f"{root / place} holds images but no class folders: only unlabeled/ may")
        for class_name in below:
            found = images_below(root, str(Path(place) / class_name))
            names += found
            labels += [classes.index(class_name)] * len(found)
    if not names:
        raise UserError(f"no images in {root / place}")
    return Split(
        name,
        keys=names,
        names=names,
        labels=np.array(labels, dtype=np.int64),
        load=partial(load, str(root)),
        measure=partial(measure, str(root)),
    )
