"""Being told to stop: a signal to any rank becomes one decision of all ranks, at the end of a step."""

from __future__ import annotations

import os

import torch

from barlow import dist, stop


class StopRequest:
    """Whether any rank was told. Ranks ask each other while the next step is computed, so that nobody waits for the
    answer: it is the one to the question of the step before, and the same on all ranks."""

    def __init__(self) -> None:
        if not stop.listening():  # nobody has, as where a stage is started by hand
            stop.listen(lambda _: os._exit(stop.STOPPED))
        self._group = dist.host_group()
        self._asked: tuple[torch.Tensor, torch.distributed.Work] | None = None

    @property
    def signal(self) -> str:
        return stop.told()

    def agreed(self, last: bool) -> bool:
        """A collective call, once a step: the answer of the step before; asks again unless this step is the last."""
        if dist.world_size() == 1:
            return bool(stop.told())
        told = False
        if self._asked is not None:
            flag, work = self._asked
            work.wait()
            told, self._asked = bool(flag), None
        if not (last or told):
            flag = torch.tensor(int(bool(stop.told())))
            self._asked = (
                flag,
                torch.distributed.all_reduce(flag, torch.distributed.ReduceOp.MAX, group=self._group, async_op=True),
            )
        return told

    def meet(self) -> None:
        """Until all ranks are here. One that is told to stop leaves where it may, and its launcher ends the others: so
        none gets there before the last save is done."""
        if self._group is not None:
            torch.distributed.barrier(self._group)
