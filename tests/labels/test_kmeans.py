"""k-means against scikit-learn from the same centres, and against its definition in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.cluster import KMeans
from sklearn.metrics import pairwise_distances_argmin_min
from torch import Tensor

from barlow.data.chance import Use, words
from barlow.labels import kmeans as module
from barlow.labels.kmeans import distances, kmeans, lloyd, plus_plus


def features(n: int, d: int = 24, groups: int = 12, seed: int = 0) -> Tensor:
    """Groups that overlap, as features of a backbone do."""
    chance = torch.Generator().manual_seed(seed)
    centres = torch.randn(groups, d, generator=chance)
    noise = torch.randn(n, d, generator=chance)
    return torch.nn.functional.normalize(centres[torch.arange(n) % groups] + 0.8 * noise, dim=1)


def test_distances_are_scikit_learns() -> None:
    points, centres = features(3000), features(70, seed=1)
    squared, nearest = distances(points, centres)
    which, far = pairwise_distances_argmin_min(points.double().numpy(), centres.double().numpy())
    assert nearest.tolist() == which.tolist()
    np.testing.assert_allclose(squared.sqrt().numpy(), far, rtol=1e-5)


def test_a_small_distance_between_long_vectors_is_not_lost() -> None:
    centres = 100 * features(5)
    points = centres + 1e-3
    squared, nearest = distances(points, centres)
    assert nearest.tolist() == list(range(5))
    torch.testing.assert_close(squared, torch.full((5,), 24 * 1e-6), rtol=0.05, atol=0)


@pytest.mark.parametrize("scale", [1.0, 1e-4, 3e5])
def test_from_the_same_centres_it_ends_where_scikit_learn_does(scale: float) -> None:
    points = scale * features(2000)
    start = points[torch.randperm(2000, generator=torch.Generator().manual_seed(2))[:20]]
    ours = lloyd(points, start, 300)
    theirs = KMeans(20, init=start.numpy(), n_init=1, max_iter=300, tol=0, algorithm="lloyd").fit(points.numpy())
    assert ours.rounds > 5
    assert ours.nearest.tolist() == theirs.labels_.tolist()
    np.testing.assert_allclose(ours.centres.numpy(), theirs.cluster_centers_, rtol=1e-4, atol=1e-6 * scale)
    assert ours.inertia == pytest.approx(theirs.inertia_, rel=1e-5)


def test_after_each_round_too() -> None:
    points = features(1500)
    for rounds in (1, 2, 5):
        ours = lloyd(points, points[:15], rounds)
        theirs = KMeans(15, init=points[:15].numpy(), n_init=1, max_iter=rounds, tol=0).fit(points.numpy())
        assert ours.rounds == rounds
        assert ours.nearest.tolist() == theirs.labels_.tolist()
        assert ours.inertia == pytest.approx(theirs.inertia_, rel=1e-5)


def test_the_bits_depend_neither_on_chunks_nor_on_the_order_of_points(monkeypatch: pytest.MonkeyPatch) -> None:
    points = features(1200)
    whole = lloyd(points, points[:10], 100)
    order = torch.randperm(1200, generator=torch.Generator().manual_seed(3))
    assert torch.equal(lloyd(points[order], points[:10], 100).centres, whole.centres)
    monkeypatch.setattr(module, "CELLS", 500)
    again = lloyd(points, points[:10], 100)
    assert torch.equal(again.centres, whole.centres)
    assert torch.equal(again.nearest, whole.nearest)


def test_the_best_of_several_starts_by_the_seed_alone() -> None:
    points = features(1500, groups=30)
    found = kmeans(points, 30, seed=5, starts=4)
    alone = [lloyd(points, plus_plus(points, 30, 5, start), 100) for start in range(4)]
    assert found.inertia == min(each.inertia for each in alone)
    assert len({each.inertia for each in alone}) > 1
    assert torch.equal(found.centres, kmeans(points, 30, seed=5, starts=4).centres)
    assert not torch.equal(found.centres, kmeans(points, 30, seed=6, starts=4).centres)
    theirs = KMeans(30, n_init=4, random_state=0).fit(points.numpy())
    assert found.inertia < 1.01 * theirs.inertia_


def test_starts_are_drawn_as_defined() -> None:
    """One after the other: of each step's trials, drawn by squared distance, the one that leaves least."""
    points, k, trials = features(400), 12, 4
    bits = words(9, Use.KMEANS, 1, torch.arange(k), slots=trials).numpy()
    uniform = (bits[..., 0] * 2**21 + bits[..., 1] // 2**11) / 2**53
    x = points.double().numpy()
    rows = [int(uniform[0, 0] * 400)]
    for step in range(1, k):
        squared = ((x[:, None] - x[rows]) ** 2).sum(2).min(1)
        tried = np.searchsorted(np.cumsum(squared) / squared.sum(), uniform[step], side="right")
        left = [np.minimum(squared, ((x - x[t]) ** 2).sum(1)).sum() for t in tried]
        rows.append(int(tried[int(np.argmin(left))]))
    assert torch.equal(plus_plus(points, k, seed=9, start=1), points[rows])


def test_a_centre_without_points_gets_the_farthest_one() -> None:
    points = torch.cat((features(200), 3 * features(1, seed=4)))
    lost = torch.full((2, 24), 50.0)
    found = lloyd(points, torch.cat((points[:3], lost)), 100)
    assert torch.bincount(found.nearest, minlength=5).min() > 0
    assert torch.equal(found.centres[found.nearest[-1]], points[-1])  # the outlier is a cluster of its own
    assert found.inertia < lloyd(points, points[:3], 100).inertia


@pytest.mark.parametrize("distinct", [1, 3])
def test_fewer_distinct_points_than_centres_are_no_trouble(distinct: int) -> None:
    points = features(distinct).repeat(10, 1)
    found = kmeans(points, 5, seed=0)
    assert found.rounds < 10
    assert found.inertia == pytest.approx(0, abs=1e-6)
    assert found.centres.isfinite().all()
    every = kmeans(features(7), 7, seed=0)
    assert sorted(every.nearest.tolist()) == list(range(7))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_a_gpu_finds_the_same_and_repeats_it() -> None:
    points = features(20000, d=512, groups=100)
    here = lloyd(points, points[:100], 50)
    there = lloyd(points.cuda(), points[:100].cuda(), 50)
    assert there.inertia == pytest.approx(here.inertia, rel=1e-4)
    first, again = (kmeans(points.cuda(), 100, seed=0) for _ in range(2))
    assert torch.equal(first.centres, again.centres)
