"""A folder of shards, read: what is in it (index.json), and whether it still is what was written. No torch needed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from barlow.data.layout import FIELD, FIELDS, HEADER, SAMPLE, VERSION
from barlow.errors import UserError

INDEX_VERSION = 1
INDEX = "index.json"
PROGRESS = "progress.json"
"""Instead of index.json while the folder is being written."""


@dataclass(frozen=True)
class Shard:
    path: Path
    count: int
    first_id: int
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Split:
    name: str
    count: int
    first_id: int
    labeled: int
    """How many samples have a label."""
    files: tuple[Shard, ...]
    names: Path
    """Text file: where each sample came from, a line each, in the order of ids."""
    folds: tuple[tuple[int, ...], ...] = ()
    """Fixed subsets to train on (STL-10), as sample ids."""


@dataclass(frozen=True)
class Index:
    folder: Path
    source: str
    size: int
    """Side of every image in pixels."""
    encoding: str
    """raw, or jpeg with its quality: jpeg95."""
    classes: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    """A number a colour, in 0..1, over the pixels before JPEG; of `unlabeled` if there is one, else `train`."""
    splits: dict[str, Split]

    def normalising(self, mean: tuple[float, ...], std: tuple[float, ...]) -> Index:
        """The same, with these in place of the data's own where they are given."""
        return replace(self, mean=mean or self.mean, std=std or self.std)

    def images(self, splits: Iterable[str], limit: int = 0) -> int:
        """How many images these splits have, or the limit if that is less (0: none)."""
        count = sum(self.split(name).count for name in splits)
        return min(count, limit or count)

    def split(self, name: str) -> Split:
        if name not in self.splits:
            raise UserError(f"no split {name!r} in {self.folder}: it has {', '.join(self.splits)}")
        return self.splits[name]


def read_index(folder: str | Path) -> Index:
    """What the folder holds. A shard that is missing or cut short is a UserError that names it; no shard is read."""
    index = _read(Path(folder))
    for split in index.splits.values():
        for shard in split.files:
            problem = check_size(shard)
            if problem:
                raise UserError(f"{shard.path}: {problem}: the launchers/shards.py command that wrote it repairs it")
    return index


def check_size(shard: Shard) -> str:
    """What is wrong with the file as far as its size tells; empty: nothing."""
    if not shard.path.is_file():
        return "the shard is missing"
    size = shard.path.stat().st_size
    if size < shard.bytes:
        return f"the shard is cut short ({size} bytes of {shard.bytes})"
    return "" if size == shard.bytes else f"the shard is too long ({size} bytes instead of {shard.bytes})"


def verify(folder: str | Path) -> Iterator[tuple[str, str]]:
    """Read everything: yields each file's name and what is wrong with it (empty: nothing).

    FFCV itself notices neither a truncated file nor a flipped bit.
    """
    index = _read(Path(folder))
    next_id = 0
    for split in index.splits.values():
        names = split.names.read_text(errors="surrogateescape").count("\n") if split.names.is_file() else 0
        counted = sum(shard.count for shard in split.files)
        if split.first_id != next_id or counted != split.count:
            yield INDEX, f"{split.name} begins at id {split.first_id}, not {next_id}; has {counted} of {split.count}"
        yield split.names.name, "" if names == split.count else f"{names} names for {split.count} samples"
        labeled = []
        for shard in split.files:
            problem = check_size(shard) or _check_hash(shard)
            if not problem:
                problem, with_label = _check_contents(shard, next_id, index.size, len(index.classes))
            if not problem:
                labeled.append(with_label)
            yield shard.path.name, problem
            next_id += shard.count
        if len(labeled) == len(split.files) and sum(labeled) != split.labeled:
            yield INDEX, f"split {split.name}: {split.labeled} labels announced, {sum(labeled)} found"


def sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while piece := file.read(1 << 22):
            digest.update(piece)
    return digest.hexdigest()


def _check_hash(shard: Shard) -> str:
    return "" if sha256(shard.path) == shard.sha256 else "its bytes have changed since it was written (sha256 differs)"


def _check_contents(shard: Shard, first_id: int, size: int, classes: int) -> tuple[str, int]:
    """What the file says of itself against the index -> (problem, samples with a label)."""
    header = np.fromfile(shard.path, HEADER, count=1)
    fields = np.fromfile(shard.path, FIELD, count=len(FIELDS), offset=HEADER.itemsize)
    found = tuple((int(field["type"]), field["name"].tobytes().rstrip(b"\0")) for field in fields)
    if not len(header) or header[0]["version"] != VERSION or header[0]["fields"] != len(FIELDS) or found != FIELDS:
        return "not a shard with image, label and id", 0
    if header[0]["samples"] != shard.count:
        return f"{header[0]['samples']} samples, the index says {shard.count}", 0
    samples = np.fromfile(shard.path, SAMPLE, count=shard.count, offset=HEADER.itemsize + fields.nbytes)
    image, labels = samples["image"], samples["label"]
    if (image["width"] != size).any() or (image["height"] != size).any():
        return f"images of other sizes than {size}x{size}", 0
    ids = np.arange(first_id, first_id + shard.count)
    if shard.first_id != first_id or not np.array_equal(np.sort(samples["id"]), ids):
        return f"its ids are not {first_id} to {first_id + shard.count - 1}, each once", 0
    if ((labels < -1) | (labels >= classes)).any():
        return f"labels from {labels.min()} to {labels.max()}, where -1 to {classes - 1} are wanted", 0
    return "", int((labels >= 0).sum())


def _read(folder: Path) -> Index:
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder of shards: write one with launchers/shards.py SOURCE {folder}")
    path = folder / INDEX
    if not path.is_file():
        if (folder / PROGRESS).is_file():
            raise UserError(f"{folder} is not finished: run the command of launchers/shards.py that began it again")
        raise UserError(f"no {INDEX} in {folder}: write it with launchers/shards.py SOURCE {folder}")
    try:
        content = json.loads(path.read_text())
        version = content["version"]
        if version == INDEX_VERSION:
            return _index(folder, content)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: not an index of shards ({type(error).__name__}: {error})") from None
    raise UserError(f"{path} has version {version}, this code reads {INDEX_VERSION}: write the shards again")


def _index(folder: Path, content: dict[str, Any]) -> Index:
    return Index(
        folder=folder,
        source=content["source"],
        size=content["size"],
        encoding=content["encoding"],
        classes=tuple(content["classes"]),
        mean=tuple(content["mean"]),
        std=tuple(content["std"]),
        splits={name: _split(folder, name, split) for name, split in content["splits"].items()},
    )


def _split(folder: Path, name: str, content: dict[str, Any]) -> Split:
    files = tuple(
        Shard(folder / f["file"], f["count"], f["first_id"], f["bytes"], f["sha256"]) for f in content["files"]
    )
    names, folds = folder / content["names"], tuple(tuple(fold) for fold in content.get("folds", ()))
    return Split(name, content["count"], content["first_id"], content["labeled"], files, names, folds)
