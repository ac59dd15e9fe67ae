"""What the benchmarks share: runs in turns, median and spread, a table, and a CSV that says where it was measured.

Machines are shared and noisy: what counts are ratios of runs that were made in turns, in one process. A benchmark has
`main(quick)`, prints its table, and replaces the rows of this hardware in benchmarks/results/NAME.csv; --quick shows in
a minute on two CPU cores that all of it runs, and writes no file.
"""

from __future__ import annotations

import argparse
import csv
import importlib
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
WHERE = ("hardware", "cores", "commit", "torch")  # columns of every row, after its own
Row = dict[str, object]


def asked(doc: str | None) -> argparse.ArgumentParser:
    """The command line of a benchmark, to which it may add."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small and short, to see that it runs; writes no file")
    return parser


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def peer(name: str) -> ModuleType | None:
    """The package of another project to compare with, or None where it is not installed."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        print(f"without {name} ({error}): pip install '.[bench]' brings the peers")
        return None


def in_turns(
    runs: Mapping[str, Callable[[], object]], rounds: int, calls: int = 1, warmup: int = 2
) -> dict[str, list[float]]:
    """Seconds a call of each run, once a round: one after the other, so that what disturbs one disturbs all.

    On a GPU the time is from CUDA events around `calls` calls, which the host only enqueues."""
    for run in runs.values():
        for _ in range(warmup):
            run()
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            seconds[name].append(timed(run, calls))
    return seconds


def timed(run: Callable[[], object], calls: int) -> float:
    if device().type == "cpu":
        began = time.perf_counter()
        for _ in range(calls):
            run()
        return (time.perf_counter() - began) / calls
    first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    first.record()
    for _ in range(calls):
        run()
    last.record()
    last.synchronize()
    return first.elapsed_time(last) / 1e3 / calls


def spread(seconds: Sequence[float], unit: str = "ms", scale: float = 1e3) -> Row:
    """Median, least and most, in columns that name their unit."""
    found = {"": statistics.median(seconds), "_least": min(seconds), "_most": max(seconds)}
    return {f"{unit}{name}": significant(value * scale) for name, value in found.items()}


def ratio(seconds: Sequence[float], than: Sequence[float]) -> float:
    """How many times as long as `than`: the median over rounds of the ratio within the round."""
    return significant(statistics.median(a / b for a, b in zip(seconds, than, strict=True)))


def significant(value: float, digits: int = 3) -> float:
    return float(f"{value:.{digits}g}")


def report(name: str, rows: Sequence[Row], quick: bool, packages: Sequence[str] = (), part: str = "") -> None:
    """Print the rows as a table, and unless `quick` put them in the place of this hardware's in results/NAME.csv.

    `part`: a column that names a part of a benchmark, which is reported as soon as it is measured; other parts stay."""
    table = Table(title=f"{name} ({hardware()})")
    columns = list(dict.fromkeys(column for row in rows for column in row))
    for column in columns:
        table.add_column(column, justify="right" if isinstance(rows[0].get(column), (int, float)) else "left")
    for row in rows:
        table.add_row(*(str(row.get(column, "")) for column in columns))
    Console(width=None if os.isatty(1) else 160).print(table)
    if not quick:
        where = circumstances(packages)
        write(RESULTS / f"{name}.csv", [row | where for row in rows], part)


def write(path: Path, rows: Sequence[Row], part: str = "") -> None:
    """Rows measured on other hardware stay, and those of other parts."""
    here, parts = rows[0]["hardware"], {str(row.get(part)) for row in rows}
    stored = list(csv.DictReader(path.open())) if path.exists() else []
    kept: list[dict[str, Any]] = [
        row for row in stored if row.get("hardware") != here or (part and row.get(part) not in parts)
    ]
    columns = dict.fromkeys(column for row in [*rows, *kept] for column in row)
    path.parent.mkdir(exist_ok=True)
    with path.open("w", newline="") as file:
        table = csv.DictWriter(file, list(columns), lineterminator="\n")
        table.writeheader()
        table.writerows([*kept, *rows])


def circumstances(packages: Sequence[str] = ()) -> Row:
    where: Row = {"hardware": hardware(), "cores": len(os.sched_getaffinity(0)), "commit": commit()}
    return where | {name: installed(name) for name in ("torch", *packages)}


def commit() -> str:
    """Of the code that was measured, marked where that is not all; results of other benchmarks do not count."""
    if told := os.environ.get("BARLOW_COMMIT"):  # of a copy without its history
        return told
    git = ["git", "-C", str(ROOT)]
    try:
        name = subprocess.run([*git, "describe", "--always"], capture_output=True, text=True).stdout.strip()
        changed = subprocess.run([*git, "diff", "--quiet", "HEAD", "--", ".", ":!benchmarks/results"]).returncode
    except OSError:  # no git
        return "unknown"
    return name + ("-dirty" if changed else "")


def hardware() -> str:
    """The GPU, or where there is none the CPU."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def installed(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return ""
