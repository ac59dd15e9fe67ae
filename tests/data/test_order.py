"""The order of a run: whole epochs, the same batches on any number of ranks, and from any step on; also endlessly."""

from __future__ import annotations

import numpy as np
import pytest

from barlow.data.order import endless, epoch_order, limited, positions, steps_per_epoch, unlabelled_steps
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


def laps(
    count: int, batch: int, rank: int = 0, world: int = 1, first: int = 0, last: int = 60, seed: int = 5
) -> list[np.ndarray]:
    return list(endless(seed, count, batch, rank, world, first, last))


SIZES = [(203, 16), (12, 16), (16, 16), (5, 16), (1, 16), (7, 64)]  # the batch is larger than the set, and much larger


@pytest.mark.parametrize(("count", "batch"), SIZES)
def test_endlessly_every_image_is_taken_equally_often(count: int, batch: int) -> None:
    """The epochs' orders laid end to end: whole passes, each in an order of its own, and nothing is dropped."""
    whole = laps(count, batch)
    assert {array.shape for array in whole} == {(batch,)}
    assert {array.dtype for array in whole} == {np.dtype(np.int64)}
    row = np.concatenate(whole)
    passes, over = divmod(len(row), count)
    for lap in range(passes):
        assert np.array_equal(row[lap * count : (lap + 1) * count], epoch_order(5, lap, count))
        assert np.array_equal(np.sort(row[lap * count : (lap + 1) * count]), np.arange(count))
    often = np.bincount(row, minlength=count)
    assert often.min() >= passes
    assert often.max() <= passes + (over > 0)


@pytest.mark.parametrize(("count", "batch"), SIZES)
@pytest.mark.parametrize("world", [2, 8])
def test_endlessly_ranks_laid_end_to_end_are_the_global_batch(count: int, batch: int, world: int) -> None:
    ranks = [laps(count, batch, rank, world) for rank in range(world)]
    for parts, whole in zip(zip(*ranks, strict=True), laps(count, batch), strict=True):
        assert np.array_equal(np.concatenate(parts), whole)


@pytest.mark.parametrize(("count", "batch"), SIZES)
@pytest.mark.parametrize("first", [1, 12, 13, 59, 60])
def test_endlessly_from_any_step_on_it_is_the_rest_of_the_sequence(count: int, batch: int, first: int) -> None:
    rest, whole = laps(count, batch, 1, 2, first), laps(count, batch, 1, 2)
    assert len(rest) == 60 - first
    assert all(np.array_equal(a, b) for a, b in zip(rest, whole[first:], strict=True))


def test_a_seed_has_an_endless_order_of_its_own_which_no_other_set_disturbs() -> None:
    assert not np.array_equal(np.concatenate(laps(203, 16)), np.concatenate(laps(203, 16, seed=6)))
    few, many = endless(5, 7, 64, 0, 1, 0, 60), positions(5, COUNT, BATCH, 0, 1, 0, 60)
    for step, (a, b) in enumerate(zip(few, many, strict=True)):  # in turn, as FixMatch asks for them
        assert np.array_equal(a, laps(7, 64, first=step, last=step + 1)[0])
        assert np.array_equal(b, sequence(first=step, last=step + 1)[0])


def test_a_pass_over_the_unlabelled_images_takes_mu_batches_a_step() -> None:
    assert unlabelled_steps(448, 7, 64) == 1
    assert unlabelled_steps(1344, 7, 64) == 3
    assert unlabelled_steps(1343, 7, 64) == 2
    told = "--mu 7 --batch-size 64: a step takes 448 unlabelled images, there are 447: give less of either"
    with pytest.raises(UserError, match=told):
        unlabelled_steps(447, 7, 64)


def test_a_part_of_the_images_is_drawn_by_the_seed_and_grows_with_its_limit() -> None:
    some, more = limited(5, COUNT, 50), limited(5, COUNT, 80)
    assert len(set(some.tolist())) == 50
    assert set(some.tolist()) < set(more.tolist())
    assert np.array_equal(some, np.sort(some))
    assert not np.array_equal(some, limited(6, COUNT, 50))
    for all_of_them in (0, COUNT, COUNT + 1):
        assert np.array_equal(limited(5, COUNT, all_of_them), np.arange(COUNT))
