"""Worker processes that compute ahead while their results are taken in order.

Each has a line of its own to a thread here. In the standard library's pools the workers share one, and a worker killed
in the middle of a large result leaves everyone waiting for the rest of it.
"""

from __future__ import annotations

import multiprocessing
import signal
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from itertools import islice
from multiprocessing.connection import Connection
from queue import SimpleQueue
from typing import Any

from barlow.errors import UserError

AHEAD = 4
"""Calls a process that are at work or done before the one whose result is next."""

Call = tuple[Callable[..., Any], tuple[Any, ...]]
InOrder = Callable[[Iterable[Call]], Iterator[Any]]


class DeadWorkerError(RuntimeError):
    """A worker process is gone without an answer: killed, or crashed."""


@contextmanager
def processes(count: int, start: Callable[[], None], preload: list[str]) -> Iterator[InOrder]:
    """Gives a function from calls to their results, in order. Each process calls `start`; `preload` is imported once.

    What a call raises is raised here, as is a DeadWorkerError. The processes end when this one does, however it ends.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(preload)
    lines: SimpleQueue[Connection] = SimpleQueue()
    workers = []
    for _ in range(count):
        ours, theirs = context.Pipe()
        workers.append(context.Process(target=_serve, args=(theirs, start), daemon=True))
        workers[-1].start()
        theirs.close()
        lines.put(ours)
    threads = ThreadPoolExecutor(count)

    def ask(call: Call) -> Any:
        line = lines.get()
        try:
            line.send(call)
            result, error = line.recv()
        except (EOFError, OSError):
            raise DeadWorkerError from None
        finally:
            lines.put(line)
        if error is not None:
            raise error
        return result

    def in_order(calls: Iterable[Call]) -> Iterator[Any]:
        rest = iter(calls)
        waiting: deque[Future[Any]] = deque(threads.submit(ask, call) for call in islice(rest, AHEAD * count))

        def results() -> Iterator[Any]:
            while waiting:
                result = waiting.popleft().result()
                waiting.extend(threads.submit(ask, call) for call in islice(rest, 1))
                yield result

        return results()

    try:
        yield in_order
    finally:
        threads.shutdown(cancel_futures=True)
        for _ in workers:
            lines.get().close()  # which ends the worker at its other end
        for worker in workers:
            worker.join()


def _serve(line: Connection, start: Callable[[], None]) -> None:
    """A worker's life: it ends when the other end of its line does."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    start()
    try:
        while True:
            function, values = line.recv()
            line.send(_answer(function, values))
    except (EOFError, OSError):
        pass


def _answer(function: Callable[..., Any], values: tuple[Any, ...]) -> tuple[Any, Exception | None]:
    try:
        return function(*values), None
    except UserError as error:
        return None, error
    except Exception:  # it may be one that cannot travel
        return None, RuntimeError(f"in a worker process:\n{traceback.format_exc()}")
