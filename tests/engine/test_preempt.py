"""Ranks that are told to stop do so at the same step."""

from __future__ import annotations

import signal
from collections.abc import Callable
from typing import Any

import pytest

from barlow import dist, stop
from barlow.engine.preempt import StopRequest


def agree(told_rank: int, told_at: int) -> list[bool]:
    stop._listening = True
    request, answers = StopRequest(), []
    for at in range(8):
        if dist.rank() == told_rank and at == told_at:
            stop.note(signal.SIGTERM)
        answers.append(request.agreed(last=at == 7))
        if answers[-1]:
            break
    return answers


@pytest.mark.parametrize("told_rank", [0, 2])
def test_ranks_agree_on_the_last_step(on_ranks: Callable[..., list[Any]], told_rank: int) -> None:
    assert on_ranks(4, agree, told_rank, 3) == [[False] * 4 + [True]] * 4
    assert on_ranks(2, agree, 1, 7) == [[False] * 8] * 2  # at the last step there is nothing to agree on
