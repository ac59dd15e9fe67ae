"""BarlowMatch's whole chain by its command: a rehearsal on the embedded set, to the table; and what is refused."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from barlow.files import read_json, read_status
from tests.papers.test_chain_of_barlowmatch import NAMES

ROOT = Path(__file__).resolve().parents[2]


def reproduce(*words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "launchers/reproduce.py", "barlowmatch", "--cluster", "local", *words]
    environment = {key: value for key, value in os.environ.items() if key != "SLURM_CONF"}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900)


@pytest.mark.slow
def test_a_rehearsal_of_the_whole_chain(tmp_path: Path) -> None:
    words = ["--scale", "0.005", "--data.source", "shapes", "--data.dir", str(tmp_path / "shapes")]
    words += ["--runs-dir", str(tmp_path / "runs")]
    done = reproduce(*words)
    assert done.returncode == 0, done.stdout + done.stderr
    runs = tmp_path / "runs"
    for name in NAMES:
        assert read_status(runs / f"barlowmatch,{name}")["state"] == "finished"
    asked = (runs / "barlowmatch,request-kmeans" / "request.csv").read_text().splitlines()
    count = read_json(runs / "barlowmatch,request-kmeans" / "config.json")["count"]
    assert len(asked) == 1 + count
    few, more = (read_logged(runs / f"barlowmatch,{name}") for name in ("finetune", "finetune-kmeans"))
    assert more == few + count  # the answers were learned from
    for name in ("finetune", "fixmatch", "finetune-kmeans", "fixmatch-kmeans"):
        results = read_json(runs / f"barlowmatch,{name}" / "results.json")
        assert 0 <= results["val_top1"] <= results["val_top5"] <= 100
        assert f"| {results['val_top1']:.2f} |" in done.stdout
    assert len(list((runs / "barlowmatch,pictures" / "pictures").glob("*.png"))) == 1 + 6
    again = reproduce(*words)
    assert again.returncode == 0
    assert again.stdout.count("has finished") == len(NAMES)


def read_logged(folder: Path) -> int:
    """How many labelled images a run says it learns from."""
    line = next(line for line in (folder / "logs" / "rank_0.log").read_text().splitlines() if "labelled images" in line)
    return int(line.split(" labelled images")[0].split()[-1])


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--scale", "2"], "--scale is 2.0: give 1 or less"),
        (["--rules", "kmeans", "kmeans"], "--rules is ('kmeans', 'kmeans'): give one rule or more, each once"),
        (["--scale", "0.01", "--nodes", "3"], "is not divisible by 3 ranks"),
        (["--sweep", "seed=1,2"], "--sweep is for single runs"),
        (["--run", "a,b"], "--run is 'a,b': give a plain name"),
    ],
)
def test_what_cannot_be_is_refused_in_a_line(tmp_path: Path, tiny_data: Path, words: list[str], told: str) -> None:
    done = reproduce(*words, "--data.dir", str(tiny_data), "--runs-dir", str(tmp_path / "runs"))
    assert done.returncode == 2, done.stdout + done.stderr
    assert told in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "runs").exists()
