"""What runs came to, side by side: the knobs in which they differ, where each stands, its final numbers, its last loss.

The first number of results.json is the one that counts, and more of it is better."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from barlow.files import leaves, read_json
from slurm.runs import facts, standing, table
from slurm.runs.standing import Run

ABOUT_ITSELF = ("run", "runs_dir")


def find(runs_dir: Path, words: Sequence[str]) -> list[Path]:
    """Folders of the runs that the words name; the name of a sweep stands for all of its runs."""
    known = [path.name for path in standing.find(runs_dir)]
    swept = {word: f"{Path(word).name}," for word in words}
    is_sweep = {word: any(name.startswith(swept[word]) for name in known) for word in words}
    return standing.find(runs_dir, [f"{swept[word]}*" if is_sweep[word] else word for word in words])


def rows(found: Sequence[Run]) -> list[dict[str, Any]]:
    """Finished ones first, the best of them on top; the others by name."""
    configs = [dict(leaves(read_json(run.folder / "config.json"))) for run in found]
    names = dict.fromkeys(name for config in configs for name in config if name not in ABOUT_ITSELF)
    differ = [name for name in names if any(config.get(name) != configs[0].get(name) for config in configs)]
    told = [row(run, {name: config.get(name) for name in differ}) for run, config in zip(found, configs, strict=True)]
    return sorted(told, key=lambda row: (row["state"] != "finished", *merit(row), row["run"]))


def row(run: Run, knobs: Mapping[str, Any]) -> dict[str, Any]:
    listed = facts.row(run)
    told = {name: listed[name] for name in ("run", "state", "detail", "certain", "step", "steps", "why")}
    results = read_json(run.folder / "results.json") if run.state == "finished" else {}
    last = facts.metrics(run.folder)
    told |= {"knobs": dict(knobs), "loss": last[-1].get("loss") if last else None}
    numbers = {name: value for name, value in results.items() if isinstance(value, int | float)}
    return told | {"results": {name: value for name, value in numbers.items() if name != "steps"}}


def merit(row: Mapping[str, Any]) -> tuple[float, float]:
    """Less is better; the loss decides where there is no final number, and says nothing of a run that goes on."""
    if row["state"] != "finished":
        return (0.0, 0.0)
    return (-next(iter(row["results"].values()), float("-inf")), row["loss"] if row["loss"] is not None else 0.0)


def text(rows: Sequence[Mapping[str, Any]]) -> str:
    """As a table, the names of its runs last, for they are long."""
    numbers = dict.fromkeys(name for row in rows for name in row["results"])
    lines = []
    for row in rows:
        line = {name: table.words(value) for name, value in row["knobs"].items()}
        line |= {"state": table.state(row), "step": f"{row['step']}/{row['steps']}" if row["steps"] else ""}
        line |= {name: f"{row['results'][name]:.2f}" if name in row["results"] else "" for name in numbers}
        line |= {"loss": "" if row["loss"] is None else f"{row['loss']:.4g}", "run": row["run"]}
        lines.append(line)
    return "\n".join(table.columns(lines)) if lines else "no runs yet"
