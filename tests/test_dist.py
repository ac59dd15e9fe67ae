"""The reductions and their gradients, on real gloo ranks."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from barlow import dist

Ranks = Callable[..., list[Any]]


def part(rank: int) -> Tensor:
    """A rank's [2, 3] part: all numbers differ, over ranks too."""
    return torch.arange(6, dtype=torch.float64).reshape(2, 3) + 10.0 * rank


def differentiate(reduce: Callable[[Tensor], Tensor], weight: Tensor) -> tuple[Tensor, Tensor]:
    """Reduction of this rank's part, and the gradient of sum(weight * reduction^2) with respect to the part."""
    x = part(dist.rank()).requires_grad_()
    y = reduce(x.t()).t() if reduce is not dist.gather else reduce(x)  # a transposed tensor: not contiguous
    (weight * y.square()).sum().backward()
    assert x.grad is not None
    assert torch.equal(x, part(dist.rank()))  # reduced out of place
    return y.detach(), x.grad


def reductions() -> dict[str, Any]:
    rank, world_size = dist.rank(), dist.world_size()
    own = torch.tensor(float(rank + 1), dtype=torch.float64)  # each rank weighs the result differently
    one = torch.tensor(1.0, dtype=torch.float64)
    dist.barrier()
    return {
        "rank": (rank, world_size, dist.local_rank()),
        "sum": differentiate(dist.all_reduce_sum, own),
        "replicated": differentiate(dist.replicated_sum, one),
        "replicated by the general form": differentiate(dist.all_reduce_sum, one),
        "gather": differentiate(dist.gather, own),
        "gather of integers": dist.gather(torch.tensor([rank, rank * 10])),
        "gather of bfloat16": dist.gather(torch.tensor([rank, 1.5], dtype=torch.bfloat16)),
        "highest": (dist.highest(int(rank == 1)), dist.highest(0), dist.highest(rank - 9)),
        "broadcast": dist.broadcast({"from": rank, "list": [1, 2]}),
    }


def gatherings() -> list[Tensor]:
    """Three under way at once, other collectives between them, waited for in another order."""
    rank = dist.rank()
    x = (part(rank).bfloat16(), part(rank).requires_grad_().t(), torch.tensor([rank]))
    begun = [dist.Gathering(each) for each in x]
    total = dist.all_reduce_sum(torch.tensor([1.0]))
    arrived = [each.rows() for each in reversed(begun)]
    assert not any(rows.requires_grad for rows in arrived)
    assert dist.bulk() is not None
    return [*reversed(arrived), total]


@pytest.mark.parametrize("world_size", [2, 4])
def test_what_is_gathered_in_the_background(on_ranks: Ranks, world_size: int) -> None:
    parts = [part(r) for r in range(world_size)]
    for narrow, transposed, ranks, total in on_ranks(world_size, gatherings):
        assert torch.equal(narrow, torch.cat(parts).bfloat16())
        assert torch.equal(transposed, torch.cat([each.t() for each in parts]))
        assert ranks.tolist() == list(range(world_size))
        assert float(total) == world_size


@pytest.mark.parametrize("world_size", [2, 4])
def test_reductions_and_their_gradients(on_ranks: Ranks, world_size: int) -> None:
    answers = on_ranks(world_size, reductions)
    parts = [part(r) for r in range(world_size)]
    total, whole = torch.stack(parts).sum(0), torch.cat(parts)
    weights = range(1, world_size + 1)
    for r, answer in enumerate(answers):
        assert answer["rank"] == (r, world_size, r)
        # The losses of all ranks together are sum_r w_r y^2, so the gradient of any part is 2 y sum_r w_r.
        value, grad = answer["sum"]
        assert torch.equal(value, total)
        assert torch.equal(grad, 2 * total * sum(weights))
        for name in ("replicated", "replicated by the general form"):
            value, grad = answer[name]
            assert torch.equal(value, total)
            assert torch.equal(grad, 2 * total * world_size)
        value, grad = answer["gather"]
        assert torch.equal(value, whole)
        assert torch.equal(grad, 2 * parts[r] * sum(weights))
        assert answer["gather of integers"].tolist() == [v for q in range(world_size) for v in (q, q * 10)]
        assert answer["gather of bfloat16"].tolist() == [v for q in range(world_size) for v in (q, 1.5)]
        assert answer["highest"] == (1, 0, world_size - 10)
        assert answer["broadcast"] == {"from": 0, "list": [1, 2]}


def test_alone_there_is_no_group_and_nothing_happens(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    dist.init(torch.device("cpu"))
    assert not torch.distributed.is_initialized()
    monkeypatch.setenv("WORLD_SIZE", "1")
    dist.init(torch.device("cpu"))
    assert not torch.distributed.is_initialized()
    assert (dist.rank(), dist.world_size(), dist.local_rank()) == (0, 1, 0)
    x = part(0)
    assert dist.all_reduce_sum(x) is x
    assert dist.replicated_sum(x) is x
    assert dist.gather(x) is x
    assert dist.highest(3) == 3
    assert dist.bulk() is None
    assert dist.broadcast("word") == "word"
    dist.barrier()
    dist.shutdown()


def fail_on_rank_1() -> None:
    if dist.rank() == 1:
        raise ArithmeticError("the first house")
    dist.barrier()  # would wait for rank 1 for ever


def sum_of(x: Tensor) -> Tensor:
    return dist.all_reduce_sum(x)


def interface() -> str | None:
    return os.environ.get("GLOO_SOCKET_IFNAME")


def test_a_failing_rank_ends_the_others_and_is_shown(on_ranks: Ranks) -> None:
    with pytest.raises(pytest.fail.Exception, match=r"rank 1:(.|\n)*ArithmeticError: the first house"):
        on_ranks(2, fail_on_rank_1, timeout=20)
    # and the next group is not harmed
    assert [float(y) for y in on_ranks(2, sum_of, torch.tensor(1.5))] == [3.0, 3.0]


def test_gloo_takes_the_interface_that_reaches_the_first_rank(on_ranks: Ranks) -> None:
    assert set(on_ranks(2, interface)) == {"lo"}
    assert dist._interface_towards("no-such-host.invalid") is None
    assert dist._interface_towards(socket.gethostname()) != "lo"  # a name that others can use is not the loopback


def test_a_machine_known_as_loopback_to_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    ways = {"first": "127.0.1.1", "192.0.2.1": "10.0.0.7"}
    monkeypatch.setattr(dist, "_address_towards", lambda host: ways.get(host))
    monkeypatch.setattr(dist, "_interfaces", lambda: {"127.0.0.1": "lo", "10.0.0.5": "eth0", "10.0.0.7": "ib0"})
    assert dist._interface_towards("first") == "ib0"
    ways.pop("192.0.2.1")  # a cluster without a way out
    assert dist._interface_towards("first") == "eth0"
    monkeypatch.setattr(dist, "_interfaces", lambda: {"127.0.0.1": "lo"})
    assert dist._interface_towards("first") == "lo"
