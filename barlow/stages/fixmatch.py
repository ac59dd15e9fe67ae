"""python -m barlow.stages.fixmatch RUN_FOLDER: a classifier learns from few labels and many images, on every rank.

A step takes B labelled images, gone through again and again, and mu times as many of the unlabelled set, one pass of
which is an epoch. CTAugment's bins learn beside the network, from labelled images, and are saved with it."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from barlow import dist
from barlow.config import FixMatch
from barlow.data import chance, ctaugment, operations, order, staging
from barlow.data.ctaugment import Bins
from barlow.data.feed import feed
from barlow.data.loader import Batch, Loader
from barlow.data.shards import Index
from barlow.data.strong import strong
from barlow.data.weak import normalised, weak
from barlow.engine import speed
from barlow.engine.checkpoint import Checkpoints, load_weights
from barlow.engine.loop import Plan, fit
from barlow.engine.preflight import together
from barlow.engine.record import Recorder
from barlow.engine.run import load_config
from barlow.labels.table import learnable
from barlow.models.ema import Average
from barlow.models.resnet import choose_norms
from barlow.objectives.fixmatch import Alignment
from barlow.objectives.fixmatch import FixMatch as Objective
from barlow.optim.groups import weights_and_biases_apart
from barlow.optim.schedule import fixmatch_cosine
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
    kept_decoded,
    newest,
    plan_of,
    ready,
    to_the_end,
    with_state,
)

LABELLED, WEAK, STRONG = range(3)  # lanes of chance: a view of each is another one


def main(run_folder: str) -> None:
    folder = Path(run_folder)
    config = load_config(folder, FixMatch)
    here = enter(folder, config)
    device, beats = here.device, here.beats
    index, known, changed = data_of(config, folder)
    splits = splits_with(index, known, config.data.splits)
    plan = together(lambda: lengths(config, index))
    classifier = build(config, index, device)
    norms = together(lambda: choose_norms(classifier.backbone, device, config.speed.norms))
    alignment = None
    if config.align:
        drawn = together(lambda: learnable(replace(config, labels=()), index))  # those asked for are no fair sample
        alignment = Alignment(torch.from_numpy(drawn.labels), len(index.classes), config.align).to(device)
    objective = Objective(classifier, config.threshold, config.lambda_u, config.temperature, config.batches, alignment)
    told = ready(config, here, index, [*splits, "val"], config.data.stage, objective, copies=3 + bool(config.ema))
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
    if stored:
        load_weights(classifier, stored.get("learning", stored["model"]), f"of step {stored['step']}")
    average = Average(classifier, config.ema) if config.ema else None
    judged = average.model if average else classifier
    bins = Bins(device, config.strong.decay, config.strong.threshold)
    eager = speed.why_not(config.speed, device)
    model = distribute(objective, device, compiled=not eager)
    knobs = config.optim
    groups = weights_and_biases_apart(classifier)
    optimizer = torch.optim.SGD(
        groups, lr=knobs.lr, momentum=knobs.momentum, nesterov=knobs.nesterov, weight_decay=knobs.weight_decay
    )
    if average:
        optimizer.register_step_post_hook(lambda *_: average.follow())
    start = 0
    if stored:
        if average:
            load_weights(average.model, stored["model"], f"of step {stored['step']}")
        optimizer.load_state_dict(stored["optimizer"])
        bins.load_state_dict(stored["bins"])
        if alignment:
            alignment.load_state_dict(stored["alignment"])
        start = stored["step"]

    recorder = Recorder(folder, dist.rank(), plan.steps, start)
    network = f"{config.model.backbone}, {config.model.stem} stem, {config.strong.kind}"
    n, m = config.batch_size, config.mu * config.batch_size
    labels = (
        f"{len(known.ids)} labelled images of {len(index.classes)} classes; a step takes {n} of them and {m} others"
    )
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
        peaks = [knobs.lr, knobs.lr, knobs.lr_backbone, knobs.lr_backbone]
        return [fixmatch_cosine(at, plan.steps, peak) for peak in peaks]

    dtype = dtype_of(config, device)
    pieces = (classifier.backbone, classifier.head)
    forward = speed.compiled(model, config.speed, device, folder / "compiled", recorder.say, pieces, eager)
    own = order.share(n, dist.world_size())

    def make(batch: Batch, at: int) -> list[Tensor]:
        """Weak views; what lies beneath the strong ones is made strong by the step, for the bins learn at each."""
        images, ids, epoch = batch.images, batch.ids, at // plan.steps_per_epoch
        looks = at * n + dist.rank() * own + torch.arange(own, device=ids.device)  # an image may be there twice
        labelled = weak(images[:own], looks, config.view, config.size, config.seed, 0, LABELLED)
        seen, beneath = (
            weak(images[own:], ids[own:], config.view, config.size, config.seed, epoch, lane) for lane in (WEAK, STRONG)
        )
        return [labelled, batch.labels[:own], seen, beneath, batch.labels[own:], looks, ids[own:]]

    done = start

    def step(given: list[Tensor], at: int) -> tuple[Tensor, Mapping[str, Tensor]]:
        nonlocal done
        done = at + 1
        labelled, labels, seen, beneath, truth, looks, ids = given
        hard = strong(beneath, ids, config.strong, bins, config.seed, at // plan.steps_per_epoch, STRONG)
        views = [normalised(view, index.mean, index.std, dtype) for view in (labelled, seen, hard)]
        torch.manual_seed(chance.seed_of_step(config.seed, at, dist.rank()))  # dropout has no state to be saved
        with autocast(dtype, device):
            loss, metrics = forward([views[0], labels, views[1], views[2], truth])
            if config.strong.kind != "randaugment":
                teach(bins, judged, labelled, labels, looks, config, index, dtype)
        return loss, metrics

    def state() -> dict[str, Any]:
        weights = {"model": judged.state_dict()}
        if average:
            weights["learning"] = classifier.state_dict()
        if alignment:
            weights["alignment"] = alignment.state_dict()
        return {**weights, "optimizer": optimizer.state_dict(), "bins": bins.state_dict(), **about}

    def evaluate() -> Iterator[tuple[str, float]]:
        found = dict(judge.accuracies(judged, dtype, lambda: beats.beat(done, "evaluate", plan.start_seconds)))
        judge.note(found, done, best, lambda: {"model": judged.state_dict(), **about}, recorder.say)
        yield from found.items()

    about = {**described(config, index, learned_from), "classes": list(index.classes)}
    source = kept_decoded(loader, config.data.cache, config.watch.start, here, recorder, classifier)
    given = feed(source.batches(positions(config, loader, index, judge.positions, start, plan)), make, device, start)
    if here.holding:
        checkpoints.prepare({**state(), "optimizer": with_state(optimizer, ["momentum_buffer"])})
    with to_the_end(here, recorder, checkpoints):
        fit(
            step, given, optimizer, rates, plan, start, state, checkpoints, recorder, here.request, evaluate, beats,
        )  # fmt: skip
        beats.beat(plan.steps, "evaluate", plan.start_seconds)
        results = dict(evaluate())
        recorder.amend(results)
        finish(here, plan, recorder, {**results, **{f"best_{name}": value for name, value in judge.best.items()}})
    dist.shutdown()


def lengths(config: FixMatch, index: Index) -> Plan:
    """An epoch is one pass over the unlabelled images, mu B of them a step."""
    count = index.images(config.data.splits, config.data.limit)
    batch = config.mu * config.batch_size
    order.unlabelled_steps(count, config.mu, config.batch_size)
    plan = plan_of(config, count, batch, config.evaluate_every)
    return replace(plan, batch_size=batch + config.batch_size)


def positions(
    config: FixMatch, loader: Loader, index: Index, labelled: np.ndarray, start: int, plan: Plan
) -> Iterator[np.ndarray]:
    """This rank's part of each step: its labelled images first."""
    firsts = [(index.split(name).first_id, index.split(name).count) for name in config.data.splits]
    unlabelled = loader.positions_of(np.concatenate([np.arange(first, first + count) for first, count in firsts]))
    unlabelled = unlabelled[order.limited(config.seed, len(unlabelled), config.data.limit)]
    ranks = (dist.rank(), dist.world_size(), start, plan.steps)
    few = order.endless(config.seed, len(labelled), config.batch_size, *ranks)
    many = order.positions(config.seed, len(unlabelled), config.mu * config.batch_size, *ranks)
    return (np.concatenate([labelled[a], unlabelled[b]]) for a, b in zip(few, many, strict=True))


@torch.no_grad()
def teach(
    bins: Bins,
    classifier: nn.Module,
    images: Tensor,
    labels: Tensor,
    looks: Tensor,
    config: FixMatch,
    index: Index,
    dtype: torch.dtype,
) -> None:
    """CTAugment's lesson: labelled images under operations drawn evenly; the better the network still knows them, the
    more their bins weigh. All ranks take in the answers of all, in the order of the global batch."""
    policy, chosen = bins.probe(config.seed, 0, looks)
    probed = normalised(operations.apply(images, policy), index.mean, index.std, dtype)
    was_training = classifier.training
    classifier.eval()
    answers = torch.softmax(classifier(probed).float(), dim=1)
    classifier.train(was_training)
    bins.update(dist.gather(chosen), dist.gather(ctaugment.match(answers, labels)))


if __name__ == "__main__":
    main(sys.argv[1])
