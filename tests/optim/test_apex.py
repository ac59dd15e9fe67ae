"""LARS made of apex's functors against the definition: by a stand-in for them here, by apex itself where it is."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from barlow.optim import apex
from barlow.optim.lars import Lars
from tests.optim.test_lars import OPTIONS, draw_gradients, parameters, plain, rate


class StandIn:
    """The functors of amp_C that we use, as far as their results go, with the demands they make."""

    def __init__(self) -> None:
        self.called: list[str] = []

    def lists(self, chunk: int, flag: Tensor, lists: list[list[Tensor]], halves: bool) -> list[list[Tensor]]:
        """Tensors as what they are to the functors: runs of memory, in dense formats, of one number of elements."""
        self.called.append(sys._getframe(1).f_code.co_name)
        assert chunk > 0
        assert flag.dtype == torch.int32
        for tensors in zip(*lists, strict=True):
            for tensor in tensors:
                assert tensor.dtype == torch.float32 or (halves and tensor.dtype == torch.bfloat16)
                assert tensor.is_contiguous() or tensor.is_contiguous(memory_format=torch.channels_last)
                assert tensor.numel() == tensors[0].numel()
        assert lists[0][-1].numel() > 0  # or what comes before it would not be launched
        return [[tensor.as_strided((tensor.numel(),), (1,)) for tensor in tensors] for tensors in lists]

    def multi_tensor_axpby(
        self, chunk: int, flag: Tensor, lists: list[list[Tensor]], a: float, b: float, check: int
    ) -> None:
        assert check in (-1, 0, 1)
        for x, y, out in zip(*self.lists(chunk, flag, lists, halves=False), strict=True):
            if not (x.isfinite().all() and y.isfinite().all()):
                flag.fill_(1)
            out.copy_(a * x + b * y)

    def multi_tensor_scale(self, chunk: int, flag: Tensor, lists: list[list[Tensor]], scale: float) -> None:
        for x, out in zip(*self.lists(chunk, flag, lists, halves=True), strict=True):
            out.copy_(x * scale)

    def multi_tensor_l2norm(
        self, chunk: int, flag: Tensor, lists: list[list[Tensor]], per_tensor: bool | None
    ) -> tuple[Tensor, Tensor]:
        (tensors,) = self.lists(chunk, flag, lists, halves=True)
        squares = torch.stack([tensor.square().sum() for tensor in tensors])
        return squares.sum().sqrt()[None], squares.sqrt() if per_tensor else torch.empty(0)

    def multi_tensor_lamb_stage2_cuda(
        self,
        chunk: int,
        flag: Tensor,
        lists: list[list[Tensor]],
        p_norms: Tensor,
        u_norms: Tensor,
        lr: float,
        weight_decay: float,
        use_nvlamb: bool | None,
    ) -> None:
        assert p_norms.is_contiguous()
        assert u_norms.is_contiguous()
        for i, (p, u) in enumerate(zip(*self.lists(chunk, flag, lists, halves=False), strict=True)):
            ratio = torch.tensor(lr)
            if (use_nvlamb or weight_decay != 0) and u_norms[i] != 0 and p_norms[i] != 0:
                ratio = lr * (p_norms[i] / u_norms[i])
            p.sub_(ratio * u)


def by_apex(params: list[nn.Parameter], options: dict[str, Any], steps: int, functors: Any) -> list[Tensor]:
    optimizer = Lars(params, **options, backend="foreach")
    optimizer._functors = functors
    for step in range(steps):
        draw_gradients(params, step)
        optimizer.param_groups[0]["lr"] = rate(step)
        optimizer.step()
    return [p.detach() for p in params]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_apex_s_functors_make_the_definition(options: dict[str, Any]) -> None:
    functors = StandIn()
    ours = by_apex(parameters(torch.float32), options, 9, functors)
    theirs = plain(parameters(torch.float32), options, 9)
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)
    assert "multi_tensor_scale" in functors.called
    assert ("multi_tensor_lamb_stage2_cuda" in functors.called) == options.get("adapt", True)


@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("broken", [torch.nan, torch.inf, 3e38])
def test_what_is_not_finite_there_is_not_finite_here(broken: float, clip: bool) -> None:
    ends = []
    for functors in (StandIn(), None):
        params = [nn.Parameter(torch.linspace(-1, 1, n)) for n in (4, 9)]
        optimizer = Lars(params, lr=0.3, weight_decay=0.1, clip=clip, backend="foreach")
        optimizer._functors = functors
        for p in params:
            p.grad = torch.linspace(2, 5, len(p))
        grad = params[0].grad
        assert grad is not None
        grad[1] = broken
        optimizer.step()
        ends.append([p.detach() for p in params])
    assert [p.isnan().tolist() for p in ends[0]] == [p.isnan().tolist() for p in ends[1]]
    torch.testing.assert_close(ends[0], ends[1], equal_nan=True)


def test_half_precision_and_other_layouts_go_on_beside_it() -> None:
    functors = StandIn()
    params = [nn.Parameter(torch.ones(4, 3).bfloat16()), nn.Parameter(torch.ones(4, 3).double())]
    params += [nn.Parameter(torch.ones(3, 4).t()), nn.Parameter(torch.ones(4, 3))]
    optimizer = Lars(params, lr=0.5, eta=0.1, backend="foreach")
    optimizer._functors = functors
    for p in params:
        p.grad = torch.ones(4, 3, dtype=p.dtype)
    params[3].grad = torch.ones(3, 4).t()
    optimizer.step()
    for p in params:
        torch.testing.assert_close(p.detach().float(), torch.full((4, 3), 0.95), rtol=4e-3, atol=0)


def test_the_apex_that_is_not_nvidia_s_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "apex", ModuleType("apex"))
    monkeypatch.setitem(sys.modules, "amp_C", None)  # its import fails
    assert apex.load() is None
    old: Any = ModuleType("amp_C")
    old.multi_tensor_scale = lambda: None
    monkeypatch.setitem(sys.modules, "amp_C", old)
    assert apex.load() is None  # too old: it lacks some
    stand_in: Any = StandIn()
    monkeypatch.setitem(sys.modules, "amp_C", stand_in)
    assert apex.load() is stand_in


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available() or apex.load() is None, reason="needs a GPU, and NVIDIA's apex")
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_apex_itself_agrees(options: dict[str, Any]) -> None:
    ours = by_apex(parameters(torch.float32, "cuda"), options, 9, apex.load())
    theirs = plain(parameters(torch.float64), options, 9)
    torch.testing.assert_close([p.cpu().double() for p in ours], theirs, rtol=1e-4, atol=1e-5)
