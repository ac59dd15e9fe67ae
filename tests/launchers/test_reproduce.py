"""BarlowMatch's whole chain by its command: a rehearsal on the embedded set, to the table; and what is refused."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest

from barlow.data.shards import read_index
from barlow.engine.run import refuse_other_config
from barlow.errors import UserError
from barlow.files import read_json, read_status, write_status
from barlow.papers.barlowmatch import Part
from barlow.recipes import FINETUNE, PRETRAIN
from slurm.launch.cluster import Cluster
from slurm.many.chain import Chain
from slurm.runs.standing import Run
from tests.papers.test_chain_of_barlowmatch import NAMES
from tests.scripts import Answer, run_all

ROOT = Path(__file__).resolve().parents[2]
SMALL = ["--pretrain.batch-size", "32", "--finetune.batch-size", "16"]
SMALL += ["--fixmatch.batch-size", "8", "--request.count", "20"]


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
        assert read_status(runs / f"barlowmatch-rehearsal,{name}")["state"] == "finished"
    asked = (runs / "barlowmatch-rehearsal,request-kmeans" / "request.csv").read_text().splitlines()
    count = read_json(runs / "barlowmatch-rehearsal,request-kmeans" / "config.json")["count"]
    assert len(asked) == 1 + count
    few, more = (read_logged(runs / f"barlowmatch-rehearsal,{name}") for name in ("finetune", "finetune-kmeans"))
    assert more == few + count  # the answers were learned from
    for name in ("finetune", "fixmatch", "finetune-kmeans", "fixmatch-kmeans"):
        results = read_json(runs / f"barlowmatch-rehearsal,{name}" / "results.json")
        assert 0 <= results["val_top1"] <= results["val_top5"] <= 100
        assert f"| {results['val_top1']:.2f} |" in done.stdout
    assert len(list((runs / "barlowmatch-rehearsal,pictures" / "pictures").glob("*.png"))) == 1 + 6
    again = reproduce(*words)
    assert again.returncode == 0
    assert again.stdout.count("has finished") == len(NAMES)


def read_logged(folder: Path) -> int:
    """How many labelled images a run says it learns from."""
    line = next(line for line in (folder / "logs" / "rank_0.log").read_text().splitlines() if "labelled images" in line)
    return int(line.split(" labelled images")[0].split()[-1])


MISTAKES = [
    (["--scale", "2"], "--scale is 2.0: give 1 or less"),
    (["--rules", "kmeans", "kmeans"], "--rules is ('kmeans', 'kmeans'): give one rule or more, each once"),
    (["--scale", "0.01", "--nodes", "5"], "--pretrain.batch-size 48 is not divisible by"),
    (["--sweep", "seed=1,2"], "--sweep is for single runs"),
    (["--run", "a,b"], "--run is 'a,b': give a plain name"),
    (["--pretrain.seed", "7"], "--pretrain.seed: the runs of a chain have that in common: give --seed"),
    (["--request.rule", "random"], "--request.rule: the runs of a chain have that in common: leave it out"),
    (["--rules", "kmeans", "random", "--answered", "a.csv"], "one: --answered is to the request of one rule"),
    ([*SMALL, "--answered", "nowhere.csv"], "run barlowmatch-chain,finetune-kmeans: "),
    ([*SMALL, "--request.count", "5000"], "run barlowmatch-chain,request-kmeans: "),
    ([*SMALL, "--labelled.per-class", "100"], "run barlowmatch-chain,finetune: "),
    ([*SMALL, "--fixmatch.mu", "70"], "run barlowmatch-chain,fixmatch: "),
    ([*SMALL, "--data.splits", "unlabeled", "val"], "run barlowmatch-chain,fixmatch: --data.splits val"),
    ([*SMALL, "--pretrain.batch-size", "500"], "run barlowmatch-chain,pretrain: "),
]


@pytest.fixture(scope="module")
def mistakes(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Answer], Path]:
    """What each is told, and where nothing should have been created."""
    runs = tmp_path_factory.mktemp("mistakes") / "runs"
    shared = ["--cluster", "local", "--data.dir", str(tiny_data), "--runs-dir", str(runs)]
    return run_all([["launchers/reproduce.py", "barlowmatch", *words, *shared] for words, _ in MISTAKES]), runs


@pytest.mark.parametrize("number", range(len(MISTAKES)), ids=[" ".join(words) for words, _ in MISTAKES])
def test_what_cannot_be_is_refused_in_a_line(mistakes: tuple[list[Answer], Path], number: int) -> None:
    answer = mistakes[0][number]
    assert answer.code == 2, answer.out + answer.told
    assert MISTAKES[number][1] in answer.told
    assert len(answer.told.splitlines()) == 1
    assert not mistakes[1].exists()


@pytest.fixture
def launcher(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """launchers/reproduce.py, whose runs end as soon as they are begun."""
    monkeypatch.syspath_prepend(str(ROOT / "launchers"))
    module = importlib.import_module("reproduce")

    def end(chain: Chain, cluster: Cluster) -> int:
        for each in chain.left():
            write_status(each.folder, state="finished", attempts=1, step=1)
        (chain.links[-1].folder / "table.md").write_text("a table")
        return 0

    monkeypatch.setattr(Chain, "launch", end)
    return module


def run_of(launcher: ModuleType, tmp_path: Path, data: Path, *words: str) -> dict[str, float]:
    """When each run of the chain was last prepared, after the command."""
    paths = ["--data.dir", str(data), "--runs-dir", str(tmp_path / "runs"), "--cluster", "local"]
    assert launcher.main(["barlowmatch", *SMALL, *paths, *words]) == 0
    runs = tmp_path / "runs"
    return {path.parent.name.partition(",")[2]: path.stat().st_mtime_ns for path in runs.glob("*,*/config.json")}


def test_answers_that_come_later_are_trained_with(launcher: ModuleType, tmp_path: Path, tiny_data: Path) -> None:
    first = run_of(launcher, tmp_path, tiny_data)
    assert set(first) == {"pretrain", "finetune", "fixmatch", "request-kmeans", "pictures", "table"}
    index = read_index(tiny_data)
    pool = index.split("unlabeled")
    name = pool.names.read_text().splitlines()[0]
    answers = tmp_path / "answered.csv"
    answers.write_text(f"id,name,label\n{pool.first_id},{name},{index.classes[0]}\n")
    second = run_of(launcher, tmp_path, tiny_data, "--answered", str(answers))
    assert set(second) == set(NAMES)
    assert {run for run in first if second[run] != first[run]} == {"table"}
    assert read_json(tmp_path / "runs" / "barlowmatch-chain,table" / "config.json")["columns"] == ["kmeans"]
    assert run_of(launcher, tmp_path, tiny_data, "--answered", str(answers)) == second

    table = tmp_path / "runs" / "barlowmatch-chain,table"
    labels = tmp_path / "runs" / "barlowmatch-chain,finetune-kmeans" / "labels"
    labels.mkdir()
    (labels / "0.csv").write_bytes(answers.read_bytes())  # as the run keeps them when it begins
    answers.write_text(answers.read_text() + f"{pool.first_id + 1},,{index.classes[0]}\n")
    with pytest.raises(
        UserError, match=r"answered.csv has changed since run 'barlowmatch-chain,finetune-kmeans' began"
    ):
        run_of(launcher, tmp_path, tiny_data, "--answered", str(answers))
    with pytest.raises(UserError, match="exists with another config"):
        run_of(launcher, tmp_path, tiny_data, "--finetune.epochs", "9")
    assert read_status(table)["state"] == "finished", "what was refused has changed nothing"


def test_a_run_that_waits_is_not_passed_over_with_other_flags(
    launcher: ModuleType, tmp_path: Path, tiny_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_of(launcher, tmp_path, tiny_data)
    write_status(tmp_path / "runs" / "barlowmatch-chain,pictures", state="pending", attempts=0)
    monkeypatch.setattr(Run, "alive", property(lambda run: run.name.endswith("pictures")))
    monkeypatch.setattr(Chain, "check", lambda chain, cluster: None)
    with pytest.raises(
        UserError, match=r"run 'barlowmatch-chain,pictures' exists with another config \(count 16 there"
    ):
        run_of(launcher, tmp_path, tiny_data, "--visualize.count", "5")


def test_a_run_cannot_take_a_chain_s_name(launcher: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "paper").mkdir()
    (tmp_path / "paper" / "chain.json").write_text("{}")
    with pytest.raises(UserError, match="run 'paper' is a chain of runs: choose another --run"):
        refuse_other_config(replace(PRETRAIN["shapes"], run="paper", runs_dir=str(tmp_path)))


@pytest.mark.parametrize(("nodes", "fewer"), [(1, 0), (2, 0), (8, 0), (64, 32), (48, 32), (3, 2)])
def test_a_small_batch_takes_fewer_nodes(launcher: ModuleType, nodes: int, fewer: int) -> None:
    part = Part("finetune", "finetune", FINETUNE["barlowmatch"])
    assert launcher.nodes_for(part, Cluster(nodes=nodes, gpus_per_node=1)) == fewer
