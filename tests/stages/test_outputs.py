"""What a network says of whole images: each of them, in the order asked for, on any number of ranks; and how often it
is right."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from barlow.data.loader import Loader
from barlow.data.shards import read_index
from barlow.stages.outputs import outputs, top, whole

CPU = torch.device("cpu")
MEAN, STD = (0.3, 0.4, 0.5), (0.2, 0.25, 0.3)


def pixels(images: Tensor) -> Tensor:
    return images.flatten(1)


def found(data: str, positions: list[int], size: int, batch: int) -> tuple[Tensor, int]:
    index = read_index(data).normalising(MEAN, STD)
    beats: list[int] = []
    loader = Loader(index, ["train", "val"], workers=1)
    rows = outputs(pixels, loader, np.array(positions), index, size, CPU, lambda: beats.append(1), batch)
    return rows, len(beats)


def found_of(data: str, rows: list[list[int]]) -> list[tuple[Tensor, int]]:
    return [found(data, positions, 32, 2) for positions in rows]


def by_hand(data: str, positions: list[int], size: int) -> Tensor:
    """One image after the other."""
    loader = Loader(read_index(data), ["train", "val"], workers=1)
    mean, std = (torch.tensor(each)[:, None, None] for each in (MEAN, STD))
    rows = [whole(batch.images, size)[0] for batch in loader.batches(np.array([[k] for k in positions]))]
    return torch.stack([((row - mean) / std).flatten() for row in rows])


@pytest.mark.parametrize(("batch", "beats"), [(256, 1), (7, 2), (4, 3), (1, 10)])
def test_every_image_in_the_order_asked_for_whatever_the_batch(tiny_data: Path, batch: int, beats: int) -> None:
    positions = np.random.default_rng(0).permutation(96)[:10].tolist()
    rows, told = found(str(tiny_data), positions, 24, batch)
    assert rows.shape == (10, 3 * 24 * 24)
    assert rows.dtype == torch.float32
    assert torch.equal(rows, by_hand(str(tiny_data), positions, 24))
    assert told == beats


UNEVEN = [[90, 3, 47, 48, 0, 5, 5], [1]]


def test_all_ranks_get_the_whole_of_it(on_ranks: Callable[..., list[Any]], tiny_data: Path) -> None:
    """Shares that do not come out even, and fewer images than ranks in one of them."""
    for answers in on_ranks(3, found_of, str(tiny_data), UNEVEN):
        for positions, (rows, told) in zip(UNEVEN, answers, strict=True):
            assert torch.equal(rows, by_hand(str(tiny_data), positions, 32))
            assert told == math.ceil(math.ceil(len(positions) / 3) / 2)


def test_nothing_of_an_image_is_cut_off_and_its_own_size_is_left_alone() -> None:
    # PIL cuts what is brighter than white between its two passes; these never are.
    image = np.random.default_rng(1).integers(64, 192, (1, 32, 32, 3), dtype=np.uint8)
    same = whole(torch.from_numpy(image), 32)
    assert torch.equal(same, torch.from_numpy(image).permute(0, 3, 1, 2) / 255)
    for size in (24, 48):
        ours = whole(torch.from_numpy(image), size)
        theirs = np.asarray(Image.fromarray(image[0]).resize((size, size), Image.Resampling.BICUBIC))
        assert ours.min() >= 0
        assert ours.max() <= 1
        np.testing.assert_allclose(ours[0].permute(1, 2, 0) * 255, theirs, atol=1.5)


def test_the_numbers_taken_from_colours_are_those_given_or_the_data_s_own(tiny_data: Path) -> None:
    index = read_index(tiny_data)
    assert index.normalising((), ()) == index
    assert index.normalising(MEAN, ()) == replace(index, mean=MEAN)
    assert index.normalising(MEAN, STD) == replace(index, mean=MEAN, std=STD)


def test_top_k_by_definition() -> None:
    chance = torch.Generator().manual_seed(0)
    logits, labels = torch.randn(200, 7, generator=chance), torch.randint(0, 7, (200,), generator=chance)
    places = [sorted(row, reverse=True).index(row[y]) for row, y in zip(logits.tolist(), labels.tolist(), strict=True)]
    expected = [100 * sum(place < k for place in places) / 200 for k in (1, 2, 5)]
    assert top(logits, labels, [1, 2, 5]) == pytest.approx(expected)
    assert top(logits, labels, [5, 1]) == pytest.approx([expected[2], expected[0]])
    assert top(logits[:, :3], labels % 3, [1, 5])[1] == 100.0  # fewer classes than that
    assert top(logits, labels, [7]) == [100.0]
