"""The promise of `make demo`: learned features beat raw pixels and the untrained network, over three seeds."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_features_learned_in_the_demo_are_ten_points_above_both_baselines(tmp_path: Path) -> None:
    found = []
    for seed in range(3):
        words = [sys.executable, "launchers/pretrain.py", "shapes", "--cluster", "local", "--seed", str(seed)]
        words += ["--run", f"seed{seed}", "--runs-dir", str(tmp_path), "--data.dir", str(tmp_path / "shapes")]
        done = subprocess.run([*words, "--knn.every-epochs", "100"], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        found.append(json.loads((tmp_path / f"seed{seed}" / "results.json").read_text()))
    mean = {name: sum(results[name] for results in found) / 3 for name in found[0]}
    print(mean)
    assert mean["knn_top1"] >= mean["knn_top1_pixels"] + 10, found
    assert mean["knn_top1"] >= mean["knn_top1_untrained"] + 10, found
