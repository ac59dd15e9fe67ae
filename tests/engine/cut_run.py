"""A run of six steps of a small model, with everything that a real one writes: what test_cut cuts."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from barlow import history
from barlow.engine.checkpoint import Checkpoints, load
from barlow.engine.loop import Plan, fit
from barlow.engine.preempt import StopRequest
from barlow.engine.record import Recorder
from barlow.engine.run import hold
from barlow.files import read_status, write_json, write_status
from barlow.pulse import Pulse

PLAN = Plan(steps=6, steps_per_epoch=3, batch_size=4, log_every=1, save_every=2, evaluate_every=0, keep_every=0)


def prepare(folder: Path) -> None:
    """As a launcher does before a job begins."""
    for part in ("logs", "checkpoints"):
        (folder / part).mkdir(parents=True)
    write_status(folder, state="pending", step=0, attempts=0, why="")


def run(folder: Path) -> None:
    """As a stage does, from the start or from where another process was cut."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 1000)  # more than a buffer: a checkpoint takes several writes
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    holding = hold(folder)
    checkpoints = Checkpoints(folder / "checkpoints", keep=1)  # the one there is must not go too early
    checkpoints.tidy()
    path, told = checkpoints.newest()
    start = 0
    if path is not None:
        found = load(path)
        model.load_state_dict(found["model"])
        optimizer.load_state_dict(found["optimizer"])
        start = found["step"]
    recorder = Recorder(folder, 0, PLAN.steps, start)
    for line in told:
        recorder.say(line)
    attempts = read_status(folder)["attempts"] + 1
    write_status(folder, state="running", step=start, attempts=attempts)
    history.note(folder, "start", step=start)

    def batches() -> Iterator[Tensor]:
        for at in range(start, PLAN.steps):
            yield torch.randn(4, 3, generator=torch.Generator().manual_seed(at))

    def step(batch: Tensor, at: int) -> tuple[Tensor, Mapping[str, Tensor]]:
        if at % PLAN.save_every == 1:  # a save goes on beside one step, and never into the next: the same calls always
            checkpoints.wait()
        return (model(batch) - batch.sum()).square().mean(), {}

    def state() -> dict[str, Any]:
        return {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "config": {}}

    fit(
        step, batches(), optimizer, lambda at: [0.1 / (1 + at)], PLAN, start, state, checkpoints, recorder,
        StopRequest(), lambda: (), Pulse(),
    )  # fmt: skip
    write_json(folder / "results.json", {"steps": PLAN.steps})
    write_status(folder, state="finished", step=PLAN.steps, why="")
    history.note(folder, "finished", step=PLAN.steps)
    recorder.close()
    holding.close()
