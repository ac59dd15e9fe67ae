"""The loop: every step's row once, resumed equals undisturbed bit for bit, broken numbers never reach a checkpoint."""

from __future__ import annotations

import json
import math
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from barlow import dist, stop
from barlow.data import chance
from barlow.engine import loop, pace
from barlow.engine.checkpoint import Checkpoints, load
from barlow.engine.loop import Plan, fit
from barlow.engine.pace import STEPS, Pace
from barlow.engine.preempt import StopRequest
from barlow.engine.record import Recorder
from barlow.errors import Preempted
from barlow.pulse import Pulse

PLAN = Plan(steps=12, steps_per_epoch=4, batch_size=8, log_every=5, save_every=4, evaluate_every=6)


@pytest.fixture(autouse=True)
def nobody_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a process was told it never forgets; here each test is one."""
    monkeypatch.setattr(stop, "_told", "")
    monkeypatch.setattr(stop, "_listening", True)
    monkeypatch.setattr(loop, "PATIENCE", 0.0)
    monkeypatch.setattr(loop, "AGAIN", 0.0)


class Waiting(Checkpoints):
    """Steps here are shorter than a save: so that it is known which are saved, the loop waits for each."""

    @property
    def busy(self) -> bool:
        self.wait()
        return False


class Regression:
    """A small model whose batch at a step is a function of the step, as in a real run."""

    def __init__(self, folder: Path, plan: Plan = PLAN) -> None:
        (folder / "logs").mkdir(exist_ok=True)
        (folder / "checkpoints").mkdir(exist_ok=True)
        self.folder, self.plan = folder, plan
        torch.manual_seed(0)
        self.model = torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1))
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1, momentum=0.9)
        self.checkpoints = Waiting(folder / "checkpoints", keep=9)
        self.request = StopRequest()
        self.pulse = Pulse()
        self.broken: dict[int, float] = {}  # step -> what its loss is multiplied by
        self.told_at = -1
        self.evaluated = 0

    def batches(self, start: int) -> Iterator[Tensor]:
        for at in range(start, self.plan.steps):
            yield torch.randn(8, 3, generator=torch.Generator().manual_seed(at))

    def step(self, batch: Tensor, at: int) -> tuple[Tensor, Mapping[str, Tensor]]:
        if at == self.told_at:
            stop.note(signal.SIGUSR2)
        error = (self.model(batch).squeeze(1) - batch.sum(1)).square().mean()
        return error * self.broken.get(at, 1.0), {"error": error.detach()}

    def evaluate(self) -> Iterator[tuple[str, float]]:
        self.evaluated += 1
        yield "knn_top1", float(self.weights().sum())

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
                self.checkpoints, recorder, self.request, self.evaluate, self.pulse,
            )  # fmt: skip
        finally:
            self.checkpoints.wait()
            recorder.close()

    def rows(self) -> list[dict]:
        return [json.loads(line) for line in (self.folder / "metrics.jsonl").read_text().splitlines()]

    def weights(self) -> Tensor:
        return torch.cat([p.detach().flatten() for p in self.model.parameters()])


class WithDropout(Regression):
    def step(self, batch: Tensor, at: int) -> tuple[Tensor, Mapping[str, Tensor]]:
        torch.manual_seed(chance.seed_of_step(5, at, 0))
        return super().step(torch.nn.functional.dropout(batch, 0.5), at)


def exact(rows: list[dict]) -> list[dict]:
    """Rows without what depends on the clock."""
    return [{key: value for key, value in row.items() if key not in ("images_per_sec", "data_wait")} for row in rows]


@pytest.fixture
def late(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU: steps are under way, and of one whose end nobody has waited for the host has no number yet."""

    under_way: list[tuple[Tensor, Tensor]] = []

    class Late(Pace):
        def enqueued(self, loss: Tensor) -> None:
            self.ends.append(under_way.pop())  # type: ignore[arg-type]

        def wait(self, most: int = STEPS) -> None:
            while len(self.ends) > most:
                host, numbers = self.ends.popleft()  # type: ignore[misc]
                host.copy_(numbers)  # type: ignore[has-type]

    def to_host(loss: Tensor, metrics: Mapping[str, Tensor]) -> Tensor:
        numbers = pace.to_host(loss, metrics)
        host = torch.full_like(numbers, math.nan)
        under_way.append((host, numbers))
        return host

    monkeypatch.setattr(loop, "Pace", Late)
    monkeypatch.setattr(loop, "to_host", to_host)


def test_numbers_are_read_when_they_are_there(tmp_path: Path, late: None, monkeypatch: pytest.MonkeyPatch) -> None:
    told = Regression(tmp_path, replace(PLAN, log_every=2))
    told.fit()
    monkeypatch.undo()
    monkeypatch.setattr(stop, "_listening", True)
    (tmp_path / "plain").mkdir()
    plain = Regression(tmp_path / "plain")
    plain.fit()
    assert exact(told.rows()) == exact(plain.rows())
    assert all(row["images_per_sec"] > 0 for row in told.rows())
    assert torch.equal(told.weights(), plain.weights())


def test_a_loss_that_is_late_and_not_finite_is_in_no_checkpoint(tmp_path: Path, late: None) -> None:
    run = Regression(tmp_path)
    run.broken = {6: math.nan}
    with pytest.raises(FloatingPointError, match="the loss of step 7 is nan"):
        run.fit()
    assert [row["step"] for row in run.rows()] == list(range(1, 7))
    assert [p.name for p in tmp_path.glob("checkpoints/*.pt")] == ["step-000000004.pt"]


def test_every_step_has_its_row(tmp_path: Path) -> None:
    run = Regression(tmp_path)
    run.fit()
    rows = run.rows()
    assert [row["step"] for row in rows] == list(range(1, 13))
    assert [row["images"] for row in rows] == [8 * step for step in range(1, 13)]
    assert rows[3]["epoch"] == 1.0
    assert rows[2]["lr"] == pytest.approx(0.1 / 3)
    assert [row["step"] for row in rows if "knn_top1" in row] == [6]  # the last evaluation is the stage's
    assert run.evaluated == 1
    assert all(row["images_per_sec"] > 0 for row in rows)
    assert [p.name for p in sorted(tmp_path.glob("checkpoints/*.pt"))] == [f"step-{s:09d}.pt" for s in (4, 8, 12)]


def test_told_to_stop_saves_and_the_rest_is_bit_identical(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    undisturbed = Regression(tmp_path / "a")
    undisturbed.fit()

    told = Regression(tmp_path / "b")
    told.told_at = 6
    with pytest.raises(Preempted, match="SIGUSR2; saved at step"):
        told.fit()
    monkeypatch.setattr(stop, "_told", "")  # the next one is another process
    again = Regression(tmp_path / "b")
    again.fit()
    assert torch.equal(again.weights(), undisturbed.weights())
    assert exact(again.rows()) == exact(undisturbed.rows())


def test_told_to_stop_where_it_would_evaluate_it_does_so_when_it_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    undisturbed = Regression(tmp_path / "a")
    undisturbed.fit()
    told = Regression(tmp_path / "b")
    told.told_at = 5
    with pytest.raises(Preempted, match="saved at step 6"):
        told.fit()
    assert told.evaluated == 0
    monkeypatch.setattr(stop, "_told", "")
    for evaluations in (1, 0):  # and once only, if it must begin there again
        again = Regression(tmp_path / "b")
        again.broken = {7: math.nan} if evaluations else {}
        if evaluations:
            with pytest.raises(FloatingPointError):
                again.fit()
        else:
            again.fit()
        assert again.evaluated == evaluations
    assert torch.equal(again.weights(), undisturbed.weights())
    assert exact(again.rows()) == exact(undisturbed.rows())


def test_dropout_goes_on_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = {}
    for name, told_at in (("a", -1), ("b", 6)):
        (tmp_path / name).mkdir()
        run = WithDropout(tmp_path / name)
        run.told_at = told_at
        if told_at > 0:
            with pytest.raises(Preempted):
                run.fit()
            monkeypatch.setattr(stop, "_told", "")
            torch.manual_seed(99)  # another process knows nothing of this generator's state
            run = WithDropout(tmp_path / name)
        run.fit()
        found[name] = run
    assert torch.equal(found["a"].weights(), found["b"].weights())
    losses = [row["loss"] for row in found["a"].rows()]
    assert losses == [row["loss"] for row in found["b"].rows()]
    plain = Regression(tmp_path / "b")
    assert losses[0] != plain.step(next(plain.batches(0)), 0)[0].item()  # it does drop


def test_a_beat_before_all_that_takes_time(tmp_path: Path) -> None:
    beats = []
    run = Regression(tmp_path, replace(PLAN, steps=6, evaluate_every=4, move_seconds=7.0, start_seconds=70.0))
    run.pulse.beat = lambda step, phase, within: beats.append((step, phase, within))  # type: ignore[method-assign]
    run.fit()
    assert beats[:4] == [(0, "data", 70.0), (0, "step", 70.0), (1, "data", 7.0), (1, "step", 7.0)]
    assert (4, "evaluate", 70.0) in beats
    assert {step for step, phase, _ in beats if phase == "save"} == {4, 6}


def test_saves_by_time(tmp_path: Path) -> None:
    plan = replace(PLAN, save_every=100, evaluate_every=0, keep_every=5, save_seconds=0.05)
    run, whole = Regression(tmp_path, plan), Regression.step

    def slow(batch: Tensor, at: int) -> tuple[Tensor, Mapping[str, Tensor]]:
        time.sleep(0.03)
        return whole(run, batch, at)

    run.step = slow  # type: ignore[method-assign]
    run.fit()
    saved = [int(path.stem[5:]) for path in sorted(tmp_path.glob("checkpoints/*.pt"))]
    assert {5, 10, 12} <= set(saved)
    assert 5 <= len(saved) <= 8  # every second step, and the kept ones


def test_training_does_not_wait_for_a_save_under_way(tmp_path: Path) -> None:
    """A save that is due while another is written is put off; the one of a kept step waits."""
    run = Regression(tmp_path, replace(PLAN, save_every=1, evaluate_every=0, keep_every=6))
    began: list[float] = []

    class Slow(Waiting):
        busy = property(lambda self: bool(began) and time.monotonic() - began[-1] < 60)

        def save(self, *words: Any) -> None:
            began.append(time.monotonic())
            super().save(*words)

    run.checkpoints = Slow(tmp_path / "checkpoints", keep=9)
    run.fit()
    assert sorted(path.name for path in tmp_path.glob("checkpoints/*.pt")) == [
        f"step-{step:09d}.pt" for step in (1, 6, 12)
    ]


def test_no_checkpoint_is_newer_than_its_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Regression(tmp_path)
    monkeypatch.setattr(Recorder, "saving", lambda self, step: step > 6)  # no room until then
    run.fit()
    assert [int(path.stem[5:]) for path in sorted(tmp_path.glob("checkpoints/*.pt"))] == [7, 8, 12]


def test_a_slow_checkpoint_is_warned_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(stop.VARIABLE, "SIGTERM=0.000001 SIGUSR2=15")
    Regression(tmp_path).fit()
    log = (tmp_path / "logs" / "rank_0.log").read_text()
    assert log.count("warning: a checkpoint takes") == 1
    assert "of the 0 s notice a stop gives" in log


def last_save(folder: Path) -> bool:
    """Whether the run's end is on the disk when a rank may leave; rank 0 takes its time to write it."""
    stop._listening, save = True, torch.save

    def slow(*words: Any) -> None:
        time.sleep(1.0 if words[0]["step"] == PLAN.steps else 0)
        save(*words)

    torch.save = slow  # type: ignore[assignment]
    (folder / str(dist.rank())).mkdir()
    Regression(folder / str(dist.rank())).fit()
    return (folder / "0" / "checkpoints" / "step-000000012.json").exists()


def test_no_rank_leaves_before_the_last_save_is_done(on_ranks: Callable[..., list[Any]], tmp_path: Path) -> None:
    assert on_ranks(2, last_save, tmp_path) == [True, True]


def test_what_could_not_be_saved_is_not_the_step_it_stopped_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, save = Regression(tmp_path), torch.save
    run.told_at = 6

    def full(*words: Any) -> None:
        if words[0]["step"] > 4:
            raise OSError(28, "No space left on device")
        save(*words)

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(Preempted, match="the checkpoint of step 7 was not written") as caught:
        run.fit()
    assert caught.value.step == 4


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
    with pytest.raises(FloatingPointError, match=r"step [89]"):  # whichever is found first: weights, or the next loss
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
    run.fit()  # the second of three: training goes on, says so, and tries again
    log = (tmp_path / "logs" / "rank_0.log").read_text()
    assert "warning: the checkpoint of step 8 was not written: [Errno 28] No space left on device" in log
    assert [int(p.stem[5:]) for p in sorted(tmp_path.glob("checkpoints/*.pt"))] == [4, 9, 12]

    (tmp_path / "again").mkdir()
    again, broken = Regression(tmp_path / "again"), {7}
    with pytest.raises(OSError, match=r"step 12 was not written.*make room in"):
        again.fit()
