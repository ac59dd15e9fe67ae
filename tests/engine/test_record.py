"""What a run records: every row once and in order, whatever the disk does, and never at the price of the run."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from barlow.engine.record import Recorder
from barlow.files import read_status

ROOT = Path(__file__).parents[2]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "logs").mkdir()
    return tmp_path


@contextmanager
def no_file_beyond(size: int) -> Iterator[None]:
    """A disk that refuses what would make a file longer, in the middle of a write, as a full one does."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def row(step: int) -> dict[str, Any]:
    numbers = {"loss": 1 / step, "lr": 0.1, "images_per_sec": 5.0, "data_wait": 0.0}
    return {"step": step, "epoch": step / 4, "images": 8 * step, **numbers}


def recorder(folder: Path, start: int = 0, rank: int = 0) -> Recorder:
    return Recorder(folder, rank, 100, start)


def rows(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def log(folder: Path) -> str:
    return (folder / "logs" / "rank_0.log").read_text()


def curves(folder: Path) -> dict[int, float]:
    """What TensorBoard shows of the loss."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # type: ignore[import-untyped]

    found = EventAccumulator(str(folder / "tensorboard")).Reload()
    assert set(found.Tags()["scalars"]) == {"loss", "lr", "images_per_sec", "data_wait"}
    return {event.step: event.value for event in found.Scalars("loss")}


def test_rows_reach_the_file_the_log_and_tensorboard(folder: Path) -> None:
    record = recorder(folder)
    record.write([row(1), row(2)])
    record.say("a line")
    assert rows(folder) == [row(1), row(2)]  # at once, for who looks
    assert record.saving(2)
    assert read_status(folder)["step"] == 2
    record.close()
    assert curves(folder) == pytest.approx({1: 1.0, 2: 0.5})
    assert "step 2/100  epoch 0.5  loss 0.5" in log(folder)
    assert log(folder).endswith(" a line\n")


def test_going_on_drops_what_will_be_made_again_and_a_torn_row(folder: Path) -> None:
    record = recorder(folder)
    record.write([row(step) for step in (1, 2, 3, 4)])
    record.close()
    inode = (folder / "metrics.jsonl").stat().st_ino
    with open(folder / "metrics.jsonl", "a") as file:
        file.write('{"step": 5, "lo')
    record = recorder(folder, start=3)
    assert rows(folder) == [row(1), row(2), row(3)]
    record.write([{**row(4), "loss": 9.0}])
    record.close()
    assert [r["loss"] for r in rows(folder)] == [1, 1 / 2, 1 / 3, 9.0]
    assert curves(folder) == pytest.approx({1: 1, 2: 1 / 2, 3: 1 / 3, 4: 9.0})
    assert (folder / "metrics.jsonl").stat().st_ino == inode  # in place: a full disk has no room for a copy


@pytest.mark.parametrize("torn", [b'{"step": 3}', b"\0\0\0\n", b"[3]\n", b"\xff\xfe\n", b'{"st\n'])
def test_what_a_crash_can_leave_behind_is_dropped(folder: Path, torn: bytes) -> None:
    whole = (json.dumps(row(1)) + "\n").encode()
    (folder / "metrics.jsonl").write_bytes(whole + torn + whole)
    recorder(folder, start=3).close()
    assert (folder / "metrics.jsonl").read_bytes() == whole


def test_a_full_disk_holds_rows_until_there_is_room(folder: Path) -> None:
    record = recorder(folder)
    record.write([row(1)])
    assert record.saving(1)
    with no_file_beyond((folder / "metrics.jsonl").stat().st_size + 20):  # in the middle of a row
        for step in range(2, 9):
            record.write([row(step)])
            assert not record.saving(step)
        record.say("meanwhile")
        assert read_status(folder)["step"] == 1
        assert b"\n" not in (folder / "metrics.jsonl").read_bytes()[-19:]
    assert record.saving(8)
    assert rows(folder) == [row(step) for step in range(1, 9)]
    record.write([row(9)])
    record.close()
    assert rows(folder) == [row(step) for step in range(1, 10)]
    assert curves(folder) == pytest.approx({step: 1 / step for step in range(1, 10)})
    lines = [line.split(" ", 2)[2] for line in log(folder).splitlines()]
    shown = [f"step {step}/100" for step in range(2, 9)]
    assert [line.split("  ")[0] for line in lines if line.startswith("step")] == ["step 1/100", *shown, "step 9/100"]
    assert [line for line in lines if not line.startswith("step")] == [
        "warning: metrics.jsonl: File too large; rows are held in memory, and no checkpoint is made, until it can be"
        " written",
        "meanwhile",
        "metrics.jsonl is whole again",
    ]


def test_a_disk_that_says_only_in_fsync_that_it_was_full(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record, fsync = recorder(folder), os.fsync
    record.write([row(1)])
    assert record.saving(1)
    durable = (folder / "metrics.jsonl").stat().st_size

    def lost(handle: int) -> None:
        os.ftruncate(handle, durable)  # as a network's disk may: what was taken is gone, or half of it is
        os.pwrite(handle, b'{"step": 2, "lo', durable)
        raise OSError(28, "No space left on device")

    record.write([row(2)])
    monkeypatch.setattr(os, "fsync", lost)
    assert not record.saving(2)
    record.write([row(3)])
    assert not record.saving(3)
    monkeypatch.setattr(os, "fsync", fsync)
    assert record.saving(3)
    record.close()
    assert rows(folder) == [row(1), row(2), row(3)]


def test_what_is_held_to_the_end_is_told_and_made_again(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record = recorder(folder)
    record.write([row(1)])
    assert record.saving(1)
    with no_file_beyond((folder / "metrics.jsonl").stat().st_size + 20):
        record.write([row(2)])
        record.close()
    assert "warning: metrics.jsonl: File too large; rows since the last checkpoint" in capsys.readouterr().out
    again = recorder(folder, start=1)
    assert rows(folder) == [row(1)]
    again.write([row(2)])
    again.close()
    assert rows(folder) == [row(1), row(2)]


def test_a_run_may_begin_while_the_disk_is_full(folder: Path) -> None:
    record = recorder(folder)
    record.write([row(1), row(2)])
    record.close()
    with no_file_beyond(0):
        record = recorder(folder, start=1)
        record.write([row(2)])
        assert not record.saving(2)
    assert record.saving(2)
    record.close()
    assert rows(folder) == [row(1), row(2)]


def test_a_folder_that_is_gone_for_a_while_ends_nothing(folder: Path) -> None:
    (folder / "logs").rmdir()
    (folder / "logs").write_text("")  # where a folder should be
    (folder / "tensorboard").write_text("")
    record = recorder(folder)
    record.say("one")
    record.write([row(1)])
    for name in ("logs", "tensorboard"):
        (folder / name).unlink()
    record.say("two")
    record.write([row(2)])
    record.close()
    assert [line.split(" ", 2)[2].split("  ")[0] for line in log(folder).splitlines()] == [
        "one",
        "step 1/100",
        "two",
        "step 2/100",
    ]
    assert curves(folder) == pytest.approx({1: 1, 2: 0.5})


def test_other_ranks_write_only_their_log(folder: Path) -> None:
    record = recorder(folder, rank=3)
    record.write([row(1)])
    record.say("here")
    record.close()
    assert [str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()] == ["logs/rank_3.log"]


SAYS = "import sys; from pathlib import Path; from tests.engine import test_record as t; t.child(Path(sys.argv[1]))"


def child(folder: Path) -> None:
    """A run of two steps, in a process of its own."""
    record = recorder(folder)
    record.say("first")
    record.write([row(1), row(2)])
    record.close()


def run(folder: Path, stdout: Any) -> subprocess.CompletedProcess[str]:
    command: Sequence[str] = [sys.executable, "-c", SAYS, str(folder)]
    buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    pipe = subprocess.PIPE
    return subprocess.run(command, cwd=ROOT, env=buffered, stdout=stdout, stderr=pipe, text=True, timeout=60)


def test_stdout_on_a_full_disk_is_given_up(folder: Path) -> None:
    with open("/dev/full", "w") as full:
        done = run(folder, full)
    assert done.stderr == ""
    assert done.returncode == 0  # and not 120, as Python ends when it cannot flush
    assert "first" in log(folder)


def test_stdout_that_is_the_log_itself_has_each_line_once(folder: Path) -> None:
    with open(folder / "logs" / "rank_0.log", "a") as same:
        assert run(folder, same).returncode == 0
    assert log(folder).count("first") == 1
