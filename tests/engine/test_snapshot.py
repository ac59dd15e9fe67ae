"""A snapshot is the state at the call, also where it is only cloned then and brought to the host later."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from typing import Any

import pytest
import torch

from barlow.engine import snapshot
from barlow.engine.snapshot import Snapshot


class Nothing:
    """Stands for a stream or an event where there is no GPU."""

    def __init__(self, *_: object) -> None: ...

    def record(self, *_: object) -> None: ...

    def wait_event(self, *_: object) -> None: ...

    def synchronize(self) -> None: ...


@pytest.fixture
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The way of a state on a GPU, with the CPU as that GPU: clones first, the host's memory later."""
    monkeypatch.setattr(snapshot, "_roomy", lambda _: {torch.device("cpu")})
    for name in ("Event", "Stream", "current_stream"):
        monkeypatch.setattr(torch.cuda, name, Nothing)
    monkeypatch.setattr(torch.cuda, "stream", lambda _: nullcontext())


def many(value: float) -> dict[str, Any]:
    """More tensors than one, so that none can be taken for another."""
    model: dict[str, Any] = {str(n): torch.full((n + 1, 3), value + n) for n in range(50)}
    model["tied"] = model["7"].detach()
    return {"model": model, "optimizer": [torch.nn.Parameter(torch.full((2,), value)), {"lr": value}]}


def changed(state: dict[str, Any]) -> None:
    for tensor in (*state["model"].values(), state["optimizer"][0].data):
        tensor.fill_(-1)


def same(found: Any, expected: dict[str, Any]) -> bool:
    tensors = all(torch.equal(found["model"][name], tensor) for name, tensor in expected["model"].items())
    return tensors and torch.equal(found["optimizer"][0], expected["optimizer"][0])


def test_it_is_the_state_at_the_call(as_on_a_gpu: None) -> None:
    taken = Snapshot(ThreadPoolExecutor(1))
    before: list[int] = []
    for value in (1.0, 2.0):
        state = many(value)
        taken.take(state)
        changed(state)
        found = taken.settle()
        assert same(found, many(value))
        assert found["model"]["tied"] is found["model"]["7"]
        assert found["optimizer"][1] == {"lr": value}
        assert not found["optimizer"][0].requires_grad
        addresses = [tensor.data_ptr() for tensor in found["model"].values()]
        assert before in ([], addresses)
        before = addresses


@pytest.mark.parametrize("other_thread", ["idle", "busy"])
def test_two_threads_copy_all_of_it_or_one_alone(other_thread: str) -> None:
    pool, go = ThreadPoolExecutor(1), threading.Event()
    if other_thread == "busy":
        pool.submit(go.wait, 10)
    state = {"model": {str(n): torch.randn(700_000 + n) for n in range(20)}}
    state["model"]["large"] = torch.randn(5_000_000)
    taken = Snapshot(pool)
    taken.take(state)
    go.set()
    expected = {name: tensor.clone() for name, tensor in state["model"].items()}
    for tensor in state["model"].values():
        tensor.zero_()
    found = taken.settle()["model"]
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
