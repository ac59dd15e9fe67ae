"""Commands as people type them after `python`, many of them in one process: most of the time of each is to import."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
PROGRAM = """
import contextlib, io, json, runpy, sys
sys.path[:0] = ["launchers", "benchmarks"]
for script, *words in json.load(sys.stdin):
    out, told, code = io.StringIO(), io.StringIO(), 0  # no UTF-8 either
    module = words.pop(0) if script == "-m" else ""
    sys.argv = [module or script, *words]
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(told):
        try:
            if module:
                runpy.run_module(module, run_name="__main__", alter_sys=True)
            else:
                runpy.run_path(script, run_name="__main__")
        except SystemExit as stop:
            code = stop.code or 0
            if isinstance(code, str):
                print(code, file=sys.stderr)
                code = 1
    print(json.dumps([code, out.getvalue(), told.getvalue(), "torch" in sys.modules]))
"""


class Answer(NamedTuple):
    code: int
    out: str
    told: str  # on stderr
    torch: bool  # whether it, or one before it, has imported torch


def run_all(commands: Sequence[Sequence[str]], timeout: float = 240) -> list[Answer]:
    """What each command answers, given one after the other in the project's folder; none of them sees a cluster."""
    environment = {key: value for key, value in os.environ.items() if key not in ("SLURM_CONF", "BARLOW_SITE")}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        input=json.dumps([list(words) for words in commands]),
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    assert done.returncode == 0, done.stderr
    return [Answer(*json.loads(line)) for line in done.stdout.splitlines()]
