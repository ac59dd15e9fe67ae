"""Every benchmark runs to its end in its short form, prints a table of figures that can be, and writes no results."""

from __future__ import annotations

import math
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.beside import Done

ROOT = Path(__file__).resolve().parents[2]
BENCHMARKS = ROOT / "benchmarks"
RESULTS = BENCHMARKS / "results"
NAMES = [
    file.stem
    for file in sorted(BENCHMARKS.glob("[!_]*.py"))
    if re.search(r"^from measure import .*\basked\b", text := file.read_text(), re.MULTILINE) and "__main__" in text
]
assert {"few_labels", "lars"} <= set(NAMES)
FIGURE = re.compile(r"(?<![\w.-])\d[\d,]*(?:\.\d+)?(?:e[+-]?\d+)?(?![\w.])")


def stored() -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in RESULTS.iterdir()}


BEFORE = stored()


def command(name: str) -> pytest.MarkDecorator:
    words = [sys.executable, str(BENCHMARKS / f"{name}.py"), "--quick"]
    return pytest.mark.beside(commands=lambda folder: [words])


def figures(told: str) -> list[float]:
    """Of the rows of all tables that were printed."""
    rows = [line for line in told.splitlines() if line.startswith("│")]
    cells = [cell.strip() for row in rows for cell in row.strip("│").split("│")]
    return [float(cell.replace(",", "")) for cell in cells if FIGURE.fullmatch(cell)]


@pytest.mark.slow
@pytest.mark.timeout(1500)
@pytest.mark.parametrize("name", [pytest.param(name, marks=command(name)) for name in NAMES])
def test_a_benchmark_in_short(name: str, beside: list[Done]) -> None:
    (done,) = beside
    assert done.code == 0, done.told
    assert f"{name} (" in done.told, done.told  # the title of its table
    found = figures(done.told)
    assert found, done.told
    assert all(math.isfinite(figure) and 0 <= figure < 1e12 for figure in found)
    assert any(figure > 0 for figure in found)
    assert stored() == BEFORE


@pytest.mark.slow
def test_the_help_of_a_benchmark_says_how_long_it_takes() -> None:
    assert {"startup", "memory"} <= set(NAMES)
    done = subprocess.run([sys.executable, str(BENCHMARKS / "startup.py"), "--help"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "--quick" in done.stdout
    assert "minutes" in done.stdout
