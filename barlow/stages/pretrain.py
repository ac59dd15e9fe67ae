"""python -m barlow.stages.pretrain RUN_FOLDER: Barlow Twins pretraining, as every rank runs it.

Takes the config from the run folder, starts from its newest good checkpoint if there is one, leaves results.json."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from barlow import dist, history, pulse
from barlow.config import Pretrain
from barlow.data import chance, order, staging, views
from barlow.data.cache import cached
from barlow.data.feed import feed
from barlow.data.loader import Loader
from barlow.data.shards import Index, read_index
from barlow.engine import memory, speed
from barlow.engine.checkpoint import Checkpoints, find, load, load_weights
from barlow.engine.loop import Plan, fit, patiently
from barlow.engine.preempt import StopRequest
from barlow.engine.preflight import preflight, together
from barlow.engine.record import Recorder
from barlow.engine.run import claim, load_config
from barlow.errors import BadNode, Preempted, UserError
from barlow.files import read_status, write_json, write_status
from barlow.models import backbone as backbones
from barlow.models.norm import synchronise
from barlow.objectives.barlow_twins import BarlowTwins
from barlow.optim.groups import weights_and_biases
from barlow.optim.lars import Lars
from barlow.optim.schedule import scaled, warmup_cosine
from barlow.stages import knn


def main(run_folder: str) -> None:
    folder = Path(run_folder)
    config = load_config(folder, Pretrain)
    device = choose_device(config.device)
    dist.init(device)
    request = StopRequest()
    holding = claim(folder) if dist.rank() == 0 else None  # until this process ends
    beats = pulse.of_this_rank()
    index = together(lambda: read_index(config.data.dir))
    objective = build(config, device)
    told = prepare(config, folder, index, objective, device, beats)
    near = staging.staged(index, config.data.splits, config.data.stage)
    pin = device.type == "cuda"
    loader = together(lambda: Loader(near, config.data.splits, workers=config.data.workers, pin=pin))
    plan = plan_of(config, len(loader))

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
    if holding:
        checkpoints.tidy()
    start, skipped = restore(checkpoints, objective, optimizer, config, index)
    recorder = Recorder(folder, dist.rank(), plan.steps, start)
    for line in (*told, *skipped, describe(config, plan, objective, device, start)):
        recorder.say(line)
    recorder.say(f"{views.way(device, config.speed.views)}, LARS by {optimizer.backend}")
    room = memory.left() // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    filling = filling_of(config, recorder, beats)
    training = 2 * sum(p.nbytes for p in objective.parameters())  # gradients and momenta
    source = together(lambda: cached(loader, config.data.cache, device, room, filling, training))
    if dist.rank() == 0:
        begin(folder, start, plan.steps)

    def rates(at: int) -> list[float]:
        warmup, peaks = knobs.warmup_epochs * plan.steps_per_epoch, peak_rates(config)
        return [warmup_cosine(at, plan.steps, warmup, peak, peak * knobs.end_lr) for peak in peaks]

    bf16 = config.precision == "bf16" or (config.precision == "auto" and device.type == "cuda")
    dtype = torch.bfloat16 if bf16 else torch.float32
    side = config.knn.size or config.views.size
    pieces = (objective.backbone, objective.projector)
    forward = speed.compiled(model, config.speed, device, folder / "compiled", recorder.say, pieces, eager)

    def make(images: Tensor, ids: Tensor, at: int) -> list[Tensor]:
        epoch = at // plan.steps_per_epoch
        return views.pair(
            images, ids, config.views, config.seed, epoch, index.mean, index.std, dtype, config.speed.views
        )

    def step(pair: list[Tensor], at: int) -> tuple[Tensor, Mapping[str, Tensor]]:
        torch.manual_seed(chance.seed_of_step(config.seed, at, dist.rank()))  # dropout has no state to be saved
        with torch.autocast(device.type, torch.bfloat16) if bf16 else nullcontext():
            return forward(pair)

    def state() -> dict[str, Any]:
        weights = {"model": objective.state_dict(), "optimizer": optimizer.state_dict()}
        return {**weights, "config": asdict(config), "data": hashes(config, index)}

    def evaluate() -> Iterator[tuple[str, float]]:
        return knn.evaluate(objective.backbone, index, config.knn, side, device, config.data.workers)

    positions = order.positions(
        config.seed, len(loader), config.batch_size, dist.rank(), dist.world_size(), start, plan.steps
    )
    given = feed(source.batches(positions), make, device, start)
    if holding:
        checkpoints.prepare({**state(), "optimizer": after_a_step(optimizer)})
    try:
        fit(
            step, given, optimizer, rates, plan, start, state, checkpoints, recorder, request, evaluate, beats,
        )  # fmt: skip
        beats.beat(plan.steps, "evaluate", plan.start_seconds)
        results = dict(evaluate()) if config.knn.every_epochs else {}
        if config.knn.baselines:
            beats.beat(plan.steps, "evaluate", plan.start_seconds)
            untrained = build(config, device).backbone
            results |= knn.baselines(untrained, index, config.knn, side, device, config.data.workers)

        def record_the_end() -> None:
            beats.beat(plan.steps, "save", plan.start_seconds)
            write_json(folder / "results.json", {"steps": plan.steps, **results})
            write_status(folder, state="finished", step=plan.steps, why="")
            history.note(folder, "finished", step=plan.steps)

        if dist.rank() == 0:
            patiently(record_the_end, recorder.say)
        recorder.say(
            f"finished {plan.steps} steps" + "".join(f"  {name} {value:.2f}" for name, value in results.items())
        )
    except Preempted as told_to_stop:
        if dist.rank() == 0:
            with suppress(OSError):  # a full disk: the job's script tries again
                write_status(folder, state="preempted", step=told_to_stop.step, why=str(told_to_stop))
        recorder.say(f"stopped: {told_to_stop}")
        raise
    finally:
        checkpoints.wait()  # whatever ends the run, a save under way is finished first
        recorder.close()
    dist.shutdown()


def prepare(
    config: Pretrain, folder: Path, index: Index, objective: nn.Module, device: torch.device, beats: pulse.Pulse
) -> list[str]:
    """See that every node is fit, and has its data; lines for the log. A node that is not is a BadNode on all ranks."""
    weights = sum(p.nbytes for p in objective.parameters())
    memory = 2 * weights if dist.rank() == 0 else 0  # a checkpoint's copy, momentum included
    disk = 2 * weights * (config.checkpoint.keep + 1)
    work = staging.ready(index, config.data.splits, config.data.stage, config.preflight.hashes)
    return preflight(
        config.preflight, folder, memory, disk, work, device, lambda: beats.beat(0, "start", config.watch.start)
    )


def filling_of(config: Pretrain, recorder: Recorder, beats: pulse.Pulse) -> Callable[[int, int], None]:
    """Tells of a cache that is being filled: to the watchdog always, to people at each quarter."""
    quarters = 0

    def told(done: int, count: int) -> None:
        nonlocal quarters
        beats.beat(0, "start", config.watch.start)
        if 4 * done // count > quarters:
            quarters = 4 * done // count
            recorder.say(f"--data.cache {config.data.cache}: {done:,} of {count:,} images decoded")

    return told


def begin(folder: Path, start: int, steps: int) -> None:
    """Say that the run goes on; a full disk does not keep it from doing so."""
    with suppress(OSError):
        attempts = read_status(folder).get("attempts", 0) + 1
        write_status(folder, state="running", step=start, steps=steps, attempts=attempts, why="")
        history.note(folder, "start", step=start, ranks=dist.world_size())


def choose_device(asked: str) -> torch.device:
    """This rank's GPU, or the CPU. One of several ranks that was promised a GPU and has none is on a bad node."""
    promised = asked == "cuda" and int(os.environ.get("WORLD_SIZE", "1")) > 1
    if asked == "cuda" and not torch.cuda.is_available():
        if promised:
            raise BadNode(dist.node(), "torch sees no GPU on it")
        raise UserError("--device cuda: torch sees no GPU here; give --device cpu or auto")
    if asked == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    if dist.local_rank() >= (count := torch.cuda.device_count()):
        told = f"more ranks on a machine than its {count} GPUs"
        if promised:
            raise BadNode(dist.node(), told)
        raise UserError(f"{told}: give --gpus-per-node what it has")
    torch.backends.cudnn.deterministic = True  # a resumed run ends with the same bits
    return torch.device("cuda", dist.local_rank())


def plan_of(config: Pretrain, count: int) -> Plan:
    per_epoch = order.steps_per_epoch(count, config.batch_size)
    steps = config.epochs * per_epoch
    evaluate_every = config.knn.every_epochs * per_epoch
    return Plan(
        steps=steps,
        steps_per_epoch=per_epoch,
        batch_size=config.batch_size,
        log_every=config.log_every,
        save_every=config.checkpoint.every_steps,
        evaluate_every=evaluate_every,
        save_seconds=config.checkpoint.every_minutes * 60,
        keep_every=config.checkpoint.keep_every,
        move_seconds=config.watch.seconds,
        start_seconds=config.watch.start,
    )


def peak_rates(config: Pretrain) -> tuple[float, float]:
    """Of weights and of biases: they follow the global batch, not the world size."""
    return scaled(config.optim.lr, config.batch_size), scaled(config.optim.lr_biases, config.batch_size)


def build(config: Pretrain, device: torch.device) -> BarlowTwins:
    """The network and its objective, initialised by the seed alone."""
    torch.manual_seed(config.seed)
    objective = BarlowTwins(backbones.build(config.model), config.objective, config.model.projector)
    return objective.to(device).to(memory_format=torch.channels_last)  # the faster layout, on CPUs too


def distribute(objective: nn.Module, device: torch.device, compiled: bool = False) -> nn.Module:
    """The module to call in training: itself when alone, under DistributedDataParallel otherwise."""
    if dist.world_size() == 1:
        return objective
    synchronise(objective, compiled)
    # DDP regroups its gradient buckets after the first step unless it looks for unused parameters. A ring's order of
    # summation depends on where in a bucket a gradient lies, so regrouping would make a resumed run differ in its bits.
    # Buckets of 25 MB, its default, leave each large layer of a projector one of its own, and few bytes to the last.
    warnings.filterwarnings("ignore", message="`broadcast_buffers` is deprecated")  # by a name that torch 2.9 lacks
    return DistributedDataParallel(
        objective,
        device_ids=[device.index] if device.type == "cuda" else None,
        process_group=dist.bulk(),
        broadcast_buffers=False,
        find_unused_parameters=True,
        gradient_as_bucket_view=True,
    )


def hashes(config: Pretrain, index: Index) -> list[str]:
    """What the run learns from, whatever folder it lies in."""
    return [shard.sha256 for split in config.data.splits for shard in index.split(split).files]


def restore(
    checkpoints: Checkpoints, objective: BarlowTwins, optimizer: Lars, config: Pretrain, index: Index
) -> tuple[int, list[str]]:
    """Go on from the newest checkpoint that verifies; rank 0 chooses it for all. First start: from the seed, or with
    another run's weights and an optimizer of its own."""
    path, told = dist.broadcast(checkpoints.newest() if dist.rank() == 0 else (None, []))
    if path is None:
        if config.model.init:
            origin = dist.broadcast(find(config.model.init) if dist.rank() == 0 else Path())
            load_weights(objective, load(origin)["model"], str(origin))
        return 0, told
    try:
        stored = load(path)
    except UserError as error:  # it was whole a moment ago: where this rank reads it otherwise, nobody asked wrongly
        raise RuntimeError(str(error)) from error
    if stored["data"] != hashes(config, index):
        raise UserError(f"the shards in {config.data.dir} are not those this run began with: choose another --run")
    load_weights(objective, stored["model"], str(path))
    optimizer.load_state_dict(stored["optimizer"])
    return stored["step"], [*told, f"going on from {path.name}"]


def after_a_step(optimizer: Lars) -> dict[str, Any]:
    """Its state as far as memory goes: before the first step it has no momentum."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    return {**optimizer.state_dict(), "state": {at: {"momentum": p} for at, p in enumerate(params)}}


def describe(config: Pretrain, plan: Plan, objective: nn.Module, device: torch.device, start: int) -> str:
    """The first line of a log: all that follows from the world size is in it."""
    millions = sum(p.numel() for p in objective.parameters()) / 1e6
    world = dist.world_size()
    peak, _ = peak_rates(config)
    return (
        f"{config.model.backbone} ({config.model.stem} stem, {millions:.1f} M parameters) on {world} x {device.type}: "
        f"batch {config.batch_size} = {world} x {config.batch_size // world}, peak lr {peak:.4g}, "
        f"steps {start} to {plan.steps} ({plan.steps_per_epoch} an epoch), {torch.get_num_threads()} threads a rank"
    )


if __name__ == "__main__":
    main(sys.argv[1])
