"""python -m barlow.stages.request RUN_FOLDER: choose the images to have labelled, as every rank runs it.

All ranks look at the images, each at its share; the first one chooses. Leaves request.csv, whole or not at all, and
results.json. Features are not kept: a run that was stopped looks again, at the same images in the same batches, so that
it chooses the same, on any number of ranks."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from barlow import config, dist, history
from barlow.config import Request
from barlow.data import staging
from barlow.data.loader import Loader
from barlow.data.shards import Index, read_index
from barlow.engine import origin
from barlow.engine.checkpoint import load, load_weights, part
from barlow.engine.journal import Journal
from barlow.engine.loop import patiently
from barlow.engine.preflight import preflight, together
from barlow.engine.record import is_file
from barlow.engine.run import load_config
from barlow.files import write_json, write_status
from barlow.labels import rules, table
from barlow.models import backbone as backbones
from barlow.stages.classifiers import answers_of, keep_answers, splits_with
from barlow.stages.outputs import outputs
from barlow.stages.training import Here, begin, checkpoint_of, enter

BATCH = 256
"""Images a rank sees at once. Always full ones: a last bit of a feature may depend on how many there are."""
BATCHES = 16
"""Of each rank, whose features are gathered at once."""
EVERY = 10.0
"""Seconds between two lines of progress."""

Tell = Callable[[int], object]  # of how much is done
Say = Callable[[str], object]


def main(run_folder: str) -> None:
    folder, began = Path(run_folder), time.perf_counter()
    config = load_config(folder, Request)
    here = enter(folder, config)
    say = voice(folder)
    index = together(lambda: read_index(config.data.dir)).normalising(config.data.mean, config.data.std)
    labels, changed = answers_of(config.labels, folder)
    known, pool = together(lambda: table.asked(replace(config, labels=labels), index))
    keep_answers(labels, folder)
    for line in changed:
        say(line)
    say(in_words(config, index, known, pool))
    if dist.rank() == 0:
        begin(folder, 0, 0 if config.rule == "random" else len(known.ids) + len(pool))
    features = None if config.rule == "random" else see(config, here, index, known, pool, say)
    tell = progress(say, "chosen", config.count)
    chosen = on_first_rank(
        lambda told: choose(config, index, pool, features, len(known.ids), told), beats(config, here), tell
    )
    if chosen is not None:
        rows, far = chosen
        patiently(lambda: write(folder, config, index, pool[rows.numpy()], far, began, say), say)
    dist.shutdown()


def see(config: Request, here: Here, index: Index, known: table.Labelled, pool: np.ndarray, say: Say) -> Tensor | None:
    """Features of what is known and of the pool, on the first rank."""
    checkpoint = together(lambda: checkpoint_of(config.from_run, here.folder))
    backbone, size = together(lambda: backbone_of(config.from_run, checkpoint))
    backbone = backbone.to(here.device).to(memory_format=torch.channels_last)  # the faster layout, on CPUs too
    ids = np.concatenate((known.ids, pool))
    splits = splits_with(index, known, config.pool)
    memory = 4 * cast(int, backbone.num_features) * len(ids) if dist.rank() == 0 and here.device.type == "cpu" else 0
    work = staging.ready(index, splits, config.data.stage, config.preflight.hashes)
    beat = beats(config, here)
    for line in preflight(config.preflight, here.folder, memory, 0, work, here.device, beat):
        say(line)
    near = staging.staged(index, splits, config.data.stage)
    pin = here.device.type == "cuda"
    loader = together(lambda: Loader(near, splits, workers=config.data.workers, pin=pin))
    tell = progress(say, "seen", len(ids), here.folder)
    return look(backbone, loader, loader.positions_of(ids), index, config.size or size, here.device, beat, tell)


def beats(config: Request, here: Here) -> Callable[[], object]:
    return lambda: here.beats.beat(0, "evaluate", config.watch.start)


def backbone_of(where: str, checkpoint: Path) -> tuple[nn.Module, int]:
    """The backbone of a run, be it self-supervised or a classifier's, in eval mode; and the side at which it sees."""
    stored = origin.config_of(where)
    network = origin.network_of(stored)
    model = config.Model(backbone=network.backbone, stem=cast(Any, network.stem), width=network.width)
    backbone = backbones.build(model)
    load_weights(backbone, part(load(checkpoint), "backbone"), str(checkpoint))
    return backbone.eval(), origin.size_of(stored)


def look(
    backbone: nn.Module,
    loader: Loader,
    positions: np.ndarray,
    index: Index,
    size: int,
    device: torch.device,
    beat: Callable[[], object],
    tell: Tell,
) -> Tensor | None:
    """Features of the images at `positions` [n], of unit length [n, d], on the first rank; the others get None.

    The last image is repeated until the ranks' batches are full: then each batch is the same whatever their number."""
    n, at_once = len(positions), BATCH * dist.world_size()
    padded = np.append(positions, np.full(-n % at_once, positions[-1]))
    kept: Tensor | None = None
    for at in range(0, n, BATCHES * at_once):
        part = padded[at : at + BATCHES * at_once]
        found = rules.unit(outputs(backbone, loader, part, index, size, device, beat, BATCH))[: n - at]
        if not found.isfinite().all():
            raise FloatingPointError("the backbone's features are not finite")
        if dist.rank() == 0:
            kept = found.new_empty(n, found.shape[1]) if kept is None else kept
            kept[at : at + len(found)] = found
        tell(at + len(found))
    return kept


def choose(
    config: Request, index: Index, pool: np.ndarray, features: Tensor | None, known: int, told: Tell
) -> tuple[Tensor, Tensor | None]:
    """Rows of the pool, the most wanted first, and their distances if the rule knows any."""
    if features is None:
        return rules.at_random(pool, config.count, config.seed), None
    labelled, others = features[:known], features[known:]
    if config.rule == "kmeans":
        return rules.farthest_from_centres(labelled, others, len(index.classes), config.count, config.seed, told)
    if config.rule == "k-centre":
        return rules.k_centre_greedy(labelled, others, config.count, told)
    return rules.typical(labelled, others, config.count, config.seed, told)


def on_first_rank(
    work: Callable[[Tell], tuple[Tensor, Tensor | None]], beat: Callable[[], object], tell: Tell
) -> tuple[Tensor, Tensor | None] | None:
    """What `work` gives, on the first rank. The others hear of it again and again, for no collective waits so long."""
    if dist.rank() > 0:
        while dist.highest(0):
            beat()
        return None

    def told(done: int) -> None:
        beat()
        tell(done)
        dist.highest(1)

    given = work(told)
    dist.highest(0)
    return given


def write(
    folder: Path,
    config: Request,
    index: Index,
    ids: np.ndarray,
    far: Tensor | None,
    began: float,
    say: Say,
) -> None:
    """The request, and what can be said of it. One that is there already may have labels in it: it is left alone."""
    labels = table.truth(index, config.pool, ids)
    path = folder / "request.csv"
    column = "spread" if config.rule == "typical" else "distance"  # of its neighbours, or to what is labelled
    if path.exists():
        say(f"{path} is there already, and stays as it is")
    else:
        columns = {} if far is None else {column: [f"{each:.6f}" for each in far.tolist()]}
        table.write_request(path, index, ids, columns, labels if config.oracle else None)
    results: dict[str, Any] = {}
    if (labels >= 0).all():
        results["classes"] = round(100 * len(np.unique(labels)) / len(index.classes), 2)  # per cent that occur
    if far is not None:
        results[f"mean_{column}"] = round(float(far.double().mean()), 6)
    results |= {"count": len(ids), "rule": config.rule, "seconds": round(time.perf_counter() - began, 1)}
    write_json(folder / "results.json", results)
    write_status(folder, state="finished", why="")
    history.note(folder, "finished")
    answered = " (answered with the shards' own labels)" if config.oracle else ""
    say(f"{len(ids):,} images to be labelled: {path}{answered}")


def in_words(config: Request, index: Index, known: table.Labelled, pool: np.ndarray) -> str:
    unanswered = f" ({known.unanswered:,} lines of its answers have no label yet)" if known.unanswered else ""
    labelled = f"{len(known.ids):,} labelled images of {len(index.classes)} classes{unanswered}"
    return f"{config.rule}: {config.count:,} of {len(pool):,} images in {' and '.join(config.pool)}, beside {labelled}"


def voice(folder: Path) -> Say:
    """Lines for people: into the rank's log, and from the first rank to the terminal."""
    log = Journal(folder / "logs" / f"rank_{dist.rank()}.log")
    prints = dist.rank() == 0 and not is_file(sys.stdout, log)  # a cluster sends stdout into this very log

    def say(line: str) -> None:
        log.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {line}\n".encode())
        if prints:
            with suppress(OSError):  # a terminal that is gone
                print(line, flush=True)

    return say


def progress(say: Say, what: str, count: int, folder: Path | None = None) -> Tell:
    """A line now and then, from the first rank; with a folder, its status knows too."""
    last = time.monotonic()

    def tell(done: int) -> None:
        nonlocal last
        if dist.rank() > 0 or (time.monotonic() - last < EVERY and done < count):
            return
        last = time.monotonic()
        say(f"{done:,} of {count:,} {what}")
        if folder is not None:
            with suppress(OSError):
                write_status(folder, step=done)

    return tell


if __name__ == "__main__":
    main(sys.argv[1])
