"""python fake_rank.py RUN_FOLDER JSON: a rank of no run, for the tests of slurm/job/watchdog.py.

JSON: `beats`, a list of [step, phase, seconds until the next one at the latest], what it does `then`; `constants` of
the watchdog; how many `threads` it has beside the main one."""

from __future__ import annotations

import ctypes
import json
import sys
import threading
import time
from pathlib import Path
from typing import Any

from barlow import pulse
from slurm.job import watchdog

ATTEMPT = "7.0"
QUICK = {"TICK": 0.05, "EVERY": 0.25, "SETTLE": 0.2, "GIVE_WAY": 0.5, "DUMP": 1.0}


def main(folder: Path, config: dict[str, Any]) -> None:
    for name, value in {**QUICK, **config.get("constants", {})}.items():
        assert hasattr(watchdog, name)
        setattr(watchdog, name, value)
    watchdog.start(folder, ATTEMPT)
    for _ in range(config.get("threads", 0)):
        threading.Thread(target=wait, daemon=True).start()
    beats = pulse.of_this_rank()
    for step, phase, within in config.get("beats", []):
        beats.beat(step, phase, within)
    print("there", flush=True)
    globals()[config["then"]](beats)


def wait(_: object = None) -> None:
    """Hang, as in a collective."""
    while True:
        time.sleep(60)


def hold(_: object) -> None:
    """Hang in C, and hold the GIL."""
    while True:
        ctypes.PyDLL(None).sleep(60)


def move(beats: pulse.Pulse) -> None:
    for step in range(10**6):
        beats.beat(step, "step", 1.0)
        time.sleep(0.02)


def dawdle(beats: pulse.Pulse) -> None:
    """Be late once, but not for long."""
    beats.beat(1, "data", 0.2)
    time.sleep(1.0)
    print("late", flush=True)
    move(beats)


def leave(_: object) -> None:
    time.sleep(0.3)


def fail(_: object) -> None:
    time.sleep(0.3)
    raise ValueError("as ranks do")


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(sys.argv[2]))
