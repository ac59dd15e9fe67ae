"""python -m barlow.stages.pretrain RUN_FOLDER: Barlow Twins pretraining, as every rank runs it.

Takes the config from the run folder, starts from its newest good checkpoint if there is one, leaves results.json."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from barlow import dist
from barlow.config import Pretrain
from barlow.data import chance, order, staging, views
from barlow.data.feed import feed
from barlow.data.loader import Batch, Loader
from barlow.data.shards import Index, read_index
from barlow.engine import speed
from barlow.engine.checkpoint import Checkpoints, load, load_weights
from barlow.engine.loop import fit
from barlow.engine.preflight import together
from barlow.engine.record import Recorder
from barlow.engine.run import load_config
from barlow.models import backbone as backbones
from barlow.models.resnet import choose_norms
from barlow.objectives.barlow_twins import BarlowTwins
from barlow.optim.groups import weights_and_biases
from barlow.optim.lars import Lars
from barlow.optim.schedule import scaled, warmup_cosine
from barlow.stages import knn
from barlow.stages.training import (
    autocast,
    begin,
    checkpoint_of,
    described,
    distribute,
    dtype_of,
    enter,
    finish,
    hashes,
    in_words,
    kept_decoded,
    newest,
    plan_of,
    ready,
    to_the_end,
    with_state,
)


def main(run_folder: str) -> None:
    folder = Path(run_folder)
    config = load_config(folder, Pretrain)
    here = enter(folder, config)
    device, beats = here.device, here.beats
    index = together(lambda: read_index(config.data.dir)).normalising(config.data.mean, config.data.std)
    objective = build(config, device)
    norms = together(lambda: choose_norms(objective.backbone, device, config.speed.norms))
    told = ready(config, here, index, config.data.splits, config.data.stage, objective)
    near = staging.staged(index, config.data.splits, config.data.stage)
    pin = device.type == "cuda"
    loader = together(lambda: Loader(near, config.data.splits, workers=config.data.workers, pin=pin))
    used = order.limited(config.seed, len(loader), config.data.limit)
    plan = together(lambda: plan_of(config, len(used), config.batch_size, config.knn.every_epochs))

    eager = speed.why_not(config.speed, device)  # and why
    model = distribute(objective, device, compiled=not eager)
    knobs = config.optim
    optimizer = Lars(
        weights_and_biases(objective),
        weight_decay=knobs.weight_decay,
        momentum=knobs.momentum,
        eta=knobs.eta,
        clip=knobs.clip,
        backend=knobs.backend,
    )
    checkpoints = Checkpoints(folder / "checkpoints", config.checkpoint.keep, config.checkpoint.keep_every)
    if here.holding:
        checkpoints.tidy()
    start, skipped = restore(checkpoints, objective, optimizer, config, index)
    recorder = Recorder(folder, dist.rank(), plan.steps, start)
    network = f"{config.model.backbone}, {config.model.stem} stem"
    for line in (*told, *skipped, in_words(network, objective, plan, device, start, peak_rates(config)[0])):
        recorder.say(line)
    recorder.say(f"{views.way(device, config.speed.views)}, {norms}, LARS by {optimizer.backend}")
    source = kept_decoded(loader, config.data.cache, config.watch.start, here, recorder, objective)
    if dist.rank() == 0:
        begin(folder, start, plan.steps)

    def rates(at: int) -> list[float]:
        warmup, peaks = knobs.warmup_epochs * plan.steps_per_epoch, peak_rates(config)
        return [warmup_cosine(at, plan.steps, warmup, peak, peak * knobs.end_lr) for peak in peaks]

    dtype = dtype_of(config, device)
    side = config.knn.size or config.views.size
    pieces = (objective.backbone, objective.projector)
    forward = speed.compiled(model, config.speed, device, folder / "compiled", recorder.say, pieces, eager)

    def make(batch: Batch, at: int) -> list[Tensor]:
        epoch = at // plan.steps_per_epoch
        return views.pair(
            batch.images,
            batch.ids,
            config.views,
            config.seed,
            epoch,
            index.mean,
            index.std,
            dtype,
            config.speed.views,
        )

    def step(pair: list[Tensor], at: int) -> tuple[Tensor, Mapping[str, Tensor]]:
        torch.manual_seed(chance.seed_of_step(config.seed, at, dist.rank()))  # dropout has no state to be saved
        with autocast(dtype, device):
            return forward(pair)

    def state() -> dict[str, Any]:
        weights = {"model": objective.state_dict(), "optimizer": optimizer.state_dict()}
        return {**weights, **described(config, index, hashes(index, config.data.splits))}

    def evaluate() -> Iterator[tuple[str, float]]:
        return knn.evaluate(objective.backbone, index, config.knn, side, device, config.data.workers)

    positions = order.positions(
        config.seed, len(used), config.batch_size, dist.rank(), dist.world_size(), start, plan.steps
    )
    given = feed(source.batches(used[places] for places in positions), make, device, start)
    if here.holding:
        checkpoints.prepare({**state(), "optimizer": with_state(optimizer, ["momentum"])})
    with to_the_end(here, recorder, checkpoints):
        fit(
            step, given, optimizer, rates, plan, start, state, checkpoints, recorder, here.request, evaluate, beats,
        )  # fmt: skip
        beats.beat(plan.steps, "evaluate", plan.start_seconds)
        results = dict(evaluate()) if config.knn.every_epochs else {}
        if config.knn.baselines:
            beats.beat(plan.steps, "evaluate", plan.start_seconds)
            untrained = build(config, device).backbone
            results |= knn.baselines(untrained, index, config.knn, side, device, config.data.workers)
        finish(here, plan, recorder, results)
    dist.shutdown()


def peak_rates(config: Pretrain) -> tuple[float, float]:
    """Of weights and of biases: they follow the global batch, not the world size."""
    return scaled(config.optim.lr, config.batch_size), scaled(config.optim.lr_biases, config.batch_size)


def build(config: Pretrain, device: torch.device) -> BarlowTwins:
    """The network and its objective, initialised by the seed alone."""
    torch.manual_seed(config.seed)
    objective = BarlowTwins(backbones.build(config.model), config.objective, config.model.projector)
    return objective.to(device).to(memory_format=torch.channels_last)  # the faster layout, on CPUs too


def restore(
    checkpoints: Checkpoints, objective: BarlowTwins, optimizer: Lars, config: Pretrain, index: Index
) -> tuple[int, list[str]]:
    """Go on from the newest checkpoint. First start: from the seed, or with another run's weights and an optimizer of
    its own. Lines for the log beside the step."""
    stored, told = newest(checkpoints, hashes(index, config.data.splits), config.data.dir)
    if stored is None:
        if config.model.init:
            origin = checkpoint_of(config.model.init, checkpoints.folder.parent)
            load_weights(objective, together(lambda: load(origin))["model"], str(origin))
        return 0, told
    load_weights(objective, stored["model"], f"of step {stored['step']}")
    optimizer.load_state_dict(stored["optimizer"])
    return stored["step"], told


if __name__ == "__main__":
    main(sys.argv[1])
