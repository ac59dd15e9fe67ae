"""lars.cu, by its emulation on a CPU, and the host side that launches it, against the definition of LARS.

On a GPU: test_lars_gpu.py."""

from __future__ import annotations

import ctypes
import itertools
import re
import shutil
import subprocess
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from barlow import kernels
from barlow.kernels import build
from barlow.optim import fused
from barlow.optim.fused import Fused
from barlow.optim.lars import Lars, reference_step
from tests.kernels.emulator import ORDERS, OnCpu

CHUNK = 4096  # small, so that tensors of a few thousand elements have several
SIZES = [1, 2, 3, 5, 255, 1027, 3100, CHUNK, 2 * CHUNK + 813]
Emulated = Callable[..., OnCpu]


def draw(shape: Any, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def weights(dtype: torch.dtype, device: str = "cpu", sizes: list[int] = SIZES) -> list[nn.Parameter]:
    """All sizes and layouts: none and one element, ends that fill no vector, zeros, addresses off its alignment."""
    tensors = [draw(n, n) for n in sizes] + [draw((), 0), draw((2, 0), 0), torch.zeros(33)]
    tensors += [draw((6, 5, 3, 3), 1).to(memory_format=torch.channels_last), draw((40, 30), 2).t()]
    made = [t.to(device, dtype) for t in tensors]
    made += [draw(1300, 3).to(device, dtype)[1:], draw((3, 433), 4).to(device, dtype).flatten()[3:1202].view(11, 109)]
    return [nn.Parameter(t) for t in made]


def give_gradients(params: list[nn.Parameter], step: int) -> None:
    """As autograd would: in the layout of the parameter. One in seven is missing, another zero; some are unaligned."""
    for i, p in enumerate(params):
        g = torch.empty(p.numel() + 1, dtype=p.dtype, device=p.device)[(i + step) % 2 :][: p.numel()].as_strided(
            p.shape, p.stride()
        )
        g.copy_(draw(p.shape, 100 * step + i) * (0 if (i + step) % 7 == 6 else 1))
        p.grad = None if (i + step) % 7 == 5 else g


def groups_of(params: list[nn.Parameter]) -> list[dict[str, Any]]:
    weights = {"weight_decay": 0.01, "eta": 0.02}
    return [
        {"params": params[::3], **weights},
        {"params": params[1::3], **weights, "clip": True},
        {"params": params[2::3], "adapt": False},
    ]


def emulated_lars(params: list[nn.Parameter], on_cpu: OnCpu, chunk: int = CHUNK) -> Lars:
    optimizer = Lars(groups_of(params), momentum=0.9)
    optimizer.backend, optimizer._fused = "fused", Fused(on_cpu, chunk)
    return optimizer


def set_rates(optimizer: Lars, step: int) -> None:
    for group, lr in zip(optimizer.param_groups, [(0.0, 0.2, 0.1), (0.3, 0.0, 0.1), (0.02, 0.05, 0.1)], strict=True):
        group["lr"] = lr[step % 3]


class Definition:
    """reference_step on copies of the parameters, in float32, rounded to their dtype after each step."""

    def __init__(self, params: list[nn.Parameter]) -> None:
        self.params = [p.detach().clone() for p in params]
        self.momenta = [torch.zeros_like(p, dtype=torch.float32) for p in self.params]

    def step(self, params: list[nn.Parameter], groups: list[dict[str, Any]]) -> None:
        at = {id(p): i for i, p in enumerate(params)}
        for group in groups:
            for p in group["params"]:
                if p.grad is not None:
                    ours, momentum = self.params[at[id(p)]], self.momenta[at[id(p)]]
                    wide = ours.float()
                    reference_step([wide], [p.grad.float()], [momentum], group)
                    ours.copy_(wide)


def rounding(dtype: torch.dtype) -> float:
    """float32's; of a bfloat16, that it may fall on the other side of a tie."""
    return 2e-6 if dtype == torch.float32 else 2**-7


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_it_is_the_definition_in_any_order_of_threads(emulated: Emulated, dtype: torch.dtype) -> None:
    ends: list[list[Tensor]] = []
    for order in ORDERS:
        params = weights(dtype)
        optimizer, definition = emulated_lars(params, emulated("lars", order)), Definition(params)
        for step in range(3):
            give_gradients(params, step)
            set_rates(optimizer, step)
            optimizer.step()
            definition.step(params, optimizer.param_groups)
        ours = [p.detach() for p in params]
        torch.testing.assert_close(ours, definition.params, rtol=rounding(dtype), atol=1e-6)
        for p, momentum in zip(params, definition.momenta, strict=True):
            if p in optimizer.state:
                mu = optimizer.state[p]["momentum"]
                assert mu.dtype == torch.float32
                torch.testing.assert_close(mu, momentum, rtol=2e-6, atol=2e-6)
        moved = sum(not torch.equal(a, b) for a, b in zip(ours, weights(dtype), strict=True))
        assert moved >= len(params) - (1 if dtype == torch.float32 else 2)  # the empty one; what rounding takes away
        ends.append([*ours, *(optimizer.state[p]["momentum"] for p in params if p in optimizer.state)])
    assert all(torch.equal(a, b) for other in ends[1:] for a, b in zip(ends[0], other, strict=True))


@pytest.mark.parametrize("broken", [torch.nan, torch.inf, -torch.inf, 3e38, 1e-30])
def test_what_is_not_finite_there_is_not_finite_here(emulated: Emulated, broken: float) -> None:
    """And what is finite there is finite here: a NaN norm is not above 0, an infinite one makes q = 0."""
    params = [nn.Parameter(draw(n, n)) for n in (5, 300, 700)]
    optimizer, definition = emulated_lars(params, emulated("lars")), Definition(params)
    for step in range(2):
        for p in params:
            p.grad = draw(p.shape, step)
            if step == 1:
                p.grad *= 1e-30 if broken == 1e-30 else 1
                p.grad[2] = broken
        set_rates(optimizer, 1)
        optimizer.param_groups[1]["lr"] = 0.1
        optimizer.step()
        definition.step(params, optimizer.param_groups)
    for p, expected, momentum in zip(params, definition.params, definition.momenta, strict=True):
        for ours, theirs in ((p.detach(), expected), (optimizer.state[p]["momentum"], momentum)):
            assert torch.equal(ours.isnan(), theirs.isnan())
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6, equal_nan=True)


def test_gradients_are_left_or_zeroed_in_the_same_pass(emulated: Emulated) -> None:
    params = weights(torch.float32)
    optimizer = emulated_lars(params, emulated("lars"))
    give_gradients(params, 0)
    params[-4].grad = params[-4].grad.contiguous() if params[-4].grad is not None else None
    before = [None if p.grad is None else p.grad.clone() for p in params]
    optimizer.step()
    assert all(b is None or torch.equal(b, p.grad) for b, p in zip(before, params, strict=True) if p.grad is not None)
    optimizer.step(zero_grads=True)
    assert all((p.grad is None) == (b is None) for b, p in zip(before, params, strict=True))
    assert all(not p.grad.any() for p in params if p.grad is not None)


def test_a_gradient_in_another_layout_is_read_right(emulated: Emulated) -> None:
    shape = (6, 5, 3, 3)
    params = [nn.Parameter(draw(shape, i).to(memory_format=torch.channels_last)) for i in range(3)]
    params += [nn.Parameter(draw((7, 4, 1, 1), 9))]
    optimizer, definition = emulated_lars(params, emulated("lars")), Definition(params)
    params[0].grad = draw(shape, 5)
    params[1].grad = draw((3, 3, 5, 6), 6).permute(3, 2, 0, 1)
    params[2].grad = torch.ones(1).expand(shape)
    params[3].grad = draw((7, 4, 1, 1), 8).to(memory_format=torch.channels_last)  # the same, under other strides
    assert params[3].grad.stride() != params[3].stride()
    set_rates(optimizer, 1)
    optimizer.step()
    definition.step(params, optimizer.param_groups)
    torch.testing.assert_close([p.detach() for p in params], definition.params, rtol=2e-6, atol=1e-6)


def test_what_the_kernels_cannot_take_is_stepped_all_the_same(emulated: Emulated) -> None:
    """Other precisions, tensors with holes, and more groups than a launch can carry."""
    params = [nn.Parameter(draw(9, 1).double()), nn.Parameter(draw(9, 2).half()), nn.Parameter(draw(20, 3)[::2])]
    params += [nn.Parameter(draw(5, 10 + i)) for i in range(fused.GROUPS)]
    optimizer = Lars([{"params": [p]} for p in params], lr=0.1, weight_decay=0.1)
    optimizer._fused = Fused(emulated("lars"))
    definition = Definition(params)
    for p in params:
        p.grad = draw(p.shape, 7).to(p.dtype)
    optimizer.step()
    definition.step(params, optimizer.param_groups)
    torch.testing.assert_close([p.detach() for p in params], definition.params, rtol=1e-3, atol=1e-6)
    assert optimizer._fused.plan is not None
    assert len(optimizer._fused.plan.params) == fused.GROUPS - 3


def test_tensors_come_go_and_are_exchanged(emulated: Emulated) -> None:
    """A first gradient later than the others', a gradient that is missing now and then, a state that is loaded, data
    and momentum that are replaced, a group that is added: never an address that is no longer right."""
    params = [nn.Parameter(draw((4, 3), i)) for i in range(4)]
    optimizer, definition = emulated_lars(params[:3], emulated("lars")), Definition(params)

    def step(present: set[int]) -> None:
        for i, p in enumerate(params):
            p.grad = draw((4, 3), 50 + i) if i in present else None
        set_rates(optimizer, 1)
        optimizer.step()
        definition.step(params, optimizer.param_groups)

    def agree() -> None:
        torch.testing.assert_close([p.detach() for p in params], definition.params, rtol=2e-6, atol=1e-6)

    step({0})
    assert params[1] not in optimizer.state
    step({0, 1})
    plan = optimizer._fused and optimizer._fused.plan
    step({1})
    assert optimizer._fused is not None
    assert optimizer._fused.plan is plan  # for a gradient that is missing nothing is made anew
    step({0, 1, 2})
    agree()
    optimizer.load_state_dict(optimizer.state_dict())
    step({0, 1, 2})
    agree()
    params[0].data = params[0].data.clone()
    optimizer.state[params[1]]["momentum"] = optimizer.state[params[1]]["momentum"].clone()
    optimizer.state[params[2]]["momentum"] = optimizer.state[params[2]]["momentum"].t().contiguous().t()
    step({0, 1, 2})
    agree()
    optimizer.param_groups.pop()
    optimizer.add_param_group({"params": [params[2]], "weight_decay": 0.01})
    optimizer.add_param_group({"params": [params[3]], "weight_decay": 0.01})
    for group in optimizer.param_groups:
        group["lr"] = 0.1
    for i, p in enumerate(params):
        p.grad = draw((4, 3), 90 + i)
    optimizer.step()
    definition.step(params, optimizer.param_groups)
    agree()


def test_a_rate_in_memory_is_read_at_each_step(emulated: Emulated) -> None:
    params = [nn.Parameter(draw(70, i)) for i in range(3)]
    optimizer, definition = emulated_lars(params, emulated("lars")), Definition(params)
    rate = torch.tensor(0.0)
    for group in optimizer.param_groups:
        group["lr"] = rate
    for lr in (0.3, 0.7, 0.0):
        for i, p in enumerate(params):
            p.grad = draw(70, 20 + i)
        rate.fill_(lr)
        optimizer.step()
        definition.step(params, optimizer.param_groups)
    torch.testing.assert_close([p.detach() for p in params], definition.params, rtol=2e-6, atol=1e-6)


def test_a_captured_step_keeps_its_addresses(emulated: Emulated) -> None:
    """What a CUDA graph replays reads a table of its own: steps between replays, on other gradients, change nothing."""
    params = [nn.Parameter(draw(70, i)) for i in range(3)]
    optimizer, definition = emulated_lars(params, emulated("lars")), Definition(params)
    captured = [draw(70, 30 + i) for i in range(3)]
    others = [draw(70, 40 + i) for i in range(3)]
    set_rates(optimizer, 1)

    def expect(grads: list[Tensor]) -> None:
        for p, g in zip(params, grads, strict=True):
            p.grad = g
        definition.step(params, optimizer.param_groups)

    expect(others)
    optimizer.step()
    assert optimizer._fused is not None
    plan = optimizer._fused.plan
    assert plan is not None
    table = plan.new_table([g.data_ptr() for g in captured])
    for grads in (others, captured, others):
        expect(grads)
        if grads is captured:
            plan.launch(table, optimizer.param_groups, False)
        else:
            optimizer.step()
    torch.testing.assert_close([p.detach() for p in params], definition.params, rtol=2e-6, atol=1e-6)


def test_elements_beyond_2_to_the_31(emulated: Emulated) -> None:
    """The last, ragged chunk of a tensor of 2^33 + 37 elements, of which only that chunk has memory: an index that
    overflows would not come out at its addresses."""
    on_cpu, size, n = emulated("lars"), 32768, 2**33 + 37
    last = n // size  # the chunk's number within its tensor
    p, g, mu = draw(37, 1), draw(37, 2), draw(37, 3)
    partial = torch.zeros(last + 1, 2)
    partial[5] = torch.tensor([3.0, 4.0])  # of other chunks of the same tensor
    base = [t.data_ptr() - 4 * last * size for t in (g, p, mu)]
    tensors = torch.tensor([[n, -last, 0, 0]])  # so that the chunk of block 0 is its last
    table, owner = torch.tensor(base), torch.zeros(1, dtype=torch.int32)
    expected = p.clone(), mu.clone()
    group = {"weight_decay": 0.1, "momentum": 0.9, "eta": 0.5, "lr": 0.3, "clip": False, "adapt": True}
    rules, _ = fused.rules_of([group], torch.device("cpu"))
    shared = (owner, tensors, table, ctypes.c_int(1), ctypes.c_int(size), ctypes.c_void_p(partial[last:].data_ptr()))
    on_cpu.launch("lars_norms", 1, fused.THREADS, 0, *shared, rules)
    decayed = g + 0.1 * p
    sums = torch.stack([p.square().sum(), decayed.square().sum()])
    torch.testing.assert_close(partial[last], sums)
    on_cpu.launch("lars_update", 1, fused.THREADS, 0, *shared, ctypes.c_int(1), rules)
    norms = (sums + torch.tensor([3.0, 4.0])).sqrt()
    expected[1].mul_(0.9).add_(0.5 * norms[0] / norms[1] * decayed)
    torch.testing.assert_close([p, mu, g], [expected[0] - 0.3 * expected[1], expected[1], torch.zeros(37)])


def test_vectors_are_loaded_whole_and_several_at_a_time(tmp_path: Path) -> None:
    """What the speed hangs on, in the machine code for an H200: 16 bytes a load, from what is known to be global
    memory, and several before the first result is used."""
    triton = find_spec("triton")  # which brings one
    beside = Path(triton.origin).parent / "backends" / "nvidia" / "bin" if triton and triton.origin else Path()
    cuobjdump = shutil.which("cuobjdump") or shutil.which("cuobjdump", path=beside)
    if cuobjdump is None:
        pytest.skip("cuobjdump, which shows machine code, is not installed")
    try:
        code = build.compile_source(build.source("lars"), "lars", "sm_90")
    except build.UnavailableError as why:
        pytest.skip(str(why))
    (tmp_path / "lars.cubin").write_bytes(code)
    shown = subprocess.run([cuobjdump, "-sass", tmp_path / "lars.cubin"], capture_output=True, text=True, check=True)
    functions = {text.split()[0]: text for text in shown.stdout.split("Function : ")[1:]}
    for name, loads in (("lars_norms", 2 * 4), ("lars_update", 3 * 2)):
        memory = re.findall(r"\b(LDG?\.E[\w.]*|STG?\.E[\w.]*|LDL\S*|STL\S*|FFMA)", functions[name])
        assert not [each for each in memory if each.startswith(("LD.", "ST.", "LDL", "STL"))]
        assert memory.count("LDG.E.128") >= loads
        runs = [list(run) for wide, run in itertools.groupby(memory, "LDG.E.128".__eq__) if wide]
        assert max(len(run) for run in runs) >= 4


def test_lars_takes_the_kernels_where_they_load(emulated: Emulated, monkeypatch: pytest.MonkeyPatch) -> None:
    on_cpu = emulated("lars")
    monkeypatch.setattr(kernels, "load", lambda name, device: on_cpu)
    p = nn.Parameter(draw(9, 1))
    optimizer = Lars([p], lr=0.1)
    assert optimizer.backend == "fused"
    p.grad = draw(9, 2)
    optimizer.step()
    assert on_cpu.launches == ["lars_point", "lars_norms", "lars_update"]
    assert Lars([p], backend="foreach").backend == "foreach"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_another_backend_goes_on_with_its_state(emulated: Emulated, dtype: torch.dtype) -> None:
    """From the fused one to the other and back, as a run that is resumed elsewhere would."""
    params = [nn.Parameter(draw(n, n).to(dtype)) for n in (5, 70, 9)]
    definition, state = Definition(params), None
    for step in range(4):
        optimizer = emulated_lars(params, emulated("lars")) if step % 2 == 0 else Lars(groups_of(params), momentum=0.9)
        if state is not None:
            optimizer.load_state_dict(state)
        for i, p in enumerate(params):
            p.grad = draw(p.shape, 10 * step + i).to(dtype)
        set_rates(optimizer, 2)
        optimizer.step()
        definition.step(params, optimizer.param_groups)
        state = optimizer.state_dict()
        assert all(set(of_p) == {"momentum"} for of_p in state["state"].values())
    torch.testing.assert_close([p.detach() for p in params], definition.params, rtol=rounding(dtype), atol=1e-6)
