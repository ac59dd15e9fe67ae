"""What memory does a run take: a rank by phase, its loader, its caches, its saves, and a step on the GPU?

    python benchmarks/memory.py [--quick]

Host: what a rank holds while it starts and trains, alone and beside others (Pss shares what several map), against the
minimal script of ImageFolder, DataLoader and timm with its workers; what our loader takes for the batches it works on,
against a DataLoader with as many workers; what a save takes beside the state. The step: peak GPU memory by loss form,
precision and batch, compiled and not, and the largest batch that fits; without a GPU the bytes that autograd keeps for
the backward pass. What is compiled runs without CUDA graphs here: a replay takes its memory past the allocator, which
then knows no peak. Four minutes on two cores; not timed on a GPU yet."""

from __future__ import annotations

import gc
import itertools
import json
import multiprocessing
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from barlow.config import Pretrain, Speed
from barlow.data.cache import cached
from barlow.data.loader import Loader
from barlow.data.shards import read_index
from barlow.engine import speed
from barlow.engine.checkpoint import Checkpoints
from barlow.recipes import PRETRAIN
from barlow.stages import pretrain as stage
from barlow.stages.training import with_state
from measure import ROOT, Row, asked, device, report, significant
from phases import megabytes
from reference_recipe import as_trained
from startup import HERE, SAME, launch, make_images
from step import compiles, fresh

MB = 2**20
WORKERS = 2
OURS = "--model.backbone resnet18 --model.projector 512 512 --batch-size 16 --device cpu"


def main() -> None:
    given = asked(__doc__).parse_args()
    torch.set_num_threads(2)
    with tempfile.TemporaryDirectory(prefix="memory-") as folder:
        make_images(Path(folder), 512 if given.quick else 2048)
        rows = [*of_ranks(Path(folder), given.quick), *of_loaders(Path(folder), given.quick)]
        rows += of_a_save(Path(folder), given.quick)
    rows += of_steps(given.quick)
    report("memory", rows, given.quick, ("torchvision", "timm"))


def of_ranks(folder: Path, quick: bool) -> Iterator[Row]:
    """Rank 0 by phase; then what all processes take together."""
    for ranks in (1,) if quick else (1, 2, 4):
        runs = folder / "runs"
        flags = [*SAME.split(), *OURS.split(), "--data.dir", str(folder / "shards"), "--runs-dir", str(runs)]
        launch([*flags, "--run", f"of-{ranks}", "--nodes", str(ranks)], PHASES_MEMORY="1", OMP_NUM_THREADS="1")
        told = [json.loads(file.read_text()) for file in sorted((runs / f"of-{ranks}").glob("phases_*.jsonl"))]
        what = f"{ranks} of our ranks" if ranks > 1 else "our rank"
        if ranks == 1:
            yield from (
                {"what": what, "when": phase, **columns(held)}
                for phase, held in told[0]["held"].items()
                if phase != "rest"
            )
        else:
            yield {"what": what, "when": "a later step", **summed([each["held"]["a later step"] for each in told])}
    if quick:
        return
    pipe = subprocess.PIPE
    words = [sys.executable, str(HERE / "minimal.py"), str(folder / "images" / "train"), "16", "resnet18"]
    with subprocess.Popen(words, cwd=ROOT, stdin=pipe, stdout=pipe, text=True) as script:
        assert script.stdout is not None
        assert script.stdin is not None
        for _ in range(3):
            script.stdout.readline()
            script.stdin.write("\n")
            script.stdin.flush()
        found = [megabytes(process) for process in [script.pid, *children(script.pid)]]
        script.communicate()
    yield {"what": "timm, ImageFolder, 2 workers", "when": "a later step", **summed(found)}


def columns(held: dict[str, float]) -> Row:
    return {f"{name.lower()}_mb": round(value) for name, value in held.items()}


def summed(held: list[dict[str, float]]) -> Row:
    return columns({name: sum(each[name] for each in held) for name in held[0]})


def children(process: int) -> list[int]:
    return [int(number) for number in Path(f"/proc/{process}/task/{process}/children").read_text().split()]


def of_loaders(folder: Path, quick: bool) -> Iterator[Row]:
    """Beyond what the process held before, at most: ours, ours from memory, a DataLoader with as many workers."""
    index, batch = read_index(folder / "shards"), 64 if quick else 256
    loader = Loader(index, ("train",), workers=WORKERS)
    chance = np.random.default_rng(0)
    batches = [chance.permutation(len(loader))[:batch] for _ in range(8)]

    def read(source: Any) -> None:
        for _ in source.batches(iter(batches)):
            pass

    megapixels = round(batch * index.size**2 * 3 / MB, 1)
    told = f"{WORKERS} threads, batches of {megapixels} MB"
    yield {"what": "our loader", "when": told, **beyond(lambda: read(loader))}
    images = []
    keep: Callable[[], None] = lambda: images.append(cached(loader, "ram", torch.device("cpu"), 2**40, lambda *_: None))  # noqa: E731
    whole = round(len(loader) * index.size**2 * 3 / MB, 1)
    yield {"what": "our loader", "when": f"filling a cache of {whole} MB", **beyond(keep)}
    yield {"what": "our loader", "when": f"from it, batches of {megapixels} MB", **beyond(lambda: read(images[0]))}

    if device().type == "cuda":
        yield from on_gpu(Loader(index, ("train",), workers=WORKERS, pin=True), read, f"batches of {megapixels} MB")
    yield of_data_loader(folder, batch, megapixels)


def on_gpu(loader: Loader, read: Callable[[Any], None], told: str) -> Iterator[Row]:
    """Pinned memory of the loader, which torch keeps for later use; GPU memory of the cache."""
    torch.cuda.reset_peak_host_memory_stats()
    read(loader)
    pinned = torch.cuda.host_memory_stats()["allocated_bytes.peak"]
    yield {"what": "our loader", "when": f"pinned, {told}", "beyond_mb": round(pinned / MB, 1)}
    before = torch.cuda.memory_allocated()
    cache = cached(loader, "gpu", device(), 0, lambda *_: None)
    taken = torch.cuda.memory_allocated() - before
    yield {
        "what": "our loader",
        "when": f"a cache of {len(cache)} images on the GPU",
        "beyond_mb": round(taken / MB, 1),
    }


def of_data_loader(folder: Path, batch: int, megapixels: float) -> Row:
    """Its workers too: their share of what they have in common with this process counts once."""
    from torchvision.datasets import ImageFolder
    from torchvision.transforms import v2

    pixels = v2.Compose([v2.PILToTensor()])
    given = ImageFolder(str(folder / "images" / "train"), pixels)
    before = megabytes()["Pss"]
    source = torch.utils.data.DataLoader(given, batch, num_workers=WORKERS, persistent_workers=True)
    most = 0.0
    for _ in itertools.islice(source, 4):
        workers = [megabytes(worker.pid or 0)["Pss"] for worker in multiprocessing.active_children()]
        most = max(most, megabytes()["Pss"] + sum(workers) - before)
    return {
        "what": "DataLoader, PIL",
        "when": f"{WORKERS} workers, batches of {megapixels} MB",
        "beyond_mb": round(most),
    }


def beyond(work: Callable[[], object]) -> Row:
    """The most that `work` had of this process's memory beyond what there was before, and what it left."""
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the mark of the most so far
    before = status("VmRSS")
    work()
    return {"beyond_mb": round(status("VmHWM") - before, 1), "left_mb": round(status("VmRSS") - before, 1)}


def status(name: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(float(line.split()[1]) / 1024 for line in lines if line.startswith(name))


def config_of(quick: bool, **objective: Any) -> Pretrain:
    large = device().type == "cuda" and not quick
    base = PRETRAIN["cifar10"]
    widths = (8192,) * 3 if large else (256,) * 2 if quick else (2048,) * 3
    name, width = ("wide_resnet50_2", 1.0) if large else ("resnet18", 0.25 if quick else 1.0)
    model = replace(base.model, backbone=name, stem="small", projector=widths, width=width)
    return replace(base, model=model, objective=replace(base.objective, **objective))


def of_a_save(folder: Path, quick: bool) -> Iterator[Row]:
    objective = stage.build(config_of(quick), torch.device("cpu"))
    optimizer = stage.Lars(stage.weights_and_biases(objective))
    state = {"model": objective.state_dict(), "optimizer": with_state(optimizer, ["momentum"])}
    (folder / "checkpoints").mkdir()
    checkpoints = Checkpoints(folder / "checkpoints", 1)
    own = round(2 * sum(p.nbytes for p in objective.parameters()) / MB, 1)

    def save() -> None:
        checkpoints.prepare(state)
        checkpoints.save(1, state)
        checkpoints.finish()

    yield {"what": "a save", "when": f"of a state of {own} MB", **beyond(save)}


def of_steps(quick: bool) -> Iterator[Row]:
    """Forms, precisions, batches."""
    gpu = device().type == "cuda"
    ways = (False, True) if gpu and compiles() else (False,)
    batches = (32,) if quick else (128, 256, 512, 1024) if gpu else (32, 64, 128)
    for form, bf16, compiled in itertools.product(("dxd", "nxn"), (True, False), ways):
        name = f"a step, {form}, {'bf16' if bf16 else 'float32'}{', compiled' if compiled else ''}"
        for batch in batches:
            yield {
                "what": name,
                "when": f"batch {batch}",
                **Step(config_of(quick, form=form), bf16, compiled).taken(batch),
            }
        if gpu and not compiled:  # each batch would be compiled anew
            most = largest(Step(config_of(quick, form=form), bf16, compiled).fits)
            yield {"what": name, "when": "the largest batch that fits", "batch": most}


class Step:
    """Loss, backward and update of one rank, on images that lie there."""

    def __init__(self, config: Pretrain, bf16: bool, compiled: bool) -> None:
        self.at, self.bf16, self.size = device(), bf16, 96 if device().type == "cuda" else 32
        fresh()  # what another one has left would count
        self.objective = stage.build(config, self.at)
        self.call: Any = self.objective
        if compiled:
            self.kept = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)  # it may still be written
            knobs = Speed(compile="on", graphs="off")
            self.call = speed.compiled(self.objective, knobs, self.at, Path(self.kept.name), print)
        self.optimizer = stage.Lars(stage.weights_and_biases(self.objective))
        self.own = {p.untyped_storage().data_ptr() for p in self.objective.parameters()}

    @as_trained
    def run(self, batch: int) -> int:
        """Bytes that autograd keeps for the backward pass, of what is not a parameter; each storage once."""
        kept: dict[int, int] = {}

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        views = [torch.rand(batch, 3, self.size, self.size, device=self.at) for _ in range(2)]
        views = [view.to(memory_format=torch.channels_last) for view in views]
        with torch.autocast(self.at.type, torch.bfloat16, enabled=self.bf16):
            if self.at.type == "cuda":  # where the peak is known; hooks would keep it from being compiled
                loss, _ = self.call(views)
            else:
                with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
                    loss, _ = self.call(views)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return sum(size for address, size in kept.items() if address not in self.own)

    def taken(self, batch: int) -> Row:
        """On a GPU the peak, weights, momentum and gradients included, once all is compiled; or that there is none."""
        if self.at.type == "cpu":
            return {"kept_mb": significant(self.run(batch) / MB)}
        try:
            self.run(batch)  # compiles, and makes the momenta
            self.empty()
            torch.cuda.reset_peak_memory_stats()
            self.run(batch)
        except torch.OutOfMemoryError:
            return {"peak_mb": "out of memory"}
        finally:
            self.empty()
        peak, reserved = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
        return {"peak_mb": significant(peak / MB), "reserved_mb": significant(reserved / MB)}

    def fits(self, batch: int) -> bool:
        try:
            self.run(batch)
        except torch.OutOfMemoryError:
            return False
        finally:
            self.empty()
        return True

    def empty(self) -> None:
        """Lets go of all that is not weights and momenta."""
        self.optimizer.zero_grad(set_to_none=True)
        gc.collect()
        torch.cuda.empty_cache()


def largest(fits: Callable[[int], bool], step: int = 64, most: int = 1 << 16) -> int:
    """The largest multiple of `step` that fits: doubled until one does not, then halved into."""
    good, bad = 0, step
    while bad <= most and fits(bad):
        good, bad = bad, 2 * bad
    while bad - good > step:
        middle = (good + bad) // 2 // step * step
        good, bad = (middle, bad) if fits(middle) else (good, middle)
    return good


if __name__ == "__main__":
    main()
