"""The sheet of pictures: colours, signs and places are those of the numbers."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from barlow.viz.grid import COLUMNS, GAP, LINE, Row, colours, overlay, sheet, signed

SIDE = 64


def row(seed: int = 0, side: int = 16, caption: str = "1500   true ring   predicted star 71 %") -> Row:
    rng = np.random.default_rng(seed)
    image = rng.integers(0, 256, (side, side, 3), dtype=np.uint8)
    guided = rng.normal(size=(24, 24, 3))  # a network sees images at another size than they have
    cam = np.zeros((24, 24))
    cam[4:8, 12:20] = 3.0
    return Row(image, cam, guided, guided * cam[:, :, None], caption)


def cell(page: Image.Image, at: int, column: int) -> np.ndarray:
    left, top = GAP + column * (SIDE + GAP), LINE + at * (SIDE + LINE + GAP)
    return np.asarray(page)[top : top + SIDE, left : left + SIDE].astype(int)


def test_rows_are_images_and_columns_what_is_seen_in_them() -> None:
    rows = [row(seed) for seed in range(3)]
    page = sheet(rows, SIDE)
    assert page.size == (4 * (SIDE + GAP) + GAP, LINE + 3 * (SIDE + LINE + GAP) + GAP)
    assert len(COLUMNS) == 4
    for at, shown in enumerate(rows):
        scaled = Image.fromarray(shown.image).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
        assert np.array_equal(cell(page, at, 0), np.asarray(scaled))
        for column, gradient in ((2, shown.guided), (3, shown.guided_cam)):
            small = np.asarray(Image.fromarray(cell(page, at, column).astype(np.uint8)).resize((24, 24)), float)
            assert np.corrcoef(small.ravel(), np.clip(gradient, -2.5, 2.5).ravel())[0, 1] > 0.8
        grey = cell(page, at, 3)[40:, :20]  # far from where the map is
        assert (grey == 128).all()


def test_colour_lies_where_the_map_is_and_nowhere_else() -> None:
    shown = cell(sheet([row()], SIDE), 0, 1)
    colourful = np.ptp(shown, axis=2) > 12
    assert colourful[12:20, 34:52].all()  # the map's place, in pixels of the sheet
    assert not colourful[28:].any()
    assert not colourful[:, :24].any()


def test_a_caption_is_written_below_its_row_and_cut_where_there_is_no_room() -> None:
    short, long = (np.asarray(sheet([row(caption=text)], SIDE)) for text in ("true ring", "true ring " * 40))
    below = slice(LINE + SIDE, LINE + SIDE + LINE)
    assert (short[below] < 100).any()
    assert (short[below, 120:] == 255).all()
    assert (long[below, 200:] < 100).any()
    assert (long[below, -GAP:] == 255).all()
    assert not np.array_equal(short[below], np.asarray(sheet([row(caption="true star")], SIDE))[below])


def test_names_may_have_any_letters() -> None:
    sheet([row(caption="true Füller   predicted 万年筆 5 %")], SIDE)


def test_a_map_that_is_zero_everywhere_leaves_the_image_grey() -> None:
    image = row().image
    shown = overlay(image, np.zeros((16, 16)))
    assert np.abs(shown.mean(2) - image @ [0.299, 0.587, 0.114]).max() <= 0.5
    assert (np.ptp(shown, axis=2) == 0).all()


def test_strength_is_relative_to_the_images_own_maximum() -> None:
    image, cam = row().image, np.random.default_rng(0).random((16, 16))
    assert np.array_equal(overlay(image, cam), overlay(image, 1e-6 * cam))


@pytest.mark.parametrize("scale", [1.0, 1e-12, 1e12])
def test_signs_are_dark_and_bright(scale: float) -> None:
    gradient = scale * np.random.default_rng(0).normal(size=(20, 20, 3))
    shown = signed(gradient).astype(int)
    assert (shown[gradient > 0] >= 128).all()
    assert (shown[gradient < 0] <= 128).all()
    assert shown.min() == 0
    assert shown.max() == 255
    assert (np.diff(shown.ravel()[np.argsort(gradient, axis=None)]) >= 0).all()


def test_no_gradient_is_grey_and_a_single_one_is_seen() -> None:
    gradient = np.zeros((64, 64, 3))
    assert (signed(gradient) == 128).all()
    gradient[5, 5] = 1e-3
    assert (signed(gradient)[5, 5] == 255).all()


def test_colours_grow_lighter_in_even_steps() -> None:
    table = colours().astype(float) / 255
    assert table.shape == (256, 3)
    linear = np.where(table <= 0.04045, table / 12.92, ((table + 0.055) / 1.055) ** 2.4)
    luminance = linear @ [0.2126, 0.7152, 0.0722]
    lightness = 116 * np.cbrt(luminance) - 16  # CIE L*: not the space in which the table was made
    assert lightness[0] < 25
    assert lightness[-1] > 85
    steps = np.diff(lightness[::15])
    assert steps.min() > 0.5 * steps.mean()
    assert steps.max() < 1.5 * steps.mean()
