"""One shard, written front to back by one process: the same images give the same bytes.

FFCV's own writer leaves the layout to whichever worker comes first, and waits for ever when one dies. What stands in
the file is the same: byte for byte what FFCV writes with a single worker.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import IO

import numpy as np

from barlow.data.layout import FIELD, FIELDS, HEADER, JPEG, MIN_PAGE, PLACE, RAW, SAMPLE, VERSION

IMAGES_PER_PAGE = 8

Run = tuple[list[int], bytes]
"""Encoded images in a row: the length of each, and all their bytes end to end."""


def page_size(side: int) -> int:
    """The smallest page FFCV takes that also holds a few raw images of this side, so that little of it stays empty."""
    size = MIN_PAGE
    while size < IMAGES_PER_PAGE * 3 * side * side:
        size *= 2
    return size


def estimate(count: int, side: int, bytes_per_image: float) -> int:
    """About how large a file of so many images becomes; raw: exactly."""
    page = page_size(side)
    pages = -(-count // max(1, int(page / bytes_per_image)))
    return _begin(count, page) + pages * page + count * PLACE.itemsize


def _begin(count: int, page: int) -> int:
    """Where the images begin: at the next page after the tables."""
    head = HEADER.itemsize + len(FIELDS) * FIELD.itemsize + count * SAMPLE.itemsize
    return -(-head // page) * page


def write(file: IO[bytes], ids: np.ndarray, labels: np.ndarray, side: int, raw: bool, images: Iterable[Run]) -> None:
    """A sample for each id. Until this returns, no reader takes the file for a whole one."""
    fields = np.zeros(len(FIELDS), FIELD)
    for field, (kind, name) in zip(fields, FIELDS, strict=True):
        field["type"] = kind
        field["name"][: len(name)] = np.frombuffer(name, np.uint8)
    samples = np.zeros(len(ids), SAMPLE)
    samples["label"], samples["id"] = labels, ids
    samples["image"]["mode"] = RAW if raw else JPEG
    samples["image"]["width"] = samples["image"]["height"] = side

    page = page_size(side)
    begin = _begin(len(ids), page)
    file.write(bytes(begin))
    starts, lengths, end = _write_pages(file, begin, page, images)
    if len(starts) != len(ids):
        raise RuntimeError(f"{len(starts)} images for {len(ids)} ids")
    places = np.zeros(len(ids), PLACE)
    places["sample"], places["start"], places["bytes"] = np.arange(len(ids)), starts, lengths
    file.write(places.tobytes())

    samples["image"]["start"] = starts
    header = np.array((VERSION, len(FIELDS), page, len(ids), end), HEADER)
    file.seek(0)
    file.write(header.tobytes() + fields.tobytes() + samples.tobytes())


def _write_pages(file: IO[bytes], begin: int, size: int, images: Iterable[Run]) -> tuple[list[int], list[int], int]:
    """Images one after another, none across two pages -> where each starts, its length; where the last page ends."""
    page, used = bytearray(size), 0
    starts: list[int] = []
    lengths: list[int] = []
    for run, blob in images:
        view, at = memoryview(blob), 0
        for length in run:
            if length > size:
                raise ValueError(f"an image of {length} bytes does not fit a page of {size}")
            if used + length > size:
                page[used:] = bytes(size - used)
                file.write(page)
                begin, used = begin + size, 0
            page[used : used + length] = view[at : at + length]
            starts.append(begin + used)
            used, at = used + length, at + length
        lengths += run
    page[used:] = bytes(size - used)
    file.write(page)
    return starts, lengths, begin + size
