"""The layout of a shard: FFCV's format 2 with the fields image, label and id.

Header, a descriptor for each field, a row for each sample; from the next page on the images, none across two pages; at
the end a row for each image's place. FFCV's own definitions say the same, but importing them takes seconds and sets the
thread counts of torch and numba for the whole process.
"""

from __future__ import annotations

import numpy as np

VERSION = 2
JPEG, RAW = 0, 1
MIN_PAGE = 1 << 21

HEADER = np.dtype(
    [("version", "<u2"), ("fields", "<u2"), ("page_size", "<u4"), ("samples", "<u8"), ("places", "<u8")], align=True
)
FIELD = np.dtype([("type", "<u1"), ("name", "<u1", 16), ("arguments", "<u1", 1024)], align=True)
IMAGE = np.dtype([("mode", "<u1"), ("width", "<u2"), ("height", "<u2"), ("start", "<u8")])
SAMPLE = np.dtype([("image", IMAGE), ("label", "<i8"), ("id", "<i8")], align=True)
PLACE = np.dtype([("sample", "<u8"), ("start", "<u8"), ("bytes", "<u8")])
FIELDS = ((2, b"image"), (1, b"label"), (1, b"id"))
"""FFCV's numbers of the kinds (1 an integer, 2 an image), and the names."""
