"""Which images to ask labels for: four rules, each a function of features and a seed.

Features are rows of unit length (`unit`), in the order of sample ids; what is chosen is told as rows of the pool, the
most wanted first. Any beginning of a request is a request by the same rule, but where images are typical: these are
chosen for their number."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from heapq import heapify, heappop, heapreplace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from barlow.data.chance import Use, words
from barlow.data.order import limited
from barlow.labels.kmeans import assign, distances, kmeans

Told = Callable[[int], object]  # of how many are chosen so far

CANDIDATES = 1024
CELLS = 1 << 24
"""Similarities at a time: 64 MB."""
TAKEN = float("inf")
CLUSTERS = 500
"""At most; of typical images."""
SAMPLE = 32_000
"""Images at most, from which centres are found."""
NEIGHBOURS = 20
OUTLIERS = 5
"""A cluster of fewer images than these comes last."""


class Chosen(NamedTuple):
    rows: Tensor  # int64 [count], of the pool
    distances: Tensor  # float32 [count], to what is labelled; of typical ones: to their neighbours


def unit(features: Tensor) -> Tensor:
    """Features [n, d] at length 1, float32."""
    return F.normalize(features.float(), dim=1)


def farthest_from_centres(
    labelled: Tensor, pool: Tensor, classes: int, count: int, seed: int, told: Told = lambda done: None
) -> Chosen:
    """The rule of BarlowMatch (section 4): k-means on the labelled images' features with a centre a class; of the pool,
    those whose nearest centre is farthest. Equally far ones go by id.

    With fewer labelled images than classes, each is a centre."""
    clusters = kmeans(labelled, min(classes, len(labelled)), seed, beat=lambda: told(0))
    squared, _ = distances(pool, clusters.centres)
    far = squared.sort(descending=True, stable=True).indices[:count]
    return Chosen(far.cpu(), squared[far].sqrt().cpu())


def k_centre_greedy(labelled: Tensor, pool: Tensor, count: int, told: Told = lambda done: None) -> Chosen:
    """Again and again the image that is farthest from all that are labelled or chosen (Sener and Savarese 2018): what
    is chosen is also far from each other, as section 6 of BarlowMatch wishes. Equally far ones go by id.

    To look at the whole pool for every choice would read it `count` times. But distances only ever fall; so among the
    1,024 farthest, those that after all choices between them are still farther than any other image was before are the
    very next choices, and the pool is read once for all of them (some hundreds, where features are many)."""
    closest = torch.full((len(pool),), -2.0, device=pool.device)  # cosine with the closest of those
    for part in labelled.split(4 * CANDIDATES):
        approach(closest, pool, part)
        told(0)
    rows: list[Tensor] = []
    cosines: list[np.ndarray] = []
    done = 0
    while done < count:
        candidates, bound = farthest(closest, min(CANDIDATES, len(pool)))
        among = pool[candidates]
        order, at = greedy(closest[candidates].cpu().numpy(), (among @ among.T).cpu().numpy(), bound, count - done)
        new = candidates[torch.from_numpy(order).to(pool.device)]
        approach(closest, pool, pool[new])
        closest[new] = TAKEN
        rows.append(new.cpu())
        cosines.append(at)
        done += len(new)
        told(done)
    cosine = torch.from_numpy(np.concatenate(cosines))
    return Chosen(torch.cat(rows), (2 - 2 * cosine).clamp(min=0).sqrt())


def typical(labelled: Tensor, pool: Tensor, count: int, seed: int, told: Told = lambda done: None) -> Chosen:
    """TypiClust (Hacohen et al. 2022), for few labels: all images in as many clusters as there will be labels, 500 at
    most; again and again, of the cluster with the fewest labelled or chosen images, and the largest of such, the most
    typical image, which is the one with the least mean distance to its 20 nearest neighbours there."""
    centres = centres_of(labelled, pool, len(labelled) + count, seed, lambda: told(0))
    own, theirs = assign(pool, centres), assign(labelled, centres)
    known = torch.bincount(theirs, minlength=len(centres)).tolist()
    size = torch.bincount(own, minlength=len(centres)).tolist()
    next_ones = [(n + at < OUTLIERS, at, -n - at, k) for k, (n, at) in enumerate(zip(size, known, strict=True)) if n]
    heapify(next_ones)
    sorted_ones: dict[int, tuple[Tensor, Tensor]] = {}
    rows, spread = [], []
    for done in range(count):
        outlying, at, size_below_0, k = next_ones[0]
        if k not in sorted_ones:
            inside = (own == k).nonzero().squeeze(1)
            every = torch.cat((pool[inside], labelled[theirs == k]))
            mean, order = mean_distance(every, len(inside), partial(told, done)).sort(stable=True)
            sorted_ones[k] = inside[order].cpu(), mean.cpu()
        nth = at - known[k]
        rows.append(sorted_ones[k][0][nth])
        spread.append(sorted_ones[k][1][nth])
        if nth + 1 < size[k]:
            heapreplace(next_ones, (outlying, at + 1, size_below_0, k))
        else:
            heappop(next_ones)
    return Chosen(torch.stack(rows), torch.stack(spread))


def centres_of(labelled: Tensor, pool: Tensor, k: int, seed: int, beat: Callable[[], object]) -> Tensor:
    """Of up to k clusters, found from images that the seed draws of all."""
    n = len(labelled) + len(pool)
    drawn = torch.from_numpy(limited(seed, n, SAMPLE)).to(pool.device)
    known = drawn < len(labelled)
    some = torch.cat((labelled[drawn[known]], pool[drawn[~known] - len(labelled)]))
    return kmeans(some, min(k, CLUSTERS, len(some)), seed, 1, beat).centres


def mean_distance(images: Tensor, m: int, beat: Callable[[], object]) -> Tensor:
    """Of each of the first m images [n, d] to its nearest neighbours among all. Which these are, products tell, about
    the mean of all; how far they are, differences: products would leave nothing of a small distance."""
    near = min(NEIGHBOURS, len(images) - 1)
    size = max(1, CELLS // max(len(images), near * images.shape[1]))
    images = images - images.mean(0)
    half = images.square().sum(1) / -2
    found = []
    for first in range(0, m, size):
        beat()
        part = images[first : min(first + size, m)]
        closeness = torch.addmm(half, part, images.T)
        closeness.diagonal(first).fill_(-TAKEN)  # an image is no neighbour of its own
        nearest = closeness.topk(near, dim=1).indices
        apart = (images[nearest] - part.unsqueeze(1)).norm(dim=2)  # [size, near]
        found.append(apart.mean(1) if near else part.new_zeros(len(part)))
    return torch.cat(found)


def at_random(ids: np.ndarray, count: int, seed: int) -> Tensor:
    """The control: `count` rows of the pool, by the seed and the ids alone."""
    bits = words(seed, Use.LABELS, 0, torch.from_numpy(ids), slots=1)[:, 0]
    return torch.argsort(bits[:, 0] << 31 | bits[:, 1] >> 1, stable=True)[:count]


def approach(closest: Tensor, pool: Tensor, new: Tensor) -> None:
    """Let `closest` [n] count the rows of `new` in."""
    size = max(1, CELLS // len(new))
    for known, part in zip(closest.split(size), pool.split(size), strict=True):
        torch.maximum(known, (part @ new.T).amax(1), out=known)


def farthest(closest: Tensor, n: int) -> tuple[Tensor, float]:
    """The n rows that are farthest, ascending, equally far ones by id; and a cosine below which no other one is."""
    bound = float(closest.topk(n, largest=False).values.max())
    below = (closest < bound).nonzero().squeeze(1)
    level = (closest == bound).nonzero().squeeze(1)[: n - len(below)]
    return torch.cat((below, level)).sort().values, bound if n < len(closest) else TAKEN


def greedy(closest: np.ndarray, cosines: np.ndarray, bound: float, count: int) -> tuple[np.ndarray, np.ndarray]:
    """The choices that are certain among candidates: which, in their order, and their cosines when they were chosen.

    The first always is: it is the farthest of all. `cosines` [m, m] between candidates; `bound` of all others."""
    rows: list[int] = []
    at: list[float] = []
    while len(rows) < count:
        row = int(closest.argmin())
        if rows and not closest[row] < bound:
            break
        rows.append(row)
        at.append(closest[row])
        closest = np.maximum(closest, cosines[row])
        closest[row] = TAKEN
    return np.array(rows), np.array(at, np.float32)
