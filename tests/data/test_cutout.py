"""The square lies where it was drawn, is cut at the border, and is drawn evenly."""

from __future__ import annotations

import pytest
import torch

from barlow.data.cutout import GRAY, centres, cut
from tests.data.test_draw import uniform_in


@pytest.mark.parametrize(("height", "width"), [(32, 32), (96, 96), (20, 31)])
@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 1.0])
def test_what_is_hidden_is_the_square_of_the_definition(height: int, width: int, share: float) -> None:
    images = torch.randint(0, 100, (60, 3, height, width), dtype=torch.uint8)
    centre = centres(1, 2, torch.arange(60))
    before = images.clone()
    ours = cut(images, centre, torch.full((60,), share))
    half = int(share * min(height, width) / 2)
    for i in range(60):
        y, x = int(centre[i, 0].item() * height), int(centre[i, 1].item() * width)
        expected = before[i].clone()
        expected[:, max(y - half, 0) : y + half, max(x - half, 0) : x + half] = 127
        assert torch.equal(ours[i], expected)
    assert torch.equal(images, before)


def test_fixmatch_s_square_has_half_the_side_and_every_image_its_own() -> None:
    images = torch.zeros(3, 3, 32, 32, dtype=torch.uint8)
    hidden = cut(images, torch.full((3, 2), 0.5), torch.tensor([0.5, 0.25, 0.0])) == GRAY
    assert hidden.sum(dim=(2, 3)).tolist() == [[256] * 3, [64] * 3, [0] * 3]


def test_every_pixel_can_be_the_centre_and_samples_epochs_and_lanes_differ() -> None:
    ids = torch.arange(20_000)
    centre = centres(7, 0, ids)
    assert uniform_in(centre[:, 0], 0, 1)
    assert uniform_in(centre[:, 1], 0, 1)
    assert abs(torch.corrcoef(centre.T)[0, 1]) < 4 / len(ids) ** 0.5
    assert len((centre * 8).long().unique(dim=0)) == 64
    for other in (centres(8, 0, ids), centres(7, 1, ids), centres(7, 0, ids, lane=1), centres(7, 0, ids + 20_000)):
        assert (other == centre).float().mean() < 0.001
    assert torch.equal(centres(7, 0, ids[100:200]), centre[100:200])
