"""FixMatch as people run it, from a classifier's best: killed and started again with all that it learns beside the
network, on one rank and on two; a classifier of other classes is refused."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from barlow.config import Finetune, FixMatch, Head, Labelled, Sgd
from barlow.engine.checkpoint import find, load
from barlow.files import read_json, read_status, write_json
from barlow.stages import finetune, fixmatch
from tests.launchers.test_finetune_launcher import (
    ROOT,
    assert_same_bits,
    command,
    rows,
    tensors,
    trained,
    whole_and_cut,
)
from tests.launchers.test_pretrain import one_line
from tests.stages.test_classifiers import asked, pretrained_run

FLAGS = (
    "--epochs 5 --batch-size 4 --mu 6 --labelled.per-class 2 --threshold 0.15 --ema 0.9 --align 0.9 --strong.kind both"
)


@pytest.fixture(scope="module")
def classifier(on_ranks: Callable[..., list[Any]], tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of a classifier, from a backbone; with dropout in its head."""
    folder = tmp_path_factory.mktemp("classifier")
    bt = str(pretrained_run(folder / "bt", tiny_data))
    knobs: dict[str, Any] = {"from_run": bt, "size": 32, "head": Head((16,), dropout=0.2), "labelled": Labelled()}
    config = asked(Finetune, tiny_data, epochs=3, batch_size=12, **knobs)
    return trained(on_ranks, finetune.main, config, folder / "clf", 1)


@pytest.fixture(scope="module")
def runs(classifier: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    flags = (*FLAGS.split(), "--from", str(classifier / "best"))
    return whole_and_cut("fixmatch", tmp_path_factory.mktemp("runs"), 20, *flags)


@pytest.mark.slow
def test_killed_and_begun_again_it_ends_with_the_same_bits(runs: tuple[Path, Path]) -> None:
    """The network and its average, momentum, CTAugment's bins, the best so far, and every number on the way."""
    assert_same_bits(*runs)
    kept = load(find(str(runs[0])))
    told = {"step", "config", "data", "mean", "std", "classes"}
    assert set(kept) == {"model", "learning", "alignment", "optimizer", "bins"} | told
    assert not torch.equal(kept["model"]["head.0.weight"], kept["learning"]["head.0.weight"])
    assert float(kept["bins"]["weights"].min()) < 1  # they have learned
    assert "momentum_buffer" in kept["optimizer"]["state"][0]
    best = load(find(str(runs[0] / "best")))
    assert set(best) == {"model", "best"} | told


@pytest.mark.slow
def test_it_goes_on_with_a_classifier_s_best_and_says_what_it_does(runs: tuple[Path, Path], classifier: Path) -> None:
    step = load(find(str(classifier / "best")))["step"]
    log = (runs[0] / "logs" / "rank_0.log").read_text()
    assert f"backbone and head of clf, step {step}" in log
    assert "24 labelled images of 12 classes; a step takes 4 of them and 24 others" in log
    told = rows(runs[0])
    assert [row["images"] for row in told] == [28 * step for step in range(1, 21)]
    assert [row["epoch"] for row in told][3::4] == [1, 2, 3, 4, 5]  # of the 96 unlabelled images
    for row in told:
        assert row["loss"] == pytest.approx(row["loss_labelled"] + row["loss_unlabelled"], rel=1e-5)
        assert "pseudo_top1" not in row  # nobody knows what they are
    assert 0 < sum(row["mask"] for row in told) / 20 < 100
    assert ["val_top1" in row for row in told] == [step % 4 == 0 for step in range(1, 21)]
    results = read_json(runs[0] / "results.json")
    values = {int(row["step"]): row["val_top1"] for row in told if "val_top1" in row}
    assert values[20] == results["val_top1"]
    assert results["best_val_top1"] == max(values.values())
    assert results["best_step"] == max(values, key=lambda step: values[step])


def test_two_ranks_have_the_loss_curve_of_one(
    on_ranks: Callable[..., list[Any]], tiny_data: Path, tmp_path: Path
) -> None:
    """The same images, masks and pseudo-labels, and bins that learn the same: of the labels that are hidden, too."""
    knobs: dict[str, Any] = {"epochs": 1, "batch_size": 4, "mu": 6, "threshold": 0.12, "ema": 0.5}
    config = asked(FixMatch, tiny_data, head=Head((16,), dropout=0.0), **knobs)
    data = replace(config.data, splits=("unlabeled", "train"))
    config = replace(config, data=data, optim=Sgd(lr=0.001, lr_backbone=0.001))  # nothing makes much of rounding
    folders = [trained(on_ranks, fixmatch.main, config, tmp_path / str(w), w) for w in (1, 2)]
    one, two = map(rows, folders)
    assert len(one) == len(two) == (96 + 48) // 24
    for a, b in zip(one, two, strict=True):
        assert a.keys() == b.keys()
        for name, value in a.items():
            assert value == pytest.approx(b[name], rel=1e-4), (name, a, b)
    assert any("pseudo_top1" in row for row in one)
    assert 0 < sum(row["mask"] for row in one) < 600
    alone, together = (tensors(load(find(str(folder)))["bins"]) for folder in folders)
    assert alone.keys() == together.keys()
    for name in alone:
        torch.testing.assert_close(alone[name], together[name], rtol=1e-5, atol=1e-6)
    assert float(alone[".weights"].min()) < 1


@pytest.mark.slow
def test_a_classifier_of_other_classes_is_refused(classifier: Path, tiny_data: Path, tmp_path: Path) -> None:
    """What it tells apart only its checkpoint knows, so a rank says it: at once, and nothing has been trained."""
    other = tmp_path / "other"
    shutil.copytree(tiny_data, other)
    index = read_json(other / "index.json")
    write_json(other / "index.json", {**index, "classes": [*index["classes"], "zebra"]})
    flags = "--run other --mu 2 --batch-size 4 --labelled.per-class 0"
    words = command("fixmatch", tmp_path, *flags.split(), "--data.dir", str(other), "--from", str(classifier))
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=100)
    one_line(done, f"--from {classifier}: it tells apart 12 classes (")
    assert "has 13 classes (" in done.stderr
    assert read_status(tmp_path / "other")["step"] == 0
    assert not list((tmp_path / "other" / "checkpoints").iterdir())
