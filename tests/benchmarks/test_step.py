"""What is compared is what it is called: each contestant's own code, cuDNN as each has it, pictures without end."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
Flags = tuple[bool, bool]


@pytest.fixture
def step(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=False):  # to which it is set back afterwards
        yield importlib.import_module("step")


@pytest.fixture
def recipe(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("reference_recipe")


def flags() -> Flags:
    """deterministic, benchmark."""
    return torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark


def compiled_with(step: Any, networks: list[Any], limit: int) -> int:
    """Graphs that are made of them, called in turns; none runs eager."""
    step.fresh()
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    views = step.views_of(step.QUICK[0])
    with torch._dynamo.config.patch(recompile_limit=limit), torch.no_grad():
        fast = [torch.compile(network, backend="eager", dynamic=False) for network in networks]
        for _ in range(2):
            for forward in fast:
                forward(views)
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"] - before)


def test_no_contestant_runs_what_was_compiled_for_another(step: Any) -> None:
    networks = [step.network(step.QUICK[0]) for _ in range(2)]
    assert compiled_with(step, networks, limit=1) == 2
    for network in networks:
        network.__class__ = step.BarlowTwins
    assert compiled_with(step, networks, limit=1) == 1


def test_too_many_compilations_end_the_benchmark(step: Any) -> None:
    step.fresh()
    views = step.views_of(step.QUICK[0])
    network = step.network(step.QUICK[0])
    fast = torch.compile(network, backend="eager", dynamic=False)
    with torch._dynamo.config.patch(recompile_limit=1), torch.no_grad():
        fast(views)
        with pytest.raises(Exception, match="recompile_limit"):
            fast([view[:4] for view in views])


def test_cudnn_is_set_as_each_has_it_and_set_back(step: Any, recipe: Any) -> None:
    before = flags()
    seen: list[Flags] = []
    for around in (recipe.as_published, recipe.as_trained, recipe.as_published):
        around(lambda: seen.append(flags()))()
    assert seen == [(False, True), (True, False), (False, True)]
    assert flags() == before
    setting = step.QUICK[0]
    objective = step.network(setting)
    saw = objective.backbone.register_forward_hook(lambda *_: seen.append(flags()))
    recipe.Step(objective.backbone, objective.projector, None, torch.device("cpu"))(step.views_of(setting))
    saw.remove()
    assert seen[3:] == [(False, True)] * 2
    assert flags() == before
    with pytest.raises(ZeroDivisionError), recipe.cudnn(deterministic=True, benchmark=True):
        print(1 / 0)
    assert flags() == before


def test_batches_of_few_pictures_have_no_end(recipe: Any, tmp_path: Path) -> None:
    (tmp_path / "all").mkdir()
    for i in range(5):
        Image.fromarray(np.full((8, 8, 3), 50 * i, np.uint8)).save(tmp_path / "all" / f"{i}.png")
    look = recipe.Pair(8, (0.5,) * 3, (0.5,) * 3)
    given = recipe.batches(str(tmp_path), look, 3, 0, False)
    shapes = [view.shape for views in islice(given, 7) for view in views]
    given.close()
    assert shapes == [(3, 3, 8, 8)] * 14
