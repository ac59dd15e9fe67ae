"""The only training loop. A stage hands it `step(batch, at) -> (loss, metrics)`; there is nothing to override.

Steps are counted from 0 over the whole run; `done` steps have been made when step done-1 has been applied. The loop
looks at numbers on the host only every `log_every` steps, so a GPU never waits for a print."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from barlow import dist
from barlow.engine.checkpoint import Checkpoints
from barlow.engine.preempt import StopRequest
from barlow.engine.record import Recorder
from barlow.errors import Preempted

Step = Callable[[Any, int], tuple[Tensor, Mapping[str, Tensor]]]


@dataclass(frozen=True)
class Plan:
    """How long the run is, and what happens when: all counted in steps."""

    steps: int
    steps_per_epoch: int
    batch_size: int  # global
    log_every: int
    save_every: int
    agree_every: int  # how often ranks ask each other whether one was told to stop: each time a GPU must be waited for
    evaluate_every: int  # 0: never within the loop


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
    stop: StopRequest,
    evaluate: Callable[[], Iterable[tuple[str, float]]],
) -> None:
    """Train from step `start` to the plan's end. `batches` must begin at `start`; `rates` gives each parameter group's
    learning rate at a step. Saves by the plan and at the end, and returns when that is on disk; when any rank was told
    to stop, saves and raises Preempted."""
    pending: list[tuple[int, Tensor, Mapping[str, Tensor], float, float]] = []
    clock = time.perf_counter()
    for at in range(start, plan.steps):
        asked = time.perf_counter()
        batch = next(batches)
        waited = time.perf_counter() - asked

        lrs = rates(at)
        for group, lr in zip(optimizer.param_groups, lrs, strict=True):
            group["lr"] = lr
        loss, metrics = step(batch, at)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

        done = at + 1
        pending.append((done, loss.detach(), metrics, lrs[0], waited))
        stopping = done % plan.agree_every == 0 and done < plan.steps and stop.agreed()
        log = done % plan.log_every == 0 or done == plan.steps
        evaluating = plan.evaluate_every > 0 and done % plan.evaluate_every == 0 and done < plan.steps
        save = done % plan.save_every == 0 or done == plan.steps
        if not (log or evaluating or save or stopping):
            continue

        rows = settle(pending, plan, time.perf_counter() - clock)
        if len(rows) < len(pending):
            recorder.write(rows)  # what led up to it
            number, broken = pending[len(rows)][0], float(pending[len(rows)][1])
            raise FloatingPointError(f"the loss of step {number} is {broken:g}; the last good checkpoint is kept")
        pending.clear()
        if evaluating:
            rows[-1].update(evaluate())
        recorder.write(rows)
        if save or stopping:
            refuse_non_finite(optimizer, done)
            if dist.rank() == 0:
                recorder.saving(done)
                lost = checkpoints.save(done, state())
                if lost:  # an earlier one: training goes on, a full disk may have room again
                    recorder.say(f"warning: {lost}")
        if stopping:
            checkpoints.finish()
            raise Preempted(stop.signal, done)
        clock = time.perf_counter()
    checkpoints.finish()


def settle(
    pending: Sequence[tuple[int, Tensor, Mapping[str, Tensor], float, float]], plan: Plan, seconds: float
) -> list[dict[str, Any]]:
    """Rows of metrics.jsonl for the steps since the last look, as plain numbers, up to a loss that is not finite."""
    rows: list[dict[str, Any]] = []
    for done, loss, metrics, lr, waited in pending:
        value = float(loss)
        if not math.isfinite(value):
            break
        row = {"step": done, "epoch": round(done / plan.steps_per_epoch, 4), "images": done * plan.batch_size}
        row |= {"loss": value, **{name: float(metric) for name, metric in metrics.items()}, "lr": lr}
        rows.append(row | {"images_per_sec": 0.0, "data_wait": round(waited, 5)})
    for row in rows:  # the wall time of the window, shared out evenly
        row["images_per_sec"] = round(plan.batch_size * len(rows) / seconds, 1)
    return rows


def refuse_non_finite(optimizer: torch.optim.Optimizer, done: int) -> None:
    """A finite loss can still leave broken weights behind: never let them replace a good checkpoint."""
    weights = [p.detach() for group in optimizer.param_groups for p in group["params"]]
    if not torch.stack([norm.float() for norm in torch._foreach_norm(weights)]).isfinite().all():
        raise FloatingPointError(f"weights are not finite after step {done}; the last good checkpoint is kept")
