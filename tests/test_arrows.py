"""The house keeps its arrows: which room may import which, and how large a file may grow."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
TOLD = {"barlow.errors", "barlow.files", "barlow.history", "barlow.pulse", "barlow.stop"}  # between a job and its ranks
EVERYWHERE = TOLD | {"barlow.config", "barlow.dist"}
MAY = {
    "launchers": {
        "barlow.cli",
        "barlow.recipes",
        "barlow.stages",
        "barlow.data",
        "barlow.labels",
        "barlow.engine.origin",
        "barlow.engine.run",
        "barlow.papers",
        "slurm",
    },
    "barlow/recipes": set(),
    "barlow/papers": {"barlow.data", "barlow.engine.origin"},
    "barlow/stages": {
        "barlow.engine",
        "barlow.objectives",
        "barlow.models",
        "barlow.data",
        "barlow.optim",
        "barlow.labels",
        "barlow.viz",
    },
    "barlow/engine": {"barlow.optim"},
    "barlow/objectives": {"barlow.models"},
    "barlow/models": {"barlow.kernels"},
    "barlow/data": {"barlow.kernels"},
    "barlow/optim": {"barlow.kernels"},
    "barlow/kernels": set(),
    "barlow/cli.py": set(),
    "barlow/config": set(),
    "barlow/labels": {"barlow.data"},
    "barlow/viz": {"barlow.models"},
    "barlow/pretrained.py": {"barlow.engine", "barlow.models"},
    "barlow/dist.py": set(),
    "barlow/errors.py": set(),
    "barlow/files.py": set(),
    "barlow/history.py": set(),
    "barlow/pulse.py": set(),
    "barlow/stop.py": set(),
}
SLURM = ("", "job", "launch", "runs", "many")  # its rooms; each may import those before it, and itself
FILES = [
    path for room in ("barlow", "slurm", "launchers", "benchmarks") for path in sorted((ROOT / room).rglob("*.py"))
]


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def dotted(room: str) -> str:
    return room.removesuffix(".py").replace("/", ".")


def within(name: str, rooms: set[str]) -> bool:
    return any(name == room or name.startswith(room + ".") for room in rooms)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_one_way(path: Path) -> None:
    here = path.relative_to(ROOT)
    ours = {
        name for name in imports(path) if name.split(".")[0] in ("barlow", "slurm", "launchers", "benchmarks", "tests")
    }
    assert not {name for name in ours if name.split(".")[0] in ("tests", "launchers")}
    if here.parts[0] == "benchmarks":
        return
    assert not {name for name in ours if name.split(".")[0] == "benchmarks"}
    if here.parts[0] == "slurm":
        assert not {name for name in ours if not within(name, TOLD | {"slurm"})}
        roots = {name.split(".")[0] for name in imports(path)} - {"slurm", "barlow"}
        assert roots <= set(sys.stdlib_module_names) | {"submitit", "tomli"}, roots
        own = here.parts[1] if len(here.parts) > 2 else ""
        taken = {name.split(".")[1] for name in ours if name.startswith("slurm.")} & set(SLURM)
        assert taken <= set(SLURM[: SLURM.index(own) + 1]), taken
        return
    module = ".".join(here.with_suffix("").parts)
    rooms = [room for room in MAY if within(module, {dotted(room)})]
    room = max(rooms, key=len, default=None)
    if room is None:
        assert here.name == "__init__.py"
        assert not ours
        return
    wrong = {name for name in ours if not within(name, EVERYWHERE | MAY[room] | {dotted(room)})}
    assert not wrong, wrong


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_file_stays_one_idea(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= 350
