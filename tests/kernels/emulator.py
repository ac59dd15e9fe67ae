"""Our CUDA kernels without a GPU: the same source, compiled by g++, its threads as fibers (see on_cpu.h).

A plugin, for its fixtures."""

from __future__ import annotations

import ctypes
import functools
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from barlow.kernels import build
from barlow.kernels.launch import parameters

ORDERS = {"ascending": 0, "descending": 1, "shuffled": 7}  # of a block's threads
HEADER = Path(__file__).parent / "on_cpu.h"


class OnCpu:
    """Takes the place of barlow.kernels.launch.Kernels, for tensors on the CPU."""

    def __init__(self, library: ctypes.CDLL, order: str, shared_limit: int) -> None:
        self.library, self.order, self.shared_limit = library, order, shared_limit
        self.device = torch.device("cpu")
        self.launches: list[str] = []

    def launch(self, name: str, grid: int, block: int, shared: int, *arguments: Any) -> None:
        assert grid > 0
        assert 0 < block <= 1024
        assert shared <= self.shared_limit
        run = getattr(self.library, f"run_{name}")
        run.restype = ctypes.c_char_p
        passed, addresses = parameters(arguments)
        self.launches.append(name)
        if wrong := run(grid, block, shared, addresses, ORDERS[self.order]):
            raise RuntimeError(f"{name}: {wrong.decode()}")
        del passed


@pytest.fixture(scope="session")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], ctypes.CDLL]:
    """`compiled(name, source)` -> the library in which run_KERNEL(grid, block, shared, addresses, order) are."""
    folder = tmp_path_factory.mktemp("kernels")

    @functools.cache
    def make(name: str, source: str) -> ctypes.CDLL:
        kernels = re.findall(r"__global__\s+void\s+(?:__launch_bounds__\([^)]*\)\s*)?(\w+)\(", source)
        assert kernels
        runs = "\n".join(
            f'extern "C" const char* run_{kernel}(unsigned grid, unsigned block, unsigned bytes, void** p, unsigned o) '
            f"{{ return on_cpu::launch({kernel}, grid, block, bytes, p, o); }}"
            for kernel in kernels
        )
        text = folder / f"{name}-{len(list(folder.iterdir()))}.cpp"
        text.write_text(f'#include "{HEADER}"\n{source}\n{runs}\n')
        library = text.with_suffix(".so")
        command = ["g++", "-O1", "-std=c++17", "-shared", "-fPIC", "-ffp-contract=off", "-w", "-fno-strict-aliasing"]
        done = subprocess.run([*command, str(text), "-o", str(library)], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return ctypes.CDLL(str(library))

    return make


@pytest.fixture
def emulated(compiled: Callable[[str, str], ctypes.CDLL]) -> Callable[..., OnCpu]:
    """`emulated("lars", order="ascending")` -> the kernels of lars.cu, to be launched with CPU tensors."""

    def make(name: str, order: str = "ascending", shared_limit: int = 227 * 1024) -> OnCpu:
        return OnCpu(compiled(name, build.source(name)), order, shared_limit)

    return make
