"""What a shard says of its samples, and pixels from their bytes: FFCV's files and FFCV's decoder, without its package.

The package stays outside because importing it sets the thread counts of torch and numba for the whole process and takes
seconds; its Loader reads one file only, hangs when a worker fails and never looks at what the decoder answers.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from importlib.machinery import PathFinder
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import numba
import numpy as np

from barlow.data.layout import FIELD, FIELDS, HEADER, JPEG, PLACE, RAW, SAMPLE, VERSION
from barlow.errors import UserError


class Samples(NamedTuple):
    """The samples of one shard or several, in order."""

    addresses: np.ndarray  # int64 [n], of the image's bytes in memory
    sizes: np.ndarray  # int64 [n], in bytes
    modes: np.ndarray  # uint8 [n], JPEG or RAW
    labels: np.ndarray  # int64 [n], -1 where missing
    ids: np.ndarray  # int64 [n]


def map_file(path: Path) -> np.ndarray:
    """The bytes of a shard; the addresses in Samples hold for as long as this array is alive."""
    try:
        return np.memmap(path, np.uint8, mode="r")
    except (OSError, ValueError) as error:  # ValueError: an empty file
        raise UserError(f"{path}: cannot be read ({error}): write this folder again with launchers/shards.py") from None


def read_samples(file: np.ndarray, path: Path, count: int, first_id: int, size: int) -> Samples:
    """What a mapped shard holds; every image lies inside it, for one cut short is a UserError here, no crash later."""

    def require(holds: bool, what: str) -> None:
        if not holds:
            raise UserError(f"{path}: {what}: write this folder again with launchers/shards.py")

    def rows(dtype: np.dtype, start: int, count: int) -> np.ndarray:
        end = start + count * dtype.itemsize
        require(end <= len(file), "the shard is cut short")
        return file[start:end].view(np.ndarray).view(dtype)

    header = rows(HEADER, 0, 1)[0]
    fields = rows(FIELD, HEADER.itemsize, len(FIELDS))
    names = tuple((int(field["type"]), field["name"].tobytes().rstrip(b"\0")) for field in fields)
    ours = header["version"] == VERSION and header["fields"] == len(FIELDS) and names == FIELDS
    require(ours, "not a shard of this project")
    require(header["samples"] == count, f"holds {header['samples']} samples, not {count} as index.json says")
    samples = rows(SAMPLE, HEADER.itemsize + fields.nbytes, count)

    table = int(header["places"])
    require(table >= HEADER.itemsize + fields.nbytes + samples.nbytes, "the shard was not written to its end")
    places = rows(PLACE, table, count)
    places = places[np.argsort(places["sample"], kind="stable")]
    start, end = places["start"], places["start"] + places["bytes"]
    image = samples["image"]
    inside = (start == image["start"]) & (start < end) & (end <= table)
    require(bool(inside.all()), "its tables are damaged")

    fits = (image["width"] == size) & (image["height"] == size)
    fits &= (image["mode"] == JPEG) | (image["mode"] == RAW) & (places["bytes"] == size * size * 3)
    require(bool(fits.all()), f"its images are not {size} x {size}, as index.json says")
    require(np.array_equal(samples["id"], first_id + np.arange(count)), "holds other samples than index.json says")
    return Samples(
        addresses=file.ctypes.data + start.astype(np.int64),
        sizes=places["bytes"].astype(np.int64),
        modes=image["mode"].copy(),
        labels=samples["label"].copy(),
        ids=samples["id"].copy(),
    )


@functools.cache
def compile_decode() -> Callable[[np.ndarray, np.ndarray, np.ndarray, np.ndarray], int]:
    """Compiles (under a second, once a process) and returns

    decode(addresses, sizes, modes, images [n, height, width, 3]) -> which of the n failed first, or -1.

    It runs without the interpreter's lock, starts no threads and writes nothing but `images`: FFCV's decoder shrinks or
    refuses an image that is larger. Because it does so in silence, the dimensions in the JPEG's header are compared
    first. Missing bytes never pass; wrong bytes do as long as they make a JPEG (two flipped bits in three).
    """
    imdecode, memcpy = library_functions()
    head_bytes = 1024  # of a JPEG, within which its dimensions must stand; OpenCV writes them at about byte 160

    @numba.njit(nogil=True)
    def has_dimensions(head: np.ndarray, height: int, width: int) -> bool:
        at = 2  # after the start-of-image marker come segments: FF, kind, length in two bytes, content
        while at + 9 <= len(head) and head[at] == 0xFF:
            kind = head[at + 1]
            if 0xC0 <= kind <= 0xCF and kind != 0xC4 and kind != 0xC8 and kind != 0xCC:
                # the frame: precision in a byte, height in two, width in two
                return head[at + 5] * 256 + head[at + 6] == height and head[at + 7] * 256 + head[at + 8] == width
            at += 2 + head[at + 2] * 256 + head[at + 3]
        return False

    @numba.njit("int64(int64[::1], int64[::1], uint8[::1], uint8[:, :, :, ::1])", nogil=True)
    def decode(addresses: np.ndarray, sizes: np.ndarray, modes: np.ndarray, images: np.ndarray) -> int:
        height, width = images.shape[1:3]
        head = np.empty(head_bytes, np.uint8)
        for i in range(len(images)):
            image = images[i]
            if modes[i] == RAW:
                memcpy(addresses[i], image.ctypes.data, image.size)
                continue
            known = min(sizes[i], head_bytes)
            memcpy(addresses[i], head.ctypes.data, known)
            if not has_dimensions(head[:known], height, width):
                return i
            whole = (height, width, 0, 0, 1, 1, False, False)  # no crop, no scaling, no flip
            if imdecode(addresses[i], sizes[i], height, width, image.ctypes.data, *whole) != 0:
                return i
        return -1

    return decode


def library_functions() -> tuple[Callable[..., int], Callable[..., None]]:
    """FFCV's imdecode and memcpy, found without importing FFCV."""
    package = find_spec("ffcv")
    library = package and PathFinder.find_spec("_libffcv", package.submodule_search_locations)
    if not library or not library.origin:
        raise ModuleNotFoundError("ffcv, whose decoder reads the shards, is not installed")
    functions = ctypes.CDLL(library.origin)
    pointer, unsigned, flag = ctypes.c_void_p, ctypes.c_uint32, ctypes.c_bool
    imdecode, memcpy = functions.imdecode, functions.my_memcpy
    imdecode.argtypes = [pointer, ctypes.c_uint64, unsigned, unsigned, pointer, *6 * [unsigned], flag, flag]
    imdecode.restype = ctypes.c_int
    memcpy.argtypes, memcpy.restype = [pointer, pointer, ctypes.c_uint64], None
    return imdecode, memcpy
