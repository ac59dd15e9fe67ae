"""Each stage that trains, as it runs on a device: a run that was cut ends with the bits of the whole one. On a GPU that
is with compiled steps in CUDA graphs, views and LARS by kernels, and steps made ahead of the host."""

from __future__ import annotations

import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

from barlow import history, stop
from barlow.config import Checkpoint, Data, Finetune, FixMatch, Head, Knn, Labelled, Model, Pretrain, Shards, Views
from barlow.engine import loop
from barlow.engine.checkpoint import find, load
from barlow.files import read_status, write_json
from barlow.stages import finetune, fixmatch, pretrain
from tests.launchers.test_finetune_launcher import rows, tensors
from tests.stages.test_classifiers import NETWORK, pretrained_run

STEPS, CUT = 12, 6
MAIN = {"pretrain": pretrain.main, "finetune": finetune.main, "fixmatch": fixmatch.main}
GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def config_of(stage: str, device: str, data: Path, bt: Path) -> Any:
    shared: dict[str, Any] = {"run": "whole", "device": device, "epochs": 4, "log_every": 2}
    shared["checkpoint"] = Checkpoint(every_steps=CUT, keep=9)
    unlabelled = Data(dir=str(data), workers=1)
    if stage == "pretrain":
        model = Model("resnet10t", "small", 0.125, projector=(16, 16))
        return Pretrain(
            **shared, data=unlabelled, batch_size=32, views=Views(size=32), model=model, knn=Knn(every_epochs=0)
        )
    shared |= {"from_run": str(bt), "size": 32, "model": NETWORK, "head": Head((16,), dropout=0.2), "evaluate_every": 0}
    if stage == "finetune":
        return Finetune(**shared, data=Shards(dir=str(data), workers=1), batch_size=16)
    few = Labelled(per_class=2)
    learning: dict[str, Any] = {"threshold": 0.12, "ema": 0.9, "align": 0.9, "batches": "two"}
    return FixMatch(**shared, **learning, data=unlabelled, batch_size=4, mu=8, labelled=few)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, GPU])])
@pytest.mark.parametrize("stage", MAIN)
def test_a_run_that_was_cut_ends_with_the_bits_of_the_whole(
    stage: str, device: str, tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stop, "_told", "")
    monkeypatch.setattr(stop, "_listening", True)
    monkeypatch.setattr(loop.Saver, "due", due_at_the_cut)
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    (whole / "checkpoints").mkdir(parents=True)
    (whole / "logs").mkdir()
    write_json(
        whole / "config.json", asdict(config_of(stage, device, tiny_data, pretrained_run(tmp_path / "bt", tiny_data)))
    )
    MAIN[stage](str(whole))
    assert len(rows(whole)) == STEPS
    shutil.copytree(whole, cut)
    shutil.rmtree(cut / "best", ignore_errors=True)
    for file in (*cut.glob(f"checkpoints/step-{STEPS:09d}.*"), cut / "results.json"):
        file.unlink()
    MAIN[stage](str(cut))
    assert (read_status(cut)["state"], read_status(cut)["attempts"]) == ("finished", 2)
    assert [event["step"] for event in history.read(cut) if event["event"] == "start"] == [0, CUT]
    assert rows(cut) == rows(whole)
    ours, theirs = (tensors(load(find(str(folder)))) for folder in (cut, whole))
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []


def due_at_the_cut(saver: loop.Saver, done: int) -> bool:
    """Steps here are shorter than a save, which would be put off."""
    saver.checkpoints.wait()
    return done % CUT == 0 and done < saver.plan.steps
