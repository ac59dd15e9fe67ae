"""Pictures for people: a row an image, beside it where the network looks, as one sheet.

Images come as they are, uint8 at their own size, and are scaled up for the eye."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFont

COLUMNS = ("image", "Grad-CAM", "guided backpropagation", "guided Grad-CAM")
GAP = 4
LINE = 20  # height of a line of text
TEXT = 13
STRENGTH = 0.75  # of the colour where the network looks most
OKLAB_TO_CONES = np.array(
    [[1, 0.3963377774, 0.2158037573], [1, -0.1055613458, -0.0638541728], [1, -0.0894841775, -1.2914855480]]
)
CONES_TO_RGB = np.array(
    [
        [4.0767416621, -3.3077115913, 0.2309699292],
        [-1.2684380046, 2.6097574011, -0.3413193965],
        [-0.0041960863, -0.7034186147, 1.7076147010],
    ]
)


@dataclass(frozen=True)
class Row:
    image: np.ndarray  # uint8 [s, s, 3]
    cam: np.ndarray  # [h, w], from zero up
    guided: np.ndarray  # [h, w, 3], of either sign
    guided_cam: np.ndarray  # [h, w, 3], of either sign
    caption: str


def sheet(rows: Sequence[Row], side: int = 192) -> Image.Image:
    """The rows under one another, each with its caption below, every picture `side` pixels wide."""
    width = len(COLUMNS) * (side + GAP) + GAP
    height = LINE + len(rows) * (side + LINE + GAP) + GAP
    page = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(page)
    for column, title in enumerate(COLUMNS):
        _write(draw, GAP + column * (side + GAP), 2, title, side)
    scale = Image.fromarray(colours()[None]).resize((side // 3, LINE // 2))  # from nothing to most
    page.paste(scale, (2 * (side + GAP) - side // 3, LINE // 4))
    for at, row in enumerate(rows):
        top = LINE + at * (side + LINE + GAP)
        for column, picture in enumerate(_pictures(row, side)):
            page.paste(picture, (GAP + column * (side + GAP), top))
        _write(draw, GAP, top + side + 2, row.caption, width - 2 * GAP)
    return page


def overlay(image: np.ndarray, cam: np.ndarray) -> np.ndarray:
    """The image [s, s, 3] without its colours under those of the map [s, s], which hide it the less the less a place
    matters. They reach from zero to the maximum in this image."""
    heat = cam / max(float(cam.max()), 1e-30)
    cover = (STRENGTH * heat)[:, :, None]
    grey = (image @ np.array([0.299, 0.587, 0.114]))[:, :, None]
    mixed = (1 - cover) * grey + cover * colours()[np.rint(255 * heat).astype(int)]
    return np.rint(mixed).astype(np.uint8)


def signed(gradient: np.ndarray) -> np.ndarray:
    """A gradient [h, w, 3] as uint8: zero is grey, and one value in a hundred may be brighter than white."""
    span = max(float(np.quantile(np.abs(gradient), 0.99)), float(np.abs(gradient).max()) / 8, 1e-30)
    return np.rint(255 * (0.5 + 0.5 * np.clip(gradient / span, -1, 1))).astype(np.uint8)


@functools.cache
def colours() -> np.ndarray:
    """uint8 [256, 3]: dark violet over red to bright yellow in even steps, so that no edge is seen that a map has not.
    It is a path through Oklab (Ottosson 2020), a space of colours made for that, within what a screen can show."""
    t = np.linspace(0, 1, 256)
    lightness, chroma, hue = 0.3 + 0.6 * t, 0.14 + 0.04 * np.sin(np.pi * t), np.deg2rad(300 + 165 * t)
    linear = (CONES_TO_RGB @ (OKLAB_TO_CONES @ [lightness, chroma * np.cos(hue), chroma * np.sin(hue)]) ** 3).T
    srgb = np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)
    return np.rint(255 * srgb).astype(np.uint8)


def _pictures(row: Row, side: int) -> list[Image.Image]:
    """The four of a row, scaled: the map as numbers, so that its colours stay the map's."""
    image = Image.fromarray(row.image).resize((side, side), Image.Resampling.BICUBIC)
    cam = Image.fromarray(row.cam.astype(np.float32)).resize((side, side), Image.Resampling.BILINEAR)
    over = Image.fromarray(overlay(np.asarray(image), np.asarray(cam)))
    details = [Image.fromarray(signed(gradient)) for gradient in (row.guided, row.guided_cam)]
    return [image, over, *(picture.resize((side, side), Image.Resampling.BICUBIC) for picture in details)]


def _write(draw: ImageDraw.ImageDraw, x: int, y: int, text: str, width: int) -> None:
    """One line, cut where there is no more room."""
    font = ImageFont.load_default(TEXT)
    if draw.textlength(text, font) > width:
        while text and draw.textlength(text + "…", font) > width:
            text = text[:-1]
        text += "…"
    draw.text((x, y), text, "black", font)
