"""The order of a run as a pure function of (seed, epoch): which samples a global step takes, and a rank's part of them.

A job that comes back, on whatever number of ranks, asks for the steps that are left and gets the very images it would
have had. Positions are places in the chosen splits (0 to count - 1), not sample ids.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache

import numpy as np

from barlow.errors import UserError

NEVER = (1 << 32) - 1  # an epoch that no run comes to


def steps_per_epoch(count: int, batch: int) -> int:
    """Whole batches in an epoch of `count` samples; what is left over is dropped (other samples each epoch)."""
    if batch < 1:
        raise UserError(f"batch size {batch}: give --batch-size of at least 1")
    if batch > count:
        choice = f"give --batch-size {count} or less"
        raise UserError(f"batch size {batch} is larger than the data ({count} images): {choice}")
    return count // batch


def limited(seed: int, count: int, limit: int) -> np.ndarray:
    """Which positions [n] int64 of `count` are used where no more than `limit` are to be (0: all): in order, drawn by
    the seed, and the more for a higher limit."""
    if not 0 < limit < count:
        return np.arange(count)
    return np.sort(epoch_order(seed, NEVER, count)[:limit])


def unlabelled_steps(count: int, mu: int, batch: int) -> int:
    """Steps of a pass over `count` unlabelled images, of which each takes mu times the labelled batch."""
    if mu * batch > count:
        what = f"--mu {mu} --batch-size {batch}: a step takes {mu * batch} unlabelled images, there are {count}"
        raise UserError(f"{what}: give less of either")
    return count // (mu * batch)


def share(batch: int, world: int) -> int:
    """Samples of the global batch that each of `world` ranks takes."""
    if batch % world:
        near = sorted({max(batch // world, 1) * world, -(-batch // world) * world})
        choice = " or ".join(str(size) for size in near)
        raise UserError(f"batch size {batch} is not divisible by {world} ranks: give --batch-size {choice}")
    return batch // world


def positions(
    seed: int, count: int, batch: int, rank: int, world: int, first_step: int, last_step: int
) -> Iterator[np.ndarray]:
    """This rank's positions [batch / world] int64 at each global step from `first_step` up to `last_step` (excluded).

    The ranks' arrays of a step, laid end to end in rank order, are the same global batch whatever the world size. What
    is wrong with the sizes is said here, at the call, not at the first batch.
    """
    steps, part = steps_per_epoch(count, batch), share(batch, world)
    if not 0 <= rank < world:
        raise ValueError(f"rank {rank} of {world}")

    def run() -> Iterator[np.ndarray]:
        for step in range(first_step, last_step):
            epoch, i = divmod(step, steps)
            start = i * batch + rank * part
            yield epoch_order(seed, epoch, count)[start : start + part].copy()

    return run()


def endless(
    seed: int, count: int, batch: int, rank: int, world: int, first_step: int, last_step: int
) -> Iterator[np.ndarray]:
    """The same for a set that is gone through again and again, whatever the batch: step s takes places s * batch and on
    of the epochs' orders laid end to end. So a batch may be larger than the set."""
    part = share(batch, world)
    order = lru_cache(maxsize=2 + part // count)(epoch_order.__wrapped__)  # not to push out that of a larger set
    for step in range(first_step, last_step):
        places = step * batch + rank * part + np.arange(part)
        epochs, within = np.divmod(places, count)
        yield np.concatenate([order(seed, e, count)[within[epochs == e]] for e in np.unique(epochs).tolist()])


@lru_cache(maxsize=2)
def epoch_order(seed: int, epoch: int, count: int) -> np.ndarray:
    """The permutation [count] int64 of an epoch; the last two are kept, for they are asked for at every step."""
    from barlow.data.chance import permutation  # brings torch, which launchers ask sizes without

    order = permutation(seed, epoch, count).numpy()
    order.setflags(write=False)
    return order
