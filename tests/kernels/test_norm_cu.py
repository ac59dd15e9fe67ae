"""norm.cu, by its emulation on a CPU, and the host side that launches it, against its definition in float64."""

from __future__ import annotations

import ctypes
import itertools
import mmap
import re
import shutil
import subprocess
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from barlow import kernels
from barlow.kernels import build
from barlow.models import norm_ops
from barlow.models.norm_ops import DTYPES, Weights, launch_apply, launch_gradient, launch_merge, launch_moments
from tests.kernels.emulator import ORDERS

EPS = 1e-5
Emulated = Callable[..., Any]
# One row; one channel; odd numbers; ends that fill no block, no thread's rows, no tile of columns; several of each.
SHAPES = [(1, 1), (1, 24), (2, 7), (5, 8), (700, 3), (67, 8), (131, 72), (300, 40), (61, 264), (2500, 1), (1100, 16)]
NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}
both = pytest.mark.parametrize("dtype", DTYPES, ids=NAMES.get)


def drawn(rows: int, channels: int, dtype: torch.dtype, seed: int = 0, mean: float = 0.3) -> Tensor:
    """Each channel with a deviation of its own."""
    made = torch.Generator().manual_seed(1000 * seed + rows + channels)
    spread = 0.5 + torch.rand(channels, generator=made)
    return (mean + spread * torch.randn(rows, channels, generator=made)).to(dtype)


def weights(channels: int, plain: bool = False) -> Weights:
    made = torch.Generator().manual_seed(channels)
    weight, bias = torch.randn(channels, generator=made), torch.randn(channels, generator=made)
    return (None, None, EPS) if plain else (weight, bias, EPS)


def close(found: Tensor, exact: Tensor, error: float = 2e-6, largest: float = 0) -> None:
    """To float32's rounding of the largest number, or of one on the way; a bfloat16 is rounded once more."""
    assert found.shape == exact.shape
    rtol = 2**-8 if found.dtype == torch.bfloat16 else error
    torch.testing.assert_close(found.double(), exact, rtol=rtol, atol=error * max(largest, float(exact.abs().max())))


def double(by: Weights) -> Weights:
    weight, bias, eps = by
    return None if weight is None else weight.double(), None if bias is None else bias.double(), eps


# ------------------------------------------------------------------------------------------------------------ moments


@both
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_moments_in_any_order_of_threads(emulated: Emulated, shape: tuple[int, int], dtype: torch.dtype) -> None:
    x = drawn(*shape, dtype)
    found = [launch_moments(emulated("norm", order), x) for order in ORDERS]
    assert all(torch.equal(found[0], other) for other in found[1:])
    exact = norm_ops.moments_of(x.double())
    for part, sought in zip(norm_ops.split(found[0]), norm_ops.split(exact), strict=True):
        close(part, sought, 1e-6)


@pytest.mark.parametrize("mean", [1e4, -3e5, 1e-9])
def test_a_mean_that_is_large_costs_no_digits(emulated: Emulated, mean: float) -> None:
    """Of the variance, no more than what float32 rounds a mean by, about a hundredth of it at most at 3e5. E[x^2] -
    E[x]^2 would be wrong by six times the variance, and by 5,000 times."""
    x = drawn(1500, 5, torch.float32, mean=mean)
    found, exact = launch_moments(emulated("norm"), x), norm_ops.moments_of(x.double())
    torch.testing.assert_close(found[:5].double(), exact[:5], rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(found[5:10].double(), exact[5:10], rtol=2e-6 + abs(mean) * 2**-25, atol=0)


def test_an_outlier_in_a_first_row_costs_few_digits(emulated: Emulated) -> None:
    """What each thread takes from its values before it squares them."""
    x = drawn(2000, 4, torch.float32)
    x[:40] = 1e5
    found, exact = launch_moments(emulated("norm"), x), norm_ops.moments_of(x.double())
    torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=0)
    constant = launch_moments(emulated("norm"), torch.full((600, 3), 0.1))
    assert torch.equal(constant, torch.tensor([0.1, 0.1, 0.1, 0, 0, 0, 600]))


def test_parts_of_ranks_are_merged(emulated: Emulated) -> None:
    """Of different numbers of samples, with means far apart and far from 0."""
    for count, channels in ((1, 3), (2, 9), (5, 64), (300, 11)):
        sizes = [3 + 7 * (i % 4) for i in range(count)]
        x = drawn(sum(sizes), channels, torch.float32, mean=300)
        x[: sizes[0]] += 40
        parts = torch.stack([norm_ops.moments_of(part) for part in x.split(sizes)])
        found = [launch_merge(emulated("norm", order), parts) for order in ORDERS]
        assert all(torch.equal(found[0], other) for other in found[1:])
        close(found[0], norm_ops.merged(parts.double()), 5e-7)
        wide = torch.stack([norm_ops.moments_of(part) for part in x.double().split(sizes)])
        torch.testing.assert_close(norm_ops.merged(wide), norm_ops.moments_of(x.double()))


def test_parts_that_are_all_the_same_stay_as_they_are(emulated: Emulated) -> None:
    """To the bit, whatever their counts: means are summed by what they differ by."""
    parts = torch.cat([drawn(1, 40, torch.float32), torch.zeros(1, 40), torch.ones(1, 1)], dim=1).repeat(300, 1)
    parts[:, -1] = 3 + torch.arange(300) % 11
    found = launch_merge(emulated("norm"), parts)
    assert torch.equal(found[:-1], parts[0, :-1])
    assert found[-1] == parts[:, -1].sum()


def test_sums_of_many_blocks_are_added(emulated: Emulated) -> None:
    for count, width in ((2, 5), (300, 20)):
        parts, out = drawn(count, width, torch.float32), torch.empty(width)
        numbers, blocks = (ctypes.c_int(count), ctypes.c_int(width)), -(-width // norm_ops.CHANNELS)
        for order in ORDERS:
            shared = 4 * norm_ops.MERGING
            emulated("norm", order).launch("norm_total", blocks, norm_ops.MERGING, shared, parts, *numbers, out)
            close(out, parts.double().sum(0), 1e-6)


# ------------------------------------------------------------------------------------------------- result and gradient


def gradients(x: Tensor, added: Tensor | None, grad: Tensor, by: Weights, relu: bool) -> list[Tensor | None]:
    """By autograd through batch norm as a textbook has it, in float64: of x, weight, bias, and what is added."""
    leaves = [None if t is None else t.double().requires_grad_() for t in (x, by[0], by[1], added)]
    wide, weight, bias, more = leaves
    assert wide is not None
    y = (wide - wide.mean(0)) / (wide.var(0, correction=0) + by[2]).sqrt()
    y = y if weight is None else y * weight
    y = y if bias is None else y + bias
    y = y if more is None else y + more
    (y.relu() if relu else y).backward(grad.double())
    return [None if leaf is None else leaf.grad for leaf in leaves]


@both
@pytest.mark.parametrize("relu", [True, False], ids=["relu", "identity"])
@pytest.mark.parametrize("sum_too", [True, False], ids=["added", "alone"])
@pytest.mark.parametrize("shape", SHAPES[1:], ids=str)
def test_result_and_gradients(
    emulated: Emulated, shape: tuple[int, int], sum_too: bool, relu: bool, dtype: torch.dtype
) -> None:
    rows, channels = shape
    by = weights(channels, plain=rows == 67)
    x, grad = drawn(rows, channels, dtype), drawn(rows, channels, dtype, seed=1)
    added = drawn(rows, channels, dtype, seed=2) if sum_too else None
    ends: list[list[Tensor]] = []
    for order in ORDERS:
        on_cpu = emulated("norm", order)
        moments = launch_moments(on_cpu, x)
        y = launch_apply(on_cpu, x, added, moments, by, relu)
        masked, mask_of_x = (y if sum_too and relu else None), relu and not sum_too
        sums, kept = norm_ops.launch_sums(on_cpu, grad, x, masked, moments, by, mask_of_x)
        g = grad if kept is None else kept
        x_grad = launch_gradient(on_cpu, g, x, moments, sums, by, mask_of_x)
        ends.append([y, sums, x_grad, *([g] if sum_too else [])])
    assert all(torch.equal(a, b) for other in ends[1:] for a, b in zip(ends[0], other, strict=True))

    y, sums, x_grad, *more = ends[0]
    exact = norm_ops.moments_of(x.double())
    close(y, norm_ops.applied(x.double(), None if added is None else added.double(), exact, double(by), relu))
    if rows == 1:
        return  # a variance of 0: nothing is differentiable that float32 could hold
    of_x, of_weight, of_bias, of_added = gradients(x, added, grad, by, relu)
    assert of_x is not None
    steepest = (exact[channels : 2 * channels] + EPS).rsqrt() * (1 if by[0] is None else by[0].abs())
    close(x_grad, of_x, 2e-6, float(grad.abs().amax(0).double().mul(steepest).max()))
    for found, sought in ((sums[0], of_weight), (sums[1], of_bias)):
        if sought is not None:
            close(found, sought, 1e-5)
    if sum_too:
        assert of_added is not None
        assert torch.equal(more[0], of_added.to(dtype))


@pytest.mark.parametrize("sum_too", [True, False], ids=["added", "alone"])
def test_a_large_mean(emulated: Emulated, sum_too: bool) -> None:
    """1e4 with a deviation of 1: the mean, rounded to float32, is all that is lost."""
    x, grad, by = drawn(700, 12, torch.float32, mean=1e4), drawn(700, 12, torch.float32, seed=1), weights(12)
    on_cpu, added = emulated("norm"), drawn(700, 12, torch.float32, seed=2) if sum_too else None
    moments = launch_moments(on_cpu, x)
    y = launch_apply(on_cpu, x, added, moments, by, True)
    more = None if added is None else added.double()
    exact = norm_ops.applied(x.double(), more, norm_ops.moments_of(x.double()), double(by), True)
    off = 1e4 * 2**-24 / 0.4  # half a unit in the last place of the mean, in the smallest deviation
    torch.testing.assert_close(y.double(), exact, rtol=2e-6, atol=4 * off)
    sums, kept = norm_ops.launch_sums(on_cpu, grad, x, y if sum_too else None, moments, by, not sum_too)
    x_grad = launch_gradient(on_cpu, grad if kept is None else kept, x, moments, sums, by, not sum_too)
    of_x, of_weight, *_ = gradients(x, added, grad, by, True)
    assert of_x is not None
    assert of_weight is not None
    clear = (exact == 0) | (exact.abs() > 8 * off)  # where rounding decides what ReLU cuts off, nothing can be said
    close(sums[0], of_weight, 3e-3)
    assert ((x_grad - of_x).abs() < 1e-2)[clear].all()
    assert clear.double().mean() > 0.99


def test_the_gradients_of_ranks_need_the_sums_of_all(emulated: Emulated) -> None:
    """Moments, result and gradient of two parts, with merged moments and summed sums, are those of the whole."""
    x, grad, by = drawn(90, 10, torch.float32), drawn(90, 10, torch.float32, seed=1), weights(10)
    on_cpu, own = emulated("norm", "shuffled"), (slice(0, 50), slice(50, 90))
    moments = launch_merge(on_cpu, torch.stack([launch_moments(on_cpu, x[part].clone()) for part in own]))
    sums = [
        norm_ops.launch_sums(on_cpu, grad[part].clone(), x[part].clone(), None, moments, by, True)[0] for part in own
    ]
    found = [
        launch_gradient(on_cpu, grad[part].clone(), x[part].clone(), moments, sums[0] + sums[1], by, True)
        for part in own
    ]
    of_x, of_weight, of_bias, _ = gradients(x, None, grad, by, True)
    assert of_x is not None
    close(torch.cat(found), of_x, 1e-5)
    for row, sought in zip(sums[0] + sums[1], (of_weight, of_bias), strict=True):
        assert sought is not None
        close(row, sought, 1e-5)


@both
@pytest.mark.parametrize("broken", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_reaches_its_channel_and_no_other(
    emulated: Emulated, broken: float, dtype: torch.dtype
) -> None:
    """As in torch: nobody is to train on with a number that was broken on the way."""
    x, by = drawn(300, 24, dtype), weights(24)
    x[123, 5] = broken
    on_cpu = emulated("norm")
    moments = launch_moments(on_cpu, x)
    mean, variance, _ = norm_ops.split(moments)
    y = launch_apply(on_cpu, x, None, moments, by, True)
    others = torch.arange(24) != 5
    assert not mean[5].isfinite()
    assert variance[5].isnan()
    assert y[:, 5].isnan().all()
    assert mean[others].isfinite().all()
    assert y[:, others].isfinite().all()
    added = drawn(300, 24, dtype, seed=2)
    added[7, 3], added[8, 3], added[9, 3] = torch.nan, torch.inf, -torch.inf
    y = launch_apply(on_cpu, x, added, moments, by, True)
    assert y[7, 3].isnan()
    assert y[8, 3] == torch.inf
    assert y[9, 3] == 0
    grad = drawn(300, 24, dtype, seed=1)
    grad[200, 11] = broken
    sums, kept = norm_ops.launch_sums(on_cpu, grad, x, y, moments, by, True)
    assert kept is not None
    x_grad = launch_gradient(on_cpu, kept, x, moments, sums, by, False)
    if y[200, 11] > 0:
        assert not x_grad[:, 11].isfinite().any()
    assert kept[7, 3] == grad[7, 3]  # as torch's: what is NaN is not below 0
    assert kept[9, 3] == 0
    assert x_grad[:, 5].isnan().all()
    assert x_grad[:, [0, 1, 2, 4, 23]].isfinite().all()


@both
def test_an_address_off_the_vectors_gives_the_same(emulated: Emulated, dtype: torch.dtype) -> None:
    """A view that does not begin where 16 bytes may: element by element then."""
    whole, by = drawn(41, 16, dtype).flatten(), weights(16)
    x = whole[1 : 1 + 40 * 16].view(40, 16)
    assert norm_ops.tiling(x)[0].wide == 0
    assert norm_ops.tiling(x.clone())[0].wide == 1
    moments = [launch_moments(emulated("norm"), each) for each in (x, x.clone())]
    torch.testing.assert_close(moments[0], moments[1], rtol=1e-6, atol=1e-7)
    y = [launch_apply(emulated("norm"), each, None, moments[0], by, True) for each in (x, x.clone())]
    assert torch.equal(y[0], y[1])


def sparse(rows: int, channels: int) -> Tensor:
    """bfloat16 that take memory only where they are written: this many need more than a machine for tests has."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000  # MAP_NORESERVE, by its name since Python 3.11
    return torch.frombuffer(mmap.mmap(-1, 2 * rows * channels, flags=flags), dtype=torch.bfloat16).view(rows, channels)


def test_elements_beyond_2_to_the_31(emulated: Emulated) -> None:
    """A few columns of rows so long that an index which overflows would not come out at their addresses."""
    on_cpu, channels, few = emulated("norm"), 2**28, 16
    x, grad, y, x_grad = (sparse(9, channels) for _ in range(4))
    x[:, :few], grad[:, :few] = drawn(9, few, torch.bfloat16), drawn(9, few, torch.bfloat16, seed=1)
    how, runs = norm_ops.tiling(x)
    assert runs == 1
    how.tiles, how.across = 1, 2  # no others than those
    moments, sums = (sparse(1, 2 * length).view(torch.float32)[0] for length in (2 * channels + 2, 2 * channels))
    plain = norm_ops.passed((None, None, EPS))
    relu, nothing = ctypes.c_int(1), ctypes.c_void_p(None)
    on_cpu.launch("norm_moments", 1, 256, 4 * 256 * 17, x, moments, how)
    on_cpu.launch("norm_apply", 1, 256, 0, x, nothing, moments, *plain, relu, y, how)
    on_cpu.launch("norm_sums", 1, 256, 4 * 256 * 16, grad, x, nothing, moments, *plain, relu, nothing, sums, how)
    on_cpu.launch("norm_gradient", 1, 256, 0, grad, x, moments, sums, *plain, relu, x_grad, how)
    near = x[:, :few].clone(), grad[:, :few].clone()
    exact = norm_ops.moments_of(near[0].double())
    close(y[:, :few], norm_ops.applied(near[0].double(), None, exact, (None, None, EPS), True))
    of_x = gradients(near[0], None, near[1], (None, None, EPS), True)[0]
    assert of_x is not None
    close(x_grad[:, :few], of_x)


# -------------------------------------------------------------------------------------------------------- machine code


@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
def test_vectors_are_loaded_whole_and_several_at_a_time(arch: str, tmp_path: Path) -> None:
    """What the speed hangs on, in the machine code for an A100 and an H200: 16 bytes a load and a store, from what is
    known to be global memory, several before the first result is used; and nothing in slow memory."""
    triton = find_spec("triton")  # which brings one
    beside = Path(triton.origin).parent / "backends" / "nvidia" / "bin" if triton and triton.origin else Path()
    cuobjdump = shutil.which("cuobjdump") or shutil.which("cuobjdump", path=beside)
    if cuobjdump is None:
        pytest.skip("cuobjdump, which shows machine code, is not installed")
    try:
        code = build.compile_source(build.source("norm"), "norm", arch)
    except build.UnavailableError as why:
        pytest.skip(str(why))
    (tmp_path / "norm.cubin").write_bytes(code)
    shown = subprocess.run([cuobjdump, "-sass", tmp_path / "norm.cubin"], capture_output=True, text=True, check=True)
    functions = {text.split()[0]: text for text in shown.stdout.split("Function : ")[1:]}
    for name, inputs, stores in (
        ("norm_moments", 1, 0), ("norm_apply", 1 + 2, 2), ("norm_sums", 2 + 3, 1), ("norm_gradient", 2, 1)
    ):  # fmt: skip
        memory = re.findall(r"\b(LDG?\.E[\w.]*|STG?\.E[\w.]*|LDL\S*|STL\S*|F[FM][MU]\w*)", functions[name])
        assert not [each for each in memory if each.startswith(("LD.", "ST.", "LDL", "STL"))], name
        assert sum("LDG.E.128" in each for each in memory) >= 2 * 4 * inputs, name  # of either dtype
        assert sum("STG.E.128" in each for each in memory) >= 2 * 4 * stores, name
        runs = [list(run) for wide, run in itertools.groupby(memory, lambda each: "LDG.E.128" in each) if wide]
        assert max(len(run) for run in runs) >= 4, name


# ---------------------------------------------------------------------------------------------------------- on a GPU


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@both
@pytest.mark.parametrize("shape", [*SHAPES[1:], (294912, 256), (4608, 2048), (73728, 129)], ids=str)
@pytest.mark.parametrize("sum_too", [True, False], ids=["added", "alone"])
def test_a_gpu_does_the_same(shape: tuple[int, int], sum_too: bool, dtype: torch.dtype) -> None:
    """Against the emulated definition in float64, without a wait, and the same bits each time."""
    device = torch.device("cuda", 0)
    found = kernels.load("norm", device)
    assert found is not None, kernels.why_not("norm", device)
    x, grad = (drawn(*shape, dtype, seed).to(device) for seed in (0, 1))
    added = drawn(*shape, dtype, 2).to(device) if sum_too else None
    weight, bias, eps = weights(shape[1])
    assert weight is not None
    assert bias is not None
    by = weight.to(device), bias.to(device), eps

    def made() -> list[Tensor]:
        moments = launch_moments(found, x)
        y = launch_apply(found, x, added, moments, by, True)
        sums, kept = norm_ops.launch_sums(found, grad, x, y if sum_too else None, moments, by, not sum_too)
        g = grad if kept is None else kept
        return [moments, y, sums, g, launch_gradient(found, g, x, moments, sums, by, not sum_too)]

    made()
    torch.cuda.set_sync_debug_mode("error")
    try:
        ends, again = made(), made()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(torch.equal(a, b) for a, b in zip(ends, again, strict=True))
    moments, y, sums, _, x_grad = ends
    exact = norm_ops.moments_of(x.double())
    close(moments, exact, 2e-6)
    more = None if added is None else added.double()
    close(y, norm_ops.applied(x.double(), more, exact, double(by), True), 5e-6)
    # What rounding lets through is let through in both directions: of millions, some lie that near to 0.
    masked = torch.where(y <= 0, 0, grad).double()
    exact_sums = norm_ops.sums_of(masked, x.double(), exact, (None, None, eps), False)
    close(sums, exact_sums, 1e-5)
    close(x_grad, norm_ops.gradient_of(masked, x.double(), exact, exact_sums, double(by), False), 1e-5)
