"""Being told to stop: SIGTERM or SIGUSR2, heard at once wherever the main thread is. Torch-free.

The end of a step is where a run stops well: within `heeding()` the loop is trusted to get there, but only for a part of
the notice that is given, for it may wait for a rank that never comes. Outside, nothing is lost by leaving at once."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGUSR2)
STOPPED = 75  # exit code of a process that was told to stop (EX_TEMPFAIL: try again)
VARIABLE = "BARLOW_NOTICE"  # seconds from a signal to the end that it announces, as in "SIGTERM=30 SIGUSR2=120"
UNKNOWN = 60.0  # seconds, where nobody said
SHARE = 0.7  # of the notice: the rest is for putting the job back

_told = ""
_listening = False
_heeding = False
_over = threading.Event()  # the loop has ended, and not because it was told to


def told() -> str:
    """The name of the first signal to stop that this process got; empty if there was none."""
    return _told


def listen(leave: Callable[[str], object]) -> None:
    """Hear the signals from now on. `leave(why)` is called on a thread, and must end the process.

    SIGUSR2 is blocked and waited for, since a mask is inherited, unlike a handler: what this process starts does not
    die of a signal that SLURM sends to the whole tree. SIGTERM is left to end such children."""
    global _listening
    _listening = True
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    signal.set_wakeup_fd(writing, warn_on_full_buffer=False)  # gets a signal's number though the main thread is in C
    signal.signal(signal.SIGTERM, _ignore)
    signal.signal(signal.SIGCONT, signal.SIG_DFL)
    signal.signal(signal.SIGUSR2, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR2})

    def wait_for_usr2() -> None:
        os.write(writing, bytes([signal.sigwait({signal.SIGUSR2})]))

    def hear() -> None:
        while (number := os.read(reading, 1)[0]) not in SIGNALS:
            pass
        note(number)
        seconds = budget(_told)
        if _heeding and not _over.wait(seconds):
            leave(f"{_told}; no step ended within {seconds:.0f} s")
        leave(f"{_told} outside training")

    for body in (wait_for_usr2, hear):
        threading.Thread(target=body, name=body.__name__, daemon=True).start()


def listening() -> bool:
    return _listening


def note(number: int) -> None:
    """Remember a signal; the first one counts."""
    global _told
    _told = _told or signal.Signals(number).name


@contextlib.contextmanager
def heeding() -> Iterator[None]:
    """Around a loop that looks at `told` after each step. What it raises is the end of the process anyway."""
    global _heeding
    _over.clear()
    _heeding = True
    yield
    _heeding = False
    _over.set()


def notice(name: str) -> float:
    """Seconds between this signal and the end; 0 if nobody said."""
    given = dict(word.split("=") for word in os.environ.get(VARIABLE, "").split())
    return float(given.get(name, 0))


def shortest_notice() -> float:
    """Of all signals; 0 if nobody said."""
    return min(filter(None, (notice(each.name) for each in SIGNALS)), default=0.0)


def budget(name: str) -> float:
    """Seconds that the loop has to reach the end of a step and save."""
    return SHARE * (notice(name) or UNKNOWN)


def _ignore(_: int, __: FrameType | None) -> None:
    """The number is in the pipe already."""
