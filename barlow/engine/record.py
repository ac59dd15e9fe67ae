"""What a run writes while it runs: metrics.jsonl, TensorBoard, a log file a rank, and the line a person looks at.

None of it can end the run: what a full disk refuses is held in memory until there is room (see journal.py)."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import IO, Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from barlow.engine.board import Board
from barlow.engine.journal import DurableJournal, Journal
from barlow.files import write_status, write_whole

SHARES = ("mask", "pseudo_top1")  # of a step, which people watch beside its loss


class Recorder:
    """Rank 0 records and prints; every rank has its own log file."""

    def __init__(self, folder: Path, rank: int, steps: int, start: int) -> None:
        self.rank = rank
        self.steps = steps
        self._log = Journal(folder / "logs" / f"rank_{rank}.log")
        self._prints = rank == 0 and not is_file(sys.stdout, self._log)  # a cluster sends stdout into this very log
        self._folder = folder
        self._progress: Progress | None = None
        self._pace: float | None = None  # seconds a step, smoothed
        self._last = (start, time.perf_counter())
        self._told = ""  # the fault that people have been told of
        self._start = start
        self._last_row: dict[str, Any] = {}  # of those that an earlier process wrote
        if rank > 0:
            return
        self._last_row = cut_after(folder / "metrics.jsonl", start)
        self._metrics = DurableJournal(folder / "metrics.jsonl")
        self._board = Board(folder / "tensorboard", start)
        if sys.stdout.isatty():
            columns = (
                BarColumn(bar_width=6),
                TextColumn("{task.fields[told]}"),
                TimeRemainingColumn(),
            )
            self._progress = Progress(*columns, console=Console())
            self._bar = self._progress.add_task("", total=steps, completed=start, told="")
            self._progress.start()

    def say(self, line: str) -> None:
        """One line for people: into the rank's log, and from rank 0 to the terminal."""
        self._note(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {line}")
        if not self._prints:
            return
        with suppress(OSError):  # stdout may be a file on a full disk, or a terminal that is gone
            if self._progress is not None:
                self._progress.console.print(line, highlight=False, markup=False)
            else:
                print(line, flush=True)

    def write(self, rows: Sequence[Mapping[str, Any]]) -> None:
        if self.rank > 0 or not rows:
            return
        self._metrics.write("".join(json.dumps(row) + "\n" for row in rows).encode())
        self._last_row = dict(rows[-1])
        self._board.write(rows)
        self._show(rows[-1])
        self._tell()

    @property
    def unevaluated(self) -> bool:
        """Whether the last row of an earlier process lacks the numbers of an evaluation."""
        return self._last_row.get("step") == self._start and not any(map(evaluated, self._last_row))

    def amend(self, numbers: Mapping[str, Any]) -> None:
        """Add an evaluation to the last row of an earlier process, before any other is written: whole or not at all,
        for its checkpoint is on the disk and needs it."""
        if self.rank > 0:
            return
        path, row = self._folder / "metrics.jsonl", {**self._last_row, **numbers}
        self._metrics.close()
        try:
            before = path.read_bytes().splitlines(keepends=True)[:-1]
            write_whole(path, b"".join([*before, (json.dumps(row) + "\n").encode()]))
        except OSError as error:
            self.say(f"warning: the row of step {row['step']} has no evaluation: {error}")
        self._metrics = DurableJournal(path)
        self._board.write([{"step": row["step"], **numbers}])
        self._show(row)

    def saving(self, step: int) -> bool:
        """Before a checkpoint: whether the rows of its steps survive a crash of the machine; without them it must wait.
        status.json has its step then. Both take their time: for the thread that writes the checkpoint."""
        durable = self._metrics.sync()
        if durable:
            with suppress(OSError):
                write_status(self._folder, step=step)
        return durable

    def _tell(self) -> None:
        fault, before, self._told = self._metrics.fault, self._told, self._metrics.fault
        if fault and not before:
            self.say(f"warning: {fault}; rows are held in memory, and no checkpoint is made, until it can be written")
        elif before and not fault:
            self.say("metrics.jsonl is whole again")

    def _note(self, line: str) -> None:
        self._log.write(f"{line}\n".encode())

    def _show(self, row: Mapping[str, Any]) -> None:
        step, now = row["step"], time.perf_counter()
        told = f"loss {row['loss']:.4g}  lr {row['lr']:.3g}  {row['images_per_sec']:,.0f} images/s"
        told += f"  wait {row['data_wait']:.3f} s"
        told += "".join(f"  {name} {row[name]:.1f} %" for name in SHARES if name in row)
        found = "".join(f"  {name} {value:.2f}" for name, value in row.items() if evaluated(name))
        if self._progress is not None:
            self._progress.update(self._bar, completed=step, told=f"epoch {row['epoch']:.1f}  {told}")
            if found:
                self.say(f"step {step}{found}")
            else:
                self._note(f"step {step}  {told}")
            return
        pace = (now - self._last[1]) / max(1, step - self._last[0])
        self._pace = pace if self._pace is None else 0.7 * self._pace + 0.3 * pace
        self._last = (step, now)
        left = timedelta(seconds=round(self._pace * (self.steps - step)))
        self.say(f"step {step}/{self.steps}  epoch {row['epoch']:.1f}  {told}{found}  left {left}")

    def close(self) -> None:
        if self._progress is not None:
            with suppress(OSError):
                self._progress.stop()
            self._progress = None
        if self.rank == 0:
            self._metrics.close()
            self._board.close()
            if self._metrics.fault:
                self.say(f"warning: {self._metrics.fault}; rows since the last checkpoint are lost, to be made again")
            let_go_of(sys.stdout)
        self._log.close()


def evaluated(name: str) -> bool:
    """Whether a number of a row is an evaluation's, by its name."""
    return name.startswith(("knn_", "train_", "val_"))


def is_file(stream: IO[str], file: Journal) -> bool:
    try:
        return os.path.sameopenfile(stream.fileno(), file.fileno())
    except (OSError, ValueError):  # a stream that is no file
        return False


def let_go_of(stream: IO[str]) -> None:
    """What a full disk has refused of it is given up: Python would try again at its very end, and exit with 120."""
    try:
        stream.flush()
    except OSError:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, stream.fileno())
        os.close(null)
        stream.flush()


def cut_after(metrics: Path, step: int) -> dict[str, Any]:
    """Drop the rows of steps that will be made again, and a last line that a crash left half written: in place, for
    that needs no room. Returns the last that is left."""
    if not metrics.exists():
        return {}
    good, last = 0, {}
    with open(metrics, "rb+") as file:
        for line in file:
            try:
                row = json.loads(line)
                if not line.endswith(b"\n") or row["step"] > step:
                    break
            except (ValueError, KeyError, TypeError):
                break
            good, last = good + len(line), row
        file.truncate(good)
    return last
