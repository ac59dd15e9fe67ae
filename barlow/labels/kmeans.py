"""k-means: Lloyd's rounds from k-means++ starts, the best of several; on the device of its points, repeatable there.

Chance is counter-based. Points are summed as integers, times a power of two: finer than float32, and the same in any
order. So a GPU's threads may add at once, and a round moves only those points that have changed their cluster."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from barlow.data.chance import Use, words

STARTS = 3
ROUNDS = 100
"""At most, a start; it ends where nothing changes."""
CELLS = 1 << 22
"""Numbers at a time: 16 MB."""
SAME = 1e-12
"""Of the largest value's square: a point whose squared distance to its centre is less lies on it."""


class Clusters(NamedTuple):
    centres: Tensor  # float32 [k, d]
    nearest: Tensor  # int64 [n]: each point's centre
    inertia: float
    """Sum of squared distances to them."""
    rounds: int


def kmeans(
    points: Tensor, k: int, seed: int, starts: int = STARTS, beat: Callable[[], object] = lambda: None
) -> Clusters:
    """The best of so many starts, for points float32 [n, d], n at least k. `beat` is called at every round."""
    found = (lloyd(points, plus_plus(points, k, seed, start, beat), ROUNDS, beat) for start in range(starts))
    return min(found, key=lambda clusters: clusters.inertia)


def lloyd(points: Tensor, centres: Tensor, rounds: int, beat: Callable[[], object] = lambda: None) -> Clusters:
    """From these centres: each point to the nearest, each centre to the mean of its points, until nothing changes.

    A cluster that has lost all its points gets the one that lies farthest from its own centre."""
    k, scale = len(centres), power_of_two(points, bits=62)
    sums = torch.zeros(centres.shape, dtype=torch.int64, device=points.device)
    before = torch.full((len(points),), -1, device=points.device)
    done = 0
    while done < rounds:
        beat()
        nearest = assign(points, centres)
        fill_empty(points, centres, nearest)
        moved = (nearest != before).nonzero().squeeze(1)
        if not len(moved):
            break
        for part in moved.split(rows(points)):
            exact = (points[part].double() * scale).round().long()
            sums.index_add_(0, nearest[part], exact)
            if done:
                sums.index_add_(0, before[part], -exact)
        counts = torch.bincount(nearest, minlength=k).unsqueeze(1)
        centres = torch.where(counts > 0, (sums.double() / counts.clamp(min=1) / scale).float(), centres)
        before = nearest
        done += 1
    squared, nearest = distances(points, centres)
    return Clusters(centres, nearest, float(squared.double().sum()), done)


def plus_plus(points: Tensor, k: int, seed: int, start: int = 0, beat: Callable[[], object] = lambda: None) -> Tensor:
    """k of the points to begin with, as k-means++ draws them (Arthur and Vassilvitskii 2007): each with a probability
    in proportion to its squared distance to those before it; of 2 + log k such draws, the one that helps most."""
    n, trials = len(points), 2 + int(math.log(k))
    bits = words(seed, Use.KMEANS, start, torch.arange(k), slots=trials)  # [k, trials, 4]
    uniform = (bits[..., 0] << 21 | bits[..., 1] >> 11).double() * 2.0**-53
    norms = torch.cat([part.square().sum(1) for part in points.split(rows(points))])

    def squared_to(chosen: Tensor) -> Tensor:
        return torch.addmm(norms[chosen], points, points[chosen].T, alpha=-2).add_(norms.unsqueeze(1)).clamp_(min=0)

    first = (uniform[0, :1] * n).long().to(points.device)
    chosen, nearest = [first], squared_to(first).squeeze(1)
    for each in uniform[1:]:
        beat()
        weights = (nearest.double() * power_of_two(nearest, bits=53)).long()  # whole numbers: sums have no order
        heap = weights.cumsum(0)
        at = (each * int(heap[-1])).long().to(points.device)
        tried = torch.searchsorted(heap, at, right=True).clamp(max=n - 1)
        after = torch.minimum(nearest.unsqueeze(1), squared_to(tried))  # [n, trials]
        best = after.sum(0, dtype=torch.float64).argmin()
        chosen.append(tried[best].unsqueeze(0))
        nearest = after[:, best].contiguous()
    return points[torch.cat(chosen)]


def distances(points: Tensor, centres: Tensor) -> tuple[Tensor, Tensor]:
    """To the nearest centre: squared distance float32 [n], and which it is [n]."""
    nearest = assign(points, centres)
    return squared_distances(points, centres, nearest), nearest


def assign(points: Tensor, centres: Tensor) -> Tensor:
    """The nearest centre of each point; of equal ones the first."""
    half = centres.square().sum(1) / -2
    parts = points.split(max(1, CELLS // len(centres)))
    return torch.cat([torch.addmm(half, part, centres.T).argmax(1) for part in parts])


def squared_distances(points: Tensor, centres: Tensor, own: Tensor) -> Tensor:
    """Of each point to its own centre, from the differences: products would leave nothing of a small distance."""
    parts = zip(points.split(rows(points)), own.split(rows(points)), strict=True)
    return torch.cat([(part - centres[its]).square().sum(1) for part, its in parts])


def fill_empty(points: Tensor, centres: Tensor, nearest: Tensor) -> None:
    """Give every centre without a point one, in `nearest`; where there are fewer distinct points than centres, not."""
    empty = (torch.bincount(nearest, minlength=len(centres)) == 0).nonzero().squeeze(1)
    if not len(empty):
        return
    squared = squared_distances(points, centres, nearest)
    farthest = squared.sort(descending=True, stable=True).indices[: len(empty)]
    apart = squared[farthest] > SAME * points.abs().max().square()
    nearest[farthest[apart]] = empty[apart]


def rows(points: Tensor) -> int:
    """Of points, at a time."""
    return max(1, CELLS // points.shape[1])


def power_of_two(values: Tensor, bits: int) -> float:
    """The largest by which the sum of all `values` [n, ...] along n, times it, stays below 2^bits."""
    low, high = torch.aminmax(values)
    largest = max(-float(low), float(high))
    return 2.0 ** (bits - math.frexp(largest * len(values))[1]) if largest else 1.0
