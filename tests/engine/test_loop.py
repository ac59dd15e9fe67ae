"""The loop: every step's row once, resumed equals undisturbed bit for bit, broken numbers never reach a checkpoint."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from barlow.engine.checkpoint import Checkpoints, load
from barlow.engine.loop import Plan, fit
from barlow.engine.preempt import StopRequest
from barlow.engine.record import Recorder
from barlow.errors import Preempted, UserError

PLAN = Plan(steps=12, steps_per_epoch=4, batch_size=8, log_every=5, save_every=4, agree_every=1, evaluate_every=6)


class Regression:
    """A small model whose batch at a step is a function of the step, as in a real run."""

    def __init__(self, folder: Path, plan: Plan = PLAN) -> None:
        (folder / "logs").mkdir(exist_ok=True)
        (folder / "checkpoints").mkdir(exist_ok=True)
        self.folder, self.plan = folder, plan
        torch.manual_seed(0)
        self.model = torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1))
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1, momentum=0.9)
        self.checkpoints = Checkpoints(folder / "checkpoints", keep=9)
        self.stop = StopRequest()
        self.broken: dict[int, float] = {}  # step -> what its loss is multiplied by
        self.told_at = -1
        self.evaluated = 0

    def batches(self, start: int) -> Iterator[Tensor]:
        for at in range(start, self.plan.steps):
            yield torch.randn(8, 3, generator=torch.Generator().manual_seed(at))

    def step(self, batch: Tensor, at: int) -> tuple[Tensor, Mapping[str, Tensor]]:
        if at == self.told_at:
            os.kill(os.getpid(), signal.SIGUSR2)
        error = (self.model(batch).squeeze(1) - batch.sum(1)).square().mean()
        return error * self.broken.get(at, 1.0), {"error": error.detach()}

    def evaluate(self) -> Iterator[tuple[str, float]]:
        self.evaluated += 1
        yield "knn_top1", 50.0

    def fit(self) -> None:
        path, _ = self.checkpoints.newest()
        start = 0
        if path is not None:
            found = load(path)
            self.model.load_state_dict(found["model"])
            self.optimizer.load_state_dict(found["optimizer"])
            start = found["step"]
        recorder = Recorder(self.folder, 0, self.plan.steps, start)

        def state() -> dict:
            return {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict(), "config": {}}

        def rates(at: int) -> list[float]:
            return [0.1 / (1 + at)]

        batches = self.batches(start)
        try:
            fit(
                self.step, batches, self.optimizer, rates, self.plan, start, state,
                self.checkpoints, recorder, self.stop, self.evaluate,
            )  # fmt: skip
        finally:
            self.checkpoints.wait()
            recorder.close()

    def rows(self) -> list[dict]:
        return [json.loads(line) for line in (self.folder / "metrics.jsonl").read_text().splitlines()]

    def weights(self) -> Tensor:
        return torch.cat([p.detach().flatten() for p in self.model.parameters()])


def exact(rows: list[dict]) -> list[dict]:
    """Rows without what depends on the clock."""
    return [{key: value for key, value in row.items() if key not in ("images_per_sec", "data_wait")} for row in rows]


def test_every_step_has_its_row(tmp_path: Path) -> None:
    run = Regression(tmp_path)
    run.fit()
    rows = run.rows()
    assert [row["step"] for row in rows] == list(range(1, 13))
    assert [row["images"] for row in rows] == [8 * step for step in range(1, 13)]
    assert rows[3]["epoch"] == 1.0
    assert rows[2]["lr"] == pytest.approx(0.1 / 3)
    assert rows[5]["knn_top1"] == 50.0  # in the row of its step; the last evaluation is the stage's
    assert run.evaluated == 1
    assert all(row["images_per_sec"] > 0 for row in rows)
    assert [p.name for p in sorted(tmp_path.glob("checkpoints/*.pt"))] == [f"step-{s:09d}.pt" for s in (4, 8, 12)]


def test_told_to_stop_saves_and_the_rest_is_bit_identical(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    undisturbed = Regression(tmp_path / "a")
    undisturbed.fit()

    told = Regression(tmp_path / "b")
    told.told_at = 6
    with pytest.raises(Preempted, match="SIGUSR2; saved at step"):
        told.fit()
    again = Regression(tmp_path / "b")
    again.fit()
    assert torch.equal(again.weights(), undisturbed.weights())
    assert exact(again.rows()) == exact(undisturbed.rows())


def test_a_crash_loses_only_steps_since_the_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    undisturbed = Regression(tmp_path / "a")
    undisturbed.fit()

    crashing = Regression(tmp_path / "b")
    whole = crashing.step

    def crash(batch: Tensor, at: int) -> tuple[Tensor, Mapping[str, Tensor]]:
        if at == 10:
            raise RuntimeError("a cable was pulled")
        return whole(batch, at)

    crashing.step = crash  # type: ignore[method-assign]
    with pytest.raises(RuntimeError, match="cable"):
        crashing.fit()
    with open(tmp_path / "b" / "metrics.jsonl", "a") as file:
        file.write('{"step": 11, "lo')  # a row half written
    again = Regression(tmp_path / "b")
    again.fit()
    assert torch.equal(again.weights(), undisturbed.weights())
    assert exact(again.rows()) == exact(undisturbed.rows())


@pytest.mark.parametrize("factor", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_names_its_step(tmp_path: Path, factor: float) -> None:
    run = Regression(tmp_path)
    run.broken = {8: factor}
    with pytest.raises(FloatingPointError, match=r"the loss of step 9 is (nan|inf)"):
        run.fit()
    newest, _ = run.checkpoints.newest()
    assert newest is not None
    assert newest.name == "step-000000008.pt"
    assert [row["step"] for row in run.rows()] == [1, 2, 3, 4, 5, 6, 7, 8]


def test_weights_that_are_not_finite_are_never_saved(tmp_path: Path) -> None:
    run = Regression(tmp_path)
    run.broken = {7: 1e38}  # the loss stays finite, its gradient does not
    with pytest.raises(FloatingPointError, match="step 8"):
        run.fit()
    newest, _ = run.checkpoints.newest()
    assert newest is not None
    assert newest.name == "step-000000004.pt"


def test_told_to_stop_between_two_looks_it_saves_that_very_step(tmp_path: Path) -> None:
    run = Regression(tmp_path, replace(PLAN, log_every=100, save_every=100, evaluate_every=0))
    run.told_at = 6
    with pytest.raises(Preempted, match="saved at step 7"):
        run.fit()
    assert [row["step"] for row in run.rows()] == [1, 2, 3, 4, 5, 6, 7]


def test_a_last_save_that_fails_is_no_finished_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, save, calls = Regression(tmp_path), torch.save, []

    def full_for_a_while(*words: Any) -> None:
        calls.append(words[0]["step"])
        if len(calls) in broken:
            raise OSError(28, "No space left on device")
        save(*words)

    monkeypatch.setattr(torch, "save", full_for_a_while)
    broken = {2}
    run.fit()  # the second of three: training goes on, and says so
    log = (tmp_path / "logs" / "rank_0.log").read_text()
    assert "warning: the checkpoint of step 8 was not written: [Errno 28] No space left on device" in log
    assert sorted(p.name for p in tmp_path.glob("checkpoints/*.pt")) == ["step-000000004.pt", "step-000000012.pt"]

    (tmp_path / "again").mkdir()
    again, broken = Regression(tmp_path / "again"), {6}
    with pytest.raises(UserError, match=r"step 12 was not written.*make room in"):
        again.fit()
