"""The embedded image set: pictures told apart by the form that is strewn over them, drawn from (index, seed) alone.

A picture is a loose pattern of one form; which form is its class. How large, how dense, where, how turned, of what
colour on what colour, what lies behind and how the light falls is drawn without looking at the class. So the same
pixels mean little from picture to picture, while features that know forms know nearly everything.

Every machine draws the same bytes: random numbers are raw Philox words, and pixels come of operations that IEEE 754
rounds exactly (+ - * / sqrt, floor, comparisons), one array at a time; no sine, no exponential, no sum of many terms.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

Array = np.ndarray
Form = Callable[[Array, Array], Array]
"""Coordinates (x to the right, y up; the form about fills the unit disk) -> distance to its edge, negative
within, in the same unit. A class keeps its name in the mirror, since flipping is a common augmentation."""


def circle(x: Array, y: Array) -> Array:
    return _radius(x, y) - 0.82


def ring(x: Array, y: Array) -> Array:
    return np.abs(_radius(x, y) - 0.78) - 0.19


def target(x: Array, y: Array) -> Array:
    r = _radius(x, y)
    return np.minimum(np.abs(r - 0.83) - 0.15, r - 0.36)


def triangle(x: Array, y: Array) -> Array:
    return np.maximum(-0.5 - y, 0.8660254 * np.abs(x) + 0.5 * y - 0.5)


def cross(x: Array, y: Array) -> Array:
    return np.minimum(_box(x, y, 0.94, 0.28), _box(x, y, 0.28, 0.94))


def star(x: Array, y: Array) -> Array:
    """Five points: what lies on the inner side of at least four of five lines."""
    a, b = 0.9510565 * x, 0.5877853 * x
    most, second = y, np.minimum(y, -9)
    for line in (a + 0.309017 * y, 0.309017 * y - a, b - 0.809017 * y, -b - 0.809017 * y):
        second = np.maximum(second, np.minimum(most, line))
        most = np.maximum(most, line)
    return second - 0.31


def crescent(x: Array, y: Array) -> Array:
    return np.maximum(_radius(x, y) - 0.97, 0.78 - _radius(x - 0.52, y))


def heart(x: Array, y: Array) -> Array:
    a = np.abs(x)
    lobes = _radius(a - 0.42, y - 0.32) - 0.45
    point = np.maximum(0.7071068 * np.maximum(a - y, a + y) - 0.52, y - 0.4)
    return np.minimum(lobes, point)


def hourglass(x: Array, y: Array) -> Array:
    a = np.abs(y)
    return np.maximum(a - 0.8, 0.8 * np.abs(x) - 0.6 * a - 0.04)


def bars(x: Array, y: Array) -> Array:
    return np.maximum(np.abs(np.abs(np.abs(y) - 0.3) - 0.3) - 0.14, np.abs(x) - 0.7)


def dots(x: Array, y: Array) -> Array:
    return np.minimum(_radius(np.abs(x) - 0.52, np.abs(y) - 0.52), _radius(x, y)) - 0.25


def grid(x: Array, y: Array) -> Array:
    a, b = np.abs(x), np.abs(y)
    return np.maximum(np.minimum(np.abs(a - 0.34), np.abs(b - 0.34)) - 0.12, np.maximum(a, b) - 0.86)


def _radius(x: Array, y: Array) -> Array:
    return np.sqrt(x * x + y * y)


def _box(x: Array, y: Array, half_width: float, half_height: float) -> Array:
    return np.maximum(np.abs(x) - half_width, np.abs(y) - half_height)


FORMS: tuple[Form, ...] = (circle, ring, target, triangle, cross, star, crescent, heart, hourglass, bars, dots, grid)
CLASSES: tuple[str, ...] = tuple(form.__name__ for form in FORMS)


class _Dice:
    """The random numbers of one picture, in [0, 1): raw words of a Philox stream keyed by seed and index."""

    def __init__(self, index: int, seed: int) -> None:
        key = np.array([seed % 2**64, index % 2**64], dtype=np.uint64)
        words = np.random.Philox(key=key).random_raw(384)
        self._left = (words >> np.uint64(40)).astype(np.float32) * 2.0**-24

    def many(self, low: float, high: float, *shape: int) -> Array:
        count = int(np.prod(shape))
        taken, self._left = self._left[:count], self._left[count:]
        return (low + (high - low) * taken).reshape(shape)

    def one(self, low: float = 0.0, high: float = 1.0) -> float:
        return float(self.many(low, high, 1)[0])


BRIGHTNESS = (0.15, 0.85)  # of the ground; the ink is lighter or darker by CONTRAST
CONTRAST = (0.3, 0.6)
CHROMA = (0.1, 0.2)  # at most, of the ground and of the ink, a colour channel
SHADES = 0.05  # between the copies of a form
ACROSS = (1.7, 2.6)  # copies from side to side
FILL = (0.8, 1.0)  # of its cell, by the largest copy of a picture
GONE = (0.0, 0.3)  # share of the cells that are left empty
TURN = 0.12  # tangent of half the angle, to either side
RELIEF = (0.01, 0.06)  # of the ground's slopes, stripes and blotches
GAIN = (0.75, 1.1)  # of the light, and how much it falls from side to side
FALL = 0.15


def render(index: int, seed: int, size: int = 96) -> tuple[np.ndarray, int]:
    """Picture `index` of the set `seed`: uint8 [size, size, 3], and its class. Classes take turns, so that every run of
    len(CLASSES) pictures holds each once. The same picture in another size is the same scene."""
    label = index % len(CLASSES)
    dice = _Dice(index, seed)
    u = ((2 * np.arange(size) + 1) / size - 1).astype(np.float32)  # pixel centres, -1 to 1
    brightness = dice.one(*BRIGHTNESS)
    picture = _background(dice, u, brightness)
    cover, ink = _pattern(dice, FORMS[label], u, brightness)
    picture += cover[:, :, None] * (ink - picture)
    picture *= _light(dice, u)[:, :, None]
    return (np.clip(picture, 0, 1) * 255 + 0.5).astype(np.uint8), label


def _background(dice: _Dice, u: Array, brightness: float) -> Array:
    """Flat, sloped, striped or blotched, around a brightness -> [size, size, 3]."""
    kind, strength = dice.one(), dice.one(*RELIEF)
    base, tint = _colour(dice, brightness, CHROMA[0]), _colour(dice, 1.0, 2 * CHROMA[0])
    along, stripes, cells = _slope(dice, u), dice.one(1.0, 5.0), 3 + int(dice.one(0.0, 9.0))
    if kind < 0.2:
        return np.zeros((len(u), len(u), 1), np.float32) + base
    if kind < 0.45:
        relief = along * 2
    elif kind < 0.7:
        wave = along * stripes
        relief = 4 * np.abs(wave - np.floor(wave) - 0.5) - 1
    else:
        relief = _blotches(dice.many(-1.5, 1.5, cells, cells), u)
    return base + (strength * relief)[:, :, None] * tint


def _blotches(heights: Array, u: Array) -> Array:
    """Straight lines between the heights [cells, cells] -> [size, size]."""
    place = (u + 1) * ((len(heights) - 1) / 2)
    low = np.minimum(place.astype(np.intp), len(heights) - 2)
    share = place - low.astype(np.float32)
    rows = heights[low] + (heights[low + 1] - heights[low]) * share[:, None]
    return rows[:, low] + (rows[:, low + 1] - rows[:, low]) * share


def _pattern(dice: _Dice, form: Form, u: Array, brightness: float) -> tuple[Array, Array]:
    """The form repeated on a loose lattice: cover [size, size] of each pixel, and the ink [size, size, 3]."""
    across = dice.one(*ACROSS)
    n = int(across) + 2
    row = (u + 1) * (across / 2) + dice.one()  # [size]
    i = row.astype(np.intp)
    column = (u + 1) * (across / 2) + dice.many(0.0, 1.0, n)[i][:, None]  # [size, size]
    j = column.astype(np.intp)
    fill, drop = dice.one(*FILL), dice.one(*GONE)
    radius = dice.many(0.85 * fill, fill, n, n)
    off_x, off_y = (1 - radius) * dice.many(-1, 1, n, n), (1 - radius) * dice.many(-1, 1, n, n)
    cosine, sine = _turned(dice.many(-TURN, TURN, n, n))
    mirror = np.where(dice.many(0.0, 1.0, n, n) < 0.5, np.float32(-1), np.float32(1))
    gone = dice.many(0.0, 1.0, n, n) < drop
    gone[n // 2, n // 2] = False  # never all of them
    # Where a pixel lies in its cell, seen from the middle of the copy: the copy fits, so it may stand off the cell's.
    x0 = (2 * (column - j.astype(np.float32)) - 1) - off_x[i[:, None], j]
    y0 = (1 - 2 * (row - i.astype(np.float32)))[:, None] - off_y[i[:, None], j]
    a, b = (cosine / radius)[i[:, None], j], (sine / radius)[i[:, None], j]
    m = mirror[i[:, None], j]
    distance = form(m * (a * x0 + b * y0), a * y0 - b * x0)
    sharp = (radius * (len(u) / (2 * across)))[i[:, None], j]
    cover = np.clip(0.5 - distance * sharp, 0, 1) * ~gone[i[:, None], j]
    step = dice.one(*CONTRAST)
    lighter = dice.one() < 0.5
    step = step if (lighter and brightness + step < 0.98) or brightness - step < 0.02 else -step
    ink = _colour(dice, brightness + step, CHROMA[1])
    shades = dice.many(-SHADES, SHADES, n, n, 3)
    return cover, (ink + shades)[i[:, None], j]


def _light(dice: _Dice, u: Array) -> Array:
    """Falls from a side, bright or dim -> [size, size]."""
    gain, fall = dice.one(*GAIN), dice.one(-FALL, FALL)
    return gain + fall * _slope(dice, u)


def _slope(dice: _Dice, u: Array) -> Array:
    """A plane through the origin that rises by one a unit, to a random side -> [size, size]."""
    cosine, sine = _turned(dice.many(-1.0, 1.0, 1))
    return (cosine * u)[None, :] + (sine * u)[:, None]


def _turned(slope: Array) -> tuple[Array, Array]:
    """Cosine and sine of twice the angle of this slope, without a library's sine."""
    square = slope * slope
    return (1 - square) / (1 + square), 2 * slope / (1 + square)


def _colour(dice: _Dice, brightness: float, chroma: float) -> Array:
    """A random colour [3] of this brightness."""
    red, green, blue = (dice.one(-chroma, chroma) for _ in range(3))
    shift = brightness - (0.299 * red + 0.587 * green + 0.114 * blue)
    return np.array([red + shift, green + shift, blue + shift], np.float32)
