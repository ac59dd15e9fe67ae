"""CTAugment's rules against their definitions in plain Python, and what is drawn against the weights."""

from __future__ import annotations

import hashlib

import pytest
import torch
from torch import Tensor

from barlow.data.ctaugment import BINS, RANGES, Bins, match, pick
from barlow.data.operations import Op
from barlow.data.resample import METHODS
from tests.data.test_draw import uniform_in
from tests.data.test_randaugment import LAYOUT, layout, same


def learned(seed: int = 0) -> Bins:
    """Bins of all kinds of weights."""
    generator = torch.Generator().manual_seed(seed)
    bins = Bins()
    bins.weights = torch.rand(bins.weights.shape, generator=generator, dtype=torch.float64) * 0.5 + 0.5
    bins.weights[Op.BLUR] *= 0.5  # none above the threshold
    bins.weights[Op.INVERT] = 0
    bins.methods = torch.tensor([1.0, 0.9, 0.81, 0.8, 0.1, 0.0], dtype=torch.float64)
    return bins


# --------------------------------------------------------------------------------------------------------- learning


def slowly(bins: Bins, chosen: Tensor, omega: Tensor) -> tuple[list[list[float]], list[float]]:
    """The definition: one image after another, one operation after another."""
    weights, methods, rho = bins.weights.tolist(), bins.methods.tolist(), bins.decay
    for uses, nearness in zip(chosen.tolist(), omega.tolist(), strict=True):
        for op, place, method in uses:
            if op != Op.IDENTITY:
                weights[op][place] = rho * weights[op][place] + (1 - rho) * nearness
            if op == Op.RESCALE:
                methods[method] = rho * methods[method] + (1 - rho) * nearness
    return weights, methods


@pytest.mark.parametrize("n", [0, 1, 2, 64, 333])
@pytest.mark.parametrize("decay", [0.99, 0.5])
def test_learning_is_one_use_after_another(n: int, decay: float) -> None:
    bins = learned()
    bins.decay = decay
    _, chosen = bins.probe(1, 2, torch.arange(n))
    chosen[: n // 2, :, :2] = torch.tensor([Op.COLOR, 3])  # a bin that is used again and again, and twice by an image
    chosen[n // 3 : n // 2, 1] = torch.tensor([Op.RESCALE, 16, 2])
    omega = torch.rand(n, generator=torch.Generator().manual_seed(n), dtype=torch.float64)
    weights, methods = slowly(bins, chosen, omega)
    before = bins.state_dict()
    bins.update(chosen, omega)
    assert torch.allclose(bins.weights, torch.tensor(weights, dtype=torch.float64), rtol=0, atol=1e-14)
    assert torch.allclose(bins.methods, torch.tensor(methods, dtype=torch.float64), rtol=0, atol=1e-14)
    assert torch.equal(bins.weights[Op.IDENTITY], before["weights"][Op.IDENTITY])
    assert torch.equal(bins.weights, before["weights"]) == (n == 0)


def test_the_order_of_uses_counts() -> None:
    once, again = Bins(), Bins()
    chosen = torch.tensor([[[Op.BLUR, 3, 0], [Op.IDENTITY, 0, 0]]] * 2)
    once.update(chosen, torch.tensor([0.0, 1.0]))
    again.update(chosen, torch.tensor([1.0, 0.0]))
    assert once.weights[Op.BLUR, 3].item() == pytest.approx(0.99 * 0.99 + 0.01, abs=1e-15)
    assert again.weights[Op.BLUR, 3].item() == pytest.approx(0.99, abs=1e-15)


def test_a_bin_that_the_model_cannot_bear_closes_and_opens_again() -> None:
    bins = Bins()
    worst = torch.tensor([[[Op.ROTATE, 0, 0], [Op.IDENTITY, 0, 0]]])
    steps = 0
    while bins.open(bins.weights)[Op.ROTATE, 0] > 0:
        bins.update(worst, torch.tensor([0.0]))
        steps += 1
    assert steps == 23  # 0.99^23 < 0.8 < 0.99^22
    assert (bins.open(bins.weights)[Op.ROTATE] > 0).sum() == BINS - 1
    for _ in range(4):
        assert bins.open(bins.weights)[Op.ROTATE, 0] == 0
        bins.update(worst, torch.tensor([1.0]))
    assert bins.open(bins.weights)[Op.ROTATE, 0] > 0


def test_omega_is_that_of_the_code_and_the_probability_of_the_label() -> None:
    p = torch.rand(50, 10, generator=torch.Generator().manual_seed(0), dtype=torch.float64).softmax(dim=1)
    labels = torch.arange(50) % 10
    target = torch.nn.functional.one_hot(labels, 10)
    assert torch.allclose(match(p, labels), 1 - (p - target).abs().sum(dim=1) / 2, rtol=0, atol=1e-14)


def test_a_split_of_the_batch_over_ranks_changes_nothing_once_it_is_gathered() -> None:
    ids, omega = torch.arange(128), torch.linspace(0, 1, 128)
    whole, parts = learned(), learned()
    whole.update(whole.probe(0, 0, ids)[1], omega)
    parts.update(torch.cat([parts.probe(0, 0, part)[1] for part in ids.split(32)]), omega)
    assert torch.equal(whole.weights, parts.weights)
    assert torch.equal(whole.methods, parts.methods)


def test_a_state_comes_back_to_the_bit_and_is_a_copy() -> None:
    bins, other = learned(), Bins()
    state = bins.state_dict()
    other.load_state_dict(state)
    ids = torch.arange(64)
    _, chosen = bins.probe(0, 0, ids)
    bins.update(chosen, torch.rand(64))
    assert torch.equal(state["weights"], learned().weights)
    assert same(other.draw(0, 0, ids), learned().draw(0, 0, ids))
    assert not same(other.draw(0, 0, ids), Bins().draw(0, 0, ids))
    with pytest.raises(RuntimeError):
        other.load_state_dict({"weights": torch.ones(3, 17), "methods": torch.ones(6)})


# ---------------------------------------------------------------------------------------------------------- drawing


def opened(weights: list[float], decay: float = 0.99, threshold: float = 0.8) -> list[float]:
    """The text's rule; where it leaves nothing, the code's."""
    above = [m if m > threshold else 0 for m in weights]
    if any(above):
        return above
    relative = [m + (1 - decay) for m in weights]
    return [m / max(relative) if m / max(relative) >= threshold else 0 for m in relative]


def test_the_bins_that_are_open_are_those_of_the_text_and_else_of_the_code() -> None:
    bins = learned()
    rows = bins.open(bins.weights).tolist()
    for row, weights in zip(rows, bins.weights.tolist(), strict=True):
        assert row == pytest.approx(opened(weights), abs=1e-15)
    assert rows[Op.INVERT] == [1.0] * BINS
    assert 0 < sum(x > 0 for x in rows[Op.BLUR]) < BINS
    assert bins.open(bins.methods).tolist() == [1.0, 0.9, 0.81, 0, 0, 0]


def test_bins_are_drawn_in_proportion_to_their_weights() -> None:
    bins, n = learned(), 60_000
    p = bins.draw(0, 0, torch.arange(n))
    ranges = torch.tensor([RANGES[op] for op in Op], dtype=torch.float64)
    for op in Op:
        low, high = ranges[op].tolist()
        amount = p.amount[p.op == op].double()
        assert abs(len(amount) - 2 * n / 19) < 4 * (2 * n / 19) ** 0.5
        if low == high:
            continue
        place = ((amount - low) / (high - low) * BINS - 1e-4).long().clamp(0, BINS - 1)
        counts = torch.bincount(place, minlength=BINS).double()
        expected = torch.tensor(opened(bins.weights[op].tolist()), dtype=torch.float64)
        expected *= len(amount) / expected.sum()
        unlikely = (counts - expected).abs() > 4.5 * expected.sqrt() + 2  # the edge of a bin rounds into the next
        assert not unlikely.any(), (op, counts, expected)
    method = torch.bincount(p.method[p.op == Op.RESCALE], minlength=len(METHODS)).double()
    expected = torch.tensor([1, 0.9, 0.81, 0, 0, 0]) / 2.71 * method.sum()
    assert ((method - expected).abs() <= 4 * expected.sqrt()).all()
    assert uniform_in(p.centre[:, 0, 0], 0, 1)


def test_probes_are_uniform_and_say_what_they_took() -> None:
    n = 60_000
    p, chosen = learned().probe(0, 0, torch.arange(n))
    assert chosen.shape == (n, 2, 3)
    assert torch.equal(chosen[..., 0], p.op)
    assert torch.equal(chosen[..., 2], p.method)
    for op in Op:
        low, high = RANGES[op]
        mine = p.op == op
        place = chosen[..., 1][mine]
        counts = torch.bincount(place, minlength=BINS).double()
        assert ((counts - counts.mean()) ** 2 / counts.mean()).sum() < 16 + 5 * 32**0.5
        assert torch.equal(place.unique(), torch.arange(BINS))
        if low < high:
            assert uniform_in(p.amount[mine], low, high)
            begin = low + (high - low) * place / BINS
            inside = p.amount[mine] - begin
            assert (inside > -1e-5 * (high - low)).all()
            assert (inside < (high - low) * (1 / BINS + 1e-5)).all()


def test_pick_takes_the_first_and_the_last_and_never_what_has_no_weight() -> None:
    weights = torch.tensor([0.0, 1.0, 0.0, 0.5, 0.0])
    bits = torch.tensor([0, 2**32 * 2 // 3 - 300, 2**32 * 2 // 3 + 300, 2**32 - 1])
    assert pick(bits, weights.expand(4, 5)).tolist() == [1, 1, 3, 3]


def test_a_sample_s_operations_depend_on_itself_and_the_weights_alone() -> None:
    bins, ids = learned(), torch.tensor([5, 0, 99_999, 17, 4_000_000_000, 18, 3])
    whole = bins.draw(3, 8, ids)
    assert layout(whole) == LAYOUT
    rows = torch.tensor([4, 2, 0, 5])
    assert same(bins.draw(3, 8, ids[rows]), whole[rows])
    for other in (bins.draw(4, 8, ids), bins.draw(3, 9, ids), bins.draw(3, 8, ids, 1), Bins().probe(3, 8, ids)[0]):
        assert not same(other, whole)


def test_draw_never_changes() -> None:
    """Runs in progress depend on these very bits: if this fails, the code is wrong, not the test."""
    ids = torch.arange(2000)
    bins = learned()
    digest = hashlib.sha256()
    for p in (bins.draw(2024, 5, ids), bins.probe(2024, 5, ids)[0]):
        for x in (p.op, p.amount, p.method, p.centre):
            digest.update(x.numpy().tobytes())
    assert digest.hexdigest() == "aab350dbf039608d50f6b5e13039ae4dd750ece264877944da5e1afe92e9fce7"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_a_gpu_learns_and_draws_the_same_bits() -> None:
    here, there = learned(), Bins("cuda")
    there.load_state_dict(here.state_dict())
    ids = torch.arange(500)
    for epoch in range(5):
        omega = torch.rand(500, generator=torch.Generator().manual_seed(epoch))
        _, chosen = here.probe(0, epoch, ids)
        torch.cuda.set_sync_debug_mode("error" if epoch else "default")
        try:
            _, on_gpu = there.probe(0, epoch, ids.cuda())
            there.update(on_gpu, omega.cuda())
            drawn = there.draw(0, epoch, ids.cuda())
        finally:
            torch.cuda.set_sync_debug_mode("default")
        here.update(chosen, omega)
        assert torch.equal(on_gpu.cpu(), chosen)
        assert torch.equal(there.weights.cpu(), here.weights)
        assert torch.equal(there.methods.cpu(), here.methods)
        assert same(drawn, here.draw(0, epoch, ids))
