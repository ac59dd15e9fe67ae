"""Batch norm on W gloo ranks against plain batch norm on the whole batch: values, gradients, running statistics."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from timm.layers import BatchNormAct2d
from torch import Tensor, nn

from barlow import dist
from barlow.models.norm import GlobalBatchNorm, moments, standardised, synchronise

Ranks = Callable[..., list[Any]]
ON_A_GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]


def assert_same(actual: Any, expected: Any) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)


def network(dims: int) -> nn.Module:
    """Norms of every kind in use, nested, with affine parameters that are not the identity."""
    torch.manual_seed(0)
    if dims == 1:
        layers = [nn.BatchNorm1d(4), nn.Linear(4, 5), nn.ReLU(), nn.Sequential(nn.BatchNorm1d(5, affine=False))]
    else:
        layers = [nn.BatchNorm2d(4, momentum=None), nn.Conv2d(4, 5, 3), nn.Sequential(BatchNormAct2d(5, momentum=0.3))]
    model = nn.Sequential(*layers, nn.BatchNorm1d(5, track_running_stats=False) if dims == 1 else nn.Flatten())
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    return model.double()


def samples(dims: int, n: int) -> Tensor:
    """[n, 4(, 6, 7)] with means large beside the deviation, which two-pass statistics must not mind."""
    shape = (n, 4) if dims == 1 else (n, 4, 6, 7)
    return 50.0 + torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(dims))


def train(model: nn.Module, x: Tensor, sizes: list[int]) -> dict[str, Any]:
    """Two training steps on this rank's part of x, and one forward in eval mode. The loss weighs samples unevenly."""
    start = sum(sizes[: dist.rank()])
    own = slice(start, start + sizes[dist.rank()])
    part = x[own].clone().requires_grad_()
    weights = torch.linspace(-1, 2, x.shape[0], dtype=torch.float64)[own]
    for _ in range(2):
        y = model(part).flatten(1)
        loss = dist.all_reduce_sum((weights[:, None] * y.square()).sum())
        loss.backward()
    model.eval()
    grads = {name: p.grad for name, p in model.named_parameters()}
    assert part.grad is not None
    return {
        "y": y.detach(),
        "loss": loss.detach(),
        "x grad": part.grad,
        "grads": grads,
        "state": model.state_dict(),
        "eval": model(x[:3]).detach(),
        "kinds": [type(m).__name__ for m in model.modules()],
    }


def train_on_ranks(cases: list[tuple[int, list[int]]]) -> list[dict[str, Any]]:
    return [train(synchronise(network(dims)), samples(dims, sum(sizes)), sizes) for dims, sizes in cases]


@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_equal_one_rank_with_the_whole_batch(on_ranks: Ranks, world_size: int) -> None:
    cases = [(dims, sizes[:world_size]) for dims in (1, 2) for sizes in ([3, 3, 3, 3], [5, 2, 1, 4])]
    answers = on_ranks(world_size, train_on_ranks, cases)
    for case, (dims, sizes) in enumerate(cases):
        ranks = [answer[case] for answer in answers]
        one = train(network(dims), samples(dims, sum(sizes)), [sum(sizes)])
        assert sum(kind.startswith("GlobalBatchNorm") for kind in ranks[0]["kinds"]) == (3 if dims == 1 else 2)
        assert_same(torch.cat([r["y"] for r in ranks]), one["y"])
        # Autograd differentiates the sum of the ranks' equal losses: W times the gradient, as barlow.dist explains.
        grad = torch.cat([r["x grad"] for r in ranks]) / world_size
        assert float(one["x grad"].abs().max()) > 0.1
        assert_same(grad, one["x grad"])
        for name, expected in one["grads"].items():
            averaged = sum(r["grads"][name] for r in ranks) / world_size
            assert_same(averaged, expected)
        for rank in ranks:
            assert_same(rank["loss"], one["loss"])
            assert rank["state"].keys() == one["state"].keys()
            assert_same(rank["state"], one["state"])
            assert_same(rank["eval"], one["eval"])


def test_alone_the_model_is_untouched() -> None:
    model = network(2)
    assert synchronise(model) is model
    assert not any(isinstance(m, GlobalBatchNorm) for m in model.modules())


def test_moments_of_one_rank_keep_their_digits_in_float32() -> None:
    """A mean a thousand times the deviation: the textbook E[x^2] - E[x]^2 has two digits left in float32."""
    x = 1000.0 + torch.randn(4096, 3, generator=torch.Generator().manual_seed(1))
    mean, variance, count = moments(x, [0])
    exact = x.double()
    torch.testing.assert_close(mean.double(), exact.mean(0), rtol=1e-6, atol=0.0)
    torch.testing.assert_close(variance.double(), exact.var(0, correction=0), rtol=1e-5, atol=0.0)
    assert int(count) == 4096


def test_gradient_of_the_form_for_ranks() -> None:
    """The hand-off from moments to output, by finite differences; alone it is the same arithmetic without a gather."""
    norm = GlobalBatchNorm(3).double()
    nn.init.normal_(norm.weight)
    x = torch.randn(4, 3, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(norm, (x,))


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=ON_A_GPU)])
def test_standardised_by_statistics_that_came_another_way(device: str) -> None:
    """The statistics of all, found with the rows of all, as the loss does; alone: batch norm without weights."""
    x = samples(1, 9).to(device).requires_grad_()
    weights = torch.linspace(-1, 2, 9, dtype=torch.float64, device=device)[:, None]
    everyone, mean, inverse = torch.native_batch_norm(x.detach(), None, None, None, None, True, 0.0, 1e-5)
    y = standardised(x, mean, inverse, 9)
    expected = nn.functional.batch_norm(x, None, None, training=True, eps=1e-5)
    assert_same(y, expected)
    assert_same(everyone, expected.detach())
    (found,), (sought,) = (torch.autograd.grad((weights * z.pow(3)).sum(), x) for z in (y, expected))
    assert float(sought.abs().max()) > 0.1
    assert_same(found, sought)


def test_half_precision_activations_come_back_in_their_dtype() -> None:
    norm, plain = GlobalBatchNorm(8), nn.BatchNorm1d(8)
    x = (3 + torch.randn(64, 8)).bfloat16()
    y = norm(x)
    assert y.dtype == torch.bfloat16
    assert norm.running_var is not None
    assert norm.running_var.dtype == torch.float32
    torch.testing.assert_close(y.float(), plain(x.float()), rtol=0.01, atol=0.01)
