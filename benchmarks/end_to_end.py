"""How fast is training, from JPEG files to weights, beside the reference recipe, and beside our step alone?

    python benchmarks/end_to_end.py [--quick] [--cores N] [--only NAME ...]

On JPEG shards and JPEG files of the same shapes (96 px, quality 95), in turns in one process: the reference recipe
(ImageFolder, PIL in a DataLoader with a worker a core, and its step: benchmarks/reference_recipe.py); ours as the stage
does it (loader or cache, feed, views, compiled step, LARS); and our step from views that lie on the device already.
A turn begins when the others' background work is over, and its clock once it has used up the batches that lay ready.
`ratio` is the rate over the reference recipe's in the same round, `of_the_step` over our bare step's; `wait` is the
share of the time in which the host waits for views, which on a CPU it makes meanwhile. --cores: only so many of the
cores are used; --only: settings whose name begins so. Two and a half minutes on two CPU cores; not timed on a GPU yet.
--quick: fifteen seconds, and writes no file.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Generator, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from barlow import config
from barlow.config import Speed
from barlow.data.cache import cached
from barlow.data.feed import feed
from barlow.data.loader import AHEAD, Batch, Loader
from barlow.data.views import pair
from barlow.engine import speed
from barlow.engine.pace import Pace, to_host
from barlow.optim.groups import weights_and_biases
from barlow.optim.lars import Lars
from loader import SPLIT, Data, cpu_seconds, prepare
from measure import Row, asked, device, ratio, report, significant, spread, timed
from reference_recipe import Pair, Step, Views, as_trained, batches
from step import CPU, GPU, QUICK, Setting, chosen, fresh, network, step_of, views_of


@dataclass
class Training:
    """`steps` steps a call; counts how long it waits for what they are given."""

    given: Iterator[Views]
    step: Callable[[Views], Tensor]
    steps: int
    ahead: int = 0
    """Batches that are made while the others have their turn."""
    waited: list[float] = field(default_factory=list)
    pace: Pace = field(default_factory=Pace)

    def __call__(self) -> None:
        self.waited.append(self.run(self.steps))

    def run(self, steps: int) -> float:
        waited = 0.0
        for _ in range(steps):
            self.pace.wait()
            began = time.perf_counter()
            views = next(self.given)
            waited += time.perf_counter() - began
            loss = self.step(views)
            to_host(loss, {})
            self.pace.enqueued(loss)
        return waited


def main(quick: bool, cores: int, only: list[str]) -> None:
    mine = sorted(os.sched_getaffinity(0))
    cores = min(cores or len(mine), len(mine))
    os.sched_setaffinity(0, mine[:cores])
    gpu = device().type == "cuda"
    torch.set_num_threads(cores if gpu else 1)  # where the CPU trains as well, the rest of it decodes
    with tempfile.TemporaryDirectory() as folder:
        for setting in chosen(QUICK if quick else GPU[:1] + GPU[-1:] if gpu else CPU, only):
            data = Data(prepare(Path(folder) / setting.name, "jpeg", 4 * setting.batch), setting.batch)
            rows = compare(setting, data, cores, quick)
            report("end_to_end", rows, quick, packages=("torchvision", "pillow", "ffcv"), part="model")


def compare(setting: Setting, data: Data, cores: int, quick: bool) -> list[Row]:
    fresh()
    gpu = device().type == "cuda"
    steps = 1 if quick else max(40, 2 * cores) if gpu else 4
    runs: dict[str, Training] = {}

    def add(name: str, given: Iterator[Views], step: Callable[[Views], Tensor], ahead: int) -> None:
        runs[name] = Training(given, step, steps, ahead)
        runs[name].run(4 if gpu else 2)  # compiles, and records CUDA graphs at the third

    add("reference recipe", by_pil(setting, data, cores), reference(setting), 2 * cores)  # each worker's two
    for cache in ("none", "ram", "gpu") if gpu else ("none", "ram"):
        name = "ours" + (f", cache {cache}" if cache != "none" else "")
        add(name, fed(setting, data, cores, cache), ours(setting, data, name), AHEAD + 1)  # the feed has one as well
    fixed = [view.to(dtype()) for view in views_of(setting)]
    add("our step alone", iter(lambda: fixed, None), ours(setting, data, "our step alone"), 0)
    seconds = in_turns(runs, rounds=2 if quick else 5)
    rows: list[Row] = []
    for name, taken in seconds.items():
        rates = spread([steps * setting.batch / value for value in taken], "images_per_sec", 1)
        row: Row = {"model": setting.name, "batch": setting.batch, "size": setting.size, "recipe": name, **rates}
        row |= {
            "ratio": ratio(seconds["reference recipe"], taken),
            "of_the_step": ratio(seconds["our step alone"], taken),
        }
        waits = [waited / value for waited, value in zip(runs[name].waited, taken, strict=True)]
        rows.append(row | {"wait": significant(sorted(waits)[len(waits) // 2])})
    for run in runs.values():
        if isinstance(run.given, Generator):
            run.given.close()
    return rows


def in_turns(runs: Mapping[str, Training], rounds: int) -> dict[str, list[float]]:
    """Seconds a turn. What works in the background also works in the turns of others: no turn begins before that is
    over, and what it has gathered is used up before the clock starts. Then batches come as fast as in a long run."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            settled()
            run.run(run.ahead)
            seconds[name].append(timed(run, calls=1))
    return seconds


def settled(patience: float = 60.0) -> None:
    """Waits until this process and its workers are idle."""
    busy, last = True, time.monotonic() + patience
    while busy and time.monotonic() < last:
        before = cpu_seconds()
        time.sleep(0.2)
        busy = cpu_seconds() - before > 0.05
    if busy:
        print("warning: a turn begins while another's batches are still made")


def dtype() -> torch.dtype:
    return torch.bfloat16 if device().type == "cuda" else torch.float32


def reference(setting: Setting) -> Step:
    objective = network(setting)
    return Step(objective.backbone, objective.projector, None, device())


def by_pil(setting: Setting, data: Data, cores: int) -> Iterator[Views]:
    look = Pair(setting.size, data.index.mean, data.index.std)
    return batches(data.files, look, setting.batch, cores, pin=device().type == "cuda")


def ours(setting: Setting, data: Data, name: str) -> Callable[[Views], Tensor]:
    """The step as stage and loop make it."""
    objective = network(setting).to(device()).to(memory_format=torch.channels_last)
    optimizer = Lars(weights_and_biases(objective), lr=0.1, weight_decay=1e-6)
    kept = data.folder / "compiled" / name
    forward: Any = speed.compiled(objective, Speed(), device(), kept, partial(print, f"{name}:"))
    return as_trained(lambda views: step_of(forward, optimizer, lambda: views))


def fed(setting: Setting, data: Data, cores: int, cache: str) -> Iterator[Views]:
    """As the stage does it: decoded by threads, views made on the device, on a GPU one batch ahead."""
    index, look = data.index, config.Views(size=setting.size)
    loader = Loader(index, [SPLIT], workers=cores, pin=device().type == "cuda")
    source = cached(loader, cache, device(), 1 << 40, lambda done, count: None)

    def make(batch: Batch, at: int) -> list[Tensor]:
        return pair(batch.images, batch.ids, look, 0, at, index.mean, index.std, dtype())

    return feed(source.batches(positions(index.split(SPLIT).count, setting.batch)), make, device(), 0)


def positions(count: int, batch: int) -> Iterator[np.ndarray]:
    """Of random batches, epoch after epoch."""
    chance = np.random.default_rng(0)
    while True:
        yield from np.split(chance.permutation(count)[: count // batch * batch], count // batch)


if __name__ == "__main__":
    parser = asked(__doc__)
    parser.add_argument("--cores", type=int, default=0, help="how many cores to use; 0: all")
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help="settings whose name begins so")
    arguments = parser.parse_args()
    main(arguments.quick, arguments.cores, arguments.only)
