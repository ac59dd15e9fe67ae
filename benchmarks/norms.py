"""What do batch norms with their ReLU and sum take: our kernels, torch's operations, and what inductor makes of these?

    python benchmarks/norms.py [--quick]

Forward and backward of each different norm of WRN-50-2 (96 px, small stem, 512 images, channels last, bfloat16), in
turns, each in a CUDA graph of its own, as training has it; `times` is how often one view's pass has such a norm, and
`whole network` the sum of all. than_bound: beside a copy of as many bytes as must move while the statistics stand
between two readings of x. On a GPU not timed yet. On a CPU there is no kernel: timed are torch's operations, and the
operators' definition in float32, with one thread, on an eighth of a small network; that tells nothing of a GPU.

A second table counts the bytes that a step (two views) moves around batch norm, of each way and of what has not been
built, from shapes alone: no measurement. Fifteen seconds on a CPU; --quick a few, and writes no file.
"""

from __future__ import annotations

import collections
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from barlow import config, kernels
from barlow.models import backbone
from barlow.models.fused_norm import FusedNorm, fused
from barlow.models.resnet import fuse
from measure import Row, asked, device, in_turns, ratio, report, significant, spread

Kind = Literal["relu", "sum, relu", "plain"]
Run = Callable[[], object]
WRN = config.Model(backbone="wide_resnet50_2", stem="small")
TINY = config.Model(backbone="resnet50", stem="small", width=0.25)
COPY = 4.23e12  # bytes a second, read and written, that an H200 copies

# How often a tensor of x's size is read or written around a norm, forward and backward. The gradient of a sum comes
# from the next block in two parts, whose addition counts (for the last block too, where it is not needed).
# torch: statistics, norm, sum, ReLU, and their gradients, one after the other.
# inductor, as its rules of fusion would have it: the mask of ReLU is read from y, the norm of a shortcut is made within
# the sum, and two gradients are added as they are read.
# epilogue: the convolution before the norm leaves the moments; the one that makes the gradient leaves the sums.
# recomputed: in backward y is made again for the convolution that has not kept it.
PASSES: Mapping[str, Mapping[Kind, tuple[int, int]]] = {
    "torch, one by one": {"relu": (5, 8), "sum, relu": (8, 11), "plain": (3, 5)},
    "inductor": {"relu": (3, 7), "sum, relu": (4, 8), "plain": (1, 5)},
    "ours": {"relu": (3, 5), "sum, relu": (4, 10), "plain": (3, 5)},
    "ours, y recomputed": {"relu": (3, 7), "sum, relu": (4, 10), "plain": (3, 5)},
    "ours, two gradients read as one": {"relu": (3, 5), "sum, relu": (4, 8), "plain": (3, 5)},
    "the same, moments in an epilogue": {"relu": (2, 5), "sum, relu": (3, 8), "plain": (2, 5)},
    "the same, sums in an epilogue too": {"relu": (2, 4), "sum, relu": (3, 6), "plain": (2, 5)},
}
ALONE = {"relu": 8, "sum, relu": 11, "plain": 8}  # of ours, where one gradient comes in


@dataclass(frozen=True)
class End:
    """A norm of the network, and what comes with it."""

    kind: Kind
    channels: int
    side: int

    def bytes(self, batch: int, dtype: torch.dtype) -> int:
        return batch * self.side**2 * self.channels * dtype.itemsize


def main(quick: bool) -> None:
    torch.set_num_threads(1)  # of the CPU: on busy cores, two threads mostly wait for each other
    on_gpu = device().type == "cuda"
    if why := kernels.why_not("norm", device()):
        print(f"without our kernels ({why}): their definition in torch's operations takes their place")
    batch, ends = (512, ends_of(WRN, 96)) if on_gpu else (8 if quick else 64, ends_of(TINY, 32 if quick else 96))
    report("norms", compare(ends, batch, quick, on_gpu), quick)
    report("norms_bytes", counted(ends_of(WRN, 96), 512, views=2), quick)


def ends_of(model: config.Model, size: int) -> dict[End, int]:
    """Each different norm of the network, and how often it has it: from shapes, without arithmetic."""
    found: collections.Counter[End] = collections.Counter()

    def note(norm: nn.Module, given: tuple[Tensor, ...]) -> None:
        assert isinstance(norm, FusedNorm)
        kind: Kind = "plain" if not norm.relu else "relu" if len(given) == 1 else "sum, relu"
        found[End(kind, norm.num_features, given[0].shape[-1])] += 1

    with torch.device("meta"):
        net = fuse(backbone.build(model)).eval()
        for module in net.modules():
            if isinstance(module, FusedNorm):
                module.register_forward_pre_hook(note)
        net(torch.empty(1, 3, size, size))
    return dict(found)


def counted(ends: Mapping[End, int], batch: int, views: int) -> list[Row]:
    """Gigabytes a step by each way; `stored` is what backward has been left, x and y each where it is not the other."""
    rows: list[Row] = []
    least = 0.0
    for way, passes in PASSES.items():
        forward, backward, stored = 0.0, 0.0, 0.0
        for end, times in ends.items():
            size = views * times * end.bytes(batch, torch.bfloat16) / 1e9
            forward += size * passes[end.kind][0]
            backward += size * passes[end.kind][1]
            stored += size * (1 + (end.kind != "plain") - (end.kind == "relu" and "recomputed" in way))
        least = least or forward + backward
        rows.append(
            {"way": way, "forward_GB": significant(forward), "backward_GB": significant(backward)}
            | {"ms_at_copy_speed": significant((forward + backward) * 1e12 / COPY)}
            | {"of_torch": significant((forward + backward) / least), "stored_GB": significant(stored)}
        )
    return rows


def compare(ends: Mapping[End, int], batch: int, quick: bool, on_gpu: bool) -> list[Row]:
    rows: list[Row] = []
    whole: dict[str, list[float]] = {}
    rounds, calls = (2, 1) if quick else (10, 10) if on_gpu else (5, 1)
    for end, times in ends.items():
        seconds = in_turns(runs_of(end, batch, on_gpu), rounds, calls)
        for way, taken in seconds.items():
            about: Row = {"norm": end.kind, "channels": end.channels, "side": end.side, "times": times}
            rows.append(about | {"way": way, **spread(taken), "than_bound": ratio(taken, seconds["copy"])})
            before = whole.get(way, [0.0] * rounds)
            whole[way] = [a + times * b for a, b in zip(before, taken, strict=True)]
    about = {"norm": "whole network", "channels": "", "side": "", "times": 1}
    for way, taken in whole.items():
        rows.append(about | {"way": way, **spread(taken), "than_bound": ratio(taken, whole["copy"])})
    return rows


def runs_of(end: End, batch: int, on_gpu: bool) -> dict[str, Run]:
    dtype = torch.bfloat16 if on_gpu else torch.float32
    made = torch.Generator(device()).manual_seed(0)
    shape = (batch, end.side, end.side, end.channels)
    x, added, grad = (
        torch.randn(shape, generator=made, device=device()).to(dtype).permute(0, 3, 1, 2) for _ in range(3)
    )
    given = [x.requires_grad_()] + ([added.requires_grad_()] if end.kind == "sum, relu" else [])
    plain = nn.BatchNorm2d(end.channels, device=device())
    ours = fused(plain, end.kind != "plain")
    everything = [*given, *plain.parameters()]

    def by_torch(x: Tensor, added: Tensor | None = None) -> Tensor:
        y: Tensor = plain(x)
        if added is not None:
            y += added
        return y if end.kind == "plain" else y.relu_()

    def both_ways(call: Callable[..., Tensor]) -> Run:
        return lambda: torch.autograd.grad(call(*given), everything, grad)

    runs = {"torch": both_ways(by_torch)}
    if on_gpu:
        torch.compiler.reset()  # what was compiled for another shape would be made general
        runs["inductor"] = both_ways(torch.compile(by_torch, dynamic=False))
    runs["ours" if kernels.load("norm", device()) else "ours, by definition"] = both_ways(ours)
    if on_gpu:
        runs = {name: replayed(run) for name, run in runs.items()}
    source = torch.zeros(ALONE[end.kind] * end.bytes(batch, dtype) // 2, dtype=torch.uint8)
    source, target = source.to(device()), source.to(device(), copy=True)
    return runs | {"copy": lambda: target.copy_(source)}


def replayed(run: Run) -> Run:
    """In a CUDA graph: what is timed is the GPU, not Python."""
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        for _ in range(3):  # compiles, and what is made once is made
            run()
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = run()

    def replay() -> object:
        graph.replay()
        return kept

    return replay


if __name__ == "__main__":
    main(asked(__doc__).parse_args().quick)
