"""Image files: finding them below a folder, reading them, and reading only their size."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
from PIL import Image

from barlow.errors import UserError

EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
_DEEPER_THAN_8_BITS = ("I", "F", "I;16", "I;16B", "I;16L", "I;16N")


def subfolders(folder: Path) -> list[str]:
    """Names of the folders in it, sorted; hidden ones are not data."""
    return sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and not entry.name.startswith("."))


def images_below(root: Path, folder: str) -> list[str]:
    """Image files anywhere below `root/folder`, relative to root, in the order of torchvision's ImageFolder."""

    def unreadable(error: OSError) -> None:
        raise UserError(f"cannot list {error.filename}: {error.strerror}")

    found = []
    for place, _, files in sorted(os.walk(root / folder, onerror=unreadable, followlinks=True)):
        inside = os.path.relpath(place, root)
        for name in sorted(files):
            if name.lower().endswith(EXTENSIONS) and not name.startswith("."):
                found.append(os.path.join(inside, name))
    return found


def load(root: str, name: str) -> np.ndarray:
    """The image as uint8 [height, width, 3], RGB; gray is repeated, a palette looked up, transparency dropped."""
    path = os.path.join(root, name)
    try:
        with Image.open(path) as image:
            if image.mode in _DEEPER_THAN_8_BITS:
                raise ValueError(f"mode {image.mode}: convert it to 8 bits a channel first")
            return np.asarray(image.convert("RGB"))
    except Exception as error:  # Pillow raises nearly anything on a broken file
        raise UserError(f"cannot read image {path}: {_reason(error)}") from None


def measure(root: str, name: str) -> tuple[int, int]:
    """Width and height; reads the header only."""
    path = os.path.join(root, name)
    try:
        with Image.open(path) as image:
            return image.size
    except Exception as error:
        raise UserError(f"cannot read image {path}: {_reason(error)}") from None


def _reason(error: Exception) -> str:
    if isinstance(error, Image.UnidentifiedImageError):
        return "not an image, or its head is broken"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return " ".join(str(error).split()) or type(error).__name__
