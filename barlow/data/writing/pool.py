"""Worker processes that compute ahead while their results are taken in order."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import contextmanager
from itertools import islice
from multiprocessing import connection
from typing import Any

AHEAD = 4
"""Calls a process that are at work or waiting before the one whose result is next."""

Call = tuple[Callable[..., Any], tuple[Any, ...]]
InOrder = Callable[[Iterable[Call]], Iterator[Any]]


@contextmanager
def processes(count: int, start: Callable[[], None], preload: list[str]) -> Iterator[InOrder]:
    """Gives a function from calls to their results, in order. Each process calls `start`; `preload` is imported once.

    A process that dies raises BrokenProcessPool here; the processes end when this one does, however it ends.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(preload)
    pool = ProcessPoolExecutor(count, context, initializer=_start, initargs=(start,))

    def in_order(calls: Iterable[Call]) -> Iterator[Any]:
        rest = iter(calls)
        waiting: deque[Future[Any]] = deque(pool.submit(call, *values) for call, values in islice(rest, AHEAD * count))

        def results() -> Iterator[Any]:
            while waiting:
                result = waiting.popleft().result()
                waiting.extend(pool.submit(call, *values) for call, values in islice(rest, 1))
                yield result

        return results()

    try:
        yield in_order
    finally:
        pool.shutdown(cancel_futures=True)


def _start(start: Callable[[], None]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    threading.Thread(target=_end_with_parent, daemon=True).start()
    start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        connection.wait([parent.sentinel])
        os._exit(1)
