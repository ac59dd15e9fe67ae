"""The promise of `make demo`: learned features beat raw pixels and the untrained network, over three seeds."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from tests.beside import Done

SEEDS = range(3)


def demos(folder: Path) -> list[list[str]]:
    words = [sys.executable, "launchers/pretrain.py", "shapes", "--cluster", "local", "--knn.every-epochs", "100"]
    words += ["--runs-dir", str(folder), "--data.dir", str(folder / "shapes")]
    return [[*words, "--seed", str(seed), "--run", f"seed{seed}"] for seed in SEEDS]


@pytest.mark.slow
@pytest.mark.beside(commands=demos)
@pytest.mark.timeout(1500)
def test_features_learned_in_the_demo_are_ten_points_above_both_baselines(beside: list[Done]) -> None:
    found = []
    for seed, done in zip(SEEDS, beside, strict=True):
        assert done.code == 0, done.told
        found.append(json.loads((done.folder / f"seed{seed}" / "results.json").read_text()))
    mean = {name: sum(results[name] for results in found) / 3 for name in found[0]}
    print(mean)
    assert mean["knn_top1"] >= mean["knn_top1_pixels"] + 10, found
    assert mean["knn_top1"] >= mean["knn_top1_untrained"] + 10, found
