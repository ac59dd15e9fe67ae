"""What stands in for a GPU in these tests finds what is wrong with a kernel."""

from __future__ import annotations

import ctypes
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from barlow.kernels import build
from tests.kernels.emulator import ORDERS, OnCpu

COMMON = (build.FOLDER / "common.cuh").read_text()
KERNELS = (
    COMMON
    + """
extern "C" __global__ void reverse_well(float* x) {
    DYNAMIC_SHARED(float, kept);
    kept[threadIdx.x] = x[threadIdx.x];
    __syncthreads();
    x[threadIdx.x] = kept[blockDim.x - 1 - threadIdx.x];
}
extern "C" __global__ void reverse_without_barrier(float* x) {
    DYNAMIC_SHARED(float, kept);
    kept[threadIdx.x] = x[threadIdx.x];
    x[threadIdx.x] = kept[blockDim.x - 1 - threadIdx.x];
}
extern "C" __global__ void leave_early(float* x) {
    if (threadIdx.x == 3) return;
    __syncthreads();
    x[threadIdx.x] = 0;
}
extern "C" __global__ void sum(const float* x, float* out, float factor) {
    const float total = block_sum(x[blockIdx.x * blockDim.x + threadIdx.x]);
    const float again = block_sum(1.0f);
    if (threadIdx.x == 5) out[blockIdx.x] = factor * total + again;
}
extern "C" __global__ void round_trip(const float* x, unsigned short* bits, float* back, int n) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) bits[i] = narrow(x[i]), back[i] = widen(bits[i]);
}
"""
)


@pytest.fixture(params=list(ORDERS))
def kernels(compiled: Callable[[str, str], ctypes.CDLL], request: pytest.FixtureRequest) -> OnCpu:
    return OnCpu(compiled("samples", KERNELS), request.param, 4096)


def test_threads_of_a_block_meet(kernels: OnCpu) -> None:
    x = torch.arange(64.0)
    kernels.launch("reverse_well", 1, 64, 64 * 4, x)
    assert torch.equal(x, torch.arange(63.0, -1, -1))


def test_a_missing_barrier_shows(kernels: OnCpu) -> None:
    x = torch.arange(64.0)
    kernels.launch("reverse_without_barrier", 1, 64, 64 * 4, x)
    assert not torch.equal(x, torch.arange(63.0, -1, -1))


def test_a_thread_that_leaves_while_others_wait_is_an_error(kernels: OnCpu) -> None:
    with pytest.raises(RuntimeError, match="wait for others"):
        kernels.launch("leave_early", 1, 32, 0, torch.ones(32))


def test_sums_of_a_block(kernels: OnCpu) -> None:
    x, out = torch.rand(3, 96), torch.empty(3)
    kernels.launch("sum", 3, 96, 0, x, out, ctypes.c_float(2))
    torch.testing.assert_close(out, 2 * x.sum(1) + 96)


def test_bfloat16_is_rounded_as_torch_rounds_it(kernels: OnCpu) -> None:
    torch.manual_seed(0)
    x = torch.cat([torch.randn(500), torch.randn(500) * 1e38, torch.tensor([0.0, -0.0, torch.inf, -torch.inf, 1e-40])])
    ties = torch.arange(1, 9).to(torch.int32).mul(0x8000).add(0x3F800000).view(torch.float32)
    x = torch.cat([x, ties, torch.tensor([torch.nan, 3.4e38])])
    bits, back = torch.empty(len(x), dtype=torch.bfloat16), torch.empty(len(x))
    kernels.launch("round_trip", 5, 256, 0, x, bits, back, ctypes.c_int(len(x)))
    assert same(bits, x.to(torch.bfloat16))
    assert same(back, x.to(torch.bfloat16).float())


def same(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.isnan(), b.isnan()) and torch.equal(a.nan_to_num(), b.nan_to_num())
