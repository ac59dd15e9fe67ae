"""kNN accuracy against its definition, one query at a time in float64."""

from __future__ import annotations

import math

import numpy as np
import torch

from barlow.stages.knn import classify


def by_definition(train: np.ndarray, labels: np.ndarray, query: np.ndarray, classes: int, k: int, t: float) -> int:
    cosine = train @ query / np.linalg.norm(train, axis=1) / np.linalg.norm(query)
    votes = [0.0] * classes
    for near in np.argsort(-cosine)[:k]:
        votes[labels[near]] += math.exp(cosine[near] / t)
    return int(np.argmax(votes))


def test_votes_are_the_definition() -> None:
    rng = np.random.default_rng(0)
    train, queries = rng.normal(size=(300, 6)), rng.normal(size=(80, 6))
    labels = rng.integers(0, 7, 300)
    for k, t in ((1, 0.07), (20, 0.07), (20, 1.0), (1000, 0.5)):
        found = classify(torch.tensor(train), torch.tensor(labels), torch.tensor(queries), 7, k, t)
        assert found.tolist() == [by_definition(train, labels, query, 7, k, t) for query in queries]


def test_scale_of_features_does_not_matter() -> None:
    generator = torch.Generator().manual_seed(0)
    train, queries = torch.randn(200, 5, generator=generator), torch.randn(50, 5, generator=generator)
    labels = torch.randint(0, 3, (200,), generator=generator)
    scaled = train * torch.rand(200, 1, generator=generator).add(0.1) * 100
    assert torch.equal(
        classify(train, labels, queries, 3, 20, 0.07), classify(scaled, labels, 5 * queries, 3, 20, 0.07)
    )


def test_many_queries_are_taken_in_chunks() -> None:
    generator = torch.Generator().manual_seed(1)
    train, queries = torch.randn(50, 4, generator=generator), torch.randn(3000, 4, generator=generator)
    labels = torch.randint(0, 3, (50,), generator=generator)
    alone = torch.cat([classify(train, labels, query[None], 3, 5, 0.1) for query in queries[:200]])
    assert torch.equal(classify(train, labels, queries, 3, 5, 0.1)[:200], alone)
