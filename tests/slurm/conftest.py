"""Run folders whose stage is fake_stage.py, and the command that launches them."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
Launch = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def make_run(tmp_path: Path) -> Callable[..., Path]:
    """make_run(name, **config): a run folder as launchers prepare it, its stage told by config what to do."""

    def make(name: str, **config: object) -> Path:
        folder = tmp_path / "runs" / name
        (folder / "logs").mkdir(parents=True)
        (folder / "config.json").write_text(json.dumps(config))
        for part in ("barlow", "slurm"):
            shutil.copytree(ROOT / part, folder / "code" / part, ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(HERE / "fake_stage.py", folder / "code")
        return folder

    return make


@pytest.fixture
def start() -> Iterator[Launch]:
    """start(folder, **cluster): the command of a launcher, as a process; killed if the test leaves it behind."""
    running: list[subprocess.Popen[str]] = []

    def begin(folder: Path, **cluster: object) -> subprocess.Popen[str]:
        command = [sys.executable, str(HERE / "fake_launcher.py"), str(folder), json.dumps(cluster)]
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
        pipe = subprocess.PIPE
        process = subprocess.Popen(command, env=environment, cwd=folder.parent, stdout=pipe, stderr=pipe, text=True)
        running.append(process)
        return process

    yield begin
    for process in running:
        process.kill()
        process.wait()


@pytest.fixture
def run(start: Launch) -> Callable[..., tuple[int, str, str]]:
    """run(folder, **cluster): the same command to its end: exit code, stdout, stderr."""

    def finish(folder: Path, **cluster: object) -> tuple[int, str, str]:
        process = start(folder, **cluster)
        out, err = process.communicate(timeout=100)
        return process.returncode, out, err

    return finish
