"""The fused LARS where it is meant to run: its numbers, CUDA graphs, and tensors that only a GPU can hold."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from barlow.optim.lars import Lars
from tests.kernels.test_lars_cu import SIZES, Definition, draw, give_gradients, groups_of, rounding, set_rates, weights

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]


def fused_on_gpu(params: list[nn.Parameter]) -> Lars:
    return Lars(groups_of(params), momentum=0.9, backend="fused")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_the_gpu_agrees_and_is_never_waited_for(dtype: torch.dtype) -> None:
    """Also with tensors of several chunks of the real size; twice, with the same bits."""
    ends = []
    for _ in range(2):
        params = weights(dtype, "cuda", [*SIZES, 8192 * 9, 300_001])
        optimizer, definition = fused_on_gpu(params), Definition(params)
        for step in range(4):
            give_gradients(params, step)
            set_rates(optimizer, step)
            torch.cuda.set_sync_debug_mode("error" if step == 3 else "default")  # by then all have a momentum
            optimizer.step()
            torch.cuda.set_sync_debug_mode("default")
            definition.step(params, optimizer.param_groups)
        ours = [p.detach() for p in params]
        torch.testing.assert_close(ours, definition.params, rtol=3 * rounding(dtype), atol=3e-6)
        ends.append(ours)
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))


def test_a_step_in_a_cuda_graph_is_replayed_with_another_rate() -> None:
    params = [nn.Parameter(draw(5000 + i, i).cuda()) for i in range(5)]
    optimizer, definition = fused_on_gpu(params), Definition(params)
    rate = torch.tensor(0.1, device="cuda")
    for group in optimizer.param_groups:
        group["lr"] = rate
    for i, p in enumerate(params):
        p.grad = draw(p.shape, 20 + i).cuda()
    optimizer.step()
    definition.step(params, optimizer.param_groups)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        optimizer.step()
    ours = [p.grad for p in params]
    for lr in (0.5, 0.0, 0.2):
        rate.fill_(lr)
        graph.replay()
        definition.step(params, optimizer.param_groups)
        for p in params:
            p.grad = torch.ones_like(p)  # between replays, a step on other gradients
        optimizer.step()
        definition.step(params, optimizer.param_groups)
        for p, g in zip(params, ours, strict=True):
            p.grad = g
    torch.testing.assert_close([p.detach() for p in params], definition.params, rtol=2e-6, atol=1e-6)


def test_a_first_step_cannot_be_captured() -> None:
    p = nn.Parameter(torch.ones(3, device="cuda"))
    p.grad = torch.ones(3, device="cuda")
    optimizer = Lars([p], lr=0.1, backend="fused")
    with pytest.raises(RuntimeError, match="made a step"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        optimizer.step()


def test_a_tensor_of_more_than_2_to_the_31_elements() -> None:
    n = 2**31 + 5
    if torch.cuda.mem_get_info()[0] < 14 * n:
        pytest.skip("needs 30 GB of GPU memory")
    p = nn.Parameter(torch.ones(n, device="cuda"))
    p.grad = torch.full((n,), 2.0, device="cuda")
    optimizer = Lars([p], lr=0.5, eta=0.5, momentum=0.0, backend="fused")
    optimizer.step()  # q = 0.5 * 1 / 2, p = 1 - 0.5 * q * 2
    assert float(p.detach().min()) == pytest.approx(0.75, rel=1e-5)
    assert float(p.detach().max()) == pytest.approx(0.75, rel=1e-5)
