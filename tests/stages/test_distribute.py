"""How pretraining hangs a model on its ranks: where gradients lie, what is copied, and that buckets never change."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.profiler import ProfilerActivity, profile

from barlow import config, dist
from barlow.objectives.barlow_twins import BarlowTwins
from barlow.stages.training import distribute

Ranks = Callable[..., list[Any]]
CPU = torch.device("cpu")


class Flat(nn.Module):
    """A backbone that is registered in another order than it runs, as the shortcuts of a ResNet are."""

    num_features = 64

    def __init__(self) -> None:
        super().__init__()
        self.last, self.first = nn.Linear(4096, 64), nn.Sequential(nn.Linear(8, 4096), nn.BatchNorm1d(4096))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.last(self.first(x).relu())
        return y


def small() -> BarlowTwins:
    torch.manual_seed(0)
    return BarlowTwins(
        Flat(), config.BarlowTwins(), (768, 768)
    )  # 3 MB of gradients: two buckets, of which the first holds 1 MB


def step(model: nn.Module) -> dict[str, tuple[int, int]]:
    """Storage of each parameter's gradient, and its offset in it; then the optimizer's zero_grad(set_to_none=True)."""
    views = torch.randn(2, 8, 8, generator=torch.Generator().manual_seed(dist.rank()))
    model(list(views))[0].backward()
    places = {}
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        places[name] = (parameter.grad.untyped_storage().data_ptr(), int(parameter.grad.storage_offset()))
        parameter.grad = None
    return places


def calls(model: nn.Module) -> dict[str, int]:
    with profile(activities=[ProfilerActivity.CPU]) as told:
        step(model)
    told_of = {e.key.split("reducer::")[1]: e.count for e in told.key_averages() if "reducer::" in e.key}
    assert told_of.pop("search_unused_parameters") == 1
    return told_of


def gradients_of_a_rank() -> dict[str, Any]:
    model, objective = distribute(small(), CPU), small()
    hasty = DistributedDataParallel(objective, broadcast_buffers=False, gradient_as_bucket_view=True)
    return {
        "places": [step(model) for _ in range(3)],
        "hasty": [step(hasty) for _ in range(3)],
        "calls": calls(model),
        "parameters": len(list(model.parameters())),
        "own queue": isinstance(model, DistributedDataParallel) and model.process_group is dist.bulk(),
    }


@pytest.fixture(scope="module")
def answers(on_ranks: Ranks) -> list[dict[str, Any]]:
    return on_ranks(2, gradients_of_a_rank)


def test_gradients_lie_in_buckets_that_never_change(answers: list[dict[str, Any]]) -> None:
    for answer in answers:
        first, second, third = answer["places"]
        assert first == second == third
        assert len({storage for storage, _ in first.values()}) == 2
        assert answer["own queue"]
        before, _, after = ([(name, offset) for name, (_, offset) in places.items()] for places in answer["hasty"])
        assert before != after  # what DDP does otherwise: gradients move after the first step, and sums with them


def test_a_gradient_is_written_once_into_its_bucket_and_never_copied_back(answers: list[dict[str, Any]]) -> None:
    """The one pass over a gradient also divides it by W: DDP has no cheaper way, zeroing and adding costs three."""
    for answer in answers:
        assert answer["calls"] == {"mul_out": answer["parameters"]}


def descend(objective: BarlowTwins, steps: range) -> None:
    """Gradient descent under DDP that begins at steps.start, as a start of a job does."""
    model = distribute(objective, CPU)
    for at in steps:
        chance = torch.Generator().manual_seed(10 * at + dist.rank())
        model(list(torch.randn(2, 8, 8, generator=chance)))[0].backward()
        with torch.no_grad():
            for parameter in model.parameters():
                assert parameter.grad is not None
                parameter.sub_(0.01 * parameter.grad)
                parameter.grad = None


def whole_and_resumed() -> list[dict[str, torch.Tensor]]:
    whole, first, second = small(), small(), small()
    descend(whole, range(4))
    descend(first, range(2))
    second.load_state_dict(first.state_dict())
    descend(second, range(2, 4))
    return [whole.state_dict(), second.state_dict()]


def test_a_resumed_run_has_the_bits_of_the_whole_one(on_ranks: Ranks) -> None:
    """Three ranks: of two, any order of summation gives the same bits."""
    for whole, resumed in on_ranks(3, whole_and_resumed):
        for name, expected in whole.items():
            assert torch.equal(resumed[name], expected), name


def test_alone_nothing_is_wrapped() -> None:
    objective = small()
    assert distribute(objective, CPU) is objective
