"""Ranks that hang are named and ended, all others left alone; nothing outlives a rank. Real processes, short limits."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from barlow.files import write_status
from slurm.states import read_failure

RANK = Path(__file__).with_name("fake_rank.py")
ROOT = Path(__file__).parents[3]
ATTEMPT = "7.0"
Start = Callable[..., "list[subprocess.Popen[str]]"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "logs").mkdir()
    return tmp_path


@pytest.fixture
def ranks(folder: Path) -> Iterator[Start]:
    """ranks({...}, {...}): so many ranks with these configs (see fake_rank.py), once all have given their beats."""
    started: list[subprocess.Popen[str]] = []

    def start(*configs: dict[str, Any], world: int = 0, first: int = 0, **more: str) -> list[subprocess.Popen[str]]:
        for rank, config in enumerate(configs, first):
            environment = {**os.environ, "PYTHONPATH": str(ROOT), "SLURMD_NODENAME": f"n{rank}", **more}
            environment |= {"RANK": str(rank), "WORLD_SIZE": str(world or len(configs))}
            command = [sys.executable, str(RANK), str(folder), json.dumps(config)]
            pipe = subprocess.PIPE
            started.append(subprocess.Popen(command, env=environment, stdout=pipe, stderr=pipe, text=True))
        for process in started[-len(configs) :]:
            assert process.stdout
            assert process.stdout.readline() == "there\n"
        return started[-len(configs) :]

    yield start
    for process in started:
        process.send_signal(signal.SIGCONT)
        process.kill()
        process.communicate()


def beats(step: int, phase: str, within: float = 0.3, then: str = "wait", **more: Any) -> dict[str, Any]:
    return {"beats": [[step, phase, within]], "then": then, **more}


def watchdog_of(rank: subprocess.Popen[str]) -> int:
    return int(Path(f"/proc/{rank.pid}/task/{rank.pid}/children").read_text().split()[0])


def gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


def wait_for(what: Callable[[], Any], seconds: float = 8.0) -> None:
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end, "did not happen in time"
        time.sleep(0.02)


def test_an_earlier_start_ends_when_a_later_one_has_begun(folder: Path, ranks: Start) -> None:
    """As on a node that SLURM has lost sight of: the job goes on elsewhere, and there is one writer."""
    write_status(folder, attempt="6.0", state="running")  # of yesterday: this start has not claimed the run yet
    (rank,) = ranks(beats(1, "step", 60.0))
    time.sleep(0.8)
    assert rank.poll() is None
    write_status(folder, attempt=ATTEMPT)
    time.sleep(0.8)
    assert rank.poll() is None
    write_status(folder, attempt="7.1")
    assert killed(rank)
    assert read_failure(folder, ATTEMPT) == {}


def killed(rank: subprocess.Popen[str], within: float = 5.0) -> bool:
    return rank.wait(within) == -signal.SIGKILL


def heartbeat(folder: Path, rank: int = 0) -> dict[str, Any]:
    """The newest, once there is one."""
    file = folder / "heartbeats" / f"rank_{rank}.json"
    wait_for(file.exists)
    return json.loads(file.read_text())


def stacks(folder: Path, rank: int = 0) -> str:
    return (folder / "logs" / "stacks" / f"{ATTEMPT}.rank_{rank}.txt").read_text()


def test_a_rank_that_moves_is_left_alone_and_seen(folder: Path, ranks: Start) -> None:
    (rank,) = ranks({"then": "move"})
    wait_for(lambda: heartbeat(folder)["step"] > 20)
    seen = heartbeat(folder)
    assert (seen["attempt"], seen["rank"], seen["node"], seen["pid"]) == (ATTEMPT, 0, "n0", rank.pid)
    assert (seen["phase"], seen["process"] in "RS", seen["late"] < 0) == ("step", True, True)
    wait_for(lambda: heartbeat(folder)["step"] > seen["step"] + 30)
    assert rank.poll() is None
    assert not (folder / "logs" / "failure.json").exists()
    assert not (folder / "logs" / "stacks").exists()


@pytest.mark.parametrize(
    ("then", "stopped", "function"), [("wait", False, "wait"), ("hold", False, "hold"), ("wait", True, "wait")]
)
def test_a_hanging_rank_is_named_and_ended(folder: Path, ranks: Start, then: str, stopped: bool, function: str) -> None:
    (rank,) = ranks(beats(17, "data", 0.6, then=then, threads=2))
    began = time.monotonic()
    if stopped:
        time.sleep(0.1)  # then it hangs already
        rank.send_signal(signal.SIGSTOP)
    assert killed(rank)
    assert 0.5 < time.monotonic() - began < 4
    failure = read_failure(folder, ATTEMPT)
    assert (failure["rank"], failure["host"], failure["kind"], failure["exit_code"]) == (0, "n0", "stuck", 1)
    state = "; process stopped" if stopped else ""
    assert failure["error"].startswith("has not moved for 1 s after step 17 (in: data" + state + "); main thread: ")
    assert "job/fake_rank.py:" in failure["error"]
    assert failure["error"].endswith(f" {function}")
    told = failure["traceback"].splitlines()
    assert told[0] == "Main thread (most recent call last):"
    assert [line.rpartition(" ")[2] for line in told[1:-1]] == ["<module>", "main", function]
    assert told[-1] == failure["error"]
    assert json.loads((folder / "status.json").read_text())["why"].startswith("rank 0 on n0: has not moved")
    assert stacks(folder).count("hread 0x") == 3
    assert stacks(folder).count("the main thread") == 1


def test_only_the_stopped_one_of_many_late_ranks_is_named(folder: Path, ranks: Start) -> None:
    """The others wait in the same step, and are left to the launcher."""
    three = ranks(*[beats(4, "step", 0.8)] * 3)
    three[1].send_signal(signal.SIGSTOP)
    assert killed(three[1])
    assert (three[0].poll(), three[2].poll()) == (None, None)
    failure = read_failure(folder, ATTEMPT)
    assert (failure["rank"], failure["host"]) == (1, "n1")
    assert "after step 4 (in: step; process stopped); main thread:" in failure["error"]


def test_the_one_least_far_is_to_blame(folder: Path, ranks: Start) -> None:
    three = ranks(beats(5, "step"), beats(5, "step"), beats(5, "data"))
    assert killed(three[2])
    assert (three[0].poll(), three[1].poll()) == (None, None)
    failure = read_failure(folder, ATTEMPT)
    assert (failure["rank"], failure["host"]) == (2, "n2")
    assert "after step 5 (in: data); main thread:" in failure["error"]
    assert killed(three[0])  # nobody has ended them: they do it themselves
    assert killed(three[1])
    assert read_failure(folder, ATTEMPT) == failure


def test_nobody_is_to_blame_when_all_hang_alike(folder: Path, ranks: Start) -> None:
    two = ranks(beats(5, "step"), beats(5, "step"))
    assert killed(two[0])
    assert two[1].poll() is None
    failure = read_failure(folder, ATTEMPT)
    assert failure["rank"] == 0
    assert "after step 5 (in: step), nor has any other rank; main thread:" in failure["error"]


def test_a_rank_that_waits_for_one_with_time_left_has_time_too(folder: Path, ranks: Start) -> None:
    two = ranks(beats(5, "save", 60), beats(5, "step", 0.1, constants={"GIVE_WAY": 0.2}))
    wait_for(lambda: heartbeat(folder, 1)["late"] > 1.5)
    assert (two[0].poll(), two[1].poll()) == (None, None)
    two[0].send_signal(signal.SIGSTOP)  # which is no way to use it
    assert killed(two[1])
    assert read_failure(folder, ATTEMPT)["rank"] == 0
    assert "in: save; process stopped" in read_failure(folder, ATTEMPT)["error"]


def test_a_node_that_is_gone_is_named_by_another(folder: Path, ranks: Start) -> None:
    """As a frozen node: neither the rank nor its watchdog is heard of again."""
    three = ranks(*[beats(3, "step", 1.0)] * 3)
    wait_for(lambda: heartbeat(folder, 1)["step"] == 3)
    os.kill(watchdog_of(three[1]), signal.SIGKILL)
    three[1].send_signal(signal.SIGSTOP)
    assert killed(three[0])
    failure = read_failure(folder, ATTEMPT)
    assert (failure["rank"], failure["host"]) == (1, "n1")
    assert failure["error"] == "has not been heard of for 1 s after step 3 (in: step): its node or its watchdog is gone"
    assert three[2].poll() is None
    assert killed(three[2])


def test_a_rank_that_never_came_is_named(folder: Path, ranks: Start) -> None:
    (rank,) = ranks({"then": "wait"}, world=2, first=1, BARLOW_START_WITHIN="0.3")
    assert killed(rank)
    failure = read_failure(folder, ATTEMPT)
    assert failure["rank"] == 0
    assert failure["error"] == "has never been heard of: it did not start, or not in this run folder"


def test_no_first_beat(folder: Path, ranks: Start) -> None:
    (rank,) = ranks({"then": "wait"}, BARLOW_START_WITHIN="0.3")
    assert killed(rank)
    assert "after step 0 (in: start)" in read_failure(folder, ATTEMPT)["error"]


def test_late_but_back_in_time(folder: Path, ranks: Start) -> None:
    (rank,) = ranks({"then": "dawdle", "constants": {"SETTLE": 3.0}})
    assert rank.stdout
    assert rank.stdout.readline() == "late\n"
    wait_for(lambda: heartbeat(folder)["step"] > 20)
    assert rank.poll() is None
    assert not (folder / "logs" / "failure.json").exists()
    assert "after step 1 (in: data)" in stacks(folder)  # it was noticed
    rank.send_signal(signal.SIGSTOP)
    assert killed(rank)
    assert read_failure(folder, ATTEMPT)["traceback"].count(" in move") == 1  # where it is now


def suspend(rank: subprocess.Popen[str], seconds: float) -> None:
    tree = [rank.pid, watchdog_of(rank)]
    for pid in tree:
        os.kill(pid, signal.SIGSTOP)
    time.sleep(seconds)
    for pid in reversed(tree):
        os.kill(pid, signal.SIGCONT)


def test_a_suspended_job_goes_on(folder: Path, ranks: Start) -> None:
    """`scontrol suspend` stops the watchdog, too. What has hung before gets its full time again, but no more."""
    began = time.monotonic()
    one, other = ranks(beats(2, "step", 1.0, constants={"JUMP": 0.4}), beats(9, "step", 60, then="leave"))
    other.wait()
    suspend(one, 1.5)
    assert not (folder / "logs" / "failure.json").exists()
    assert killed(one)
    assert time.monotonic() - began > 1.0 + 1.5
    assert re.match("has not moved for [12] s", read_failure(folder, ATTEMPT)["error"])  # the pause does not count
    assert heartbeat(folder, 1)["process"] == "X"  # left in peace: not to blame


def open_files(pid: int) -> list[str]:
    names = []
    for path in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(OSError):  # closed since
            names.append(os.readlink(path))
    return names


def has_nothing_of_the_rank(names: list[str]) -> bool:
    return sum(name == "/dev/null" for name in names) == 3 and sum(name.endswith(" (deleted)") for name in names) == 2


@pytest.mark.parametrize(("then", "code"), [("leave", 0), ("fail", 1), ("wait", -signal.SIGKILL)])
def test_nothing_is_left_behind(folder: Path, ranks: Start, then: str, code: int) -> None:
    (rank,) = ranks(beats(1, "step", 60, then=then))
    beside = watchdog_of(rank)
    wait_for(lambda: len(open_files(beside)) == 5 and has_nothing_of_the_rank(open_files(beside)))
    if code < 0:
        rank.kill()
    assert rank.wait(5) == code
    wait_for(lambda: gone(beside), 2)
    assert heartbeat(folder)["process"] == "X"
    assert sorted(path.name for path in folder.iterdir()) == ["heartbeats", "logs"]
    assert not any((folder / "logs").iterdir())


def test_signals_to_the_whole_tree_do_not_end_the_watch(folder: Path, ranks: Start) -> None:
    (rank,) = ranks(beats(1, "step", 0.7))
    for number in ("TERM", "INT", "HUP", "USR1", "USR2", "QUIT", "CONT"):
        os.kill(watchdog_of(rank), getattr(signal, f"SIG{number}"))
    assert killed(rank)


@pytest.mark.parametrize("full", [("heartbeats", "logs"), ("heartbeats",)])
def test_a_full_disk_changes_nothing(folder: Path, ranks: Start, full: Sequence[str]) -> None:
    """No heartbeat can be written, perhaps no failure either. Who moves is left alone, who does not is ended."""
    (folder / "logs").rmdir()
    for name in full:
        (folder / name).touch()  # no folder: an OSError as any
    moving, hanging = ranks({"then": "move"}, beats(1, "step"))
    assert killed(hanging)
    assert moving.poll() is None
    assert (folder / "heartbeats").is_file()
    if "logs" not in full:
        assert read_failure(folder, ATTEMPT)["rank"] == 1  # not the one that nobody could hear of


def test_a_file_system_that_hangs_does_not_save_a_rank(folder: Path, ranks: Start) -> None:
    (folder / "logs" / "stacks").mkdir()
    os.mkfifo(folder / "logs" / "stacks" / f"{ATTEMPT}.rank_0.txt")  # opening it takes for ever
    (rank,) = ranks(beats(1, "step", 0.2, constants={"HUNG": 12}))
    began = time.monotonic()
    assert killed(rank)
    assert time.monotonic() - began > 0.6


def test_stacks_on_demand(folder: Path, ranks: Start) -> None:
    (rank,) = ranks({"then": "move", "threads": 1})
    wait_for(lambda: heartbeat(folder)["step"] > 5)
    rank.send_signal(signal.SIGQUIT)
    wait_for(lambda: (folder / "logs" / "stacks" / f"{ATTEMPT}.rank_0.txt").exists() and " in wait" in stacks(folder))
    assert " in move" in stacks(folder)
    before = heartbeat(folder)["step"]
    wait_for(lambda: heartbeat(folder)["step"] > before + 20)
    assert rank.poll() is None


def test_a_watchdog_that_fails_says_so(folder: Path, ranks: Start) -> None:
    (rank,) = ranks(beats(1, "step", 0.2, constants={"EVERY": "soon", "HUNG": 12}))
    assert killed(rank)
    assert "this rank's watchdog failed:\nTraceback" in stacks(folder)
