"""The table of runs: which knobs it shows, which run is on top, and what it says of runs that have not finished."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from barlow.errors import UserError
from barlow.files import write_json, write_status
from slurm.runs import results, standing


def make(
    runs_dir: Path, name: str, state: str, lr: float, top1: float | None, loss: float | None, seed: int = 0
) -> None:
    folder = runs_dir / name
    folder.mkdir(parents=True)
    write_json(folder / "config.json", {"run": name, "seed": seed, "epochs": 2, "optim": {"lr": lr, "eta": 0.1}})
    write_status(folder, state=state, step=6, steps=6)
    if top1 is not None:
        write_json(folder / "results.json", {"steps": 6, "knn_top1": top1, "baseline": 1.0, "of": "val"})
    if loss is not None:
        row = {"step": 6, "images": 192, "images_per_sec": 10.0, "loss": loss}
        (folder / "metrics.jsonl").write_text(json.dumps(row | {"loss": 99.0}) + "\n" + json.dumps(row) + "\n")


def table(runs_dir: Path, *words: str) -> list[dict]:
    return results.rows(standing.look(results.find(runs_dir, words))[0])


def test_a_sweep_is_named_by_its_own_name_and_the_best_is_first(tmp_path: Path) -> None:
    make(tmp_path, "tune,optim.lr=0.1", "finished", 0.1, 20.0, 3.25)
    make(tmp_path, "tune,optim.lr=0.2", "finished", 0.2, 30.0, 4.0)
    make(tmp_path, "tune,optim.lr=0.3", "failed", 0.3, 90.0, None)  # results of before
    make(tmp_path, "tuned,optim.lr=0.4", "finished", 0.4, 40.0, 1.0)
    rows = table(tmp_path, "tune")
    assert [row["knobs"] for row in rows] == [{"optim.lr": 0.2}, {"optim.lr": 0.1}, {"optim.lr": 0.3}]
    assert rows[0]["results"] == {"knn_top1": 30.0, "baseline": 1.0}
    assert (rows[2]["results"], rows[2]["loss"], rows[2]["state"]) == ({}, None, "failed")
    assert results.text(rows).splitlines() == [
        "optim.lr  state     step  knn_top1  baseline  loss  run",
        "0.2       finished   6/6  30.00     1.00      4     tune,optim.lr=0.2",
        "0.1       finished   6/6  20.00     1.00      3.25  tune,optim.lr=0.1",
        "0.3       failed     6/6                            tune,optim.lr=0.3",
    ]
    assert table(tmp_path, "tune*", str(tmp_path / "tune"))[0]["run"] == "tuned,optim.lr=0.4"
    with pytest.raises(UserError, match="no run 'tun' in"):
        table(tmp_path, "tun")


def test_without_final_numbers_the_loss_decides(tmp_path: Path) -> None:
    make(tmp_path, "a", "finished", 0.1, None, 5.0)
    make(tmp_path, "b", "finished", 0.1, None, 4.0, seed=1)
    make(tmp_path, "c", "pending", 0.1, None, 3.0, seed=2)
    rows = table(tmp_path, "a", "b", "c")
    assert [(row["run"], row["knobs"]) for row in rows] == [("b", {"seed": 1}), ("a", {"seed": 0}), ("c", {"seed": 2})]
