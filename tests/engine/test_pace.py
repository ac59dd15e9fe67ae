"""The host waits for the step before the last two, and for nothing on a CPU."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from barlow.engine.pace import STEPS, Pace


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
    assert not pace.ends
