"""What do many nodes cost: bytes on the wire, CPU time on one to four SLURM nodes, and what hides behind backward?

    python benchmarks/scaling.py [--quick]

Four tables. `scaling_bytes`: what a rank sends in a step, on paper and by gloo (2 and 4 ranks). `scaling_overlap`: a
step whose computation is slept, so that cores do not matter, on connections that are slowed down: what each order of
forward and each queue hides. `scaling`: 1, 2 and 4 nodes of a real SLURM of CPUs, which it starts and ends, the batch
of a rank fixed; the nodes share this machine's cores, so the CPU time of an image is the figure, not the images a
second. The last is a model of 8-GPU nodes, not a measurement (nodes.py says what it assumes). Five minutes, 6 GB of
memory; the results replace the rows of this hardware in benchmarks/results/. --quick: no SLURM, little of the others.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

from barlow import config, dist
from barlow.models import backbone
from barlow.models.norm import synchronise
from barlow.objectives.barlow_twins import BarlowTwins, Form, barlow_twins_loss
from barlow.stages.pretrain import build
from barlow.stages.training import distribute
from measure import ROOT, Row, asked, in_turns, ratio, report, significant, spread
from nodes import NETWORKS, Work, step
from slurm import devcluster
from slurm.job.rank import slurm_ranks
from wire import cpu_of_threads, of_batch_norms, of_gradients, of_loss, pace, sent

CPU = torch.device("cpu")
FORMS: tuple[Form, ...] = ("nxn", "dxd")
TRAINED = config.Pretrain(
    model=config.Model(backbone="resnet18", stem="small", width=0.5, projector=(1024, 1024, 1024)),
)


def main(quick: bool) -> None:
    found = ranks(2, ["wire", "train", "overlap"] if quick else ["wire", "overlap"], quick)
    if quick:
        weak = [found["train"]]
    else:
        found["wire"] += [*ranks(4, ["wire"], quick)["wire"], *on_paper()]
        weak = weak_scaling() if shutil.which("slurmctld") else [ranks(w, ["train"], quick)["train"] for w in (1, 2, 4)]
    report("scaling_bytes", found["wire"], quick)
    report("scaling_overlap", found["overlap"], quick)
    report("scaling", [row | {"cpu_ratio": ratio_to(weak[0], row)} for row in weak], quick)
    report("a model, not a measurement: 8 GPUs a node", model(), quick=True)


def ranks(world: int, parts: Sequence[str], quick: bool, srun: bool = False) -> dict[str, Any]:
    """What rank 0 of `world` finds: processes of this file, started here or by srun, a node each."""
    command = [sys.executable, __file__, "--parts", *parts, *(["--quick"] if quick else [])]
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "rank0.json"
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "BARLOW_OUT": str(out)}
        if srun:
            subprocess.run(["srun", f"--nodes={world}", f"--ntasks={world}", *command], env=environment, check=True)
            return json.loads(out.read_text())
        shared = {"WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(20000 + os.getpid() % 10000)}
        own = [{"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(world)]
        processes = [subprocess.Popen(command, env={**environment, **shared, **each}) for each in own]
        if any([process.wait() for process in processes]):
            raise SystemExit(f"a rank of {parts} failed")
        return json.loads(out.read_text())


def as_a_rank(parts: Sequence[str], quick: bool) -> None:
    if "SLURM_PROCID" in os.environ:
        os.environ.update(slurm_ranks(os.environ))
    torch.set_num_threads(1)
    dist.init(CPU)
    found = {part: {"wire": wire, "overlap": overlap, "train": train}[part](quick) for part in parts}
    if dist.rank() == 0:
        Path(os.environ["BARLOW_OUT"]).write_text(json.dumps(found))
    dist.barrier()
    dist.shutdown()


def counted(run: Callable[[], object]) -> int:
    """Bytes that this rank sends for it."""
    run()  # connections, and what only the first call sends
    dist.barrier()
    time.sleep(0.1)
    before = sent()
    run()
    time.sleep(0.1)
    return sent() - before


def loss(z_a: Tensor, z_b: Tensor, form: Form) -> None:
    barlow_twins_loss(z_a, z_b, form=form)[0].backward()


def wire(quick: bool) -> list[Row]:
    """Of the loss alone, then of batch norms and gradients of a small network. Megabytes."""
    rows: list[Row] = []
    world, n = dist.world_size(), 512 // dist.world_size()
    for d in [1024] if quick else [1024, 2048, 4096, 8192]:
        z_a, z_b = (z.bfloat16().requires_grad_() for z in torch.randn(2, n, d))
        for form in FORMS:
            measured = counted(partial(loss, z_a, z_b, form))
            rows.append(bytes_row(f"loss {form}", n, d, world, of_loss(form, n, d, world), measured))
    views = [torch.randn(4, 3, 32, 32) for _ in range(2)]
    objective = build(TRAINED, CPU)
    channels = [module.num_features for module in objective.modules() if isinstance(module, _BatchNorm)]
    parameters = sum(p.numel() for p in objective.parameters())
    model = distribute(objective, CPU)
    assert isinstance(model, DistributedDataParallel)

    def without_reduction() -> None:
        with model.no_sync():
            model(views)[0].backward()

    norms, whole = counted(without_reduction), counted(lambda: model(views)[0].backward())
    own = norms - round(of_loss("nxn", 4, 1024, world, size=4))
    rows.append(bytes_row("batch norm", 4, 1024, world, of_batch_norms(channels, world), own))
    rows.append(bytes_row("gradients", 4, 1024, world, of_gradients(parameters, world), whole - norms))
    return rows


def bytes_row(what: str, n: int, d: int, world: int, paper: float, measured: float | None = None) -> Row:
    row: Row = {"what": what, "W": world, "n": n, "N": n * world, "D": d, "paper_MB": significant(paper / 1e6, 4)}
    if measured is None:
        return row
    return row | {"measured_MB": significant(measured / 1e6, 4), "ratio": significant(measured / paper, 4)}


def on_paper() -> list[Row]:
    """A global batch of 2048, which more and more ranks share."""
    places = [(d, world) for d in (1024, 2048, 4096, 8192) for world in (2, 8, 32, 256)]
    return [
        bytes_row(f"loss {form}", 2048 // world, d, world, of_loss(form, 2048 // world, d, world))
        for d, world in places
        for form in FORMS
    ]


class Slept(torch.autograd.Function):
    """Stands for the computation of a layer on a device of its own: it takes time, but no core."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, seconds: float) -> Tensor:
        ctx.seconds = seconds
        time.sleep(seconds)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        time.sleep(2 * ctx.seconds)
        return grad, None


class Layer(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = super().forward(Slept.apply(x, 0.005))
        return y


class Backbone(nn.Sequential):
    """Twelve layers with 30 % of the parameters; the projector below has the others, as that of a WRN-50-2 has."""

    num_features = 256

    def __init__(self) -> None:
        super().__init__(*(Layer(nn.Linear(256, 256, bias=False), nn.BatchNorm1d(256)) for _ in range(12)))


class ViewByView(BarlowTwins):
    def forward(self, views: Any) -> tuple[Tensor, dict[str, Tensor]]:
        return barlow_twins_loss(*(self.projector(self.backbone(view)) for view in views))


def overlap(quick: bool) -> list[Row]:
    """Backward sleeps 240 ms of 360 in all; the gradients of 10.6 MB take 200 ms at 52 MB/s."""
    views = [torch.randn(64, 256) for _ in range(2)]
    runs: dict[str, Callable[[], object]] = {}
    for order, kind in (("view by view", ViewByView), ("backbones, then projectors", BarlowTwins)):
        for queue in ("own", "no reduction") if quick else ("shared", "own", "no reduction"):
            model: nn.Module = synchronise(kind(Backbone(), config.BarlowTwins(), (900, 900, 900)))
            if queue != "no reduction":
                group = dist.bulk() if queue == "own" else None
                model = DistributedDataParallel(
                    model, process_group=group, broadcast_buffers=False, find_unused_parameters=True,
                    gradient_as_bucket_view=True, bucket_cap_mb=0.3,
                )  # fmt: skip
            runs[f"{order}|{queue}"] = partial(one_step, model, views)
    dist.barrier()
    pace(52_000_000)
    seconds = in_turns(runs, rounds=1 if quick else 15, warmup=1)
    bare = seconds["backbones, then projectors|no reduction"]
    return [
        {**dict(zip(("order", "queue"), name.split("|"), strict=True)), **spread(taken), "ratio": ratio(taken, bare)}
        for name, taken in seconds.items()
    ]


def one_step(model: nn.Module, views: list[Tensor]) -> None:
    model(views)[0].backward()
    for parameter in model.parameters():
        parameter.grad = None


def train(quick: bool) -> Row:
    """Forward and backward of 32 images a rank, 64 px."""
    n, steps, warmup = 32, *((1, 1) if quick else (30, 3))
    model = distribute(build(TRAINED, CPU), CPU)
    views = [torch.randn(n, 3, 64, 64).to(memory_format=torch.channels_last) for _ in range(2)]
    for _ in range(warmup):
        one_step(model, views)
    dist.barrier()
    began, cpu, network, out = time.perf_counter(), time.process_time(), cpu_of_threads("gloo"), sent()
    for _ in range(steps):
        one_step(model, views)
    wall, cpu, network = time.perf_counter() - began, time.process_time() - cpu, cpu_of_threads("gloo") - network
    return {
        "nodes": dist.world_size(),
        "n": n,
        "images_per_s": significant(n * dist.world_size() * steps / wall),
        "step_ms": significant(1e3 * wall / steps),
        "cpu_ms_an_image": significant(1e3 * cpu / steps / n),
        "gloo_share_of_cpu": significant(network / cpu),
        "sent_MB": significant((sent() - out) / steps / 1e6),
    }


def ratio_to(one: Row, row: Row) -> float:
    return significant(float(str(row["cpu_ms_an_image"])) / float(str(one["cpu_ms_an_image"])))


def weak_scaling() -> list[Row]:
    """On a SLURM of four nodes that this starts, and ends."""
    with tempfile.TemporaryDirectory() as folder:
        cluster = Path(folder) / "cluster"
        try:
            devcluster.up(cluster)
            os.environ["SLURM_CONF"] = str(cluster / "slurm.conf")
            return [ranks(world, ["train"], quick=False, srun=True)["train"] for world in (1, 2, 4)]
        finally:
            os.environ.pop("SLURM_CONF", None)
            devcluster.down(cluster)


def model() -> list[Row]:
    with torch.device("meta"):
        network = backbone.build(config.Model(backbone="wide_resnet50_2"))
        objective = BarlowTwins(network, config.BarlowTwins(), (8192, 8192, 8192))
    channels = tuple(module.num_features for module in objective.modules() if isinstance(module, _BatchNorm))
    projector = sum(p.numel() for p in objective.projector.parameters())
    share = 2 * 6 * projector / 26.7e9  # two views; forward and backward: 6 operations a parameter and image
    whole = sum(p.numel() for p in network.parameters())
    work = Work(50.5e-3 / 512, share, whole, projector, channels, 8192)
    return [step(work, n, nodes, network) for network in NETWORKS for n in (512, 128) for nodes in (1, 2, 4, 8, 32)]


if __name__ == "__main__":
    parser = asked(__doc__)
    parser.add_argument("--parts", nargs="+", choices=["wire", "overlap", "train"], help="what its ranks run")
    arguments = parser.parse_args()
    as_a_rank(arguments.parts, arguments.quick) if arguments.parts else main(arguments.quick)
