"""What is asked for, whether it can be had, and which shards it makes."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np

from barlow.data.sources import Source, Split, parse
from barlow.data.writing import beton, encode
from barlow.data.writing.encode import Encoding
from barlow.data.writing.pool import InOrder
from barlow.data.writing.record import Settings
from barlow.errors import UserError

SIDES = (8, 2048)
SAMPLES = 16
"""Images a split that are encoded beforehand, to know the space needed."""
HEADERS = 512
"""Image headers that a process reads in one go."""


@dataclass(frozen=True)
class Request:
    source: str
    out: Path
    size: int | None = None
    """Side in pixels; None: as the images are, if all are square and equal."""
    jpeg_quality: int | None = 95
    """None: raw pixels."""
    shards: int = 1
    """Files a split."""
    workers: int = 0
    """Processes; 0: all cores this process may use."""
    splits: tuple[str, ...] = ()
    """Empty: all the source has."""

    @property
    def encoding(self) -> str:
        return "raw" if self.jpeg_quality is None else f"jpeg{self.jpeg_quality}"

    def settings(self) -> Settings:
        """What decides the bytes written."""
        kind, folder = parse(self.source)
        return {
            "source": kind if folder is None else f"{kind}:{folder}",
            "size": self.size,
            "encoding": self.encoding,
            "shards": self.shards,
            "splits": sorted(self.splits),
        }


@dataclass(frozen=True)
class Job:
    """One shard to be: samples `first` to `first + count` of its split."""

    split: Split
    file: str
    first: int
    count: int
    first_id: int


def check(request: Request) -> None:
    quality, size = request.jpeg_quality, request.size
    if quality is not None and not 1 <= quality <= 100:
        raise UserError(f"JPEG quality {quality}: give 1 to 100, or --raw")
    if size is not None and not SIDES[0] <= size <= SIDES[1]:
        raise UserError(f"size {size}: give {SIDES[0]} to {SIDES[1]} pixels")
    if request.shards < 1:
        raise UserError(f"{request.shards} shards: give at least 1")
    if request.workers < 0:
        raise UserError(f"{request.workers} workers: give 1 or more, or 0 for all cores")


def jobs(source: Source, shards: int) -> list[Job]:
    """Every split in as many stretches of nearly equal length; ids run through the splits."""
    made: list[Job] = []
    next_id = 0
    for split in source.splits:
        if shards > split.count:
            raise UserError(f"{shards} shards, but split {split.name} has {split.count} images: give fewer --shards")
        bounds = [split.count * i // shards for i in range(shards + 1)]
        for i, (first, end) in enumerate(pairwise(bounds)):
            file = f"{split.name}-{i:04d}-of-{shards:04d}.beton"
            made.append(Job(split, file, first, end - first, next_id + first))
        next_id += split.count
    return made


def side(request: Request, source: Source, in_order: InOrder) -> int:
    """The side of every image to write; where it is neither asked for nor promised, all headers are read."""
    if request.size is not None:
        return request.size
    if source.side is not None:
        return source.side
    first: tuple[str, tuple[int, int]] | None = None
    for name, size in _sizes(source, in_order):
        first = first or (name, size)
        if size != first[1]:
            a, b = (f"{n} {w}x{h}" for n, (w, h) in (first, (name, size)))
            raise UserError(f"the images differ in size ({a}, {b}): give --size N to bring all to one size")
    assert first is not None
    width, height = first[1]
    if width != height or not SIDES[0] <= width <= SIDES[1]:
        raise UserError(f"the images are {width}x{height}: give --size N, of {SIDES[0]} to {SIDES[1]}, to make them so")
    return width


def _sizes(source: Source, in_order: InOrder) -> Iterator[tuple[str, tuple[int, int]]]:
    for split in source.splits:
        starts = range(0, split.count, HEADERS)
        calls = ((encode.measure, (split.measure, split.keys[i : i + HEADERS])) for i in starts)
        sizes = (size for some in in_order(calls) for size in some)
        yield from zip(split.names, sizes, strict=True)


def samples(source: Source, encoding: Encoding) -> list[np.ndarray]:
    """A few images from all over the source, as they will be written."""
    few = []
    for split in source.splits:
        count = min(SAMPLES, split.count)
        for i in ((2 * i + 1) * split.count // (2 * count) for i in range(count)):
            few.append(encode.fit(split.image(i), split.keys[i], encoding))
    return few


def check_space(out: Path, todo: list[Job], encoding: Encoding, few: list[np.ndarray]) -> None:
    quality = encoding.jpeg_quality
    each = sum(image.nbytes if quality is None else len(encode.jpeg(image, quality)) for image in few) / len(few)
    need = sum(beton.estimate(job.count, encoding.side, each) for job in todo)
    free = shutil.disk_usage(out).free
    if need > free:
        raise UserError(f"no space for {out}: about {need / 1e6:,.0f} MB needed, {free / 1e6:,.0f} MB free: make room")
