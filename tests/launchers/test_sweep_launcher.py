"""pretrain.py --sweep as people give it: its runs one after another here, given again, added to, and each bad input."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
TINY = "--epochs 2 --batch-size 32 --log-every 1 --checkpoint.every-steps 3 --knn.every-epochs 2 --knn.no-baselines"
TINY += " --knn.size 32 --data.source= --data.workers 1 --views.size 32 --model.width 0.125 --model.projector 32 32"
TINY += " --optim.warmup-epochs 1 --optim.lr-biases 0.0005 --device cpu --run tune"


def launch(script: str, *words: str, slurm: bool = False) -> subprocess.CompletedProcess[str]:
    """One thread here and there: the same bits. Only `slurm` sees the cluster that another test may have brought up."""
    environment = {key: value for key, value in os.environ.items() if slurm or key != "SLURM_CONF"}
    environment["OMP_NUM_THREADS"] = "1"
    command = [sys.executable, f"launchers/{script}.py", *words]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240)


def pretrain(data: Path, runs: Path, *words: str, slurm: bool = False) -> subprocess.CompletedProcess[str]:
    place = ["--data.dir", str(data), "--runs-dir", str(runs), "--cluster", "slurm" if slurm else "local"]
    return launch("pretrain", "shapes", *TINY.split(), *place, *words, slurm=slurm)


def table(runs: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = json.loads(launch("jobs", "table", "tune", "--json", "--runs-dir", str(runs)).stdout)
    return rows


@pytest.fixture(scope="module")
def swept(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of one value first, then of three: the run that is there already is not run again."""
    runs = tmp_path_factory.mktemp("swept")
    first = pretrain(tiny_data, runs, "--sweep", "optim.lr=0.5")
    assert first.returncode == 0, first.stdout + first.stderr
    done = pretrain(tiny_data, runs, "--sweep", "optim.lr=0.25,0.5,1")
    assert done.returncode == 0, done.stdout + done.stderr
    told = [line for line in done.stdout.splitlines() if line.startswith("run ")]
    assert told[0] == f"run tune,optim.lr=0.5 has finished its 6 steps: {runs}/tune,optim.lr=0.5/results.json"
    assert told[1:] == ["run tune,optim.lr=0.25 (1 of 2)", "run tune,optim.lr=1 (2 of 2)"]
    return runs


@pytest.mark.slow
def test_runs_one_after_another_each_like_any_other(swept: Path) -> None:
    rows = table(swept)
    rates = {f"tune,optim.lr={lr}": {"optim.lr": float(lr)} for lr in ("0.25", "0.5", "1")}
    assert {row["run"]: row["knobs"] for row in rows} == rates
    assert [(row["state"], row["step"]) for row in rows] == [("finished", 6)] * 3
    top1 = [row["results"]["knn_top1"] for row in rows]
    assert top1 == sorted(top1, reverse=True)
    assert len({row["loss"] for row in rows}) == 3
    for row in rows:
        config = json.loads((swept / row["run"] / "config.json").read_text())
        assert (config["run"], config["optim"]["lr"]) == (row["run"], row["knobs"]["optim.lr"])


@pytest.mark.slow
@pytest.mark.slurm
def test_an_array_ends_with_what_came_of_the_runs_here(
    tiny_data: Path, swept: Path, tmp_path: Path, real_slurm: Path
) -> None:
    done = pretrain(tiny_data, tmp_path, "--sweep", "optim.lr=0.5,0.25,1", slurm=True)
    assert done.returncode == 0, done.stderr
    followed = [
        launch("jobs", "logs", row["run"], "-f", "--runs-dir", str(tmp_path), slurm=True) for row in table(swept)
    ]
    assert [done.returncode for done in followed] == [0, 0, 0], [done.stderr for done in followed]
    assert table(tmp_path) == table(swept)


def test_a_dry_run_creates_nothing(tiny_data: Path, tmp_path: Path) -> None:
    done = pretrain(tiny_data, tmp_path / "runs", "--sweep", "seed=0,1", "--dry-run")
    assert done.returncode == 0, done.stderr
    for seed in (0, 1):
        assert f"slurm.job.rank barlow.stages.pretrain {tmp_path}/runs/tune,seed={seed} " in done.stdout
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("batch-size=30,32 --nodes 4 --dry-run", "run tune,batch_size=30: batch size 30 is not divisible by 4 ranks"),
        ("batch_size=32,4096", "run tune,batch_size=4096: batch size 4096 is larger than the data"),
        ("optim.lr=1,-1", "run tune,optim.lr=-1: --optim.lr is -1.0: give 0 or more"),
        ("optim.lear=1,2", "no knob 'optim.lear' to sweep (did you mean optim.lr?)"),
        ("model.init=a.pt,b.pt", "run tune,model.init=a.pt: --model.init: no checkpoint "),
        ("data.dir=/nowhere,/there", "run tune,data.dir=_nowhere: /nowhere: no such folder of shards"),
    ],
)
def test_bad_input_is_one_line_before_anything_starts(tiny_data: Path, tmp_path: Path, words: str, told: str) -> None:
    place = () if words.startswith("data.dir") else ("--data.dir", str(tiny_data))
    tiny = TINY.replace("--batch-size 32 ", "") if words.startswith("batch") else TINY
    place = ("--runs-dir", str(tmp_path / "runs"), "--cluster", "local", *place)
    done = launch("pretrain", "shapes", *tiny.split(), *place, "--sweep", *words.split())
    assert (done.returncode, done.stdout, len(done.stderr.splitlines())) == (2, "", 1), done.stderr
    assert told in done.stderr
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
def test_another_config_is_refused_and_names_the_run(tiny_data: Path, swept: Path) -> None:
    done = pretrain(tiny_data, swept, "--sweep", "optim.lr=2,0.5", "--seed", "3")
    assert (done.returncode, done.stdout, len(done.stderr.splitlines())) == (2, "", 1)
    assert "run 'tune,optim.lr=0.5' exists with another config (seed 0 there, 3 here)" in done.stderr
    assert not (swept / "tune,optim.lr=2").exists()
