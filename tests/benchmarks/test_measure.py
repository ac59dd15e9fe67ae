"""What was measured stays: of other hardware, and of parts of a benchmark that were not measured anew."""

from __future__ import annotations

import csv
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

import measure
from measure import write
from step import CPU, GPU, chosen


def rows(path: Path) -> list[tuple[str, str, str]]:
    return [(row["hardware"], row["model"], row["ms"]) for row in csv.DictReader(path.open())]


def test_only_what_was_measured_anew_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "step.csv"
    write(path, [{"hardware": "a", "model": model, "ms": 1} for model in ("x", "x", "y")])
    write(path, [{"hardware": "b", "model": "x", "ms": 2}])
    write(path, [{"hardware": "a", "model": "x", "ms": 3}], "model")
    assert sorted(rows(path)) == [("a", "x", "3"), ("a", "y", "1"), ("b", "x", "2")]
    write(path, [{"hardware": "a", "model": "z", "ms": 4}])
    assert sorted(rows(path)) == [("a", "z", "4"), ("b", "x", "2")]


def test_settings_are_named_by_how_they_begin() -> None:
    assert chosen(GPU, []) == list(GPU)
    assert chosen(GPU, ["WRN", "ResNet-18"]) == [GPU[0], GPU[3]]
    with pytest.raises(SystemExit, match="none of ResNet-18 small 512x3 begins so"):
        chosen(CPU, ["WRN"])


def test_a_copy_without_history_says_what_it_is_of(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BARLOW_COMMIT", "abc1234")
    assert measure.commit() == "abc1234"
    monkeypatch.delenv("BARLOW_COMMIT")
    monkeypatch.setenv("PATH", "/nowhere")
    assert measure.commit() == "unknown"
