"""The table of a chain: each number where the paper has it."""

from __future__ import annotations

from pathlib import Path

import pytest

from barlow.config import Table
from barlow.engine import run
from barlow.files import read_json, read_status, write_json
from barlow.stages import table

ROOT = Path(__file__).resolve().parents[2]


def test_ours_stands_beside_theirs(tmp_path: Path) -> None:
    runs = ("c,finetune", "c,finetune-kmeans", "c,fixmatch", "c,fixmatch-kmeans")
    for number, name in enumerate(runs):
        (tmp_path / name).mkdir()
        write_json(tmp_path / name / "results.json", {"train_top1": 90 + number, "val_top1": 30.126 + number})
    config = Table(
        run="c,table",
        runs_dir=str(tmp_path),
        title="Top-1",
        rows=("classifier", "FixMatch"),
        columns=("kmeans",),
        runs=runs,
        paper=(97.89, 32.80, 35.22, 99.23, 33.70, 36.69),
        notes=("Data: few.",),
    )
    folder = run.prepare(config, "", ROOT)
    table.main(str(folder))
    text = (folder / "table.md").read_text()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if "|" in line]
    theirs = ["train (paper)", "val (paper)", "val with the labels asked for (paper)"]
    assert rows[0] == ["", "train", "val", "val, labels by kmeans", *theirs]
    assert rows[2] == ["classifier", "90.00", "30.13", "31.13", "97.89", "32.80", "35.22"]
    assert rows[3] == ["FixMatch", "92.00", "32.13", "33.13", "99.23", "33.70", "36.69"]
    assert text.endswith("Data: few.\n")
    assert read_status(folder)["state"] == "finished"
    assert read_json(folder / "results.json")["c,fixmatch-kmeans"] == pytest.approx(33.126)
