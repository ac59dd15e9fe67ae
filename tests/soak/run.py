"""A run of four ranks on the development cluster, and one who watches it: what soak's disturbances happen to."""

from __future__ import annotations

import contextlib
import math
import os
import random
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

from barlow import history
from barlow.engine.checkpoint import find
from barlow.errors import UserError
from barlow.files import read_status
from slurm import devcluster, devfaults
from slurm.devfaults import Job, Rank, until

ROOT = Path(__file__).resolve().parents[2]
RANKS = 4
PATIENCE = 240.0  # seconds for SLURM and the run to do what is expected of them
WAITING, OVER = ("PENDING", "REQUEUED"), ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "OUT_OF_MEMORY")


class Broken(Exception):  # noqa: N818  (a state, like Preempted)
    """The run, or SLURM, is where nothing leads on."""


class Watch(threading.Thread):
    """Looks at the run all the time: its steps, what was saved when a start ended, what is left of earlier starts."""

    def __init__(self, cluster: Path, folder: Path, job: str) -> None:
        super().__init__(daemon=True)
        self.cluster, self.folder, self.number = cluster, folder, job
        self.began = time.monotonic()
        self.over = threading.Event()
        self.job = Job()
        self.steps: list[tuple[float, int]] = [(0.0, 0)]  # when a step was seen that had never been made
        self.saved: dict[int, int] = {}  # by start: the newest good checkpoint there was before it
        self.reached: dict[int, int] = {}  # by start: the last step that had been recorded before it
        self.left: set[str] = set()

    def run(self) -> None:
        while not self.over.wait(0.25):
            now, last = time.monotonic() - self.began, last_step(self.folder)
            if last > self.steps[-1][1]:
                self.steps.append((now, last))
            job = devfaults.look(self.cluster, self.number)
            if job.state:
                self.job = job
            if job.state in WAITING:
                self.saved[job.restarts] = newest_good(self.folder)
                self.reached[job.restarts] = last
            elif job.state == "RUNNING" and job.seconds > 10:
                for pid, at in devfaults.of_job(self.number).items():
                    if (start := int(at.get("SLURM_RESTART_COUNT", "0"))) < job.restarts:
                        self.left.add(f"process {pid} of start {start}")

    def next_new_step(self, since: float, step: int) -> float | None:
        """Seconds until a step was made that had never been made before."""
        return next((at - since for at, made in self.steps if made > step and at > since), None)


def last_step(folder: Path) -> int:
    """In metrics.jsonl, by its last whole line."""
    with contextlib.suppress(OSError):
        with open(folder / "metrics.jsonl", "rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - 4096))
            found = re.findall(rb'^\{"step": (\d+),.*\}$', file.read(), re.MULTILINE)
        return int(found[-1]) if found else 0
    return 0


def newest_good(folder: Path) -> int:
    try:
        return int(find(str(folder)).stem.removeprefix("step-"))
    except (UserError, OSError):
        return 0


class Run:
    """The run that is disturbed, and the cluster that it runs on."""

    def __init__(self, words: list[str], cluster: Path, folder: Path, steps: int, chance: random.Random) -> None:
        """Give the command, once."""
        done = subprocess.run(
            [sys.executable, "launchers/pretrain.py", *words], cwd=ROOT, capture_output=True, text=True
        )
        if done.returncode:
            raise Broken(f"the command failed: {done.stdout}{done.stderr}")
        self.cluster, self.folder, self.steps, self.random = cluster, folder, steps, chance
        self.job = str(read_status(folder)["job"])
        self.watch = Watch(cluster, folder, self.job)
        self.watch.start()
        self.later: list[Callable[[], None]] = []  # what a disturbance leaves to be done when the job waits again

    def __enter__(self) -> Run:
        return self

    def __exit__(self, *_: object) -> None:
        """It need not be over, but is watched no longer."""
        self.watch.over.set()
        self.watch.join()

    def look(self) -> Job:
        """Also while slurmctld comes back; a job that nothing can bring on is an error."""
        deadline = time.monotonic() + 60
        while not (job := devfaults.look(self.cluster, self.job)).state and time.monotonic() < deadline:
            time.sleep(0.5)
        held = "held" in job.reason.lower() or "Hold" in job.reason
        if held or (job.state in (*OVER, "") and not self.finished()):
            raise Broken(f"job {self.job} is {job.state or 'gone'} ({job.reason}), at step {last_step(self.folder)}")
        return job

    def finished(self) -> bool:
        return read_status(self.folder).get("state") == "finished"

    def wait_for_end(self) -> None:
        """Until the run has finished and its job is over."""
        while (state := self.look().state) != "COMPLETED":
            if not self.finished() and time.monotonic() - self.watch.began - self.watch.steps[-1][0] > PATIENCE:
                raise Broken(f"no new step for {PATIENCE:.0f} s; job {self.job} is {state}")
            time.sleep(0.5)

    def attempt(self, restarts: int) -> str:
        """The name of a start, in history.jsonl."""
        return f"{self.job}.{restarts}"

    def starts(self) -> dict[str, int]:
        """The step that each start of the job has begun to train with."""
        return {str(e["attempt"]): int(e["step"]) for e in history.read(self.folder) if e["event"] == "start"}

    def trains(self) -> bool:
        """Whether this start of the job has got so far."""
        return self.watch.job.state == "RUNNING" and self.attempt(self.watch.job.restarts) in self.starts()

    def wait_until(self, true: Callable[[], bool], every: float = 0.02, most: float = math.inf) -> None:
        """While the run makes steps; at most so many seconds."""
        began = time.monotonic()
        while not true() and (now := time.monotonic()) - began < most:
            if self.finished():
                raise Broken("the run has finished before all had hit it: give more --steps")
            if self.watch.job.state in OVER or now - max(began, self.watch.began + self.watch.steps[-1][0]) > PATIENCE:
                raise Broken(f"no new step for {PATIENCE:.0f} s; job {self.job} is {self.look().state}")
            time.sleep(every)

    def ranks(self) -> dict[int, Rank]:
        """All of them, as soon as this start of the job has them."""
        found: dict[int, Rank] = {}

        def all_there() -> bool:
            job = self.look()
            found.clear()
            found.update(devfaults.ranks(self.job, job.restarts))
            return job.state == "COMPLETED" or (job.state == "RUNNING" and len(found) == RANKS)

        if not until(all_there, PATIENCE):
            raise Broken(f"{len(found)} of {RANKS} ranks after {PATIENCE:.0f} s; the job: {self.look()}")
        if not found:
            raise Broken("the run has finished before all had hit it: give more --steps")
        return found

    def any_rank(self) -> tuple[str, Rank]:
        number, rank = self.random.choice(sorted(self.ranks().items()))
        return f"rank {number}", rank

    def any_node(self) -> str:
        return self.random.choice(devcluster.names(RANKS))


def send(process: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(process, number)
