"""From batches to views, on a GPU one batch ahead: while it trains on one, the next is copied and made into views.

What comes out is what `make` gives, to the bit, wherever it is made; only the time differs.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator
from contextlib import closing
from itertools import count
from typing import NamedTuple

import torch
from torch import Tensor

from barlow.data.loader import Batch

Make = Callable[[Batch, int], list[Tensor]]
"""A batch on the device, which step of the run -> what the step is given. On a GPU it must not wait for it, and what it
returns must not be kept here."""


class Made(NamedTuple):
    views: list[Tensor]
    ready: torch.cuda.Event


def feed(
    batches: Generator[Batch, None, None], make: Make, device: torch.device, start: int
) -> Generator[list[Tensor], None, None]:
    """What each step from `start` on is given, `make` of its batch, on the stream that is current when it is asked for.

    What goes wrong with a batch is raised when the steps before it have been given theirs. Closing this, early or not,
    closes `batches`. On a GPU each step that the host is ahead of it holds a batch in host memory and one of views.
    """
    with closing(batches):
        yield from (beside if device.type == "cuda" else in_line)(batches, make, device, start)


def in_line(
    batches: Generator[Batch, None, None], make: Make, device: torch.device, start: int
) -> Generator[list[Tensor], None, None]:
    for at, batch in enumerate(batches, start):
        yield make(Batch(*(each.to(device) for each in batch)), at)


def beside(
    batches: Generator[Batch, None, None], make: Make, device: torch.device, start: int
) -> Generator[list[Tensor], None, None]:
    """On a stream of its own, so that the GPU can do it while it trains. That nothing is read before it is written, nor
    written while it is read, rests on this, buffer by buffer:

    pinned batch   written by the loader's threads before `next` returns, so before the copy is enqueued. torch's
                   allocator of pinned memory notes the copy (non_blocking, from memory of its own) and hands the memory
                   out again only when the copy is done, however early the batch is dropped here.
    device batch,  allocated, written, read and freed on `side` alone: the memory serves again for later work of that
    inside `make`  stream only, which comes after. A batch that is on the device already (a cache) is picked out by
                   `next`, which is called with `side` current, for that.
    views          written on `side`; the consumer's stream waits for `ready` before anything that it enqueues
                   afterwards. Freed by the host while that stream still reads them: record_stream makes the allocator
                   wait for what the stream had been given by then. Without it the memory would go to a later batch.
    what they read but do not make (a cache, constants): enqueued earlier by the consumer's stream, for which `side`
                   waits at the start.
    """
    side = torch.cuda.Stream(device)
    side.wait_stream(torch.cuda.current_stream(device))

    pending: deque[Made] = deque()  # no other name for what is made: the consumer alone decides when it is freed

    def launch(at: int) -> None:
        with torch.cuda.stream(side):
            batch = next(batches)
            there = Batch(*(each.to(device, non_blocking=True) for each in batch))
            pending.append(Made(make(there, at), side.record_event()))

    def hand_over(made: Made) -> list[Tensor]:
        stream = torch.cuda.current_stream(device)
        stream.wait_event(made.ready)
        for view in made.views:
            view.record_stream(stream)
        return made.views

    ended: Exception | None = None
    for at in count(start):
        try:
            launch(at)
        except Exception as error:  # the end, or what went wrong; in its turn
            ended = error
        while len(pending) > (0 if ended else 1):
            yield hand_over(pending.popleft())
        if isinstance(ended, StopIteration):
            return
        if ended:
            raise ended
