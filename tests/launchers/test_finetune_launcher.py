"""Fine-tuning as people run it: killed and started again, on one rank and on two, its best kept; and each bad input's
one line, of every launcher, before torch is imported or anything created."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

from barlow import dist, stop
from barlow.config import Finetune, Head
from barlow.data.loader import Loader
from barlow.data.shards import read_index
from barlow.engine.checkpoint import Checkpoints, find, load
from barlow.files import read_json, write_json
from barlow.models import classifier as classifiers
from barlow.stages import finetune
from tests.launchers.test_pretrain import nobody_left, signal_rank_after
from tests.scripts import Answer, run_all
from tests.stages.test_classifiers import NETWORK, asked, pretrained_run, without_labels_in_val

ROOT = Path(__file__).resolve().parents[2]
TINY = "--size 32 --checkpoint.every-steps 3 --log-every 1 --data.workers 1 --device cpu --cluster local"
FLAGS = "--epochs 8 --batch-size 12 --labelled.per-class 0 --head.widths 16 --head.dropout 0.2 --optim.lr 0.003"


@pytest.fixture(scope="module")
def bt(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pretrained_run(tmp_path_factory.mktemp("pretrained") / "bt", tiny_data)


def command(launcher: str, runs: Path, *flags: str) -> list[str]:
    return [sys.executable, f"launchers/{launcher}.py", "--runs-dir", str(runs), *TINY.split(), *flags]


def begin(words: list[str]) -> subprocess.Popen[str]:
    environment = {key: value for key, value in os.environ.items() if key != "SLURM_CONF"}
    pipe = subprocess.PIPE
    return subprocess.Popen(words, cwd=ROOT, env=environment, stdout=pipe, stderr=subprocess.STDOUT, text=True)


def to_its_end(started: subprocess.Popen[str]) -> str:
    told, _ = started.communicate(timeout=240)
    assert started.returncode == 0, told
    return told


def whole_and_cut(launcher: str, runs: Path, steps: int, *flags: str) -> tuple[Path, Path]:
    """Two runs: one that nothing happens to, and one that is killed in its midst and begun again."""
    whole, cut = (begin(command(launcher, runs, *flags, "--run", name)) for name in ("whole", "cut"))
    signal_rank_after(0, 7, signal.SIGKILL, runs / "cut", cut)
    told, _ = cut.communicate(timeout=60)
    assert cut.returncode == 1, told
    assert 7 <= len(rows(runs / "cut")) < steps
    nobody_left(runs / "cut")
    told = to_its_end(begin(command(launcher, runs, *flags, "--run", "cut")))
    assert "going on from step-" in told
    to_its_end(whole)
    assert (read_json(runs / "cut" / "status.json")["attempts"], len(rows(runs / "cut"))) == (2, steps)
    return runs / "whole", runs / "cut"


def rows(folder: Path) -> list[dict[str, float]]:
    """Of metrics.jsonl, without what is of the clock."""
    found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in found] == list(range(1, len(found) + 1))
    return [{name: row[name] for name in row if name not in ("images_per_sec", "data_wait")} for row in found]


def tensors(state: Any, name: str = "") -> dict[str, torch.Tensor]:
    """All tensors and numbers of a checkpoint, by their place in it; its config has the run's own name."""
    if isinstance(state, torch.Tensor):
        return {name: state}
    if isinstance(state, dict | list):
        parts = state.items() if isinstance(state, dict) else enumerate(state)
        found = [tensors(part, f"{name}.{key}") for key, part in parts if f"{name}.{key}" != ".config"]
        return {place: tensor for part in found for place, tensor in part.items()}
    return {name: torch.tensor(float(state))} if isinstance(state, bool | int | float) else {}


def assert_same_bits(a: Path, b: Path) -> None:
    """The same weights, optimizer and all else that is kept, newest and best; the same rows, the same results."""
    for place in ("", "best"):
        ours, theirs = find(str(a / place)), find(str(b / place))
        assert ours.name == theirs.name
        one, other = load(ours), load(theirs)
        assert one["data"] == other["data"]
        left, right = tensors(one), tensors(other)
        assert left.keys() == right.keys()
        assert [name for name in left if not torch.equal(left[name], right[name])] == []
    assert rows(a) == rows(b)
    assert read_json(a / "results.json") == read_json(b / "results.json")


@pytest.fixture(scope="module")
def runs(bt: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return whole_and_cut("finetune", tmp_path_factory.mktemp("runs"), 32, *FLAGS.split(), "--from", str(bt))


@pytest.mark.slow
def test_killed_and_begun_again_it_ends_with_the_same_bits(runs: tuple[Path, Path]) -> None:
    assert_same_bits(*runs)
    kept = load(find(str(runs[0])))
    assert set(kept) == {"model", "optimizer", "step", "config", "data", "mean", "std", "classes"}
    assert {"exp_avg", "exp_avg_sq", "step"} == set(kept["optimizer"]["state"][0])


@pytest.mark.slow
def test_the_best_and_the_last_are_kept_and_told(runs: tuple[Path, Path], tiny_data: Path) -> None:
    folder = runs[0]
    results, told = read_json(folder / "results.json"), rows(folder)
    evaluated = {int(row["step"]): row["val_top1"] for row in told if "val_top1" in row}
    assert list(evaluated) == [4, 8, 12, 16, 20, 24, 28, 32]
    assert set(results) == {"steps", "train_top1", "val_top1", "val_top5", "best_step", "best_val_top1"}
    assert evaluated[32] == results["val_top1"]
    assert results["best_val_top1"] == max(evaluated.values())
    assert results["best_step"] == max(evaluated, key=lambda step: evaluated[step])  # of equal ones the first
    assert len(set(evaluated.values())) > 1

    for place, top1, step in (("best", "best_val_top1", results["best_step"]), ("", "val_top1", 32)):
        path = find(str(folder / place))
        assert path.name == f"step-{step:09d}.pt"
        assert counted(load(path), tiny_data) == pytest.approx(results[top1])
    assert len(list((folder / "best").glob("*.pt"))) == 1


def counted(stored: dict[str, Any], data: Path) -> float:
    """In per cent, how many of val's images these weights get right."""
    index = read_index(data)
    model = classifiers.build(NETWORK, Head(widths=(16,)), len(index.classes)).eval()
    model.load_state_dict({name: w for name, w in stored["model"].items()})
    loader = Loader(index, ["val"], workers=1)
    (batch,) = loader.batches([np.arange(48)])
    mean, std = (torch.tensor(each).view(1, 3, 1, 1) for each in (index.mean, index.std))
    with torch.no_grad():
        answers = model((batch.images.permute(0, 3, 1, 2) / 255 - mean) / std).argmax(1)
    return 100 * float((answers == batch.labels).float().mean())


@pytest.mark.slow
def test_a_run_that_goes_on_keeps_a_best_that_it_never_reaches_again(
    runs: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "again"
    shutil.copytree(runs[0], folder)
    for file in folder.glob("checkpoints/step-000000032.*"):
        file.unlink()
    held = load(find(str(folder / "best")))
    best = Checkpoints(folder / "best", keep=1)
    best.save(held["step"], {**held, "best": {"step": held["step"], "val_top1": 100.0}})
    best.finish()
    monkeypatch.setattr(stop, "_told", "")
    monkeypatch.setattr(stop, "_listening", True)
    finetune.main(str(folder))
    results = read_json(folder / "results.json")
    assert (results["steps"], results["best_step"], results["best_val_top1"]) == (32, held["step"], 100.0)
    assert torch.equal(load(find(str(folder / "best")))["model"]["head.0.weight"], held["model"]["head.0.weight"])
    assert results["val_top1"] == read_json(runs[0] / "results.json")["val_top1"]


def on_ports(main: Callable[[str], None], folder: str, port: int) -> None:
    """A stage on the ranks of a test, which have joined for the test: it joins them again by itself."""
    dist.shutdown()
    os.environ["MASTER_PORT"] = str(port)
    main(folder)


def trained(on_ranks: Callable[..., list[Any]], main: Callable[[str], None], config: Any, folder: Path, w: int) -> Path:
    """The folder of a run on w ranks."""
    for sub in ("checkpoints", "logs"):
        (folder / sub).mkdir(parents=True)
    write_json(folder / "config.json", asdict(config))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    on_ranks(w, on_ports, main, str(folder), port)
    return folder


def test_two_ranks_have_the_loss_curve_of_one(
    on_ranks: Callable[..., list[Any]], tiny_data: Path, bt: Path, tmp_path: Path
) -> None:
    knobs: dict[str, Any] = {"from_run": str(bt), "epochs": 2, "batch_size": 12, "head": Head((16,), dropout=0.0)}
    config = asked(Finetune, tiny_data, **knobs)
    one, two = (rows(trained(on_ranks, finetune.main, config, tmp_path / str(w), w)) for w in (1, 2))
    assert len(one) == len(two) == 4
    for a, b in zip(one, two, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4)
        assert (a["top1"], a["images"]) == (b["top1"], b["images"])


class Case(NamedTuple):
    launcher: str
    flags: str
    told: str  # a part of the line; empty: nothing is wrong


CASES = [
    *[Case(name, "--help", "") for name in ("finetune", "fixmatch", "label_request", "visualize", "pretrain")],
    *[Case(name, "--from nowhere", "--from nowhere: there is no such run") for name in ("label_request", "visualize")],
    *[Case(name, "--nope", "unknown flag --nope") for name in ("label_request", "visualize")],
    Case("finetune", "--from {bt} --dry-run --batch-size 12", ""),
    Case("finetune", "--from={bt}/checkpoints --dry-run --batch-size 12", ""),
    Case("finetune", "--from nowhere", "--from nowhere: there is no such run: name a run's folder"),
    Case("finetune", "--from={empty}", "neither a run's folder nor a checkpoint in one (there is no config.json)"),
    Case("finetune", "--from {unsaved}", "that run has saved nothing yet: wait for its first checkpoint"),
    Case("finetune", "--from {bt}/best", "that run has saved nothing yet"),
    Case("finetune", "--from {bt} --model.stem imagenet", "--model.stem imagenet: {bt} has small: leave it out"),
    Case("finetune", "--from={bt} --model.backbone resnet50", "--model.backbone resnet50: {bt} has resnet10t: leave"),
    Case("finetune", "--from {bt} --form both", "--form"),
    Case("finetune", "", "no --from, and no --model.backbone"),
    Case("finetune", "--model.backbone resnet18 --form head", "--form head keeps the backbone as it is: give --from"),
    Case("finetune", "--from {bt} --data.dir nowhere", "no such folder of shards"),
    Case("finetune", "--from {bt} --data.dir {bare}", "has no split val with labels"),
    Case("finetune", "--from {bt} --labelled.splits unlabeled", "split unlabeled of {data} has no labels"),
    Case("finetune", "--from {bt} --labelled.splits train val", "--labelled.splits val: classifiers are judged on it"),
    Case("finetune", "--from {bt} --labelled.splits test", "no split 'test'"),
    Case("finetune", "--from {bt} --labelled.per-class 5", "5 a class are asked for: give --labelled.per-class 4"),
    Case("finetune", "--from {bt} --batch-size 49", "batch size 49 is larger than the data (48 images)"),
    Case("finetune", "--from {bt} --batch-size 13 --nodes 2", "batch size 13 is not divisible by 2 ranks"),
    Case("finetune", "--from {bt} --labels {foreign}", "{foreign}, line 2: "),
    Case("finetune", "--from {bt} --labels none.csv", "none.csv: cannot be read"),
    Case("finetune", "--from {bt} --head.dropout 1", "--head.dropout is 1.0: give 0 or more, and less than 1"),
    Case("fixmatch", "--from {bt} --dry-run --mu 3 --batch-size 12", ""),
    Case("fixmatch", "--from {unsaved}", "that run has saved nothing yet"),
    Case("fixmatch", "--from={bt} --model.width 1", "--model.width 1.0: {bt} has 0.125: leave it out"),
    Case(
        "fixmatch",
        "--from {bt} --mu 9 --batch-size 12",
        "--mu 9 --batch-size 12: a step takes 108 unlabelled images, there are 96: give less of either",
    ),
    Case(
        "fixmatch",
        "--from {bt} --data.splits unlabeled unlabeled",
        "--data.splits is ('unlabeled', 'unlabeled'): give at least one",
    ),
    Case("fixmatch", "--from {bt} --data.limit 90 --mu 8 --batch-size 12", "there are 90"),
    Case("fixmatch", "--from {bt} --data.splits unlabeled val", "--data.splits val: classifiers are judged on it"),
    Case("fixmatch", "--from {bt} --labelled.splits unlabeled", "split unlabeled of {data} has no labels"),
    Case("fixmatch", "--from {bt} --labels {foreign}", "{foreign}, line 2: "),
    Case("fixmatch", "--from {bt} --data.dir {bare}", "has no split val with labels"),
    Case("fixmatch", "--from {bt} --batch-size 13 --nodes 2", "batch size 13 is not divisible by 2 ranks"),
    Case("fixmatch", "--from {bt} --threshold 90", "--threshold is 90.0: give 0 to 1"),
    Case("fixmatch", "--from {bt} --ema 1", "--ema is 1.0: give 0 or more, and less than 1"),
]
ALL_LABELS = ["--labelled.per-class", "0"]  # the recipe wants more than there are here


class Answers(NamedTuple):
    names: dict[str, str]
    told: dict[Case, Answer]
    runs: Path


@pytest.fixture(scope="module")
def answers(tiny_data: Path, bt: Path, tmp_path_factory: pytest.TempPathFactory) -> Answers:
    """All cases one after the other, each with the launcher's own script."""
    folder = tmp_path_factory.mktemp("mistakes")
    for name in ("empty", "unsaved/checkpoints"):
        (folder / name).mkdir(parents=True)
    write_json(folder / "unsaved" / "config.json", read_json(bt / "config.json"))
    (folder / "foreign.csv").write_text("id,name,label\n3,train/cat/7.png,circle\n4,train/cat/8.png,circle\n")
    names = {"bt": str(bt), "data": str(tiny_data), "empty": str(folder / "empty"), "unsaved": str(folder / "unsaved")}
    names |= {"foreign": str(folder / "foreign.csv")}
    names |= {"bare": str(without_labels_in_val(tiny_data, folder / "bare"))}
    more = ["--runs-dir", str(folder / "runs"), "--device", "cpu", "--cluster", "local"]
    words = [case.flags.format(**names).split() + more for case in CASES]
    train = ("finetune", "fixmatch")
    all_labels = [[] if case.launcher not in train or "per-class" in case.flags else ALL_LABELS for case in CASES]
    given = [[f"launchers/{c.launcher}.py", *one, *two] for c, one, two in zip(CASES, words, all_labels, strict=True)]
    return Answers(names, dict(zip(CASES, run_all(given), strict=True)), folder / "runs")


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.launcher} {case.flags}")
def test_bad_input_is_one_line_without_torch(answers: Answers, case: Case) -> None:
    answer = answers.told[case]
    lines = answer.told.splitlines()
    assert answer.code == (2 if case.told else 0), answer.told
    assert len(lines) == (1 if case.told else 0), answer.told
    assert not case.told or case.told.format(**answers.names) in lines[0]
    assert not answer.torch


def test_nothing_was_created(answers: Answers) -> None:
    assert not answers.runs.exists()
