"""python -m barlow.stages.table RUN_FOLDER: what the runs of a chain have come to, as the paper's table, ours beside
theirs. Leaves table.md, and the numbers in results.json."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from barlow import history
from barlow.config import Table
from barlow.engine.run import load_config
from barlow.files import read_json, read_status, write_json, write_status, write_whole

THEIRS = ("train", "val", "val with the labels asked for")


def main(run_folder: str) -> None:
    folder = Path(run_folder)
    config = load_config(folder, Table)
    starts = read_status(folder).get("attempts", 0) + 1
    write_status(folder, state="running", step=0, steps=1, attempts=starts, why="")
    history.note(folder, "start", step=0, ranks=1)
    results = [read_json(folder.parent / run / "results.json") for run in config.runs]
    text = "\n".join([f"{config.title}.", "", *lines(config, results), "", *config.notes]) + "\n"
    write_whole(folder / "table.md", text.encode())
    print(f"table: {folder / 'table.md'}", flush=True)
    found = dict(zip(config.runs, results, strict=True))
    write_json(folder / "results.json", {"steps": 1, **{run: of.get("val_top1") for run, of in found.items()}})
    write_status(folder, state="finished", step=1, steps=1, why="")
    history.note(folder, "finished", step=1)


def lines(config: Table, results: Sequence[dict[str, Any]]) -> list[str]:
    """The table in Markdown: for each method the accuracy on what it learned from and on val, then on val with the
    labels that each rule has asked for."""
    each = 1 + len(config.columns)
    columns = ["train", "val", *(f"val, labels by {name}" for name in config.columns)]
    columns += [f"{name} (paper)" for name in THEIRS]
    table = [["", *columns], ["---", *("---:" for _ in columns)]]
    for at, row in enumerate(config.rows):
        ours = results[at * each : (at + 1) * each]
        numbers = [ours[0]["train_top1"], *(run["val_top1"] for run in ours)]
        theirs = config.paper[at * len(THEIRS) : (at + 1) * len(THEIRS)]
        table.append([row, *(f"{number:.2f}" for number in (*numbers, *theirs))])
    return [f"| {' | '.join(cells)} |" for cells in table]


if __name__ == "__main__":
    main(sys.argv[1])
