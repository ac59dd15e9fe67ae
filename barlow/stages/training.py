"""What stands around the steps of every stage that trains: the run's folder, device and ranks, where the run goes on
from, and how it ends. A stage calls these one after the other; none of them calls a stage."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from barlow import dist, history, pulse
from barlow.config import Run, Training
from barlow.data import order, staging
from barlow.data.cache import Cache, cached
from barlow.data.loader import Loader
from barlow.data.shards import Index
from barlow.engine import memory, origin
from barlow.engine.checkpoint import Checkpoints, find, load
from barlow.engine.loop import Plan, patiently
from barlow.engine.preempt import StopRequest
from barlow.engine.preflight import preflight, together
from barlow.engine.record import Recorder
from barlow.engine.run import claim
from barlow.errors import BadNode, Preempted, UserError
from barlow.files import read_status, write_json, write_status
from barlow.models.norm import synchronise


@dataclass(frozen=True)
class Here:
    """This rank's place in the run."""

    folder: Path
    device: torch.device
    request: StopRequest
    beats: pulse.Pulse
    holding: IO[str] | None
    """The lock of the run's one writer, on rank 0, until this process ends."""


def enter(folder: Path, config: Run) -> Here:
    """Join the other ranks, and be the run's one writer if this is rank 0."""
    device = choose_device(config.device)
    dist.init(device)
    request = StopRequest()
    holding = claim(folder) if dist.rank() == 0 else None
    return Here(folder, device, request, pulse.of_this_rank(), holding)


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


def ready(
    config: Training,
    here: Here,
    index: Index,
    splits: Sequence[str],
    stage: str,
    model: nn.Module,
    copies: int = 2,
) -> list[str]:
    """See that every node is fit, and has its data; lines for the log. A node that is not is a BadNode on all ranks.

    `copies`: how often what a checkpoint holds is as large as the weights; the optimizer's state counts."""
    weights = sum(p.nbytes for p in model.parameters())
    copied = copies * weights if dist.rank() == 0 else 0  # what is saved is copied first
    disk = copies * weights * (config.checkpoint.keep + 1)
    work = staging.ready(index, splits, stage, config.preflight.hashes)
    return preflight(
        config.preflight,
        here.folder,
        copied,
        disk,
        work,
        here.device,
        lambda: here.beats.beat(0, "start", config.watch.start),
    )


def plan_of(config: Training, count: int, batch: int, evaluate_epochs: int) -> Plan:
    """For epochs of `count` images in global batches of `batch`."""
    per_epoch = order.steps_per_epoch(count, batch)
    return Plan(
        steps=config.epochs * per_epoch,
        steps_per_epoch=per_epoch,
        batch_size=batch,
        log_every=config.log_every,
        save_every=config.checkpoint.every_steps,
        evaluate_every=evaluate_epochs * per_epoch,
        save_seconds=config.checkpoint.every_minutes * 60,
        keep_every=config.checkpoint.keep_every,
        move_seconds=config.watch.seconds,
        start_seconds=config.watch.start,
    )


def distribute(model: nn.Module, device: torch.device, compiled: bool = False) -> nn.Module:
    """The module to call in training: itself when alone, under DistributedDataParallel otherwise."""
    if dist.world_size() == 1:
        return model
    synchronise(model, compiled)
    # DDP regroups its gradient buckets after the first step unless it looks for unused parameters. A ring's order of
    # summation depends on where in a bucket a gradient lies, so regrouping would make a resumed run differ in its bits.
    # Buckets of 25 MB, its default, leave each large layer of a projector one of its own, and few bytes to the last.
    warnings.filterwarnings("ignore", message="`broadcast_buffers` is deprecated")  # by a name that torch 2.9 lacks
    return DistributedDataParallel(
        model,
        device_ids=[device.index] if device.type == "cuda" else None,
        process_group=dist.bulk(),
        broadcast_buffers=False,
        find_unused_parameters=True,
        gradient_as_bucket_view=True,
    )


def dtype_of(config: Training, device: torch.device) -> torch.dtype:
    bf16 = config.precision == "bf16" or (config.precision == "auto" and device.type == "cuda")
    return torch.bfloat16 if bf16 else torch.float32


def autocast(dtype: torch.dtype, device: torch.device) -> AbstractContextManager[object]:
    return torch.autocast(device.type, dtype) if dtype == torch.bfloat16 else nullcontext()


def newest(checkpoints: Checkpoints, data: Sequence[str], where: str) -> tuple[dict[str, Any] | None, list[str]]:
    """The newest checkpoint that verifies, if there is one; rank 0 chooses it for all. One that was made with other
    `data` (hashes of what is in `where`) is refused. Lines for the log beside it."""
    path, told = dist.broadcast(checkpoints.newest() if dist.rank() == 0 else (None, []))
    if path is None:
        return None, told
    try:
        stored = load(path)
    except UserError as error:  # it was whole a moment ago: where this rank reads it otherwise, nobody asked wrongly
        raise RuntimeError(str(error)) from error
    if stored["data"] != list(data):
        raise UserError(f"the data in {where}, or labels, are not those this run began with: choose another --run")
    return stored, [*told, f"going on from {path.name}"]


def checkpoint_of(where: str, folder: Path) -> Path:
    """The checkpoint that the run in `folder` starts from: what `where` means at its first start, and the same one at
    every other. As rank 0 sees it: on all ranks, as what is wrong with it is."""
    path, fault = Path(), ""
    if dist.rank() == 0:
        try:
            path = _kept(folder) or origin.keep(find(where), folder)
        except UserError as error:
            fault = str(error)
    path, fault = dist.broadcast((path, fault))
    if fault:
        raise UserError(fault)
    return path


def _kept(folder: Path) -> Path | None:
    """The checkpoint that a run which has begun started from, if it is still good."""
    with suppress(UserError):
        return find(str(folder / "origin")) if origin.began(folder) else None
    return None


def described(config: Training, index: Index, data: Sequence[str]) -> dict[str, Any]:
    """What a checkpoint says of itself, so that its file alone is enough to use it; `data`: what it learned from."""
    return {"config": asdict(config), "data": list(data), "mean": list(index.mean), "std": list(index.std)}


def hashes(index: Index, splits: Sequence[str]) -> list[str]:
    """What the run learns from, whatever folder it lies in."""
    return [shard.sha256 for split in splits for shard in index.split(split).files]


def begin(folder: Path, start: int, steps: int) -> None:
    """Say that the run goes on; a full disk does not keep it from doing so."""
    with suppress(OSError):
        attempts = read_status(folder).get("attempts", 0) + 1
        write_status(folder, state="running", step=start, steps=steps, attempts=attempts, why="")
        history.note(folder, "start", step=start, ranks=dist.world_size())


def kept_decoded(
    loader: Loader, where: str, within: float, here: Here, recorder: Recorder, model: nn.Module
) -> Loader | Cache:
    """The loader, or its images decoded once and kept `where` --data.cache says; that there is no room is refused."""
    room = memory.left() // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    filling = filling_of(where, within, recorder, here.beats)
    training = 2 * sum(p.nbytes for p in model.parameters())  # gradients and momenta
    return together(lambda: cached(loader, where, here.device, room, filling, training))


def filling_of(where: str, within: float, recorder: Recorder, beats: pulse.Pulse) -> Callable[[int, int], None]:
    """Tells of a cache that is being filled: to the watchdog always, to people at each quarter."""
    quarters = 0

    def told(done: int, count: int) -> None:
        nonlocal quarters
        beats.beat(0, "start", within)
        if 4 * done // count > quarters:
            quarters = 4 * done // count
            recorder.say(f"--data.cache {where}: {done:,} of {count:,} images decoded")

    return told


def with_state(optimizer: torch.optim.Optimizer, names: Sequence[str]) -> dict[str, Any]:
    """Its state as far as memory goes: before the first step it has none of what `names` tells, a parameter's size
    each."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    state = {at: {name: p for name in names} for at, p in enumerate(params)}
    return {**optimizer.state_dict(), "state": state}


@contextmanager
def to_the_end(here: Here, recorder: Recorder, *saving: Checkpoints) -> Iterator[None]:
    """Whatever ends the run, saves under way are finished first; that it was told to stop, its folder says."""
    try:
        yield
    except Preempted as told_to_stop:
        if dist.rank() == 0:
            with suppress(OSError):  # a full disk: the job's script tries again
                write_status(here.folder, state="preempted", step=told_to_stop.step, why=str(told_to_stop))
        recorder.say(f"stopped: {told_to_stop}")
        raise
    finally:
        for checkpoints in saving:
            checkpoints.wait()
        recorder.close()


def finish(here: Here, plan: Plan, recorder: Recorder, results: Mapping[str, float]) -> None:
    """The last word: results.json and the run's state."""

    def record_the_end() -> None:
        here.beats.beat(plan.steps, "save", plan.start_seconds)
        write_json(here.folder / "results.json", {"steps": plan.steps, **results})
        write_status(here.folder, state="finished", step=plan.steps, why="")
        history.note(here.folder, "finished", step=plan.steps)

    if dist.rank() == 0:
        patiently(record_the_end, recorder.say)
    told = "".join(f"  {name} {value:.2f}" for name, value in results.items())
    recorder.say(f"finished {plan.steps} steps{told}")


def in_words(network: str, model: nn.Module, plan: Plan, device: torch.device, start: int, rate: float) -> str:
    """The first line of a log: all that follows from the world size is in it."""
    millions = sum(p.numel() for p in model.parameters()) / 1e6
    world = dist.world_size()
    return (
        f"{network} ({millions:.1f} M parameters) on {world} x {device.type}: "
        f"batch {plan.batch_size} = {world} x {plan.batch_size // world}, peak lr {rate:.4g}, "
        f"steps {start} to {plan.steps} ({plan.steps_per_epoch} an epoch), {torch.get_num_threads()} threads a rank"
    )
