"""Commands that run beside the other tests, at the lowest priority: most tests keep one core busy, or wait.

`@pytest.mark.beside(commands=...)`: `commands(folder)` are lists of words. They begin when the tests have been
collected, one after the other, in one thread each; the tests that are marked run last, and get what came of theirs from
the fixture `beside`."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import tempfile
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[1]


class Done(NamedTuple):
    """What came of a command."""

    folder: Path
    code: int
    told: str


PATIENCE = 1200.0
"""Seconds that a test waits for what its commands, and those before them, come to."""
GRACE = 10.0
"""Seconds between being told to end and being killed."""
STARTED = pytest.StashKey[list[Future[Done]]]()


class Beside:
    """One command at a time."""

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="beside-"))
        self.thread = ThreadPoolExecutor(1)
        self.running: subprocess.Popen[str] | None = None
        self.over = False
        self.lock = threading.Lock()  # nothing starts once it is over

    def start(self, item: pytest.Item, number: int) -> None:
        folder = self.folder / str(number)
        folder.mkdir()
        commands = item.get_closest_marker("beside").kwargs["commands"](folder)  # type: ignore[union-attr]
        item.stash[STARTED] = [self.thread.submit(self.run, words, folder) for words in commands]

    def run(self, words: list[str], folder: Path) -> Done:
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        with self.lock:
            if self.over:
                return Done(folder, -1, "")
            self.running = subprocess.Popen(
                ["nice", "-n", "19", *words],
                cwd=ROOT,
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                start_new_session=True,
            )
        told, _ = self.running.communicate()
        return Done(folder, self.running.returncode, told)

    def end(self) -> None:
        """Also when the tests are interrupted: nothing is left."""
        with self.lock:
            self.over = True
        if self.running and self.running.poll() is None:
            self._signal(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.running.wait(GRACE)
            self._signal(signal.SIGKILL)  # also those of its session that outlive it, and hold its output open
        self.thread.shutdown()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _signal(self, number: signal.Signals) -> None:
        assert self.running is not None
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.running.pid, number)


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "beside(commands): looks at what came of commands that ran beside other tests")


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.get_closest_marker("beside") is not None)


@pytest.hookimpl(wrapper=True)
def pytest_runtestloop(session: pytest.Session) -> Iterator[None]:
    wanted = [item for item in session.items if item.get_closest_marker("beside")]
    if not wanted or session.config.option.collectonly:
        return (yield)
    beside = Beside()
    try:
        for number, item in enumerate(wanted):
            beside.start(item, number)
        return (yield)
    finally:
        beside.end()


@pytest.fixture
def beside(request: pytest.FixtureRequest) -> list[Done]:
    """What came of this test's commands, in their order."""
    return [started.result(PATIENCE) for started in request.node.stash[STARTED]]
