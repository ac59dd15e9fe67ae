"""Fused norms against batch norm, sum and ReLU as torch has them: alone, among ranks, compiled, and in our networks."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from barlow import config, dist, kernels
from barlow.errors import UserError
from barlow.models import backbone, norm_ops
from barlow.models.fused_norm import FusedNorm, fused, way
from barlow.models.norm import GlobalBatchNorm, synchronise
from barlow.models.resnet import choose_norms, fuse
from tests.kernels.emulator import OnCpu

Ranks = Callable[..., list[Any]]
CPU = torch.device("cpu")
gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]


def assert_same(actual: Any, expected: Any) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)


class End(nn.Module):
    """Of a block, as torch has it: norm, sum, ReLU; and the same parameters in one."""

    def __init__(self, channels: int, relu: bool, momentum: float | None = 0.1, affine: bool = True) -> None:
        super().__init__()
        self.norm: nn.Module = nn.BatchNorm2d(channels, momentum=momentum, affine=affine)
        self.relu = relu
        made = torch.Generator().manual_seed(channels)
        for parameter in self.norm.parameters():
            nn.init.normal_(parameter, generator=made)

    def forward(self, x: Tensor, added: Tensor | None = None) -> Tensor:
        if isinstance(self.norm, FusedNorm):
            y: Tensor = self.norm(x, added)
            return y
        y = self.norm(x) if added is None else self.norm(x) + added
        return y.relu() if self.relu else y

    def fused(self) -> End:
        twin = copy.deepcopy(self)
        assert isinstance(twin.norm, nn.BatchNorm2d)
        twin.norm = fused(twin.norm, self.relu)
        return twin


def images(n: int, channels: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """[n, channels, 3, 5], channels last, with means large beside the deviation."""
    made = torch.Generator().manual_seed(100 * seed + channels)
    x = 5 + torch.randn(n, channels, 3, 5, dtype=torch.float64, generator=made)
    return x.to(dtype).to(memory_format=torch.channels_last)


def train(end: End, x: Tensor, added: Tensor | None, weights: Tensor, steps: int = 2) -> dict[str, Any]:
    """Forward and backward, the loss weighing samples unevenly; then a forward in eval mode."""
    x = x.detach().clone().requires_grad_()
    added = None if added is None else added.detach().clone().requires_grad_()
    for _ in range(steps):
        y = end(x, added)
        dist.all_reduce_sum((weights[:, None] * y.flatten(1).square()).sum()).backward()
    found = {"y": y.detach(), "x": x.grad, "added": None if added is None else added.grad}
    grads = {name: p.grad for name, p in end.named_parameters()}
    return found | {"grads": grads, "state": end.state_dict(), "eval": end.eval()(x[:2], x[:2]).detach()}


CASES: list[dict[str, Any]] = [
    {"relu": True},
    {"relu": False},
    {"relu": True, "momentum": None},
    {"relu": True, "affine": False},
]


@pytest.mark.parametrize("sum_too", [True, False], ids=["added", "alone"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_it_is_batch_norm_sum_and_relu(case: dict[str, Any], sum_too: bool) -> None:
    """Values, gradients, running statistics, the names of the state, and eval mode."""
    plain = End(6, **case).double()
    x, added, weights = images(4, 6), images(4, 6, 1) - 5 if sum_too else None, torch.linspace(-1, 2, 4).double()
    ours, theirs = train(plain.fused(), x, added, weights), train(plain, x, added, weights)
    assert list(ours["state"]) == list(theirs["state"])
    assert float(theirs["x"].abs().max()) > 0.01
    assert_same(ours, theirs)
    assert ours["y"].is_contiguous(memory_format=torch.channels_last)


def test_gradients_by_finite_differences() -> None:
    for relu in (True, False):
        end = End(3, relu).double().fused()
        x, added = images(2, 3).requires_grad_(), (images(2, 3, 1) - 5).requires_grad_()
        assert torch.autograd.gradcheck(lambda x, added, end=end: end(x, added), (x, added))
        assert torch.autograd.gradcheck(end, (x,))


@pytest.mark.parametrize("shape", [(9, 4), (3, 4, 2, 5), (3, 4, 6)], ids=str)
def test_other_layouts_and_numbers_of_dimensions(shape: tuple[int, ...]) -> None:
    """As they come from a linear layer, or not channels last; and a gradient that is expanded."""
    norm, plain = fused(nn.BatchNorm2d(4), relu=True), GlobalBatchNorm(4)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(3)).requires_grad_()
    ours, theirs = norm(x), plain(x).relu()
    torch.testing.assert_close(ours, theirs)
    grads = [torch.autograd.grad(y.flatten(1).mean(1).sum() + y.sum() * x.detach().sum(), x)[0] for y in (ours, theirs)]
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-5)


# --------------------------------------------------------------------------------------------------------------- ranks


def train_on_ranks(sizes: list[int]) -> list[dict[str, Any]]:
    own = slice(sum(sizes[: dist.rank()]), sum(sizes[: dist.rank() + 1]))
    weights = torch.linspace(-1, 2, sum(sizes), dtype=torch.float64)[own]
    found = []
    for case in CASES:
        for added in (images(sum(sizes), 6, 1)[own] - 5, None):
            found.append(train(End(6, **case).double().fused(), images(sum(sizes), 6)[own], added, weights))
    return found


@pytest.mark.parametrize("sizes", [[3, 3], [5, 2, 1, 4]], ids=str)
def test_ranks_equal_one_rank_with_the_whole_batch(on_ranks: Ranks, sizes: list[int]) -> None:
    world, whole = len(sizes), images(sum(sizes), 6)
    answers = on_ranks(world, train_on_ranks, sizes)
    plain = [(case, added) for case in CASES for added in (images(sum(sizes), 6, 1) - 5, None)]
    for at, (case, added) in enumerate(plain):
        ranks = [answer[at] for answer in answers]
        one = train(End(6, **case).double(), whole, added, torch.linspace(-1, 2, sum(sizes), dtype=torch.float64))
        assert_same(torch.cat([r["y"] for r in ranks]), one["y"])
        # Autograd differentiates the sum of the ranks' equal losses: W times the gradient, as barlow.dist explains.
        assert_same(torch.cat([r["x"] for r in ranks]) / world, one["x"])
        if added is not None:
            assert_same(torch.cat([r["added"] for r in ranks]) / world, one["added"])
        for name, expected in one["grads"].items():
            assert_same(sum(r["grads"][name] for r in ranks) / world, expected)
        for rank in ranks:
            assert_same(rank["state"], one["state"])


def kinds_on_ranks() -> list[str]:
    model = nn.Sequential(fuse(small("resnet10t")), nn.BatchNorm1d(4))
    return [type(module).__name__ for module in synchronise(model).modules() if "Norm" in type(module).__name__]


def test_the_other_norms_are_synchronised_beside_them(on_ranks: Ranks) -> None:
    for kinds in on_ranks(2, kinds_on_ranks):
        assert kinds[-1] == "GlobalBatchNorm"
        assert set(kinds[:-1]) == {"FusedNorm"}


# ------------------------------------------------------------------------------------------------------------ networks


def small(name: str, width: float = 0.125) -> nn.Module:
    torch.manual_seed(0)
    model = backbone.build(config.Model(backbone=name, stem="imagenet", width=width))
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):  # a block's last weights begin at zero: nothing would be seen of them
            nn.init.uniform_(module.weight, 0.5, 1.5)
    return model.to(memory_format=torch.channels_last)


@pytest.mark.parametrize("name", ["resnet18", "resnet10t", "resnet50", "resnet26d"])
def test_a_network_is_the_same_network_in_fewer_passes(name: str) -> None:
    """In float64, basic blocks and bottlenecks, plain and deep stems; its state fits both ways."""
    plain = small(name).double()
    model = fuse(copy.deepcopy(plain))
    x = torch.randn(6, 3, 40, 40, dtype=torch.float64).to(memory_format=torch.channels_last)
    ends = []
    for each in (model, plain):
        y = each(x)
        (y * torch.linspace(-1, 1, y.numel()).view_as(y)).sum().backward()
        ends.append([y.detach(), {name: p.grad for name, p in each.named_parameters()}, each.state_dict()])
    assert list(ends[0][2]) == list(ends[1][2])
    assert [p.shape for p in model.parameters()] == [p.shape for p in plain.parameters()]
    torch.testing.assert_close(*ends, rtol=1e-7, atol=1e-7)
    assert not [m for m in model.modules() if isinstance(m, nn.ReLU)]
    assert all(isinstance(m, FusedNorm) for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm))
    model.load_state_dict(plain.state_dict())
    assert torch.equal(model.eval()(x), plain.eval()(x))


def test_autocast_rounds_once() -> None:
    """Activations in bfloat16, weights and statistics in float32; no further from float32 than torch's operations."""
    plain, x = End(16, relu=True), images(8, 16, dtype=torch.float32)
    added = images(8, 16, 1, torch.float32) - 5
    exact = plain(x.bfloat16().float(), added.bfloat16().float())
    with torch.autocast("cpu", torch.bfloat16):
        ours, theirs = (end(x.bfloat16(), added.bfloat16()) for end in (plain.fused(), plain))
    assert ours.dtype == theirs.dtype == torch.bfloat16
    off, off_too = ((y.float() - exact).abs().mean() for y in (ours, theirs))
    assert off < off_too
    torch.testing.assert_close(ours.float(), exact, rtol=2**-8, atol=1e-6)

    plain_network = small("resnet18")
    pictures = torch.randn(32, 3, 64, 64, generator=torch.Generator().manual_seed(2))
    grads = {}
    for name, network in (("fused", fuse(small("resnet18"))), ("plain", plain_network), ("float32", plain_network)):
        network.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=name != "float32"):
            y = network(pictures.to(memory_format=torch.channels_last))
        y.float().square().mean().backward()
        grads[name] = torch.cat([p.grad.flatten() for p in network.parameters() if p.grad is not None])
    off, off_too = (1 - F.cosine_similarity(grads[name], grads["float32"], dim=0) for name in ("fused", "plain"))
    assert off < 2 * off_too < 0.2


def test_networks_of_timm_and_other_heads_are_left_as_they_are() -> None:
    theirs = timm.create_model("resnet18", num_classes=0)
    before = [type(module) for module in theirs.modules()]
    assert [type(module) for module in fuse(theirs).modules()] == before
    model = nn.Sequential(small("resnet10t"), nn.BatchNorm1d(4), nn.ReLU())
    fuse(model)
    assert [type(part) for part in model[1:]] == [nn.BatchNorm1d, nn.ReLU]


def test_how_norms_are_made_is_one_line() -> None:
    assert way(CPU, "auto") == "batch norms by torch's operations"
    assert way(CPU, "reference") == "batch norms by torch's operations (as asked)"
    with pytest.raises(UserError, match=r"^--speed.norms fused: there is no kernel here \(not on a GPU\); give auto"):
        way(CPU, "fused")


def test_norms_are_fused_where_that_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    model, theirs = small("resnet10t"), timm.create_model("resnet10t", num_classes=0)
    for by in ("auto", "reference"):
        assert choose_norms(model, CPU, by).startswith("batch norms by torch's operations")
    with pytest.raises(UserError, match="no kernel here"):
        choose_norms(model, CPU, "fused")
    assert not any(isinstance(module, FusedNorm) for module in model.modules())
    monkeypatch.setattr(kernels, "why_not", lambda name, device: "")
    assert choose_norms(model, CPU, "fused") == "batch norms by our CUDA kernel"
    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    assert len(norms) > 10
    assert all(isinstance(module, FusedNorm) for module in norms)
    assert choose_norms(theirs, CPU, "fused").startswith("batch norms by torch's operations (ours fuse only")


# ------------------------------------------------------------------------------------- the operators, and what compiles


def operands(dtype: torch.dtype, device: torch.device = CPU) -> dict[str, Tensor]:
    x, grad, added = (images(4, 8, seed, dtype).to(device) for seed in range(3))
    moments = torch.ops.barlow.norm_moments(x)
    return {"x": x, "grad": grad, "added": added, "moments": moments, "weight": torch.randn(8, device=device)}


def calls(o: dict[str, Tensor]) -> list[tuple[Any, tuple[Any, ...]]]:
    ops: Any = torch.ops.barlow
    x, grad, moments, weight = o["x"], o["grad"], o["moments"], o["weight"]
    sums = moments.new_ones(2, 8)
    return [
        (ops.norm_moments, (x,)),
        (ops.norm_merge, (torch.stack([moments, moments + 1]),)),
        (ops.norm_apply, (x, o["added"], moments, weight, None, 1e-5, True)),
        (ops.norm_apply, (x, None, moments, None, weight, 1e-5, False)),
        (ops.norm_sums, (grad, x, moments, weight, weight, 1e-5, True)),
        (ops.norm_masked_sums, (grad, x, o["added"], moments, 1e-5)),
        (ops.norm_gradient, (grad, x, moments, sums, weight, weight, 1e-5, True)),
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_what_the_operators_say_of_their_results_is_so(dtype: torch.dtype) -> None:
    """Shapes, dtypes and strides, by which compiled code reads them; and nothing is changed or handed through."""
    for operator, arguments in calls(operands(dtype)):
        torch.library.opcheck(operator.default, arguments, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_in_one_piece_it_is_what_it_was(backend: str) -> None:
    """Forward, backward and running statistics of a block's end, twice; nothing breaks the graph."""
    torch.compiler.reset()
    ends = []
    for compiled in (True, False):
        end = End(8, relu=True).fused()
        call: Any = torch.compile(end, backend=backend, fullgraph=True, dynamic=False) if compiled else end
        for step in range(2):
            x, added = (images(4, 8, 2 * step + k, torch.float32).requires_grad_() for k in range(2))
            y = call(x, added)
            (y * torch.arange(8.0)[:, None, None]).square().sum().backward()
        grads = [x.grad, added.grad, *(p.grad for p in end.parameters())]
        ends.append([y.detach(), *grads, *end.state_dict().values()])
    torch.testing.assert_close(*ends, rtol=1e-5, atol=1e-4)


def compiled_on_ranks() -> list[list[Tensor]]:
    own = slice(3 * dist.rank(), 3 * dist.rank() + 3)
    weights = torch.linspace(-1, 2, 6)[own]
    ends = []
    for compiled in (True, False):
        end: Any = End(6, relu=True).fused()
        call = torch.compile(end, fullgraph=True, dynamic=False) if compiled else end
        x = images(6, 6, 0, torch.float32)[own].requires_grad_()
        y = call(x, images(6, 6, 1, torch.float32)[own] - 5)
        dist.all_reduce_sum((weights[:, None] * y.flatten(1).square()).sum()).backward()
        assert x.grad is not None
        ends.append([y.detach(), x.grad, *(p.grad for p in end.parameters()), *end.state_dict().values()])
    return ends


@pytest.mark.slow
def test_compiled_among_ranks_its_collectives_are_in_the_one_piece(on_ranks: Ranks) -> None:
    for fast, eager in on_ranks(2, compiled_on_ranks, timeout=280):
        torch.testing.assert_close(fast, eager, rtol=1e-5, atol=1e-5)


# ------------------------------------------------------------------------------------------------------- with kernels


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_operators_take_the_kernels_where_they_load(
    emulated: Callable[..., OnCpu], monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    """Emulated, on the CPU: what each gives is what its definition gives."""
    o, on_cpu = operands(dtype), emulated("norm", "shuffled")
    sought = [operator(*arguments) for operator, arguments in calls(o)]
    monkeypatch.setattr(kernels, "load", lambda name, device: on_cpu)
    found = [operator(*arguments) for operator, arguments in calls(o)]
    assert {name.split("_")[1] for name in on_cpu.launches} == {"moments", "merge", "apply", "sums", "gradient"}
    for ours, theirs in zip(found, sought, strict=True):
        rtol = 2**-7 if dtype == torch.bfloat16 else 1e-5
        torch.testing.assert_close(ours, theirs, rtol=rtol, atol=2e-5)
        pairs = zip(*((each if isinstance(each, tuple) else (each,)) for each in (ours, theirs)), strict=True)
        assert all(a.stride() == b.stride() for a, b in pairs)
    launches = len(on_cpu.launches)
    norm_ops._moments(images(2, 8))  # float64 is not theirs
    assert len(on_cpu.launches) == launches


def test_a_network_with_the_kernels_trains_as_without(
    emulated: Callable[..., OnCpu], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The loss of a few steps, and the weights at their end."""

    def trained(model: nn.Module) -> list[float]:
        torch.manual_seed(1)
        optimizer, losses = torch.optim.SGD(model.parameters(), lr=0.05), []
        for _ in range(3):
            y = model(torch.randn(6, 3, 32, 32).to(memory_format=torch.channels_last))
            loss = (y - y.detach().mean(0)).square().mean() + (y.mean() - 1).square()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        return [*losses, *(p.sum().item() for p in model.parameters())]

    plain = small("resnet10t")
    sought = trained(copy.deepcopy(plain))
    on_cpu = emulated("norm")
    monkeypatch.setattr(kernels, "load", lambda name, device: on_cpu)
    torch.testing.assert_close(trained(fuse(plain)), sought, rtol=1e-3, atol=1e-3)
    assert on_cpu.launches


@pytest.mark.parametrize("device", [pytest.param(torch.device("cuda", 0), marks=gpu)])
def test_on_a_gpu(device: torch.device) -> None:
    """bfloat16 with the kernels, eager and compiled in CUDA graphs, is as near to float32 as without them; and nothing
    waits for the GPU."""
    assert way(device, "fused") == "batch norms by our CUDA kernel"
    plain = small("resnet50", 0.5).to(device)
    x = torch.randn(64, 3, 96, 96, generator=torch.Generator().manual_seed(1))
    x = x.to(device, memory_format=torch.channels_last)
    ours = fuse(copy.deepcopy(plain))
    options: Any = {"triton.cudagraphs": True}
    compiled: Any = torch.compile(copy.deepcopy(ours), fullgraph=True, dynamic=False, options=options)
    grads: dict[str, Tensor] = {}
    for name, model in (("float32", plain), ("plain", plain), ("fused", ours), ("compiled", compiled)):
        for _ in range(3):
            torch.compiler.cudagraph_mark_step_begin()
            model.zero_grad()
            with torch.autocast("cuda", torch.bfloat16, enabled=name != "float32"):
                y = model(x)
            y.float().square().mean().backward()
        grads[name] = torch.cat([p.grad.flatten().float() for p in model.parameters() if p.grad is not None]).clone()
    off = {name: 1 - F.cosine_similarity(grad, grads["float32"], dim=0).item() for name, grad in grads.items()}
    assert max(off["fused"], off["compiled"]) < 2 * off["plain"] + 0.01, off
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.autocast("cuda", torch.bfloat16):
            ours(x).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
