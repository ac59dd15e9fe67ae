"""FixMatch's loss against equations 3 to 5 of the paper, image by image; what counts and what does not; many ranks."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from barlow import dist
from barlow.objectives.fixmatch import Alignment, FixMatch, answers, fixmatch_loss
from barlow.stages.training import distribute

Ranks = Callable[..., list[Any]]
CLASSES = 5
KNOBS = [(0.5, 1.0, 1.0), (0.5, 0.3, 0.7), (0.3, 2.0, 2.5), (0.0, 1.0, 1.0), (0.9, 0.0, 1.0)]  # t, lambda_u, T


def drawn(n: int = 6, m: int = 14, seed: int = 0) -> list[Tensor]:
    """Logits of labelled images [n, 5], of weak and of strong views [m, 5], labels [n], true ones [m], some -1."""
    chance = torch.Generator().manual_seed(seed)
    logits, weak, strong = (2 * torch.randn(k, CLASSES, dtype=torch.float64, generator=chance) for k in (n, m, m))
    labels, truth = (torch.randint(least, CLASSES, (k,), generator=chance) for least, k in ((0, n), (-1, m)))
    return [logits, weak, strong, labels, truth]


def entropy(label: int, logits: Tensor) -> Tensor:
    """H(label, p(y | x)), the label as a distribution that is sure."""
    total = logits.exp().sum()
    return -sum((float(k == label) * (logits[k].exp() / total).log() for k in range(len(logits))), logits.new_zeros(()))


def paper(given: list[Tensor], t: float, lambda_u: float, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    """Equations 5, 3 and 4, an image at a time."""
    logits, weak, strong, labels, _ = given
    of_labelled = sum((entropy(int(y), x) for y, x in zip(labels, logits, strict=True)), logits.new_zeros(()))
    l_l, l_u = of_labelled / len(labels), logits.new_zeros(())
    for u in range(len(weak)):
        powers = [math.exp(x / temperature) for x in weak[u].tolist()]
        q = [power / sum(powers) for power in powers]
        if max(q) >= t:
            l_u = l_u + entropy(q.index(max(q)), strong[u])
    l_u = l_u / len(weak)
    return l_l + lambda_u * l_u, l_l, l_u


def ours_of(
    given: list[Tensor], t: float, lambda_u: float = 1.0, temperature: float = 1.0
) -> tuple[Tensor, dict[str, Tensor]]:
    logits, weak, strong, labels, truth = given
    return fixmatch_loss(logits, answers(weak, temperature), strong, labels, truth, t, lambda_u)


def with_gradients(loss: Callable[[list[Tensor]], Tensor], given: list[Tensor]) -> list[Tensor]:
    """The loss, and its gradients to the logits, weak ones too; zeros where there is none."""
    leaves = [x.clone().requires_grad_() for x in given[:3]]
    value = loss([*leaves, *given[3:]])
    value.backward()
    return [value.detach(), *(torch.zeros_like(x) if x.grad is None else x.grad for x in leaves)]


def assert_same(actual: Any, expected: Any, tolerance: float = 1e-12) -> None:
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(("t", "lambda_u", "temperature"), KNOBS)
def test_value_and_gradient_are_the_paper_s(t: float, lambda_u: float, temperature: float) -> None:
    for seed in range(2):
        given = drawn(seed=seed)
        ours = with_gradients(lambda g: ours_of(g, t, lambda_u, temperature)[0], given)
        assert_same(ours, with_gradients(lambda g: paper(g, t, lambda_u, temperature)[0], given))
        _, metrics = ours_of(given, t, lambda_u, temperature)
        _, l_l, l_u = paper(given, t, lambda_u, temperature)
        assert_same((metrics["loss_labelled"], metrics["loss_unlabelled"]), (l_l, l_u))


def test_an_image_counts_from_the_threshold_on_and_not_just_below() -> None:
    """The threshold is the probability itself, and its neighbours among the numbers."""
    given = drawn(m=1)
    sure = float(torch.softmax(given[1], dim=1).max())
    masks = [ours_of(given, t)[1]["mask"].item() for t in (math.nextafter(sure, 0.0), sure, math.nextafter(sure, 1.0))]
    assert masks == [100.0, 100.0, 0.0]
    given[1] = torch.tensor([[3.0, 3.0, -1e4, -1e4, -1e4]])  # float32: two halves
    assert [ours_of(given, t)[1]["mask"].item() for t in (0.5, 0.5000001)] == [100.0, 0.0]


def test_where_no_image_is_sure_the_labelled_ones_alone_are_learned_from() -> None:
    given = drawn()
    value, of_logits, of_weak, of_strong = with_gradients(lambda g: ours_of(g, 1.0)[0], given)
    assert_same(value, paper(given, 1.0, 1.0, 1.0)[1])
    assert of_strong.count_nonzero() == of_weak.count_nonzero() == 0
    assert of_logits.isfinite().all()
    assert of_logits.count_nonzero() == of_logits.numel()
    _, metrics = ours_of(given, 1.0)
    assert (metrics["loss_unlabelled"].item(), metrics["mask"].item()) == (0.0, 0.0)
    assert math.isnan(metrics["pseudo_top1"].item())  # there is nothing to be right about


def test_where_every_image_counts_none_is_left_out() -> None:
    given = drawn()
    loss, metrics = ours_of(given, 0.0, 3.0)
    logits, weak, strong, labels, _ = given
    assert_same(loss, F.cross_entropy(logits, labels) + 3 * F.cross_entropy(strong, weak.argmax(1)))
    assert metrics["mask"].item() == 100.0


def test_no_gradient_flows_through_a_pseudo_label() -> None:
    """Also where weak and strong logits are of one network: what is differentiated is the strong view's part alone."""
    given = drawn()
    of_weak = with_gradients(lambda g: ours_of(g, 0.3)[0], given)[2]
    assert of_weak.count_nonzero() == 0
    shared = given[1].clone().requires_grad_()
    ours_of([given[0], shared, shared, *given[3:]], 0.3)[0].backward()
    given[2] = given[1]
    assert_same(shared.grad, with_gradients(lambda g: paper(g, 0.3, 1.0, 1.0)[0], given)[3])


def test_a_temperature_moves_the_probability_and_never_the_answer() -> None:
    given = drawn()
    masks = {T: ours_of(given, 0.6, 1.0, T)[1]["mask"].item() for T in (0.25, 1.0, 4.0)}
    assert masks[0.25] > masks[1.0] > masks[4.0]
    sharp, flat = (ours_of(given, 0.0, 1.0, T)[0] for T in (0.25, 4.0))
    assert_same(sharp, flat)


def test_metrics_count_images_and_compare_only_where_the_truth_is_known() -> None:
    certain = 50 * torch.eye(CLASSES, dtype=torch.float64)
    unsure = torch.zeros(CLASSES, dtype=torch.float64)
    weak = torch.stack([certain[0], certain[1], certain[2], certain[3], unsure, unsure, unsure, unsure])
    truth = torch.tensor([0, 4, -1, 3, 0, 1, -1, 2])  # right, wrong, unknown, right; then those that do not count
    logits, labels = certain[[0, 1, 2, 2]], torch.tensor([0, 1, 2, 3])
    _, metrics = fixmatch_loss(logits, answers(weak), weak, labels, truth, 0.9)
    assert metrics["top1"].item() == 75.0
    assert metrics["mask"].item() == 50.0
    assert metrics["pseudo_top1"].item() == pytest.approx(200 / 3)
    nobody_knows = torch.full_like(truth, -1)
    assert math.isnan(fixmatch_loss(logits, answers(weak), weak, labels, nobody_knows, 0.9)[1]["pseudo_top1"].item())
    assert not any(value.requires_grad for value in metrics.values())
    loss = [fixmatch_loss(logits, answers(weak), weak, labels, known, 0.9)[0] for known in (truth, nobody_knows)]
    assert loss[0] == loss[1]  # true labels are counted, never learned from


def test_half_precision_logits_are_summed_in_float32() -> None:
    given = drawn()
    exact = ours_of(given, 0.5)[0]
    ours, metrics = ours_of([*(x.bfloat16() for x in given[:3]), *given[3:]], 0.5)
    assert ours.dtype == metrics["mask"].dtype == torch.float32
    assert float(ours) == pytest.approx(float(exact), rel=2e-2)


def test_aligned_answers_are_those_of_the_definition() -> None:
    """Normalise(q p / p~) of ReMixMatch (section 3.1), p the labels' frequencies, p~ the mean answer as it moves."""
    align, labels = aligned(), [1, 2, 1, 1, 3]  # so many of 8
    p = [n / 8 for n in labels]
    mean = list(p)
    for seed in range(3):
        q = torch.softmax(drawn(seed=seed)[1], dim=1)
        rows = q.tolist()
        mean = [0.6 * mean[k] + 0.4 * sum(row[k] for row in rows) / len(rows) for k in range(CLASSES)]
        weighed = [[row[k] * p[k] / mean[k] for k in range(CLASSES)] for row in rows]
        expected = [[each / sum(row) for each in row] for row in weighed]
        assert_same(align(q), torch.tensor(expected, dtype=torch.float64))
        assert_same(align.mean, torch.tensor(mean, dtype=torch.float64))


def test_alignment_gives_a_class_that_is_seldom_said_its_images_back() -> None:
    one = torch.zeros(10, 2, dtype=torch.float64)
    one[:, 0], one[5:, 1] = 1.0, 0.8  # all are taken for the first class, half of them barely
    labels, truth = torch.tensor([0, 1]), torch.tensor([0] * 5 + [1] * 5)
    align = Alignment(labels, 2, 0.0).double()
    found = [fixmatch_loss(one[:2], q, one, labels, truth, 0.0)[1] for q in (answers(one), align(answers(one)))]
    assert [metrics["pseudo_top1"].item() for metrics in found] == [50, 100]


def test_a_class_without_a_label_is_never_a_pseudo_label() -> None:
    align = Alignment(torch.tensor([0, 1]), 3, 0.5).double()
    sure_of_it = torch.tensor([[0.0, 0.0, 1.0], [0.2, 0.3, 0.5]], dtype=torch.float64)
    aligned = align(sure_of_it)
    assert aligned.isfinite().all()
    assert aligned[0].max() < 1e-9  # it counts for no class
    assert aligned[1, 2] == 0
    assert float(aligned[1].sum()) == pytest.approx(1)


class Tiny(nn.Module):
    """A classifier with batch norms, before and after its features are pooled."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten())
        self.head = nn.Sequential(nn.Linear(4 * 4, 7), nn.BatchNorm1d(7), nn.ReLU(), nn.Linear(7, CLASSES))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.backbone(x))
        return 3 * y


def images(n: int, m: int) -> list[Tensor]:
    chance = torch.Generator().manual_seed(3)
    own, weak, strong = (torch.randn(k, 3, 4, 4, dtype=torch.float64, generator=chance) for k in (n, m, m))
    *_, labels, truth = drawn(n, m, seed=1)
    return [own, labels, weak, 0.7 * weak + 0.3 * strong, truth]


def aligned(decay: float = 0.6) -> Alignment:
    return Alignment(torch.tensor([0, 1, 1, 2, 3, 4, 4, 4]), CLASSES, decay).double()


def train(threshold: float, batches: Literal["one", "two"] = "one", align: bool = False) -> dict[str, Any]:
    """Three steps of gradient descent on this rank's part of batches of 6 and 18."""
    torch.manual_seed(0)
    objective = FixMatch(Tiny().double(), threshold, 0.7, 0.9, batches, aligned() if align else None)
    model = distribute(objective, torch.device("cpu"))
    rank, world = dist.rank(), dist.world_size()
    given = [part.chunk(world)[rank] for part in images(6, 18)]
    seen = []
    for _ in range(3):
        model.zero_grad()
        loss, metrics = model(given)
        loss.backward()
        seen.append({"loss": loss.detach(), **metrics})
        grads = {name: p.grad.clone() for name, p in objective.named_parameters() if p.grad is not None}
        with torch.no_grad():
            for name, p in objective.named_parameters():
                p.sub_(0.1 * grads[name])
    return {"seen": seen, "grads": grads, "state": objective.state_dict()}


def train_cases() -> list[dict[str, Any]]:
    return [train(0.5), train(1.01), train(0.5, "two"), train(0.4, align=True)]


@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_equal_one_rank(on_ranks: Ranks, world_size: int) -> None:
    """Loss, metrics, gradients and statistics, also where the ranks have other numbers of images that count."""
    answers = on_ranks(world_size, train_cases)
    for case, one in enumerate(train_cases()):
        assert (0 < one["seen"][0]["mask"] < 100) == (case != 1)
        assert float(one["grads"]["classifier.backbone.0.weight"].abs().max()) > 1e-4
        for rank in (answer[case] for answer in answers):
            torch.testing.assert_close(rank["seen"], one["seen"], rtol=1e-10, atol=1e-10, equal_nan=True)
            assert_same(rank["grads"], one["grads"], 1e-10)
            assert_same(rank["state"], one["state"], 1e-10)


def test_all_views_go_through_the_network_at_once() -> None:
    """As one batch to its norms, in which each image keeps its place."""
    seen: list[Tensor] = []

    class Asked(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            seen.append(x)
            return x.mean((2, 3)) @ torch.eye(3, CLASSES, dtype=torch.float64)

    given = images(6, 18)
    loss, _ = FixMatch(Asked(), 0.0, 1.0, 1.0)(given)
    assert_same(seen, [torch.cat([given[0], given[2], given[3]])])
    logits, weak, strong = (Asked()(view) for view in (given[0], given[2], given[3]))
    assert_same(loss, fixmatch_loss(logits, answers(weak), strong, given[1], given[4], 0.0)[0])


def test_norms_do_not_remember_strong_views_that_go_by_themselves() -> None:
    torch.manual_seed(0)
    network, other = Tiny().double(), Tiny().double()
    other.load_state_dict(network.state_dict())
    given = images(6, 18)
    loss, _ = FixMatch(network, 0.3, 0.7, 1.0, "two")(given)
    logits, weak = other(torch.cat([given[0], given[2]])).split([6, 18])
    remembered = {name: buffer.clone() for name, buffer in other.named_buffers() if "running" in name}
    strong = other(given[3])
    assert_same(loss, fixmatch_loss(logits, answers(weak), strong, given[1], given[4], 0.3, 0.7)[0])
    now = dict(network.named_buffers())
    assert_same({name: now[name] for name in remembered}, remembered)
    assert not torch.equal(other.get_buffer("backbone.1.running_mean"), remembered["backbone.1.running_mean"])
    assert {norm.momentum for norm in network.modules() if isinstance(norm, _BatchNorm)} == {0.1}
