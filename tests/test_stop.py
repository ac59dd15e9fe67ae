"""Signals to stop: heard at once, heeded by a loop within its budget, not passed on to what a rank has started."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from barlow import stop

ROOT = Path(__file__).parents[1]
BEGIN = """
import hashlib, os, signal, subprocess, sys, time
from barlow import stop
def leave(why):
    print(why, flush=True)
    os._exit(stop.STOPPED)
stop.listen(leave)
def in_c():
    hashlib.pbkdf2_hmac("sha256", b"", b"", 10**9)
def ready():
    print("ready", flush=True)
"""


def told(body: str, number: int, notice: str = "", wait: float = 0.0) -> tuple[int, str, float]:
    """Exit code, what it said after `ready`, and seconds from the signal to its end."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), stop.VARIABLE: notice}
    command = [sys.executable, "-c", BEGIN + body]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        time.sleep(wait)
        began = time.monotonic()
        process.send_signal(number)
        said, _ = process.communicate(timeout=20)
        return process.returncode, said.strip(), time.monotonic() - began


@pytest.mark.parametrize("number", stop.SIGNALS)
@pytest.mark.parametrize("body", ["ready(); time.sleep(60)", "ready(); in_c()"])
def test_outside_training_it_leaves_at_once(body: str, number: signal.Signals) -> None:
    """Also when the main thread is in C, where no Python handler would run."""
    code, said, seconds = told(body, number)
    assert (code, said) == (stop.STOPPED, f"{number.name} outside training")
    assert seconds < 5


@pytest.mark.parametrize("number", stop.SIGNALS)
def test_a_loop_ends_its_step_first(number: signal.Signals) -> None:
    body = """
with stop.heeding():
    ready()
    while not stop.told():
        time.sleep(0.05)
    time.sleep(0.5)
    print("saved", stop.told(), flush=True)
    raise SystemExit(3)
"""
    assert told(body, number)[:2] == (3, f"saved {number.name}")


def test_a_step_that_does_not_end_is_not_waited_for_longer_than_the_notice_allows() -> None:
    body = "\nwith stop.heeding():\n    ready()\n    in_c()\n"
    code, said, seconds = told(body, signal.SIGTERM, "SIGTERM=2 SIGUSR2=60")
    assert (code, said) == (stop.STOPPED, "SIGTERM; no step ended within 1 s")
    assert 1.3 < seconds < 6


def test_told_during_the_last_step_it_leaves_after_it() -> None:
    body = """
with stop.heeding():
    ready()
    time.sleep(1.0)
time.sleep(60)
"""
    code, said, seconds = told(body, signal.SIGUSR2)
    assert (code, said) == (stop.STOPPED, "SIGUSR2 outside training")
    assert seconds < 5


def test_what_it_starts_does_not_die_of_usr2_but_of_term() -> None:
    body = """
code = "print(flush=True); import time; time.sleep(60)"
child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
child.stdout.readline()
child.send_signal(signal.SIGUSR2)
time.sleep(0.3)
print(child.poll(), flush=True)
child.terminate()
print(child.wait(5), flush=True)
ready()
time.sleep(60)
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", BEGIN + body]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert [process.stdout.readline() for _ in range(3)] == ["None\n", f"{-signal.SIGTERM}\n", "ready\n"]
        process.kill()


def test_notices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(stop.VARIABLE, raising=False)
    assert stop.shortest_notice() == 0
    assert stop.budget("SIGTERM") == pytest.approx(0.7 * stop.UNKNOWN)
    monkeypatch.setenv(stop.VARIABLE, "SIGTERM=30 SIGUSR2=120")
    assert stop.shortest_notice() == 30
    assert stop.budget("SIGUSR2") == pytest.approx(84)
