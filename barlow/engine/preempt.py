"""Being told to stop: a signal to any rank becomes one decision of all ranks, at a step boundary."""

from __future__ import annotations

import signal
from types import FrameType

from barlow import dist

SIGNALS = (signal.SIGTERM, signal.SIGUSR2)


class StopRequest:
    """Remembers the first stop signal of this process. Handlers only set a flag: the loop saves and leaves."""

    def __init__(self) -> None:
        self.signal = ""
        for number in SIGNALS:
            signal.signal(number, self._note)

    def _note(self, number: int, _: FrameType | None) -> None:
        self.signal = self.signal or signal.Signals(number).name

    def agreed(self) -> bool:
        """Whether any rank was told; a collective call, so every rank gets the same answer."""
        return bool(dist.highest(int(bool(self.signal))))
