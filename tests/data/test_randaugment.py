"""What RandAugment draws: FixMatch's operations and ranges, evenly, and for each sample by itself."""

from __future__ import annotations

import hashlib
from dataclasses import fields

import pytest
import torch

from barlow.data.operations import Op, Policy
from barlow.data.randaugment import RANGES, draw
from tests.data.test_draw import uniform_in


def same(a: Policy, b: Policy) -> bool:
    return all(torch.equal(getattr(a, f.name).cpu(), getattr(b, f.name).cpu()) for f in fields(Policy))


def layout(p: Policy) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    return {f.name: (getattr(p, f.name).dtype, tuple(getattr(p, f.name).shape)) for f in fields(Policy)}


LAYOUT = {
    "op": (torch.int64, (7, 2)),
    "amount": (torch.float32, (7, 2)),
    "method": (torch.int64, (7, 2)),
    "centre": (torch.float32, (7, 2, 2)),
}


def test_two_operations_an_image() -> None:
    assert layout(draw(0, 0, torch.arange(7))) == LAYOUT


def test_the_list_is_fixmatch_s() -> None:
    assert len(RANGES) == 14
    assert not {Op.INVERT, Op.SMOOTH, Op.BLUR, Op.RESCALE, Op.CUTOUT} & set(RANGES)


def test_operations_come_equally_often_in_all_pairs_with_strengths_uniform_in_their_ranges() -> None:
    p = draw(3, 1, torch.arange(30_000))
    pairs = (p.op[:, 0] * len(Op) + p.op[:, 1]).unique(return_counts=True)[1].double()
    expected = 30_000 / 14**2
    assert len(pairs) == 14**2
    assert ((pairs - expected) ** 2 / expected).sum() < 195 + 4 * (2 * 195) ** 0.5
    for op, (low, high) in RANGES.items():
        amount = p.amount[p.op == op]
        assert uniform_in(amount, low, high) if low < high else (amount == low).all()
    correlation = torch.corrcoef(torch.cat((p.op, p.amount), dim=1).double().T)
    assert abs(correlation[0, 1]) < 4 / 30_000**0.5
    assert abs(correlation[2, 3]) < 4 / 30_000**0.5


def test_a_sample_s_operations_depend_on_itself_alone() -> None:
    ids = torch.tensor([5, 0, 99_999, 17, 4_000_000_000, 18])
    whole = draw(3, 8, ids)
    rows = torch.tensor([4, 2, 0, 5])
    assert same(draw(3, 8, ids[rows]), whole[rows])
    for other in (draw(4, 8, ids), draw(3, 9, ids), draw(3, 8, ids, lane=1), draw(3, 8, ids + 100)):
        assert not same(other, whole)


def test_draw_never_changes() -> None:
    """Runs in progress depend on these very bits: if this fails, the code is wrong, not the test."""
    p = draw(2024, 5, torch.arange(2000))
    digest = hashlib.sha256(p.op.numpy().tobytes() + p.amount.numpy().tobytes()).hexdigest()
    assert digest == "cdfb01d4d86bedf3749e90aca79d67856a29f9bc448e1c671281b48a32d257d9"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_a_gpu_draws_the_same_bits() -> None:
    ids = torch.arange(50_000) * 77_777
    assert same(draw(5, 1, ids), draw(5, 1, ids.cuda()))
