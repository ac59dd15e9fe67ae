"""What does a step of LARS take, beside the same step by others, and beside copying as many bytes?

    python benchmarks/lars.py [--quick]

All step the same tensors with a momentum of their own, in turns. The bound is a copy that moves 28 bytes a parameter,
as LARS must in float32: weights and gradients are read for the norms; weights, gradients and momenta are read again,
and weights and momenta written. On a GPU, the parameters of WRN-50-2 and of ResNet-34 with their projectors, not
timed yet; on a CPU, where there are no kernels of ours, those of ResNet-18 with one thread, one minute. `host` is what
Python takes for a step of the fused LARS if nothing is launched.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from barlow import config, kernels
from barlow.models import backbone, heads
from barlow.optim import apex
from barlow.optim.fused import Fused
from barlow.optim.groups import weights_and_biases
from barlow.optim.lars import Lars, reference_step
from measure import Row, asked, device, in_turns, peer, ratio, report, spread

LARGE = config.Model(backbone="wide_resnet50_2", stem="small", projector=(8192, 8192, 8192))
MEDIUM = config.Model(backbone="resnet34", stem="dense", projector=(1024, 1024, 1024))
SMALL = config.Model(backbone="resnet18", stem="small", projector=(512, 512))
TINY = config.Model(backbone="resnet18", stem="small", projector=(64, 64), width=0.25)
OPTIONS: dict[str, Any] = {"lr": 1e-4, "weight_decay": 1e-6, "momentum": 0.9}
Groups = list[dict[str, Any]]
Run = Callable[[], object]


def main(quick: bool) -> None:
    on_gpu = device().type == "cuda"
    if not on_gpu:
        torch.set_num_threads(1)  # on a machine that others use, two wait for one another
    models = [TINY] if quick else [MEDIUM, LARGE] if on_gpu else [SMALL]
    rows = [row for model in models for row in compare(model, quick, on_gpu)]
    rows += [host(model, 20 if quick else 1000) for model in (MEDIUM, LARGE)]
    report("lars", rows, quick, packages=("timm", "apex"))


def compare(model: config.Model, quick: bool, on_gpu: bool) -> list[Row]:
    groups = shapes_of(model)
    name = name_of(model, groups)
    for group in groups:
        group["params"] = [filled(p.shape) for p in group["params"]]
    runs = contestants(groups)
    rounds, calls = (2, 1) if quick else (20, 10) if on_gpu else (25, 1)
    seconds = in_turns(runs, rounds, calls)
    bound = seconds["copy of 28 bytes"]
    return [
        {"set": name, "step": run, **spread(found), "than_bound": ratio(found, bound)} for run, found in seconds.items()
    ]


def shapes_of(model: config.Model) -> Groups:
    """The parameters of backbone and projector, in the groups of training, without memory."""
    with torch.device("meta"):
        body = backbone.build(model)
        net = nn.Sequential(body, heads.projector(int(body.num_features), model.projector))  # type: ignore[arg-type]
    return weights_and_biases(net)


def name_of(model: config.Model, groups: Groups) -> str:
    params: list[Tensor] = [p for group in groups for p in group["params"]]
    return f"{model.backbone}, {sum(p.numel() for p in params) / 1e6:.1f} M in {len(params)} tensors"


def filled(shape: torch.Size) -> Tensor:
    """With a gradient, as training has them; the values do not matter."""

    def drawn() -> Tensor:
        tensor = torch.randn(shape, device=device()).mul_(0.02)
        return tensor.to(memory_format=torch.channels_last) if tensor.ndim == 4 else tensor

    p = nn.Parameter(drawn())
    p.grad = drawn()
    return p


def contestants(groups: Groups) -> dict[str, Run]:
    runs: dict[str, Run] = {}
    if found := kernels.load("lars", device()):
        runs["fused"] = Lars(anew(groups), **OPTIONS, backend="fused").step
        runs["fused, in a CUDA graph"] = replayed(Lars(anew(groups), **OPTIONS, backend="fused"))
        for size in (4096, 8192, 16384, 32768, 65536):
            runs[f"fused, chunks of {size}"] = in_chunks(Lars(anew(groups), **OPTIONS), Fused(found, size))
    if device().type == "cuda" and apex.load():
        runs["apex"] = Lars(anew(groups), **OPTIONS, backend="apex").step
    runs["foreach"] = Lars(anew(groups), **OPTIONS, backend="foreach").step
    runs["loop"] = loop(groups)
    if timm := peer("timm.optim"):
        params = [{"params": group["params"]} for group in groups]
        runs["timm"] = timm.Lars(params, **OPTIONS).step
    params = [{"params": group["params"]} for group in groups]
    runs["torch's fused SGD, no norms"] = torch.optim.SGD(params, **OPTIONS, fused=True).step
    count = sum(p.numel() for group in groups for p in group["params"])
    source = torch.zeros(14 * count, dtype=torch.uint8, device=device())
    target = torch.zeros_like(source)
    runs["copy of 28 bytes"] = lambda: target.copy_(source)
    return runs


def anew(groups: Groups) -> Groups:
    """The same tensors in groups that another optimizer may fill with its options."""
    return [dict(group) for group in groups]


def replayed(optimizer: Lars) -> Run:
    optimizer.step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        optimizer.step()
    kept = optimizer  # the graph uses its momenta

    def replay() -> Lars:
        graph.replay()
        return kept

    return replay


def in_chunks(optimizer: Lars, fused: Fused) -> Run:
    optimizer._fused = fused
    return optimizer.step


def loop(groups: Groups) -> Run:
    """Tensor by tensor, as the reference implementation of Barlow Twins writes it."""
    optimizer = Lars(anew(groups), **OPTIONS)
    momenta = [[torch.zeros_like(p) for p in group["params"]] for group in groups]

    @torch.no_grad()
    def step() -> None:
        for group, mus in zip(optimizer.param_groups, momenta, strict=True):
            reference_step(group["params"], [p.grad for p in group["params"]], mus, group)

    return step


class Silent:
    """Kernels that launch nothing, on tensors that are on a CPU."""

    device = torch.device("cpu")

    def launch(self, name: str, grid: int, block: int, shared: int, *arguments: Any) -> None:
        pass


def host(model: config.Model, steps: int) -> Row:
    """Python's part of a step: as many tensors of as many dimensions, small and on the CPU."""
    groups = shapes_of(model)
    small: Groups = []
    for group in groups:
        params = [nn.Parameter(torch.ones([min(n, 2) for n in p.shape])) for p in group["params"]]
        small.append({**group, "params": params})
    optimizer = Lars(small, **OPTIONS)
    optimizer._fused = Fused(Silent())
    for group in small:
        for p in group["params"]:
            p.grad = torch.ones_like(p)
    optimizer.step()  # which finds out what there is to step
    seconds = []
    for _ in range(steps):
        began = time.perf_counter()
        optimizer.step()
        seconds.append(time.perf_counter() - began)
    return {"set": name_of(model, groups), "step": "host", **spread(seconds), "than_bound": ""}


if __name__ == "__main__":
    main(asked(__doc__).parse_args().quick)
