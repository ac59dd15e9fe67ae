"""Our CUDA kernels: `load` brings those of a .cu file for a GPU, or says None where the reference must do.

One name, four places: NAME.cu here, its reference in Python (the definition), its tests, its benchmark."""

from __future__ import annotations

import functools

import torch

from barlow.kernels.build import UnavailableError
from barlow.kernels.launch import Kernels


def load(name: str, device: torch.device) -> Kernels | None:
    """The kernels of NAME.cu, compiled for this GPU the first time; None on a CPU or where that cannot be done."""
    return _loaded(name, device)[0]


def why_not(name: str, device: torch.device) -> str:
    """One line on why `load` gives None; empty if it does not."""
    return _loaded(name, device)[1]


@functools.cache
def _loaded(name: str, device: torch.device) -> tuple[Kernels | None, str]:
    if device.type != "cuda":
        return None, "not on a GPU"
    try:
        index = torch.cuda.current_device() if device.index is None else device.index
        return Kernels(name, torch.device("cuda", index)), ""
    except UnavailableError as error:
        return None, " ".join(str(error).split())
