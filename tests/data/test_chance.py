"""Philox against its published vectors and against a plain-Python form of its definition; what is drawn is uniform."""

from __future__ import annotations

import hashlib
import random

import pytest
import torch

from barlow.data.chance import Use, permutation, philox, seed_of_step, uniform, words

KNOWN_ANSWERS = [  # Random123's kat_vectors, philox4x32 with 10 rounds
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


def numbers(text: str) -> list[int]:
    return [int(word, 16) for word in text.split()]


def philox_in_integers(key: tuple[int, int], counter: tuple[int, ...]) -> list[int]:
    """The definition, in Python's unbounded integers: ten times two multiplications, a swap and a bumped key."""
    left, right = [counter[0], counter[2]], [counter[1], counter[3]]
    for i in range(10):
        keys = [(key[j] + i * bump) % 2**32 for j, bump in enumerate((0x9E3779B9, 0xBB67AE85))]
        high0, low0 = divmod(left[0] * 0xD2511F53, 2**32)
        high1, low1 = divmod(left[1] * 0xCD9E8D57, 2**32)
        left = [high1 ^ right[0] ^ keys[0], high0 ^ right[1] ^ keys[1]]
        right = [low1, low0]
    return [left[0], right[0], left[1], right[1]]


@pytest.mark.parametrize(("counter", "key", "answer"), KNOWN_ANSWERS)
def test_philox_gives_the_published_answers(counter: str, key: str, answer: str) -> None:
    k0, k1 = numbers(key)
    assert philox((k0, k1), torch.tensor(numbers(counter))).tolist() == numbers(answer)
    assert philox_in_integers((k0, k1), tuple(numbers(counter))) == numbers(answer)


def test_philox_agrees_with_integers_on_any_input() -> None:
    rng = random.Random(0)
    key = (rng.getrandbits(32), rng.getrandbits(32))
    counters = [tuple(rng.getrandbits(32) for _ in range(4)) for _ in range(500)]
    counters += [(2**32 - 1 - i, i, 2**31 + i, 2**31 - i) for i in range(50)]
    expected = [philox_in_integers(key, counter) for counter in counters]
    assert philox(key, torch.tensor(counters)).tolist() == expected
    assert philox(key, torch.tensor(counters).view(2, 275, 4)).view(-1, 4).tolist() == expected


def test_words_are_philox_of_index_epoch_slot_and_use() -> None:
    seed = (7 << 32) + 5
    drawn = words(seed, Use.VIEWS, epoch=3, index=torch.tensor([11, 4_000_000_000]), slots=2, lane=1)
    expected = [
        [philox_in_integers((5, 7), (index, 3, (1 << 16) + slot, int(Use.VIEWS))) for slot in (0, 1)]
        for index in (11, 4_000_000_000)
    ]
    assert drawn.tolist() == expected


def test_no_two_draws_share_their_words() -> None:
    """Every one of seed, use, epoch, sample, lane and slot gives other words."""
    index = torch.arange(50)
    drawn = [
        words(seed, use, epoch, index, slots=3, lane=lane).flatten(0, 1)
        for seed in (0, 1, -1, 1 << 32)
        for use in Use
        for epoch in (0, 1, 50)
        for lane in (0, 1)
    ]
    rows = torch.cat(drawn)
    assert len(rows.unique(dim=0)) == len(rows) == 4 * len(Use) * 3 * 2 * 50 * 3


def test_uses_have_their_own_numbers() -> None:
    assert {use.name: int(use) for use in Use}.items() >= {"ORDER": 1, "VIEWS": 2}.items()
    assert len({int(use) for use in Use}) == len(Use.__members__)


def test_uniform_is_exact_and_below_one() -> None:
    bits = torch.tensor([0, 255, 256, 2**31, 2**32 - 1])
    assert uniform(bits).dtype == torch.float32
    assert uniform(bits).double().tolist() == [0.0, 0.0, 2.0**-24, 0.5, 1 - 2.0**-24]


def test_uniform_is_uniform() -> None:
    n = 32_000
    u = uniform(words(0, Use.VIEWS, 0, torch.arange(n // 4), slots=1)).double().flatten()
    assert abs(u.mean().item() - 0.5) < 4 * (1 / 12 / n) ** 0.5
    bins = torch.histc(u, 64, 0, 1)
    chi2 = ((bins - n / 64) ** 2 / (n / 64)).sum().item()  # 63 degrees of freedom
    assert 63 - 4 * (2 * 63) ** 0.5 < chi2 < 63 + 4 * (2 * 63) ** 0.5
    pairs = u.view(-1, 4)
    correlation = torch.corrcoef(pairs.T) - torch.eye(4)
    assert correlation.abs().max() < 4.5 / (n / 4) ** 0.5


def test_every_bit_is_set_half_of_the_time() -> None:
    bits = words(3, Use.ORDER, 0, torch.arange(8_000), slots=1).flatten()
    share = (bits[:, None] >> torch.arange(32) & 1).double().mean(dim=0)
    assert (share - 0.5).abs().max() < 4.5 * 0.5 / len(bits) ** 0.5


@pytest.mark.parametrize("n", [1, 2, 5, 999, 16_384, 40_001])
def test_permutation_is_one(n: int) -> None:
    order = permutation(seed=1, epoch=2, n=n)
    assert order.dtype == torch.int64
    assert torch.equal(order.sort().values, torch.arange(n))


@pytest.mark.parametrize("seed", [17, -3, (9 << 32) + 1])
def test_permutation_sorts_63_bit_keys_two_from_a_counter(seed: int) -> None:
    keys = []
    for position in range(501):
        key = (seed % 2**32, seed // 2**32 % 2**32)
        w = philox_in_integers(key, (position // 2, 3, 0, int(Use.ORDER)))[position % 2 * 2 :]
        keys.append((w[0] * 2**31 + w[1] // 2, position))
    assert permutation(seed, 3, 501).tolist() == [position for _, position in sorted(keys)]


def test_permutations_are_uniform() -> None:
    """All 24 orders of four things come equally often."""
    seen = torch.stack([permutation(seed, epoch, 4) for seed in range(30) for epoch in range(40)])
    counts = seen.unique(dim=0, return_counts=True)[1]
    chi2 = ((counts - 50) ** 2 / 50).sum().item()  # 23 degrees of freedom
    assert len(counts) == 24
    assert chi2 < 23 + 4 * (2 * 23) ** 0.5


def test_permutation_never_changes() -> None:
    """Runs in progress depend on these very bytes: if this fails, the code is wrong, not the test."""
    assert permutation(0, 0, 10).tolist() == [4, 8, 5, 0, 3, 9, 6, 7, 2, 1]
    digest = "62ac60a84a1aa20fe461d517b29745f4356de81b7c705bbf3afc55aa5fe0cf7f"
    assert hashlib.sha256(permutation(17, 3, 50_000).numpy().tobytes()).hexdigest() == digest


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_words_are_the_same_on_a_gpu() -> None:
    index = torch.arange(100_000) * 42_949
    here, there = (words(123, Use.VIEWS, 7, index.to(device), slots=3, lane=1) for device in ("cpu", "cuda"))
    assert torch.equal(here, there.cpu())
    assert torch.equal(uniform(here), uniform(there).cpu())


def test_the_seed_of_a_step_is_its_own() -> None:
    seeds = {seed_of_step(seed, step, rank) for seed in (0, 1) for step in range(50) for rank in range(8)}
    assert len(seeds) == 2 * 50 * 8
    assert all(0 <= seed < 1 << 63 for seed in seeds)
    first, second = words(3, Use.LAYERS, 7, torch.tensor([2]), slots=1)[0, 0, :2].tolist()
    assert seed_of_step(3, 7, 2) == first << 31 | second >> 1  # in plain numbers the same
