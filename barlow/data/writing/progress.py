"""How far the writing of shards is: a bar with images/s on a terminal, a plain line every few seconds elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

SECONDS_BETWEEN_LINES = 5.0


@contextmanager
def progress(total: int, done: int) -> Iterator[Callable[[int], None]]:
    """Gives a function to call with the number of images just written; `done` of the total were there before."""
    with _bar(total, done) if sys.stdout.isatty() else _lines(total, done) as advance:
        yield advance


@contextmanager
def _bar(total: int, done: int) -> Iterator[Callable[[int], None]]:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, Task, TextColumn, TimeRemainingColumn
    from rich.text import Text

    class Rate(TextColumn):
        def render(self, task: Task) -> Text:
            return Text(f"{task.speed:,.0f} images/s" if task.speed else "")

    with Progress(BarColumn(), MofNCompleteColumn(), Rate(""), TimeRemainingColumn()) as bar:
        task = bar.add_task("", total=total, completed=done)
        yield lambda images: bar.advance(task, images)


@contextmanager
def _lines(total: int, done: int) -> Iterator[Callable[[int], None]]:
    start = printed = time.monotonic()
    first = done

    def advance(images: int) -> None:
        nonlocal done, printed
        done += images
        now = time.monotonic()
        if now - printed >= SECONDS_BETWEEN_LINES or done == total:
            printed = now
            print(f"{done:,} of {total:,} images, {(done - first) / (now - start):,.0f} images/s", flush=True)

    yield advance
