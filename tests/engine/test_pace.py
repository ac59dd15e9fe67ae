"""The host waits for the step before the last two, and for nothing on a CPU."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from barlow.engine.pace import STEPS, Pace, to_host


@pytest.fixture
def done(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The steps whose end was waited for, in order."""
    waited: list[int] = []

    class Event:
        made = 0

        def __init__(self, blocking: bool) -> None:
            assert blocking
            self.step = Event.made
            Event.made += 1

        def record(self, stream: str) -> None:
            assert stream == "the stream of cuda:3"

        def synchronize(self) -> None:
            waited.append(self.step)

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: f"the stream of {device}")
    return waited


def test_two_steps_are_always_under_way(done: list[int]) -> None:
    pace, loss = Pace(), SimpleNamespace(is_cuda=True, device="cuda:3")
    after: list[Any] = []
    for _ in range(5):
        pace.wait()
        after.append(list(done))
        pace.enqueued(loss)  # type: ignore[arg-type]
    assert STEPS == 2
    assert after == [[], [], [], [0], [0, 1]]


def test_a_cpu_is_never_ahead(done: list[int]) -> None:
    pace = Pace()
    for _ in range(5):
        pace.wait()
        pace.enqueued(torch.zeros(()))
    assert not done
    assert pace.behind == 0


def test_where_numbers_are_to_be_read_all_steps_are_waited_for(done: list[int]) -> None:
    pace, loss = Pace(), SimpleNamespace(is_cuda=True, device="cuda:3")
    for _ in range(3):
        pace.enqueued(loss)  # type: ignore[arg-type]
    assert pace.behind == 3
    pace.wait(0)
    assert (pace.behind, done) == (0, [0, 1, 2])


def test_numbers_come_to_the_host_together() -> None:
    loss = torch.tensor(2.5, requires_grad=True)
    found = to_host(loss, {"count": torch.tensor(3), "unknown": torch.tensor(float("nan"))})
    assert not found.requires_grad
    assert found[:2].tolist() == [2.5, 3.0]
    assert found[2].isnan()
    loss.data.fill_(9.0)
    assert found[0] == 2.5, "the next step may write over its loss"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_nobody_waits_for_them() -> None:
    loss = torch.ones((), device="cuda")
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda._sleep(50_000_000)
        torch.cuda.set_sync_debug_mode("error")
        try:
            found = to_host(loss * 3, {"twice": loss * 2})
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert found.is_pinned()
    torch.cuda.synchronize()
    assert found.tolist() == [3.0, 2.0]
