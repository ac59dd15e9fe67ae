"""What a writing process does: load images, bring them to size, encode them, and add up their pixels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
from PIL import Image

from barlow.errors import UserError


@dataclass(frozen=True)
class Encoding:
    side: int
    resize: bool
    """False: an image of another size is an error."""
    jpeg_quality: int | None
    """None: raw pixels."""


@dataclass(frozen=True)
class Pixels:
    """Exact sums over pixels, so that mean and deviation depend on neither order nor grouping."""

    count: int = 0
    sums: tuple[int, int, int] = (0, 0, 0)
    squares: tuple[int, int, int] = (0, 0, 0)

    def __add__(self, other: Pixels) -> Pixels:
        a, b = self, other
        return Pixels(
            a.count + b.count,
            (a.sums[0] + b.sums[0], a.sums[1] + b.sums[1], a.sums[2] + b.sums[2]),
            (a.squares[0] + b.squares[0], a.squares[1] + b.squares[1], a.squares[2] + b.squares[2]),
        )

    def mean(self) -> list[float]:
        """A number a colour, in 0..1."""
        return [s / (255 * self.count) for s in self.sums]

    def std(self) -> list[float]:
        n = self.count
        return [((n * q - s * s) / (255 * n) ** 2) ** 0.5 for s, q in zip(self.sums, self.squares, strict=True)]


@dataclass(frozen=True)
class Encoded:
    """Images in a row: the length of each once encoded, all their bytes end to end, the sums of their pixels before."""

    sizes: list[int]
    blob: bytes
    pixels: Pixels


def encode(load: Callable[[Any], np.ndarray], keys: Sequence[Any], encoding: Encoding) -> Encoded:
    parts, pixels = [], Pixels()
    for key in keys:
        image = fit(load(key), key, encoding)
        pixels += count_pixels(image)
        parts.append(image.tobytes() if encoding.jpeg_quality is None else jpeg(image, encoding.jpeg_quality))
    return Encoded([len(part) for part in parts], b"".join(parts), pixels)


def fit(image: np.ndarray, key: Any, encoding: Encoding) -> np.ndarray:
    """[height, width, 3] -> [side, side, 3]: shorter side brought to size (bicubic, antialiased), then the middle."""
    height, width = image.shape[:2]
    side = encoding.side
    if height == width == side:
        return image
    if not encoding.resize:
        raise UserError(f"{key} is {width}x{height}, others are {side}x{side}: give --size N to bring all to one size")
    short = min(height, width)
    size = (max(side, side * width // short), max(side, side * height // short))
    resized = Image.fromarray(image).resize(size, Image.Resampling.BICUBIC)
    left, top = round((size[0] - side) / 2), round((size[1] - side) / 2)
    return np.asarray(resized.crop((left, top, left + side, top + side)))


def count_pixels(image: np.ndarray) -> Pixels:
    # OpenCV adds in integers but answers in doubles, the square of a root among them: whole numbers once rounded.
    r, g, b = cv2.sumElems(image)[:3]
    rr, gg, bb = (round(cv2.norm(plane, cv2.NORM_L2SQR)) for plane in cv2.split(image))
    return Pixels(image.shape[0] * image.shape[1], (round(r), round(g), round(b)), (rr, gg, bb))


def jpeg(image: np.ndarray, quality: int) -> bytes:
    """4:2:0, as FFCV's writer encodes it."""
    done, encoded = cv2.imencode(".jpg", cv2.cvtColor(image, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_JPEG_QUALITY, quality])
    if not done:
        raise RuntimeError("OpenCV cannot encode JPEG")
    return encoded.tobytes()


def measure(read: Callable[[Any], tuple[int, int]], keys: Sequence[Any]) -> list[tuple[int, int]]:
    return [read(key) for key in keys]


def one_thread() -> None:
    """A process a core is enough."""
    cv2.setNumThreads(1)
