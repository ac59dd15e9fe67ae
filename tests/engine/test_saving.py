"""A save costs training only the copy, all of which is told; at the end of a run there is patience with a full disk."""

from __future__ import annotations

import os
import re
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from barlow.engine import loop
from barlow.engine.checkpoint import Checkpoints
from barlow.engine.loop import Plan, Saver, patiently
from barlow.engine.record import Recorder
from barlow.files import read_status
from barlow.pulse import Pulse

PLAN = Plan(steps=12, steps_per_epoch=4, batch_size=8, log_every=5, save_every=4, evaluate_every=6)


class Training:
    """What the loop has when it saves."""

    def __init__(self, folder: Path) -> None:
        self.model = torch.nn.Linear(3, 8)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1)
        self.checkpoints = Checkpoints(folder / "checkpoints", keep=9)
        (folder / "checkpoints").mkdir()
        self.recorder = Recorder(folder, 0, PLAN.steps, 0)
        self.pulse = Pulse()
        self.saver = Saver(PLAN, 0, self.state, self.checkpoints, self.recorder, self.pulse)

    def state(self) -> dict[str, Any]:
        return {"model": self.model.state_dict()}

    def row(self, step: int) -> None:
        numbers = {"loss": 1.0, "lr": 0.1, "images_per_sec": 5.0, "data_wait": 0.0}
        self.recorder.write([{"step": step, "epoch": step / 4, "images": 8 * step, **numbers}])

    def save(self, step: int) -> None:
        self.saver.save(step)


def test_training_syncs_nothing_and_rows_come_before_their_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    training, fsync = Training(tmp_path), os.fsync
    synced: list[tuple[str, str]] = []

    def watched(handle: int) -> None:
        synced.append((threading.current_thread().name, Path(os.readlink(f"/proc/self/fd/{handle}")).name))
        named.append(list(tmp_path.glob("checkpoints/step-*")))
        fsync(handle)

    named: list[list[Path]] = []
    monkeypatch.setattr(os, "fsync", watched)
    training.row(4)
    training.save(4)
    training.checkpoints.finish()
    assert {thread for thread, _ in synced} == {"checkpoint_0"}
    assert named[[name for _, name in synced].index("metrics.jsonl")] == []
    assert read_status(tmp_path)["step"] == 4
    assert training.saver.saved == 4


def test_the_stall_is_all_that_training_waits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    training = Training(tmp_path)

    def slow() -> float:
        """Of all that is done there."""
        time.sleep(0.2)
        return 0.0

    monkeypatch.setattr(loop.stop, "shortest_notice", slow)
    began = time.perf_counter()
    training.save(4)
    waited = time.perf_counter() - began
    training.checkpoints.finish()
    stall = re.search(r"written in [\d.]+ s \(stall ([\d.]+) s, [\d.]+ MB\)", training.checkpoints.take_news()[0])
    assert stall
    assert float(stall[1]) + 0.001 >= 0.2
    assert float(stall[1]) == pytest.approx(waited, abs=0.02)


def test_a_save_whose_rows_found_no_room_is_owed_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    training, fsync = Training(tmp_path), os.fsync

    def full(handle: int) -> None:
        if os.readlink(f"/proc/self/fd/{handle}").endswith("metrics.jsonl"):
            raise OSError(28, "No space left on device")
        fsync(handle)

    monkeypatch.setattr(loop, "AGAIN", 60.0)
    monkeypatch.setattr(os, "fsync", full)
    training.row(4)
    assert training.saver.due(4)
    training.save(4)
    training.checkpoints.wait()
    assert "step 4 was not written: the disk does not take its rows" in training.checkpoints.failed
    assert not list(tmp_path.glob("checkpoints/*"))
    assert not training.saver.due(5)  # not at each step
    monkeypatch.setattr(loop, "AGAIN", 0.0)
    assert training.saver.due(6)
    monkeypatch.setattr(os, "fsync", fsync)
    training.save(6)
    training.checkpoints.finish()
    assert not training.saver.due(7)
    assert (tmp_path / "metrics.jsonl").read_text().count("\n") == 1


def test_a_save_before_the_last_is_waited_for_with_the_time_of_a_save(tmp_path: Path) -> None:
    training = Training(tmp_path)
    done: list[str] = []
    training.pulse.beat = lambda step, phase, within: done.append(phase)  # type: ignore[method-assign]
    whole = training.checkpoints.wait

    def wait() -> None:
        done.append("wait")
        whole()

    training.checkpoints.wait = wait  # type: ignore[method-assign]
    assert training.saver.save_and_leave(7) == ""
    assert done[:2] == ["save", "wait"]


def test_memory_that_cannot_be_made_ready_ends_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    training = Training(tmp_path)

    def no_room(_: object) -> None:
        raise RuntimeError("cannot pin memory")

    monkeypatch.setattr(training.checkpoints._snapshot, "make_room", no_room)
    training.checkpoints.prepare(training.state())
    training.checkpoints.wait()
    told = "warning: no memory could be made ready for checkpoints: cannot pin memory"
    assert training.checkpoints.take_news() == [told]
    training.save(4)
    training.checkpoints.finish()
    assert training.checkpoints.saved == 4


def test_the_end_of_a_run_waits_for_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "AGAIN", 0.01)
    said: list[str] = []
    tried: list[int] = []

    def full_for_a_while() -> None:
        tried.append(1)
        if len(tried) < 4:
            raise OSError(28, "No space left on device")

    patiently(full_for_a_while, said.append)
    assert said == ["warning: the end of the run is not on disk yet: [Errno 28] No space left on device"] * 3
    monkeypatch.setattr(loop, "PATIENCE", 0.05)
    monkeypatch.setattr(loop, "AGAIN", 0.03)

    def full() -> None:
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        patiently(full, said.append)
