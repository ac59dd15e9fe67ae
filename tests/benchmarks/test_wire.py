"""Bytes on paper against those that gloo's connections have sent, and what the model of many nodes must obey."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

from barlow import dist
from barlow.models.norm import GlobalBatchNorm
from barlow.objectives.barlow_twins import Form, barlow_twins_loss
from nodes import NETWORKS, Network, Work, exposed, step
from wire import of_batch_norms, of_loss, sent

Ranks = Callable[..., list[Any]]
N, D, CHANNELS = 16, 512, 2048
FORMS: tuple[Form, ...] = ("nxn", "dxd")


def counted(run: Callable[[], object]) -> int:
    run()
    dist.barrier()
    before = settled()
    run()
    after = settled()
    dist.barrier()  # who has finished closes its connections, and what they have sent is forgotten
    return after - before


def settled() -> int:
    """Bytes sent, once nothing more is under way: gloo's threads send on a busy machine when their turn comes."""
    before, since = sent(), time.monotonic()
    while time.monotonic() - since < 0.2:
        time.sleep(0.02)
        if (now := sent()) != before:
            before, since = now, time.monotonic()
    return before


def bytes_of_a_rank() -> dict[str, float]:
    z_a, z_b = (z.bfloat16().requires_grad_() for z in torch.randn(2, N, D))
    found: dict[str, float] = {
        form: counted(lambda form=form: barlow_twins_loss(z_a, z_b, form=form)[0].backward())  # type: ignore[misc]
        for form in FORMS
    }
    norm, x = GlobalBatchNorm(CHANNELS), torch.randn(4, CHANNELS).requires_grad_()
    found["norm"] = counted(lambda: norm(x).square().sum().backward())
    return found


@pytest.mark.parametrize("world_size", [2, 4])
def test_paper_agrees_with_the_counters(on_ranks: Ranks, world_size: int) -> None:
    for answer in on_ranks(world_size, bytes_of_a_rank):
        for form in FORMS:
            paper = of_loss(form, N, D, world_size)
            assert paper <= answer[form] < 1.03 * paper + 4000  # messages have headers
        paper = of_batch_norms([CHANNELS], world_size) / 2  # one view
        assert paper <= answer["norm"] < 1.03 * paper + 2000


def test_known_bytes() -> None:
    """N = 512, D = 8192 on 4 ranks: embeddings against C, which has 268 MB."""
    assert of_loss("nxn", 128, 8192, 4) == 2 * 3 * 128 * 8192 * 2 + 1.5 * 8193 * 4 + 1.5 * 4 * 8192 * 4
    assert of_loss("dxd", 128, 8192, 4) - 1.5 * 8192**2 * 4 == 3 * (4 * 8192 + 1) * 4 + 1.5 * 5 * 8192 * 4
    assert of_loss("nxn", 128, 8192, 1) == of_loss("dxd", 128, 8192, 1) == 0


def test_the_model_obeys_its_limits() -> None:
    work = Work(1e-4, 0.07, 60_000_000, 150_000_000, (64, 2048), 8192)
    fast, slow = NETWORKS[0], Network("slow", 1e9)
    backward = 0.03
    tail = exposed(work, backward, 4, Network("endless", 1e15), projectors_last=True)
    assert 0 < tail < 1e-3  # the last bucket is never hidden
    late = [exposed(work, backward, 4, slow, projectors_last=order) for order in (True, False)]
    assert late[0] < late[1]  # what is complete sooner is reduced sooner
    whole = 2 * 3 / 4 * 4 * 210_000_000 / slow.rate
    assert whole - backward < late[0] < whole
    rows = [step(work, 512, nodes, fast) for nodes in (1, 2, 8, 32)]
    shares = [float(str(row["efficiency"])) for row in rows]
    assert shares == sorted(shares, reverse=True)
    assert all(0 < share < 1 for share in shares)
