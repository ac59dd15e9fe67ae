"""The host side of the fused LARS, with kernels that only note their launches; what they compute: tests/kernels."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from barlow.optim.fused import Fused, chunk_size
from barlow.optim.lars import Lars


class Recorder:
    """Takes the place of barlow.kernels.launch.Kernels."""

    device = torch.device("cpu")

    def __init__(self) -> None:
        self.launches: list[tuple[str, int]] = []

    def launch(self, name: str, grid: int, block: int, shared: int, *arguments: Any) -> None:
        self.launches.append((name, grid))


def recorded(params: list[nn.Parameter]) -> tuple[Lars, Recorder]:
    recorder, optimizer = Recorder(), Lars(params, lr=0.1)
    optimizer._fused = Fused(recorder)
    for p in params:
        p.grad = torch.ones_like(p)
    return optimizer, recorder


def test_two_launches_whatever_the_number_of_tensors() -> None:
    """And one more for each 480 addresses, when something has moved: addresses are of gradients, tensors, momenta."""
    params = [nn.Parameter(torch.ones(2)) for _ in range(300)]
    optimizer, recorder = recorded(params)

    def launched() -> list[str]:
        recorder.launches.clear()
        optimizer.step()
        return [name for name, _ in recorder.launches]

    assert launched() == ["lars_point", "lars_point", "lars_norms", "lars_update"]
    assert launched() == ["lars_norms", "lars_update"]
    kept, params[3].grad = params[3].grad, torch.zeros(2)
    assert kept is not None  # so the other has another address
    assert launched() == ["lars_point", "lars_norms", "lars_update"]
    assert launched() == ["lars_norms", "lars_update"]


def test_a_block_for_each_chunk() -> None:
    optimizer, recorder = recorded([nn.Parameter(torch.ones(n)) for n in (1, 8192, 8193, 0)])
    optimizer.step()
    assert recorder.launches[1:] == [("lars_norms", 4), ("lars_update", 4)]


def test_nothing_is_launched_for_nothing() -> None:
    optimizer, recorder = recorded([nn.Parameter(torch.ones(0))])
    optimizer.step()
    optimizer.zero_grad()
    optimizer.step()
    assert not recorder.launches
    optimizer, recorder = recorded([nn.Parameter(torch.ones(3))])
    optimizer.zero_grad()
    optimizer.step()
    assert not recorder.launches
    assert not optimizer.state


def test_chunks_are_whole_vectors_and_follow_the_size_of_the_set() -> None:
    assert chunk_size(1) == chunk_size(23_900_000) == 8192
    assert chunk_size(217_900_000) == 32768


def test_autograd_is_told_that_parameters_have_changed() -> None:
    """As it is by torch's own optimizers: a backward pass through what was, is an error and no wrong gradient."""
    p = nn.Parameter(torch.ones(3))
    optimizer, _ = recorded([p])
    loss = p.square().sum()
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
