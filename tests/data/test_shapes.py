"""The embedded set: the same bytes everywhere, its class in the form alone, and pixels that do not give it away."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest

from barlow.data.shapes import CLASSES, FORMS, render


def pictures(count: int, size: int = 96, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    drawn = [render(i, seed, size) for i in range(count)]
    return np.stack([picture for picture, _ in drawn]), np.array([label for _, label in drawn])


def test_every_machine_draws_these_bytes() -> None:
    digest = hashlib.sha256()
    drawn = ((0, 0, 96), (1, 0, 96), (6999, 0, 96), (12345678901, 7, 96), (5, 2**63, 32), (11, 3, 128))
    for index, seed, size in drawn:
        picture, label = render(index, seed, size)
        digest.update(picture.tobytes() + bytes([label]))
    assert digest.hexdigest() == "116c2ce3d3c607d48622081d57b79d3eb676c1461aa14619fe0f26f2bb9220dd"


def test_a_picture_is_a_function_of_index_and_seed() -> None:
    for i in (0, 17, 6999):
        assert np.array_equal(render(i, 0)[0], render(i, 0)[0])
        assert not np.array_equal(render(i, 0)[0], render(i, 1)[0])
        assert not np.array_equal(render(i, 0)[0], render(i + 12, 0)[0])


@pytest.mark.parametrize("size", [32, 48, 96, 128])
def test_sizes_show_the_same_scene(size: int) -> None:
    for i in range(12):
        picture, label = render(i, 0, size)
        assert picture.shape == (size, size, 3)
        assert picture.dtype == np.uint8
        assert label == i
        blocks = picture[: size // 16 * 16, : size // 16 * 16].reshape(16, size // 16, 16, size // 16, 3).mean((1, 3))
        large = render(i, 0, 96)[0].reshape(16, 6, 16, 6, 3).mean((1, 3))
        assert np.abs(blocks - large).mean() < 4


def test_classes_come_equally_often_and_have_their_names() -> None:
    _, labels = pictures(120, 32)
    assert np.bincount(labels).tolist() == [10] * len(CLASSES)
    assert len(set(CLASSES)) == len(CLASSES) == 12


def test_forms_fill_the_unit_disk_and_hardly_leave_it() -> None:
    u = np.linspace(-1.5, 1.5, 301, dtype=np.float32)
    x, y = np.meshgrid(u, u)
    outside = x * x + y * y > 1.07
    for form in FORMS:
        within = form(x, y) < 0
        assert not within[outside].any(), form.__name__
        assert within.any(0).sum() > 80, form.__name__  # of 200
        assert within.any(1).sum() > 80, form.__name__


def test_colour_and_light_say_nothing_of_the_class() -> None:
    """The mean colour of a class differs from another's by no more than chance allows (F-test, p > 0.001 a channel)."""
    images, labels = pictures(1200, 32)
    colours = images.reshape(len(images), -1, 3).mean(1)  # [n, 3]
    groups = [colours[labels == k] for k in range(12)]
    between = sum(len(g) * (g.mean(0) - colours.mean(0)) ** 2 for g in groups) / 11
    within = sum(((g - g.mean(0)) ** 2).sum(0) for g in groups) / (len(images) - 12)
    assert (between / within < 2.9).all()  # the 0.999 quantile of F(11, 1188) is 2.86


def test_raw_pixels_do_poorly() -> None:
    images, labels = pictures(1440, 48)
    flat = images.reshape(len(images), -1).astype(np.float32) / 255
    flat = (flat - flat.mean()) / flat.std()
    flat /= np.linalg.norm(flat, axis=1, keepdims=True)
    train, val = flat[:960], flat[960:]
    nearest = np.argsort(-(val @ train.T), axis=1)[:, :20]
    votes = np.stack([(labels[:960][nearest] == k).sum(1) for k in range(12)], axis=1)
    assert (votes.argmax(1) == labels[960:]).mean() < 0.25
