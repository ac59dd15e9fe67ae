"""How far the host may be ahead of the GPU: far enough that it never waits, near enough to know where it is."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping

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

    def wait(self, most: int = STEPS) -> None:
        """Until the GPU has no more than so many steps to do."""
        while len(self.ends) > most:
            self.ends.popleft().synchronize()

    @property
    def behind(self) -> int:
        """Steps whose end nobody has waited for: what they have copied to the host may not be there yet."""
        return len(self.ends)


def to_host(loss: Tensor, metrics: Mapping[str, Tensor]) -> Tensor:
    """The loss and the metrics [1 + metrics] on the host, without waiting for them: they are there once the GPU has
    come to the end of what has been enqueued. To read them off the GPU would be to wait for all of that, at once."""
    numbers = torch.stack([loss.detach(), *(metric.detach().to(loss.dtype) for metric in metrics.values())])
    if not numbers.is_cuda:
        return numbers
    host = torch.empty(numbers.shape, dtype=numbers.dtype, pin_memory=True)
    return host.copy_(numbers, non_blocking=True)
