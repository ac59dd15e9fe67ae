"""What a run writes while it runs: metrics.jsonl, TensorBoard, a log file a rank, and the line a person looks at."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import IO, Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from barlow.files import write_status


class Recorder:
    """Rank 0 records and prints; every rank has its own log file."""

    def __init__(self, folder: Path, rank: int, steps: int, start: int) -> None:
        self.rank = rank
        self.steps = steps
        self._log = open(folder / "logs" / f"rank_{rank}.log", "a", buffering=1)  # noqa: SIM115  (closed in close)
        self._prints = rank == 0 and not is_file(sys.stdout, self._log)  # a cluster sends stdout into this very log
        self._folder = folder
        self._progress: Progress | None = None
        self._pace: float | None = None  # seconds a step, smoothed
        self._last = (start, time.perf_counter())
        if rank > 0:
            return
        metrics = folder / "metrics.jsonl"
        cut_after(metrics, start)
        self._metrics = open(metrics, "a")  # noqa: SIM115  (closed in close)
        from torch.utils.tensorboard import SummaryWriter

        self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=start + 1)
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
        self._log.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {line}\n")
        if not self._prints:
            return
        if self._progress is not None:
            self._progress.console.print(line, highlight=False, markup=False)
        else:
            print(line, flush=True)

    def write(self, rows: Sequence[Mapping[str, Any]]) -> None:
        if self.rank > 0 or not rows:
            return
        for row in rows:
            self._metrics.write(json.dumps(row) + "\n")
            for name, value in row.items():
                if name not in ("step", "epoch", "images"):
                    self._board.add_scalar(name, value, row["step"])
        self._metrics.flush()
        self._show(rows[-1])

    def _show(self, row: Mapping[str, Any]) -> None:
        step, now = row["step"], time.perf_counter()
        told = f"loss {row['loss']:.4g}  lr {row['lr']:.3g}  {row['images_per_sec']:,.0f} images/s"
        told += f"  wait {row['data_wait']:.3f} s"
        found = "".join(f"  {name} {value:.2f}" for name, value in row.items() if name.startswith("knn"))
        if self._progress is not None:
            self._progress.update(self._bar, completed=step, told=f"epoch {row['epoch']:.1f}  {told}")
            if found:
                self.say(f"step {step}{found}")
            else:
                self._log.write(f"step {step}  {told}\n")
            return
        pace = (now - self._last[1]) / max(1, step - self._last[0])
        self._pace = pace if self._pace is None else 0.7 * self._pace + 0.3 * pace
        self._last = (step, now)
        left = timedelta(seconds=round(self._pace * (self.steps - step)))
        self.say(f"step {step}/{self.steps}  epoch {row['epoch']:.1f}  {told}{found}  left {left}")

    def saving(self, step: int) -> None:
        """Before a checkpoint: the rows of its steps survive a crash of the machine, and status.json has its step."""
        os.fsync(self._metrics.fileno())
        write_status(self._folder, step=step)

    def close(self) -> None:
        if self._progress is not None:
            self._progress.stop()
            self._progress = None
        if self.rank == 0:
            self._metrics.close()
            self._board.close()
        self._log.close()


def is_file(stream: IO[str], file: IO[str]) -> bool:
    try:
        return os.path.sameopenfile(stream.fileno(), file.fileno())
    except (OSError, ValueError):  # a stream that is no file
        return False


def cut_after(metrics: Path, step: int) -> None:
    """Drop the rows of steps that will be made again, and a last line that a crash left half written."""
    if not metrics.exists():
        return
    kept = []
    for line in metrics.read_text().splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            break
        if row["step"] > step:
            break
        kept.append(line + "\n")
    fresh = metrics.with_name(f".{metrics.name}.{os.getpid()}")
    fresh.write_text("".join(kept))
    fresh.replace(metrics)
