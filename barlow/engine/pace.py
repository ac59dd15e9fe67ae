"""How far the host may be ahead of the GPU: far enough that it never waits, near enough to know where it is."""

from __future__ import annotations

from collections import deque

import torch
from torch import Tensor

STEPS = 2


class Pace:
    """Left alone, the host enqueues steps until it next asks for a number: all that time it holds their batches and
    views, a heartbeat speaks of steps that are yet to come, and waiting for data is taken for nothing."""

    def __init__(self) -> None:
        self.ends: deque[torch.cuda.Event] = deque()  # of the steps that the GPU may still be at

    def enqueued(self, loss: Tensor) -> None:
        """A step has been given to the device of its loss."""
        if loss.is_cuda:
            self.ends.append(torch.cuda.Event(blocking=True))  # the host sleeps meanwhile: others decode
            self.ends[-1].record(torch.cuda.current_stream(loss.device))

    def wait(self) -> None:
        """Until the GPU has no more than STEPS to do."""
        while len(self.ends) > STEPS:
            self.ends.popleft().synchronize()
