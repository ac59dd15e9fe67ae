"""One momentum a parameter, wide enough, and none where it was only asked for."""

from __future__ import annotations

from collections import defaultdict

import pytest
import torch

from barlow.optim.momentum import State, has_momentum, momentum_of


@pytest.mark.parametrize(
    ("dtype", "wide"), [(torch.bfloat16, torch.float32), (torch.float32, torch.float32), (torch.float64, torch.float64)]
)
def test_it_is_made_once_of_zeros(dtype: torch.dtype, wide: torch.dtype) -> None:
    state: State = defaultdict(dict)
    p = torch.ones(5, 4, dtype=dtype).t()
    assert not has_momentum(state, p)
    assert not state
    momentum = momentum_of(state, p)
    assert (momentum.dtype, momentum.stride()) == (wide, p.stride())
    assert not momentum.any()
    assert momentum_of(state, p) is momentum
    assert has_momentum(state, p)
