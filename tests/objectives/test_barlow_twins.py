"""The loss against the paper's formula, its invariances, its precision, and W ranks against one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from barlow import config, dist
from barlow.models.norm import synchronise
from barlow.objectives.barlow_twins import BarlowTwins, Form, barlow_twins_loss, cheaper, gathering

Ranks = Callable[..., list[Any]]
FORMS: tuple[Form, ...] = ("dxd", "nxn")
each_form = pytest.mark.parametrize("form", FORMS)


def paper(z_a: Tensor, z_b: Tensor, lambd: float, scale: float, eps: float = 0.0) -> Tensor:
    """Equations 1 and 2 of the paper, element by element of C; eps as the reference's batch norm adds it."""
    n, d = z_a.shape
    a, b = z_a - z_a.mean(0), z_b - z_b.mean(0)
    loss = z_a.new_zeros(())
    for i in range(d):
        for j in range(d):
            norms = (a[:, i].square().sum() + n * eps).sqrt() * (b[:, j].square().sum() + n * eps).sqrt()
            c_ij = (a[:, i] * b[:, j]).sum() / norms
            loss = loss + ((1 - c_ij) ** 2 if i == j else lambd * c_ij**2)
    return scale * loss


def pair(n: int, d: int, seed: int = 0, correlation: float = 0.7) -> tuple[Tensor, Tensor]:
    """Embeddings [n, d] of two views: correlated, and with another mean and size in every dimension."""
    chance = torch.Generator().manual_seed(seed)
    a, noise = torch.randn(2, n, d, dtype=torch.float64, generator=chance)
    size, mean = torch.randn(2, d, dtype=torch.float64, generator=chance)
    b = correlation * a + (1 - correlation) * noise
    return (a * (0.5 + size.abs()) + mean), (b * (1.5 + size.abs()) - mean)


def with_gradients(loss: Callable[..., Tensor], z_a: Tensor, z_b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    z_a, z_b = z_a.clone().requires_grad_(), z_b.clone().requires_grad_()
    value = loss(z_a, z_b)
    value.backward()
    assert z_a.grad is not None
    assert z_b.grad is not None
    return value.detach(), z_a.grad, z_b.grad


def assert_same(actual: Any, expected: Any, tolerance: float = 1e-10) -> None:
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


@each_form
@pytest.mark.parametrize(("n", "d"), [(12, 5), (5, 12), (2, 3), (7, 7)])
def test_value_and_gradient_are_the_paper_s(form: Form, n: int, d: int) -> None:
    lambd, scale = 0.03, 0.7
    ours = with_gradients(lambda a, b: barlow_twins_loss(a, b, lambd, scale, form)[0], *pair(n, d))
    assert_same(ours, with_gradients(lambda a, b: paper(a, b, lambd, scale, eps=1e-5), *pair(n, d)))
    # The paper has no eps; embeddings of a large size make it vanish.
    large_a, large_b = (1e5 * z for z in pair(n, d))
    assert_same(barlow_twins_loss(large_a, large_b, lambd, scale, form)[0], paper(large_a, large_b, lambd, scale))


@each_form
def test_gradient_by_finite_differences(form: Form) -> None:
    z_a, z_b = (z.requires_grad_() for z in pair(4, 5))
    assert torch.autograd.gradcheck(lambda a, b: barlow_twins_loss(a, b, 0.1, 2.0, form)[0], (z_a, z_b))


@each_form
def test_invariances(form: Form) -> None:
    z_a, z_b = (1e3 * z for z in pair(10, 6))  # large, so that eps does not tell scales apart

    def loss(a: Tensor, b: Tensor) -> Tensor:
        return barlow_twins_loss(a, b, 0.2, 1.0, form)[0]

    value, chance = loss(z_a, z_b), torch.Generator().manual_seed(1)
    stretch = 1 + torch.rand(6, dtype=torch.float64, generator=chance)
    assert_same(loss(z_a * stretch + 7, z_b / stretch - 3), value, 1e-8)  # an affine map of each dimension
    assert_same(loss(-z_a, -z_b), value)
    assert_same(loss(z_b, z_a), value)
    order, dims = torch.randperm(10, generator=chance), torch.randperm(6, generator=chance)
    assert_same(loss(z_a[order], z_b[order]), value)
    assert_same(loss(z_a[:, dims], z_b[:, dims]), value)
    # and it is not blind to what matters: which samples, and which dimensions, belong together
    assert float((loss(z_a[order], z_b) - value).abs()) > 0.1
    assert float((loss(z_a[:, dims], z_b) - value).abs()) > 0.1


@each_form
def test_known_values(form: Form) -> None:
    orthogonal = [[1, 1, 1], [1, -1, -1], [-1, 1, -1], [-1, -1, 1]]  # its columns are
    basis = 1e3 * torch.tensor(orthogonal, dtype=torch.float64)
    _, metrics = barlow_twins_loss(basis, basis, 0.5, 1.0, form)
    assert_same((metrics["on_diagonal"], metrics["off_diagonal"]), (basis.new_zeros(()),) * 2, 1e-9)
    loss, metrics = barlow_twins_loss(basis, -basis, 0.5, 3.0, form)  # C = -I
    assert_same(metrics["on_diagonal"], basis.new_tensor(12.0), 1e-8)
    assert_same(loss, basis.new_tensor(36.0), 1e-8)
    same = basis[:, :1].expand(4, 3)  # all dimensions alike: C is all ones
    loss, metrics = barlow_twins_loss(same, same, 0.5, 1.0, form)
    assert_same(metrics["off_diagonal"], basis.new_tensor(6.0), 1e-8)
    assert_same(loss, basis.new_tensor(3.0), 1e-8)
    assert not any(value.requires_grad for value in metrics.values())


@each_form
def test_collapsed_dimensions_give_no_nan(form: Form) -> None:
    z_a, z_b = pair(6, 4)
    z_a[:, 2] = 5.0
    value, grad_a, grad_b = with_gradients(lambda a, b: barlow_twins_loss(a, b, 0.1, 1.0, form)[0], z_a, z_b)
    assert bool(torch.isfinite(torch.cat([value[None], grad_a.flatten(), grad_b.flatten()])).all())


@pytest.mark.parametrize(
    ("form", "n", "d"), [("nxn", 64, 1024), ("nxn", 128, 128), ("dxd", 64, 1024), ("dxd", 64, 128), ("dxd", 256, 64)]
)
def test_float32_keeps_its_digits(form: Form, n: int, d: int) -> None:
    """The N x N form takes the diagonal from ||C||^2: with views alike, where the most is cancelled, 1e-5 stays."""
    for correlation in (0.0, 0.9, 1.0):
        z_a, z_b = pair(n, d, correlation=correlation)
        exact = barlow_twins_loss(z_a, z_b, 0.0051, 1.0, "dxd")[1]
        single = barlow_twins_loss(z_a.float(), z_b.float(), 0.0051, 1.0, form)[1]
        error = float((single["off_diagonal"].double() / exact["off_diagonal"] - 1).abs())
        assert error < 1e-5, (correlation, error)
        assert float((single["on_diagonal"].double() - exact["on_diagonal"]).abs()) < 1e-5 * d


@each_form
def test_bfloat16_products_stay_near_and_sums_stay_float32(form: Form) -> None:
    z_a, z_b = (z.bfloat16() for z in pair(64, 256, correlation=0.9))
    exact = with_gradients(lambda a, b: barlow_twins_loss(a, b, 0.0051, 1.0, "dxd")[0], z_a.double(), z_b.double())
    with torch.autocast("cpu", torch.bfloat16):
        ours = with_gradients(lambda a, b: barlow_twins_loss(a, b, 0.0051, 1.0, form)[0], z_a, z_b)
        single = barlow_twins_loss(z_a.float(), z_b.float(), 0.0051, 1.0, form)[0]
    assert ours[0].dtype == single.dtype == torch.float32
    assert float((ours[0] / exact[0] - 1).abs()) < 5e-3
    for grad, expected in zip(ours[1:], exact[1:], strict=True):
        assert grad.dtype == torch.bfloat16
        cosine = torch.cosine_similarity(grad.double().flatten(), expected.flatten(), dim=0)
        assert float(cosine) > 0.999
    # float32 embeddings are multiplied in float32 even under autocast
    plain = barlow_twins_loss(z_a.float(), z_b.float(), 0.0051, 1.0, form)[0]
    assert torch.equal(single, plain)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@each_form
def test_on_a_gpu_it_is_the_same_loss(form: Form) -> None:
    z_a, z_b = (z.bfloat16() for z in pair(64, 256, correlation=0.9))
    exact = with_gradients(lambda a, b: barlow_twins_loss(a, b, 0.0051, 1.0, "dxd")[0], z_a.double(), z_b.double())
    ours = with_gradients(lambda a, b: barlow_twins_loss(a, b, 0.0051, 1.0, form)[0], z_a.cuda(), z_b.cuda())
    assert float((ours[0].cpu() / exact[0] - 1).abs()) < 5e-3
    for grad, expected in zip(ours[1:], exact[1:], strict=True):
        assert float(torch.cosine_similarity(grad.cpu().double().flatten(), expected.flatten(), dim=0)) > 0.999


def test_auto_takes_the_cheaper_form(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[Form] = []
    for form in FORMS:
        monkeypatch.setattr(f"barlow.objectives.barlow_twins._{form}", spy(form, taken))
    for n, d in [(3, 8), (6, 8), (7, 8)]:
        barlow_twins_loss(*pair(n, d))
    assert taken == ["nxn", "nxn", "dxd"]


def forms_of_a_rank() -> tuple[list[Form], list[bool]]:
    """What a global batch of 6, 8 and 10 takes at D = 8, and whether its embeddings are gathered ahead."""
    ahead = [gathering(torch.zeros(total // 2, 8), "auto") for total in (6, 8, 10)]
    for each in ahead:
        assert each is None or each.rows().shape[1] == 8
    return [cheaper(total, 8) for total in (6, 8, 10)], [each is not None for each in ahead]


def test_among_ranks_auto_counts_what_is_sent(on_ranks: Ranks) -> None:
    assert on_ranks(2, forms_of_a_rank) == [(["nxn", "nxn", "dxd"], [True, True, False])] * 2
    assert [cheaper(total, 8) for total in (6, 8, 10)] == ["nxn", "dxd", "dxd"]  # alone
    assert gathering(torch.zeros(2, 8), "nxn") is None


def spy(form: Form, taken: list[Form]) -> Callable[..., tuple[Tensor, Tensor]]:
    def record(*_: Any) -> tuple[Tensor, Tensor]:
        taken.append(form)
        return torch.zeros(2), torch.zeros(())

    return record


class Tiny(nn.Module):
    """A backbone with batch norm: [n, 3, h, w] -> [n, 6]."""

    num_features = 6

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(3, 5, 3, stride=2), nn.BatchNorm2d(5), nn.ReLU(), nn.Flatten())
        self.last = nn.Linear(5 * 2 * 2, 6)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.last(self.layers(x))
        return y


def views(n: int = 8) -> list[Tensor]:
    chance = torch.Generator().manual_seed(5)
    image = torch.randn(n, 3, 6, 6, dtype=torch.float64, generator=chance)
    return [image + 0.3 * torch.randn(image.shape, dtype=torch.float64, generator=chance) for _ in range(2)]


def objective(form: Form, widths: tuple[int, ...]) -> BarlowTwins:
    torch.manual_seed(0)
    return BarlowTwins(Tiny(), config.BarlowTwins(lambd=0.1, scale=0.5, form=form), widths).double()


def train(form: Form, widths: tuple[int, ...]) -> dict[str, Any]:
    """Three steps of gradient descent on this rank's part, and the gradient with respect to raw embeddings."""
    rank, n = dist.rank(), 8 // dist.world_size()
    own = slice(rank * n, (rank + 1) * n)
    model: nn.Module = synchronise(objective(form, widths))
    if dist.world_size() > 1:
        model = DistributedDataParallel(model, broadcast_buffers=False)
    parameters = dict(model.named_parameters())
    losses = []
    for _ in range(3):
        model.zero_grad()
        loss, metrics = model([view[own] for view in views()])
        loss.backward()
        losses.append(torch.stack([loss.detach(), metrics["on_diagonal"], metrics["off_diagonal"]]))
        with torch.no_grad():
            for p in parameters.values():
                assert p.grad is not None
                p.sub_(0.05 * p.grad)
    z_a, z_b = (z[own] for z in pair(8, widths[-1]))
    _, *raw = with_gradients(lambda a, b: barlow_twins_loss(a, b, 0.1, 0.5, form)[0], z_a, z_b)
    return {
        "losses": losses,
        "grads": {name.removeprefix("module."): p.grad for name, p in parameters.items()},
        "raw": raw,
        "state": {name.removeprefix("module."): value for name, value in model.state_dict().items()},
    }


CASES: list[tuple[Form, tuple[int, ...]]] = [("dxd", (9, 5)), ("nxn", (9, 5)), ("nxn", (7, 16)), ("auto", (16,))]


def test_in_backward_the_projector_is_done_before_a_backbone_begins() -> None:
    """Its gradients, most of all bytes, can then be reduced meanwhile."""
    model, done, begun = objective("auto", (9, 5)), list[str](), list[int]()
    for name, parameter in model.named_parameters():
        parameter.register_post_accumulate_grad_hook(lambda _, name=name: done.append(name.split(".")[0]))
    model.backbone.register_full_backward_pre_hook(lambda *_: begun.append(len(done)))
    model(views())[0].backward()
    projector = len(list(model.projector.parameters()))
    assert done == ["projector"] * projector + ["backbone"] * (len(done) - projector)
    assert begun == [projector, projector]


def test_alone_the_step_compiles_whole() -> None:
    """No break in the graph, and the same numbers. The backend only traces: what is compiled well is another matter."""
    for form in FORMS:
        model = objective(form, (9, 5))
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        found = [torch.autograd.grad(call(views())[0], list(model.parameters())) for call in (model, compiled)]
        assert_same(found[0], found[1])


def bfloat16_losses() -> dict[Form, tuple[Tensor, ...]]:
    """Value and gradients on this rank's part of a bfloat16 batch, as under autocast; divided by W as DDP does."""
    own = slice(dist.rank() * 32 // dist.world_size(), (dist.rank() + 1) * 32 // dist.world_size())
    z_a, z_b = (z.bfloat16()[own] for z in pair(32, 64, correlation=0.9))
    found: dict[Form, tuple[Tensor, ...]] = {}
    for form in FORMS:
        value, *grads = with_gradients(lambda a, b, f=form: barlow_twins_loss(a, b, 0.0051, 1.0, f)[0], z_a, z_b)
        found[form] = (value, *(grad.float() / dist.world_size() for grad in grads))
    return found


def test_ranks_equal_one_rank_in_bfloat16(on_ranks: Ranks) -> None:
    """Embeddings travel as they are, so nothing is lost on the way: all that differs is the order of sums."""
    ranks, one = on_ranks(2, bfloat16_losses), bfloat16_losses()
    for form in FORMS:
        assert ranks[0][form][0].dtype == torch.float32
        for rank in ranks:
            torch.testing.assert_close(rank[form][0], one[form][0], rtol=2e-3, atol=0.0)
        for view in (1, 2):
            whole = torch.cat([rank[form][view] for rank in ranks])
            assert float(torch.cosine_similarity(whole.flatten(), one[form][view].flatten(), dim=0)) > 0.9999


def train_cases() -> list[dict[str, Any]]:
    return [train(*case) for case in CASES]


@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_equal_one_rank(on_ranks: Ranks, world_size: int) -> None:
    answers = on_ranks(world_size, train_cases)
    for case, one in enumerate(train_cases()):
        ranks = [answer[case] for answer in answers]
        for rank in ranks:
            assert_same(rank["losses"], one["losses"])
            assert_same(rank["grads"], one["grads"])
            assert_same(rank["state"], one["state"])
        # On the embeddings themselves no average has taken the factor W of the ranks' equal losses away.
        for view in range(2):
            gathered = torch.cat([rank["raw"][view] for rank in ranks])
            assert_same(gathered / world_size, one["raw"][view])
        assert float(one["grads"]["backbone.last.weight"].abs().max()) > 1e-4
    assert_same(train_cases()[0]["losses"], train_cases()[1]["losses"])  # both forms, one loss curve
