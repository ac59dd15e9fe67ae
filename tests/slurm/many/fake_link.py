"""A stage of a moment, for the tests of chains: it notes that it ran, and ends as files in its folder say."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

from fake_stage import stop_when_told  # type: ignore[import-not-found]  # it lies beside this one in RUN/code

from barlow.errors import UserError
from barlow.files import write_status


def main(run_folder: str) -> None:
    folder = Path(run_folder)
    config = json.loads((folder / "config.json").read_text())
    again = (folder / "ran").exists()
    with open(folder / "ran", "a") as file:
        file.write(f"{time.time()}\n")
    if (folder / "broken").exists():
        raise UserError("its shards are gone")
    if (folder / "held").exists():
        stop_when_told(folder / "ready", 0.1)
    if config.get("killed_once") and not again:
        os.kill(os.getpid(), signal.SIGKILL)
    if config.get("slow_once") and not again:
        time.sleep(60)
    write_status(folder, state="finished", why="", step=1, steps=1)
