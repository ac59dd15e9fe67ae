"""The state of LARS, which all its backends share: a momentum a parameter, float32 for one of half precision."""

from __future__ import annotations

from collections.abc import MutableMapping
from typing import Any

import torch
from torch import Tensor

HALF = (torch.bfloat16, torch.float16)
State = MutableMapping[Tensor, dict[str, Any]]


def momentum_of(state: State, p: Tensor) -> Tensor:
    """Of zeros, if there is none yet."""
    of_p = state[p]
    if "momentum" not in of_p:
        of_p["momentum"] = torch.zeros_like(p, dtype=torch.float32 if p.dtype in HALF else p.dtype)
    momentum: Tensor = of_p["momentum"]
    return momentum


def has_momentum(state: State, p: Tensor) -> bool:
    return p in state and "momentum" in state[p]
