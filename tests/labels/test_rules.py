"""Which images are asked for: each rule against its definition, one image at a time in float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from barlow.labels import rules
from barlow.labels.kmeans import Clusters, kmeans
from barlow.labels.rules import at_random, farthest_from_centres, k_centre_greedy, typical, unit


def features(n: int, d: int = 32, groups: int = 20, seed: int = 0) -> Tensor:
    chance = torch.Generator().manual_seed(seed)
    centres = torch.randn(groups, d, generator=chance)
    which = torch.randint(0, groups, (n,), generator=chance)
    return unit(centres[which] + 0.5 * torch.randn(n, d, generator=chance))


def one_at_a_time(labelled: Tensor, pool: Tensor, count: int) -> tuple[list[int], list[float]]:
    x, known = pool.double().numpy(), labelled.double().numpy()
    closest = np.min([np.linalg.norm(x - each, axis=1) for each in known], axis=0)
    rows, far = [], []
    for _ in range(count):
        rows.append(int(closest.argmax()))
        far.append(float(closest[rows[-1]]))
        closest = np.minimum(closest, np.linalg.norm(x - x[rows[-1]], axis=1))
        closest[rows[-1]] = -1
    return rows, far


def test_the_papers_rule_is_its_definition() -> None:
    labelled, pool = features(300), features(2000, seed=1)
    found = farthest_from_centres(labelled, pool, classes=20, count=50, seed=3)
    centres = kmeans(labelled, 20, seed=3).centres.double().numpy()
    nearest = np.min([np.linalg.norm(pool.double().numpy() - centre, axis=1) for centre in centres], axis=0)
    assert found.rows.tolist() == np.argsort(-nearest)[:50].tolist()
    np.testing.assert_allclose(found.distances.numpy(), np.sort(nearest)[::-1][:50], rtol=1e-5)


def test_equally_far_ones_go_by_id() -> None:
    labelled, pool = features(50), features(40, seed=1).repeat(3, 1)
    rows = farthest_from_centres(labelled, pool, 5, 30, seed=0).rows.view(-1, 3)
    assert (rows.diff(dim=1) == 40).all()
    first = k_centre_greedy(labelled, pool, 1).rows
    assert int(first) < 40


def test_fewer_labelled_images_than_classes_are_centres_themselves() -> None:
    labelled, pool = features(6), features(100, seed=1)
    found = farthest_from_centres(labelled, pool, classes=800, count=5, seed=0)
    assert found.rows.tolist() == torch.cdist(pool, labelled).amin(1).sort(descending=True).indices[:5].tolist()


@pytest.mark.parametrize("candidates", [1, 7, 64, 1024])
@pytest.mark.parametrize("cells", [3000, 1 << 24])
def test_k_centre_greedy_is_the_choice_one_at_a_time(
    monkeypatch: pytest.MonkeyPatch, candidates: int, cells: int
) -> None:
    monkeypatch.setattr(rules, "CANDIDATES", candidates)
    monkeypatch.setattr(rules, "CELLS", cells)
    labelled, pool = features(100), features(1500, seed=1)
    rows, far = one_at_a_time(labelled, pool, 120)
    done: list[int] = []
    found = k_centre_greedy(labelled, pool, 120, done.append)
    assert found.rows.tolist() == rows
    np.testing.assert_allclose(found.distances.numpy(), far, rtol=1e-4)
    assert done[-1] == 120
    assert done == sorted(done)


def test_many_choices_for_one_look_at_the_pool() -> None:
    done: list[int] = []
    k_centre_greedy(features(100, d=128), features(6000, d=128, seed=1), 600, done.append)
    assert len(set(done)) < 12


def test_the_whole_pool_may_be_chosen_and_copies_come_last() -> None:
    pool = torch.cat((features(60, seed=1), features(60, seed=1)[:20]))
    found = k_centre_greedy(features(10), pool, 80)
    assert sorted(found.rows.tolist()) == list(range(80))
    last = {int(row) % 60 for row in found.rows[60:]}
    assert last == set(range(20))
    assert (found.distances[:60] > 0.1).all()
    assert (found.distances[60:] < 1e-2).all()


def test_k_centre_keeps_its_choices_apart() -> None:
    """What the paper's own rule does not: here the farthest images are near copies of one another."""
    labelled, pool = features(1200).split((200, 1000))
    strange = unit(-labelled.mean(0) + 0.001 * torch.randn(60, 32, generator=torch.Generator().manual_seed(0)))
    pool = torch.cat((pool, strange))
    papers, spread = farthest_from_centres(labelled, pool, 20, 50, 0).rows, k_centre_greedy(labelled, pool, 50).rows
    assert (papers >= 1000).sum() > 40
    assert (spread >= 1000).sum() == 1


def typical_one_at_a_time(labelled: Tensor, pool: Tensor, count: int, centres: Tensor) -> tuple[list[int], list[float]]:
    every = torch.cat((pool, labelled)).double()
    cluster = torch.cdist(every, centres.double()).argmin(1)
    covered, left = cluster[len(pool) :].tolist(), list(range(len(pool)))
    rows, far = [], []
    for _ in range(count):

        def rank(k: int) -> tuple[bool, int, int, int]:
            size = int((cluster == k).sum())
            return size < 5, covered.count(k), -size, k

        k = min({int(cluster[row]) for row in left}, key=rank)
        inside = every[cluster == k]

        def mean(row: int, inside: Tensor = inside) -> float:
            near = (inside - every[row]).norm(dim=1).sort().values[1:21]  # the first is the image itself
            return float(near.mean()) if len(near) else 0.0

        best = min((row for row in left if cluster[row] == k), key=mean)
        rows.append(best)
        far.append(mean(best))
        covered.append(k)
        left.remove(best)
    return rows, far


@pytest.mark.parametrize(("known", "count", "clusters"), [(30, 60, 500), (100, 60, 20), (5, 200, 500)])
@pytest.mark.parametrize("cells", [700, 1 << 24])
def test_typical_images_are_those_of_the_definition(
    monkeypatch: pytest.MonkeyPatch, known: int, count: int, clusters: int, cells: int
) -> None:
    monkeypatch.setattr(rules, "CELLS", cells)
    monkeypatch.setattr(rules, "CLUSTERS", clusters)
    labelled, pool = features(known), features(400, seed=1)
    found = typical(labelled, pool, count, seed=2)
    centres = rules.centres_of(labelled, pool, known + count, 2, lambda: None)
    assert len(centres) == min(known + count, clusters)
    rows, far = typical_one_at_a_time(labelled, pool, count, centres)
    np.testing.assert_allclose(found.distances.numpy(), far, rtol=1e-4, atol=1e-6)
    assert found.rows.tolist() == rows


def test_typical_images_are_of_groups_without_a_label_and_no_outliers() -> None:
    chance = torch.Generator().manual_seed(0)
    centres = unit(torch.randn(24, 32, generator=chance))
    groups = unit(centres[:, None] + 0.02 * torch.randn(24, 50, 32, generator=chance)).flatten(0, 1)
    strange = unit(torch.randn(3, 32, generator=chance))
    found = typical(groups[: 4 * 50 : 50], torch.cat((groups, strange)), 20, seed=0).rows
    assert sorted((found // 50).tolist()) == list(range(4, 24))


def test_the_whole_pool_may_be_asked_for_as_typical() -> None:
    done: list[int] = []

    def told(at: int) -> None:
        done.append(at)

    found = typical(features(10), features(80, seed=1), 80, 0, told)
    assert sorted(found.rows.tolist()) == list(range(80))
    assert done == sorted(done)
    pair = unit(torch.eye(2, 32))
    assert sorted(typical(pair[:1].repeat(3, 1), pair, 2, 0).rows.tolist()) == [
        0,
        1,
    ]  # beside one that is labelled thrice


def test_near_copies_are_told_apart() -> None:
    """Distances that float32 products would lose."""
    chance = torch.Generator().manual_seed(0)
    pool = unit(torch.ones(1, 256) + 1e-4 * torch.randn(200, 256, generator=chance))
    found = typical(-pool[:1], pool, 1, seed=0)
    every = torch.cdist(pool.double(), pool.double(), compute_mode="donot_use_mm_for_euclid_dist")
    mean = every.sort(dim=1).values[:, 1:21].mean(1)
    assert (mean < mean[found.rows]).sum() < 20
    assert float(found.distances) == pytest.approx(float(mean[found.rows]), rel=1e-3)


def test_centres_are_found_from_a_part_of_many_images(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rules, "SAMPLE", 480)
    labelled, pool = features(40), features(4000, seed=1)
    seen: list[Tensor] = []

    def clustered(points: Tensor, *more: Any) -> Clusters:
        seen.append(points)
        return kmeans(points, *more)

    monkeypatch.setattr(rules, "kmeans", clustered)
    found = typical(labelled, pool, 20, seed=0)
    assert [len(points) for points in seen] == [480]
    assert len(set(found.rows.tolist())) == 20
    assert not torch.equal(found.rows, typical(labelled, pool, 20, seed=1).rows)


def test_the_control_is_drawn_by_seed_and_ids() -> None:
    ids = np.arange(5000, 9000)
    few, more, other = at_random(ids, 100, 0), at_random(ids, 1000, 0), at_random(ids, 100, 1)
    assert torch.equal(few, more[:100])
    assert len(set(few.tolist()) & set(other.tolist())) < 12
    assert len(set(more.tolist())) == 1000
    assert abs(float(more.double().mean()) - 2000) < 5 * 4000 / 12**0.5 / 1000**0.5
    part = ids[ids % 3 > 0]
    chosen = {int(i) for i in ids[few.numpy()] if i % 3}
    assert chosen <= set(part[at_random(part, 100, 0).numpy()].tolist())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_a_gpu_chooses_the_same() -> None:
    labelled, pool = features(500, d=256), features(20000, d=256, seed=1)
    for rule in (
        lambda a, b: k_centre_greedy(a, b, 300).rows,
        lambda a, b: farthest_from_centres(a, b, 20, 300, 0).rows,
        lambda a, b: typical(a, b, 300, 0).rows,
    ):
        here, there = rule(labelled, pool), rule(labelled.cuda(), pool.cuda())
        assert len(set(here.tolist()) & set(there.tolist())) > 295  # but for what lies within rounding
        assert torch.equal(there, rule(labelled.cuda(), pool.cuda()))
