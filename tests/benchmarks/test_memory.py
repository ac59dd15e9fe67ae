"""The largest batch that fits is found, and what is counted of memory is there."""

from __future__ import annotations

import importlib
import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("memory")


def test_the_largest_batch_that_fits(memory: Any) -> None:
    for limit, step in itertools.product((0, 63, 64, 65, 127, 1000, 1024, 5000), (64, 100)):
        tried: list[int] = []

        def fits(batch: int, limit: int = limit, tried: list[int] = tried) -> bool:
            tried.append(batch)
            return batch <= limit

        assert memory.largest(fits, step) == limit // step * step
        assert len(tried) < 16


def test_memory_that_is_taken_and_let_go_is_seen(memory: Any) -> None:
    kept = []
    taken = memory.beyond(lambda: np.ones(40 << 20, np.uint8).sum())
    left = memory.beyond(lambda: kept.append(np.ones(40 << 20, np.uint8)))
    assert 39 < taken["beyond_mb"] < 60
    assert taken["left_mb"] < 20
    assert 39 < left["left_mb"] < 60
    held = memory.megabytes()
    assert 0 < held["Anonymous"] <= held["Rss"]
    assert 0 < held["Pss"] <= held["Rss"]


def test_what_does_not_fit_is_a_row_like_the_others(memory: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    step = memory.Step(memory.config_of(quick=True), bf16=False, compiled=False)
    step.at = torch.device("cuda")  # which it asks for memory that is not there
    monkeypatch.setattr(memory.Step, "run", lambda self, batch: torch.empty(1 << 60) if batch > 1 else 0)
    monkeypatch.setattr(torch, "OutOfMemoryError", RuntimeError)  # as a CPU calls it
    assert step.taken(2) == {"peak_mb": "out of memory"}
    assert not step.fits(2)
    assert step.fits(1)
