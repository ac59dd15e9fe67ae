"""What does the Barlow Twins loss cost, in both of our forms, beside lightly's and the paper's few lines?

    python benchmarks/loss.py [--quick]

Forward and backward on embeddings [N, D] of two views, in turns: bfloat16 under autocast on a GPU, float32 and one
thread on a CPU. Memory (GPU only) is the peak beyond the embeddings and their gradients. Two minutes; the result
replaces the rows of this hardware in benchmarks/results/loss.csv. --quick: ten seconds, and writes no file.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from barlow.objectives.barlow_twins import barlow_twins_loss, cheaper
from measure import Row, asked, device, in_turns, peer, ratio, report, significant, spread

Loss = Callable[[Tensor, Tensor], Tensor]
LAMBDA = 0.0051
GPU = [(512, 8192), (1024, 8192), (2048, 8192), (4096, 8192), (6144, 8192), (8192, 8192), (1024, 1024)]
CPU = [(64, 1024), (256, 1024), (512, 1024), (768, 1024), (1024, 1024), (1536, 1024)]


def main(quick: bool) -> None:
    torch.set_num_threads(1)  # of the CPU: on busy cores, two threads mostly wait for each other
    rows: list[Row] = []
    for n, d in [(64, 512)] if quick else GPU if device().type == "cuda" else CPU:
        rows += compare(n, d, rounds=3 if quick else 15)
    report("loss", rows, quick, packages=("lightly",))


def compare(n: int, d: int, rounds: int) -> list[Row]:
    """A row for each way; `ratio` is to ours of form auto, marked by *."""
    ways: dict[str, Loss] = {
        f"ours {form}{'*' * (form == cheaper(n, d))}": partial(ours, form=form) for form in ("nxn", "dxd")
    }
    ways["the paper's lines"] = reference
    if lightly := peer("lightly.loss"):
        ways["lightly"] = lightly.BarlowTwinsLoss(lambda_param=LAMBDA)
    chance = torch.Generator(device()).manual_seed(0)
    dtype = torch.bfloat16 if device().type == "cuda" else torch.float32
    z_a, noise = torch.randn(2, n, d, generator=chance, device=device())
    views = [z.to(dtype).requires_grad_() for z in (z_a, 0.7 * z_a + 0.3 * noise)]
    runs = {name: partial(forward_and_backward, loss, *views) for name, loss in ways.items()}
    seconds = in_turns(runs, rounds, calls=10 if device().type == "cuda" else 1)
    auto = next(seconds[name] for name in ways if name.endswith("*"))
    return [
        {"N": n, "D": d, "loss": name, **spread(seconds[name]), "ratio": ratio(seconds[name], auto), **memory(run)}
        for name, run in runs.items()
    ]


def ours(z_a: Tensor, z_b: Tensor, form: str) -> Tensor:
    return barlow_twins_loss(z_a, z_b, LAMBDA, 1.0, form)[0]  # type: ignore[arg-type]


def reference(z_a: Tensor, z_b: Tensor) -> Tensor:
    """Algorithm 1 of the paper, as one writes it down: the mask makes a copy of nearly all of C."""
    n, d = z_a.shape
    a, b = (F.batch_norm(z, None, None, training=True) for z in (z_a, z_b))
    c = a.T @ b / n
    on_diagonal = (torch.diagonal(c) - 1).square().sum()
    off_diagonal = c[~torch.eye(d, dtype=torch.bool, device=c.device)].square().sum()
    return on_diagonal + LAMBDA * off_diagonal


def forward_and_backward(loss: Loss, z_a: Tensor, z_b: Tensor) -> None:
    z_a.grad = z_b.grad = None
    with torch.autocast(z_a.device.type, torch.bfloat16, enabled=z_a.dtype == torch.bfloat16):
        value = loss(z_a, z_b)
    value.backward()


def memory(run: Callable[[], None]) -> Row:
    if device().type == "cpu":
        return {}
    run()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    return {"peak_GiB": significant((torch.cuda.max_memory_allocated() - before) / 2**30)}


if __name__ == "__main__":
    main(asked(__doc__).parse_args().quick)
