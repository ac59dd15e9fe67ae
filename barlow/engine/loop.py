"""The only training loop. A stage hands it `step(batch, at) -> (loss, metrics)`; there is nothing to override.

Steps are counted from 0 over the whole run; `done` steps have been made when step done-1 has been applied. Each step's
numbers travel to the host behind it and are looked at when they are there, so a GPU never waits for a print."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from barlow import dist, stop
from barlow.engine.checkpoint import Checkpoints
from barlow.engine.pace import Pace, to_host
from barlow.engine.preempt import StopRequest
from barlow.engine.record import Recorder
from barlow.errors import Preempted
from barlow.pulse import Pulse

Step = Callable[[Any, int], tuple[Tensor, Mapping[str, Tensor]]]
PATIENCE = 300.0  # seconds that a run at its end waits for room on the disk; less than ranks wait in a collective
AGAIN = 5.0  # seconds between two tries


class Made(NamedTuple):
    """A step that has been enqueued."""

    done: int
    names: Sequence[str]
    numbers: Tensor  # the loss, then what is named, on the host: there once the step's end has been waited for
    lr: float
    waited: float


@dataclass(frozen=True)
class Plan:
    """How long the run is, and what happens when: counted in steps, unless it says seconds."""

    steps: int
    steps_per_epoch: int
    batch_size: int  # global
    log_every: int
    save_every: int
    evaluate_every: int  # 0: never within the loop
    save_seconds: float = 0.0  # save also so long after the last save; 0: no
    keep_every: int = 0  # what is saved every so many steps is kept for good; 0: nothing
    move_seconds: float = 300.0  # a rank that takes longer for a step is stuck
    start_seconds: float = 1800.0  # the same for its first step, and for an evaluation

    def keeps(self, done: int) -> bool:
        return self.keep_every > 0 and done % self.keep_every == 0

    def evaluates(self, done: int) -> bool:
        return self.evaluate_every > 0 and done % self.evaluate_every == 0 and 0 < done < self.steps


def fit(
    step: Step,
    batches: Iterator[Any],
    optimizer: torch.optim.Optimizer,
    rates: Callable[[int], Sequence[float]],
    plan: Plan,
    start: int,
    state: Callable[[], dict[str, Any]],
    checkpoints: Checkpoints,
    recorder: Recorder,
    request: StopRequest,
    evaluate: Callable[[], Iterable[tuple[str, float]]],
    pulse: Pulse,
) -> None:
    """Train from step `start` to the plan's end. `batches` must begin at `start`; `rates` gives each parameter group's
    learning rate at a step. Saves by the plan and at the end, and returns when that is on disk; when any rank was told
    to stop, saves and raises Preempted."""
    saver = Saver(plan, start, state, checkpoints, recorder, pulse) if dist.rank() == 0 else None
    pending: list[Made] = []
    if plan.evaluates(start) and dist.broadcast(recorder.unevaluated):  # it was told to stop there
        pulse.beat(start, "evaluate", plan.start_seconds)
        recorder.amend(dict(evaluate()))
    clock, pace = time.perf_counter(), Pace()
    with stop.heeding():
        for at in range(start, plan.steps):
            pace.wait()
            within = plan.start_seconds if at == start else plan.move_seconds
            pulse.beat(at, "data", within)
            asked = time.perf_counter()
            batch = next(batches)
            waited = time.perf_counter() - asked

            pulse.beat(at, "step", within)
            lrs = rates(at)
            for group, lr in zip(optimizer.param_groups, lrs, strict=True):
                group["lr"] = lr
            loss, metrics = step(batch, at)
            del batch  # the device may have its memory for the next
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            done = at + 1
            pending.append(Made(done, tuple(metrics), to_host(loss, metrics), lrs[0], waited))
            pace.enqueued(loss)

            stopping = request.agreed(last=done == plan.steps) and done < plan.steps
            evaluating = plan.evaluates(done) and not stopping  # the notice is for saving: whoever goes on evaluates
            saving = saver is not None and saver.due(done)
            if evaluating or saving or stopping or done == plan.steps:
                pace.wait(0)
            elif (done - pace.behind) % plan.log_every or len(pending) == pace.behind:
                continue

            there, pending = pending[: len(pending) - pace.behind], pending[len(pending) - pace.behind :]
            rows = settle(there, plan, time.perf_counter() - clock)
            if len(rows) < len(there):
                recorder.write(rows)  # what led up to it
                number, broken = there[len(rows)].done, float(there[len(rows)].numbers[0])
                raise FloatingPointError(f"the loss of step {number} is {broken:g}; the last good checkpoint is kept")
            if evaluating:
                pulse.beat(done, "evaluate", plan.start_seconds)
                rows[-1].update(evaluate())
            recorder.write(rows)
            if stopping:
                lost = saver.save_and_leave(done) if saver else ""
                raise Preempted(request.signal, saver.saved if saver else done, lost)
            if saver and saving:
                saver.save(done)
            clock = time.perf_counter()
        if saver and start < plan.steps:
            saver.finish()
        pulse.beat(plan.steps, "save", PATIENCE + plan.start_seconds)
        request.meet()


class Saver:
    """When rank 0 saves. A save that is due while the one before is still written is put off, and one that failed is
    tried again at a later step. Training waits for a disk only at a step that is kept for good, for the save before."""

    def __init__(
        self,
        plan: Plan,
        start: int,
        state: Callable[[], dict[str, Any]],
        checkpoints: Checkpoints,
        recorder: Recorder,
        pulse: Pulse,
    ) -> None:
        self.plan, self.state, self.checkpoints, self.recorder, self.pulse = plan, state, checkpoints, recorder, pulse
        self.start = start
        self.owed = False
        self.warned = False
        self.began = time.monotonic()  # the last save

    @property
    def saved(self) -> int:
        """The newest step that is on the disk."""
        return self.start if self.checkpoints.saved is None else self.checkpoints.saved

    def due(self, done: int) -> bool:
        now = time.monotonic()
        by_time = 0 < self.plan.save_seconds <= now - self.began
        self.owed = self.owed or by_time or done % self.plan.save_every == 0
        if done == self.plan.steps:
            return False  # `finish` saves
        if self.plan.keeps(done):
            return True
        if self.checkpoints.busy:
            return False
        return now - self.began > AGAIN if self.checkpoints.failed else self.owed

    def save(self, done: int) -> None:
        began = time.perf_counter()
        self.pulse.beat(done, "save", self.plan.start_seconds)
        self.tell()
        self.owed, self.began = False, time.monotonic()

        def rows() -> None:
            """A checkpoint is never newer than its rows of metrics.jsonl."""
            if not self.recorder.saving(done):
                raise OSError("the disk does not take its rows of metrics.jsonl")

        self.checkpoints.save(done, self.state(), began, rows)

    def save_and_leave(self, done: int) -> str:
        """The last save of a run that is told to stop; returns why it was lost, empty if it was not."""
        self.pulse.beat(done, "save", self.plan.start_seconds)
        self.checkpoints.wait()
        self.save(done)
        lost = ""
        try:
            self.checkpoints.finish()
        except OSError as error:
            lost = str(error)
        self.tell()
        return lost

    def finish(self) -> None:
        """Until the end of the run is on disk."""

        def save() -> None:
            if lost := self.save_and_leave(self.plan.steps):
                raise OSError(lost)

        patiently(save, self.recorder.say)

    def tell(self) -> None:
        """What became of earlier saves; once, that they take longer than a preemption allows."""
        for line in self.checkpoints.take_news():
            self.recorder.say(line)
        if self.checkpoints.broken:
            raise FloatingPointError(self.checkpoints.broken)
        notice = stop.shortest_notice()
        if notice and self.checkpoints.seconds > stop.SHARE * notice and not self.warned:
            self.warned = True
            told = f"a checkpoint takes {self.checkpoints.seconds:.1f} s of the {notice:.0f} s notice a stop gives"
            self.recorder.say(f"warning: {told}: what cannot be saved then is made again, from the last one saved")


def patiently(do: Callable[[], object], say: Callable[[str], object]) -> None:
    """What a run does at its end, again while the disk is full. One that stays so is an error, which brings the job
    back: nothing else will try again."""
    until = time.monotonic() + PATIENCE
    while True:
        try:
            do()
            return
        except OSError as error:
            if time.monotonic() >= until:
                raise
            say(f"warning: the end of the run is not on disk yet: {error}")
        time.sleep(AGAIN)


def settle(made: Sequence[Made], plan: Plan, seconds: float) -> list[dict[str, Any]]:
    """Rows of metrics.jsonl for steps whose numbers are there, up to a loss that is not finite.

    What a step could not measure (NaN) is left out of its row."""
    rows: list[dict[str, Any]] = []
    for done, names, numbers, lr, waited in made:
        loss, *metrics = numbers.tolist()
        if not math.isfinite(loss):
            break
        row = {"step": done, "epoch": round(done / plan.steps_per_epoch, 4), "images": done * plan.batch_size}
        told = {name: number for name, number in zip(names, metrics, strict=True) if not math.isnan(number)}
        row |= {"loss": loss, **told, "lr": lr}
        rows.append(row | {"images_per_sec": 0.0, "data_wait": round(waited, 5)})
    for row in rows:  # the wall time of the window, shared out evenly
        row["images_per_sec"] = round(plan.batch_size * len(rows) / seconds, 1)
    return rows
