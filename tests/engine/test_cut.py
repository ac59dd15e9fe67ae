"""A run may be cut anywhere: killed before any system call that changes a file, or the power gone after it. What goes
on ends with the same bits, every step in metrics.jsonl once; no checkpoint is said to be written while it could still
be lost. Done for real by cutting.py, with ptrace; only the failing power is a model (power.py)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]


def cutting(*words: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "tests.engine.cutting", *words]
    one_thread = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=one_thread, capture_output=True, text=True, timeout=280)
    if done.returncode != 0:
        pytest.fail(f"nothing was cut:\n{done.stderr}", pytrace=False)
    return json.loads(done.stdout)


@pytest.mark.slow
def test_whatever_call_a_run_is_cut_at_it_ends_the_same(tmp_path: Path) -> None:
    told = cutting(str(tmp_path))
    print(f"{told['tried']} in {told['seconds']} s")
    assert told["faults"] == []
    assert told["tried"]["kills"] > 100
    assert told["tried"]["kills of a resume"] > 50
    assert told["tried"]["power cuts"] > 100


@pytest.mark.slow
def test_a_run_whose_fsync_does_nothing_is_caught(tmp_path: Path) -> None:
    told = cutting(str(tmp_path), "careless")
    assert any("it was said that that of 2 is written" in fault for fault in told["faults"])
    assert any("not the rows of all its steps" in fault for fault in told["faults"])
