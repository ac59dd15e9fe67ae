"""The order of a run: whole epochs, the same batches on any number of ranks, and from any step on."""

from __future__ import annotations

import numpy as np
import pytest

from barlow.data.order import positions, steps_per_epoch
from barlow.errors import UserError

COUNT, BATCH = 203, 16
STEPS = COUNT // BATCH


def sequence(rank: int = 0, world: int = 1, first: int = 0, last: int = 3 * STEPS, seed: int = 5) -> list[np.ndarray]:
    return list(positions(seed, COUNT, BATCH, rank, world, first, last))


def test_arrays_are_int64_of_the_rank_s_share() -> None:
    for array in sequence(world=4):
        assert array.dtype == np.int64
        assert array.shape == (BATCH // 4,)


def test_every_epoch_takes_each_sample_at_most_once() -> None:
    whole = sequence()
    assert len(whole) == 3 * STEPS == 3 * steps_per_epoch(COUNT, BATCH)
    for epoch in range(3):
        taken = np.concatenate(whole[epoch * STEPS : (epoch + 1) * STEPS])
        assert len(np.unique(taken)) == len(taken) == STEPS * BATCH
        assert taken.min() >= 0
        assert taken.max() < COUNT


def test_an_epoch_without_a_tail_is_a_permutation() -> None:
    taken = np.concatenate(list(positions(0, 192, 16, 0, 1, 12, 24)))
    assert np.array_equal(np.sort(taken), np.arange(192))


def test_the_tail_that_is_dropped_differs_from_epoch_to_epoch() -> None:
    whole = sequence()
    dropped = [set(range(COUNT)) - set(np.concatenate(whole[e * STEPS : (e + 1) * STEPS]).tolist()) for e in range(3)]
    assert all(len(tail) == COUNT % BATCH for tail in dropped)
    assert dropped[0] != dropped[1] != dropped[2]


@pytest.mark.parametrize("world", [1, 2, 4, 8])
def test_ranks_laid_end_to_end_are_the_global_batch(world: int) -> None:
    ranks = [sequence(rank, world) for rank in range(world)]
    for parts, whole in zip(zip(*ranks, strict=True), sequence(), strict=True):
        assert np.array_equal(np.concatenate(parts), whole)


@pytest.mark.parametrize("first", [0, 1, STEPS - 1, STEPS, STEPS + 5, 3 * STEPS - 1, 3 * STEPS])
def test_starting_at_a_step_gives_the_rest_of_the_sequence(first: int) -> None:
    rest, whole = sequence(1, 2, first), sequence(1, 2)
    assert len(rest) == 3 * STEPS - first
    assert all(np.array_equal(a, b) for a, b in zip(rest, whole[first:], strict=True))


def test_epochs_and_seeds_differ() -> None:
    whole = np.concatenate(sequence()).reshape(3, -1)
    other = np.concatenate(sequence(seed=6)).reshape(3, -1)
    rows = np.concatenate([whole, other])
    assert len(np.unique(rows, axis=0)) == 6
    assert (whole[0] == whole[1]).mean() < 0.1


def test_arrays_are_the_caller_s_own() -> None:
    before = sequence()
    for array in positions(5, COUNT, BATCH, 0, 1, 0, STEPS):
        array[:] = -1
    assert all(np.array_equal(a, b) for a, b in zip(before, sequence(), strict=True))


def test_a_batch_that_the_ranks_cannot_share_is_refused_at_the_call() -> None:
    with pytest.raises(UserError, match=r"batch size 100 is not divisible by 8 ranks: give --batch-size 96 or 104"):
        positions(0, 1000, 100, 0, 8, 0, 1)
    with pytest.raises(UserError, match=r"give --batch-size 4$"):
        positions(0, 1000, 2, 0, 4, 0, 1)


def test_a_batch_larger_than_the_data_is_refused_at_the_call() -> None:
    with pytest.raises(UserError, match=r"batch size 512 is larger than the data \(100 images\)"):
        positions(0, 100, 512, 0, 1, 0, 1)
    with pytest.raises(UserError, match="at least 1"):
        steps_per_epoch(100, 0)
    assert steps_per_epoch(512, 512) == 1


def test_a_rank_outside_the_world_is_a_bug() -> None:
    with pytest.raises(ValueError, match="rank 2 of 2"):
        positions(0, 100, 10, 2, 2, 0, 1)
