"""python -m barlow.stages.finetune RUN_FOLDER: a classifier learns from labelled images, as every rank runs it.

On a pretrained backbone, which learns too or stays as it is, or from nothing. The run keeps its newest checkpoints and,
in `best/`, the one with the highest accuracy on val; results.json has both."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from barlow import dist
from barlow.config import Finetune
from barlow.data import chance, order, staging
from barlow.data.feed import feed
from barlow.data.loader import Batch, Loader
from barlow.data.weak import normalised, weak
from barlow.engine import speed
from barlow.engine.checkpoint import Checkpoints, load_weights
from barlow.engine.loop import fit
from barlow.engine.preflight import together
from barlow.engine.record import Recorder
from barlow.engine.run import load_config
from barlow.models.resnet import choose_norms
from barlow.objectives.supervised import Supervised
from barlow.optim.groups import head_and_backbone
from barlow.optim.schedule import half_cosine
from barlow.stages.classifiers import Judge, best_of, build, data_of, fingerprint, splits_with, start_from
from barlow.stages.training import (
    autocast,
    begin,
    described,
    distribute,
    dtype_of,
    enter,
    finish,
    in_words,
    newest,
    plan_of,
    ready,
    to_the_end,
    with_state,
)


def main(run_folder: str) -> None:
    folder = Path(run_folder)
    config = load_config(folder, Finetune)
    here = enter(folder, config)
    device, beats = here.device, here.beats
    index, known, changed = data_of(config, folder)
    splits = splits_with(index, known)
    plan = together(lambda: plan_of(config, len(known.ids), config.batch_size, config.evaluate_every))
    classifier = build(config, index, device)
    norms = together(lambda: choose_norms(classifier.backbone, device, config.speed.norms))
    objective = Supervised(classifier)
    told = ready(config, here, index, [*splits, "val"], config.data.stage, objective, copies=3 + 1)
    near = staging.staged(index, [*splits, "val"], config.data.stage)
    loader = together(lambda: Loader(near, splits, workers=config.data.workers, pin=device.type == "cuda"))
    loader = loader.relabelled(known.ids, known.labels)
    judge = together(lambda: Judge(config, near, loader, known, device))

    checkpoints = Checkpoints(folder / "checkpoints", config.checkpoint.keep, config.checkpoint.keep_every)
    if here.holding:
        checkpoints.tidy()
    best, damage = best_of(folder, writes=bool(here.holding))
    learned_from = fingerprint(index, splits, known)
    stored, skipped = newest(checkpoints, learned_from, config.data.dir)
    judge.remember(best, learned_from)
    origin = [] if stored else together(lambda: start_from(classifier, config, index, folder))
    eager = speed.why_not(config.speed, device)
    model = distribute(objective, device, compiled=not eager)
    knobs = config.optim
    groups = head_and_backbone(classifier)
    optimizer = torch.optim.Adam(groups, weight_decay=knobs.weight_decay, fused=device.type == "cuda" or None)
    start = 0
    if stored:
        load_weights(classifier, stored["model"], f"of step {stored['step']}")
        optimizer.load_state_dict(stored["optimizer"])
        start = stored["step"]

    recorder = Recorder(folder, dist.rank(), plan.steps, start)
    network = f"{config.model.backbone}, {config.model.stem} stem, {config.form} form"
    labels = f"{len(known.ids)} labelled images of {len(index.classes)} classes" + in_answers(known.unanswered)
    for line in (
        *told,
        *changed,
        *skipped,
        *damage,
        *origin,
        labels,
        in_words(network, objective, plan, device, start, knobs.lr),
    ):
        recorder.say(line)
    recorder.say(norms)
    if dist.rank() == 0:
        begin(folder, start, plan.steps)

    def rates(at: int) -> list[float]:
        peaks = [knobs.lr, knobs.lr_backbone][: len(groups)]
        return [half_cosine(at, plan.steps, peak) for peak in peaks] if knobs.schedule == "cosine" else peaks

    dtype = dtype_of(config, device)
    pieces = (classifier.backbone, classifier.head)
    forward = speed.compiled(model, config.speed, device, folder / "compiled", recorder.say, pieces, eager)

    def make(batch: Batch, at: int) -> list[Tensor]:
        images = weak(batch.images, batch.ids, config.view, config.size, config.seed, at // plan.steps_per_epoch)
        return [normalised(images, index.mean, index.std, dtype), batch.labels]

    done = start

    def step(given: list[Tensor], at: int) -> tuple[Tensor, Mapping[str, Tensor]]:
        nonlocal done
        done = at + 1
        torch.manual_seed(chance.seed_of_step(config.seed, at, dist.rank()))  # dropout has no state to be saved
        with autocast(dtype, device):
            return forward(given)

    def state() -> dict[str, Any]:
        weights = {"model": classifier.state_dict(), "optimizer": optimizer.state_dict()}
        return {**weights, **about}

    def evaluate() -> Iterator[tuple[str, float]]:
        found = dict(judge.accuracies(classifier, dtype, lambda: beats.beat(done, "evaluate", plan.start_seconds)))
        judge.note(found, done, best, lambda: {"model": classifier.state_dict(), **about}, recorder.say)
        yield from found.items()

    about = {**described(config, index, learned_from), "classes": list(index.classes)}
    positions = order.positions(
        config.seed, len(judge.positions), config.batch_size, dist.rank(), dist.world_size(), start, plan.steps
    )
    given = feed(loader.batches(judge.positions[places] for places in positions), make, device, start)
    if here.holding:
        checkpoints.prepare({**state(), "optimizer": with_state(optimizer, ["exp_avg", "exp_avg_sq"])})
    with to_the_end(here, recorder, checkpoints):
        fit(
            step, given, optimizer, rates, plan, start, state, checkpoints, recorder, here.request, evaluate, beats,
        )  # fmt: skip
        beats.beat(plan.steps, "evaluate", plan.start_seconds)
        results = dict(evaluate())
        recorder.amend(results)
        finish(here, plan, recorder, {**results, **{f"best_{name}": value for name, value in judge.best.items()}})
    dist.shutdown()


def in_answers(unanswered: int) -> str:
    return f" ({unanswered} of the images asked for have no answer yet)" if unanswered else ""


if __name__ == "__main__":
    main(sys.argv[1])
