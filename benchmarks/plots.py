"""Bars of what was measured: benchmarks/results/NAME.svg of each NAME.csv, as README shows them.

    python benchmarks/plots.py

Takes seconds. Where a table has rows of several machines, those of a GPU are drawn, and of several the last measured.
"""

from __future__ import annotations

import csv
import re
from dataclasses import dataclass
from pathlib import Path

from measure import RESULTS, Row

OURS, OTHERS = "#1f5fa8", "#b9bec6"


@dataclass(frozen=True)
class Plot:
    """One bar a row: `value` of what the columns `label` name, in a panel for each of what `panel` names."""

    title: str
    panel: tuple[str, ...]
    label: tuple[str, ...]
    value: str


PLOTS = {
    "end_to_end": Plot("From JPEG files to weights, images a second", ("model",), ("recipe",), "images_per_sec"),
    "step": Plot("A step, images a second", ("model",), ("step",), "images_per_sec"),
    "views": Plot("Both views of an image, pairs a second", ("size",), ("views",), "images_per_sec"),
    "lars": Plot("A step of LARS, times what a copy of its 28 bytes takes", ("set",), ("step",), "than_bound"),
    "loader": Plot("Batches of 512, images a second", ("gives", "encoding", "threads"), ("loader",), "images_per_sec"),
}


def main() -> None:
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams |= {"svg.hashsalt": "barlow", "font.size": 9, "axes.spines.top": False}
    matplotlib.rcParams |= {"axes.spines.right": False, "axes.titlesize": 9, "axes.titlelocation": "left"}
    for name, plot in PLOTS.items():
        if (table := RESULTS / f"{name}.csv").exists():
            draw(plot, chosen(list(csv.DictReader(table.open()))), table.with_suffix(".svg"))


def chosen(rows: list[dict[str, str]]) -> list[dict[str, str]]:
    """The rows of one machine."""
    machines = list(dict.fromkeys(row["hardware"] for row in rows))
    gpus = [machine for machine in machines if re.search("NVIDIA|H100|H200|A100|B200|GeForce|RTX|Tesla", machine)]
    return [row for row in rows if row["hardware"] == (gpus or machines)[-1]]


def draw(plot: Plot, rows: list[dict[str, str]], path: Path) -> None:
    from matplotlib import pyplot

    panels: dict[str, list[Row]] = {}
    for row in rows:
        if row[plot.value]:
            bar: Row = {"label": named(row, plot.label), "value": float(row[plot.value])}
            panels.setdefault(named(row, plot.panel), []).append(bar)
    heights = [len(bars) + 1.2 for bars in panels.values()]
    figure, axes = pyplot.subplots(
        len(panels),
        1,
        figsize=(7, 0.5 + 0.27 * sum(heights)),
        height_ratios=heights,
        squeeze=False,
        layout="constrained",
    )
    for (panel, bars), ax in zip(panels.items(), axes[:, 0], strict=True):
        labels = [str(bar["label"]) for bar in bars]
        values = [float(str(bar["value"])) for bar in bars]
        drawn = ax.barh(labels, values, color=[OURS if is_ours(label) else OTHERS for label in labels], height=0.7)
        ax.bar_label(drawn, [f"{value:,.3g}" if value < 1000 else f"{value:,.0f}" for value in values], padding=3)
        ax.invert_yaxis()
        ax.set_xticks([])
        ax.spines["bottom"].set_visible(False)
        ax.tick_params(length=0)
        ax.margins(x=0.12)
        ax.set_title(panel)
    figure.suptitle(f"{plot.title} ({rows[0]['hardware']}, {rows[0]['cores']} cores)", x=0.01, ha="left", fontsize=10)
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)
    print(path)


def named(row: dict[str, str], columns: tuple[str, ...]) -> str:
    """What a row's columns say; a number is said with what it counts."""
    return ", ".join(row[column] if not row[column].isdigit() else f"{column} {row[column]}" for column in columns)


def is_ours(label: str) -> bool:
    return label.startswith(("our", "+", "fused", "foreach"))


if __name__ == "__main__":
    main()
