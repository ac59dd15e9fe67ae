"""LARS: the fast form against the definition, the definition against numbers worked out by hand, and its state."""

from __future__ import annotations

import io
import pickle
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from barlow import kernels
from barlow.errors import UserError
from barlow.optim import apex
from barlow.optim.groups import weights_and_biases
from barlow.optim.lars import Lars, foreach_step, reference_step

SHAPES = [(7, 5), (4, 3, 3, 3), (6,), (1,), (), (1, 1), (130, 17), (2, 0)]
OPTIONS: list[dict[str, Any]] = [
    {"weight_decay": 1e-2},
    {"weight_decay": 0.0},
    {"weight_decay": 1e-2, "clip": True, "eta": 0.02},
    {"weight_decay": 1e-2, "adapt": False},
    {"weight_decay": 0.0, "adapt": False, "momentum": 0.0},
]


def parameters(dtype: torch.dtype, device: str = "cpu") -> list[nn.Parameter]:
    """Tensors of all shapes and layouts, among them one of zeros."""
    chance = torch.Generator().manual_seed(0)
    tensors = [torch.randn(shape, dtype=torch.float64, generator=chance) for shape in SHAPES]
    tensors += [torch.zeros(3, 4, dtype=torch.float64)]
    tensors += [torch.randn(4, 3, 5, 5, dtype=torch.float64, generator=chance).to(memory_format=torch.channels_last)]
    tensors += [torch.randn(9, 6, dtype=torch.float64, generator=chance).t()]  # not contiguous
    return [nn.Parameter(t.to(device, dtype)) for t in tensors]


def draw_gradients(params: list[nn.Parameter], step: int) -> None:
    """Fresh gradients: at some steps those of some tensors are zero, or missing; contiguous whatever the tensor is."""
    chance = torch.Generator().manual_seed(step + 1)
    for i, p in enumerate(params):
        grad = torch.randn(p.shape, dtype=torch.float64, generator=chance).to(p.device, p.dtype)
        p.grad = None if (i + step) % 5 == 4 else grad * (0 if (i + step) % 7 == 6 else 1)


def rate(step: int) -> float:
    return [0.0, 0.3, 0.02, 1.7][step % 4]


def fast(params: list[nn.Parameter], options: dict[str, Any], steps: int) -> list[Tensor]:
    optimizer = Lars(params, **options)
    for step in range(steps):
        draw_gradients(params, step)
        optimizer.param_groups[0]["lr"] = rate(step)
        optimizer.step()
    return [p.detach() for p in params]


def plain(params: list[nn.Parameter], options: dict[str, Any], steps: int) -> list[Tensor]:
    group = Lars([torch.zeros(1)], **options).param_groups[0]
    momenta = [torch.zeros_like(p) for p in params]
    for step in range(steps):
        draw_gradients(params, step)
        present = [i for i, p in enumerate(params) if p.grad is not None]
        grads = [p.grad for p in params if p.grad is not None]
        group["lr"] = rate(step)
        reference_step([params[i].detach() for i in present], grads, [momenta[i] for i in present], group)
    return [p.detach() for p in params]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-6)])
def test_the_fast_form_is_the_definition(options: dict[str, Any], dtype: torch.dtype, tolerance: float) -> None:
    ours, theirs = fast(parameters(dtype), options, 9), plain(parameters(dtype), options, 9)
    start = parameters(dtype)
    moved = sum(not torch.equal(a, b) for a, b in zip(ours, start, strict=True))
    assert moved == len(ours) - 1  # all but the empty one
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_all_tensors_together_are_the_definition_too(options: dict[str, Any]) -> None:
    """As on a GPU: on a CPU the fast form takes one after the other."""
    params = [p for p in parameters(torch.float64) if p.numel()]
    group = Lars(params, lr=0.3, **options).param_groups[0]
    ends = []
    for form in (foreach_step, reference_step):
        copies, momenta = [p.detach().clone() for p in params], [torch.ones_like(p) for p in params]
        draw_gradients(params, 0)
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in params]
        before = [g.clone() for g in grads]
        form([p.detach() for p in copies], grads, [mu.detach() for mu in momenta], group)
        assert all(torch.equal(a, b) for a, b in zip(grads, before, strict=True))
        ends.append([*copies, *(mu.detach() for mu in momenta)])
    torch.testing.assert_close(*ends, rtol=1e-12, atol=1e-12)


def one_step(p: float, g: float, mu: float = 0.0, **group: Any) -> tuple[float, float]:
    """The definition on a [1, 1] tensor: new p and new momentum."""
    options = {"lr": 0.5, "weight_decay": 0.0, "momentum": 0.9, "eta": 0.001, "clip": False, "adapt": True} | group
    tensors = [torch.full((1, 1), value, dtype=torch.float64) for value in (p, g, mu)]
    reference_step([tensors[0]], [tensors[1]], [tensors[2]], options)
    return float(tensors[0]), float(tensors[2])


def test_the_definition_by_hand() -> None:
    # g = 3 + 0.5 * 2 = 4, q = 0.001 * 2 / 4, mu = 0.9 * 10 + q * 4 = 9.002, p = 2 - 0.5 * 9.002
    assert one_step(2.0, 3.0, 10.0, weight_decay=0.5) == pytest.approx((-2.501, 9.002), rel=1e-14)
    # without adaptation mu = 9 + 4
    assert one_step(2.0, 3.0, 10.0, weight_decay=0.5, adapt=False) == pytest.approx((2 - 6.5, 13.0), rel=1e-14)
    # a zero weight, and a zero gradient: q = 1, clipped or not
    for clip in (False, True):
        assert one_step(0.0, 3.0, lr=4.0, clip=clip) == pytest.approx((-12.0, 3.0), rel=1e-14)
        assert one_step(2.0, 0.0, 1.0, clip=clip) == pytest.approx((2 - 0.45, 0.9), rel=1e-14)
    # a zero gradient but for the decay: the norm is that of the decayed gradient, q = 0.001 * 2 / 1
    assert one_step(2.0, 0.0, weight_decay=0.5) == pytest.approx((2 - 0.5 * 0.002, 0.002), rel=1e-14)
    # clipped: q = eta |p| / |g| = 1 exceeds lr = 0.5 -> the rate is lr; q = 0.25 does not -> the rate is q
    assert one_step(2.0, 1.0, eta=0.5, clip=True) == pytest.approx((2 - 0.5, 1.0), rel=1e-14)
    assert one_step(2.0, 4.0, eta=0.5, clip=True) == pytest.approx((2 - 0.25 * 4, 0.5 * 4), rel=1e-14)
    # at the start of the warm-up lr is 0: nothing moves, the momentum takes the gradient as it is
    assert one_step(2.0, 4.0, lr=0.0, clip=True) == (2.0, 4.0)


def test_half_precision_parameters_have_float32_state_and_arithmetic() -> None:
    ours = parameters(torch.bfloat16)
    start = [p.detach().clone() for p in ours]
    optimizer = Lars(ours, lr=0.3, weight_decay=1e-2)
    momenta = [torch.zeros_like(p, dtype=torch.float32) for p in ours]
    theirs = [p.detach().clone() for p in ours]
    for step in range(0, 10, 5):  # steps at which the same gradients are missing
        draw_gradients(ours, step)
        optimizer.step()
        present = [i for i, p in enumerate(ours) if p.grad is not None]
        wide = [theirs[i].float() for i in present]
        grads = [p.grad.float() for p in ours if p.grad is not None]
        reference_step(wide, grads, [momenta[i] for i in present], optimizer.param_groups[0])
        for i, value in zip(present, wide, strict=True):
            theirs[i].copy_(value)
    assert all(state["momentum"].dtype == torch.float32 for state in optimizer.state.values())
    torch.testing.assert_close([p.detach() for p in ours], theirs, rtol=1e-2, atol=1e-6)
    for i in present:
        torch.testing.assert_close(optimizer.state[ours[i]]["momentum"], momenta[i], rtol=1e-6, atol=1e-6)
    assert any(not torch.equal(a, b) for a, b in zip(ours, start, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_state_survives_a_file_exactly(dtype: torch.dtype) -> None:
    params = parameters(dtype)
    optimizer = Lars(params, lr=0.2, weight_decay=1e-3)
    for step in range(3):
        draw_gradients(params, step)
        optimizer.step()
    file = io.BytesIO()
    torch.save({"optimizer": optimizer.state_dict(), "params": [p.detach() for p in params]}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    twins = [nn.Parameter(p) for p in saved["params"]]
    resumed = Lars(twins)
    resumed.load_state_dict(saved["optimizer"])
    for p, twin in zip(params, twins, strict=True):
        assert torch.equal(resumed.state[twin]["momentum"], optimizer.state[p]["momentum"])
        assert resumed.state[twin]["momentum"].dtype == torch.float32
    for step in range(3, 6):
        for group in (params, twins):
            draw_gradients(group, step)
        optimizer.step()
        resumed.step()
    assert all(torch.equal(p, twin) for p, twin in zip(params, twins, strict=True))


def test_gradients_and_missing_gradients_are_left_alone() -> None:
    params = parameters(torch.float64)
    optimizer = Lars(params, lr=0.1, weight_decay=0.1)
    draw_gradients(params, 0)
    before = [(p.detach().clone(), None if p.grad is None else p.grad.clone()) for p in params]
    optimizer.step()
    without = [i for i, p in enumerate(params) if p.grad is None]
    assert without
    for i, (p, (value, grad)) in enumerate(zip(params, before, strict=True)):
        if i in without:
            assert torch.equal(p, value)
            assert p not in optimizer.state
        else:
            assert p.grad is not None
            assert grad is not None
            assert torch.equal(p.grad, grad)


def test_each_group_has_its_rate_and_its_rules() -> None:
    """Weights adapted and decayed, biases and norms neither: one step of a small net against the definition."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)).double()
    weights, biases = weights_and_biases(model)
    optimizer = Lars([weights, biases], weight_decay=0.1, eta=0.01)
    optimizer.param_groups[0]["lr"], optimizer.param_groups[1]["lr"] = 0.5, 0.25
    model(torch.randn(5, 4, dtype=torch.float64)).pow(3).sum().backward()
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer.step()
    for name, p in model.named_parameters():
        assert p.grad is not None
        if p.ndim > 1:
            g = p.grad + 0.1 * start[name]
            expected = start[name] - 0.5 * 0.01 * start[name].norm() / g.norm() * g
        else:
            expected = start[name] - 0.25 * p.grad
        torch.testing.assert_close(p.detach(), expected, rtol=1e-12, atol=1e-12)


def test_a_closure_is_called_with_gradients_on() -> None:
    p = nn.Parameter(torch.ones(2, 2))
    optimizer = Lars([p], lr=1.0)

    def closure() -> float:
        loss = p.square().sum()
        loss.backward()
        return float(loss.detach())

    assert optimizer.step(closure) == 4.0
    assert float(p[0, 0].detach()) == pytest.approx(1 - 0.001)


def test_a_rate_that_is_a_tensor_is_the_rate() -> None:
    """In the fast form and the definition."""
    ends = []
    for lr in (0.3, torch.tensor(0.3, dtype=torch.float64)):
        for clip in (False, True):
            params = parameters(torch.float64)
            optimizer = Lars(params, lr=lr, weight_decay=0.1, clip=clip, eta=0.1)
            draw_gradients(params, 0)
            optimizer.step()
            p, g = params[0].detach().clone(), params[0].grad
            assert g is not None
            reference_step([p], [g], [optimizer.state[params[0]]["momentum"].clone()], optimizer.param_groups[0])
            ends.append([*(p.detach() for p in params), p])
    torch.testing.assert_close(ends[:2], ends[2:], rtol=1e-12, atol=1e-12)


def test_gradients_are_zeroed_where_asked() -> None:
    params = [*parameters(torch.float32), nn.Parameter(torch.ones(3, dtype=torch.bfloat16))]
    draw_gradients(params, 0)
    without = [p.grad is None for p in params]
    Lars(params, lr=0.1).step(zero_grads=True)
    assert [p.grad is None for p in params] == without
    assert all(not p.grad.any() for p in params if p.grad is not None)


def test_the_backend_is_the_first_that_works(monkeypatch: pytest.MonkeyPatch) -> None:
    optimizer = Lars([nn.Parameter(torch.ones(2))])
    assert optimizer.backend == "foreach"  # on a CPU
    monkeypatch.setattr(kernels, "load", lambda name, device: None)
    monkeypatch.setattr(apex, "load", lambda: None)
    optimizer._choose("auto", torch.device("cuda"))
    assert optimizer.backend == "foreach"
    monkeypatch.setattr(apex, "load", lambda: "functors")
    optimizer._choose("auto", torch.device("cuda"))
    assert optimizer.backend == "apex"


def test_a_backend_that_cannot_be_had_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    p = nn.Parameter(torch.ones(2))
    with pytest.raises(UserError, match=r"^--optim.backend fused: not on a GPU; auto takes what works here$"):
        Lars([p], backend="fused")
    with pytest.raises(UserError, match=r"^--optim.backend apex: not on a GPU; auto takes what works here$"):
        Lars([p], backend="apex")
    monkeypatch.setattr(apex, "load", lambda: None)
    with pytest.raises(UserError, match=r"apex: NVIDIA's apex \(its amp_C\) is not installed"):
        Lars([p])._choose("apex", torch.device("cuda"))


def test_an_optimizer_that_was_pickled_goes_on() -> None:
    p = nn.Parameter(torch.ones(2, 2))
    optimizer = pickle.loads(pickle.dumps(Lars([p], lr=0.1)))
    (twin,) = optimizer.param_groups[0]["params"]
    twin.grad = torch.ones(2, 2)
    optimizer.step()
    assert not torch.equal(twin.detach(), p.detach())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_the_gpu_agrees(options: dict[str, Any]) -> None:
    ours = fast(parameters(torch.float64, "cuda"), options, 9)
    theirs = plain(parameters(torch.float64), options, 9)
    torch.testing.assert_close([p.cpu() for p in ours], theirs, rtol=1e-11, atol=1e-11)
    single = fast(parameters(torch.float32, "cuda"), options, 9)
    torch.testing.assert_close([p.cpu().double() for p in single], theirs, rtol=1e-4, atol=1e-5)


def test_it_does_without_torch_s_compiler() -> None:
    """Whose import takes longer than the rest of a start."""
    code = """
import sys, torch
from barlow.optim.lars import Lars
p = torch.nn.Parameter(torch.ones(3, 3))
optimizer = Lars([p], lr=0.1)
p.grad = torch.ones(3, 3)
optimizer.step()
optimizer.zero_grad()
optimizer.load_state_dict(optimizer.state_dict())
assert p.grad is None and optimizer.state[p]["momentum"].norm() > 0
sys.exit("torch._dynamo" in sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True)
