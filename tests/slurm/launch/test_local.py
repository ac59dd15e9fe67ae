"""Ranks on this machine: they find each other, fail together, and leave nothing behind."""

from __future__ import annotations

import fcntl
import json
import multiprocessing
import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from barlow.files import read_status
from slurm.launch import local
from slurm.launch.local import Ended, outcome
from slurm.states import record_failure

Run = Callable[..., tuple[int, str, str]]
Start = Callable[..., "subprocess.Popen[str]"]
MakeRun = Callable[..., Path]


def alive(pid: int) -> bool:
    """Whether a process still runs; a zombie does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def wait_for(what: Callable[[], bool], seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end, "did not happen in time"
        time.sleep(0.02)


def pids(folder: Path) -> list[int]:
    """Of the ranks (each writes place_R.json), and of what they have started."""
    return [json.loads(path.read_text())["pid"] for path in [*folder.glob("place_*.json"), *folder.glob("child")]]


def status(folder: Path) -> tuple[str, str]:
    got = json.loads((folder / "status.json").read_text())
    return got["state"], got["why"]


def test_ranks_find_each_other(make_run: MakeRun, run: Run) -> None:
    folder = make_run("sum", sum=True)
    code, out, err = run(folder, cluster="local", nodes=2)
    assert (code, err) == (0, "")
    assert [json.loads((folder / f"sum_{rank}.json").read_text()) for rank in range(2)] == [11.0, 11.0]
    assert out == "rank 0 of 2 says original\ndone\n"  # the others' words are in their logs
    assert (folder / "logs" / "rank_1.log").read_text() == "rank 1 of 2 says original\ndone\n"
    place = json.loads((folder / "place_1.json").read_text())
    assert place["file"] == str(folder / "code" / "fake_stage.py")
    assert place["cwd"] == str(folder.parent)
    assert {place["LOCAL_RANK"], place["LOCAL_WORLD_SIZE"]} == {"1", "2"}


def test_first_failure_ends_all_and_is_shown(make_run: MakeRun, run: Run) -> None:
    folder = make_run("broken", fault="raise", rank=2)
    began = time.monotonic()
    code, _, err = run(folder, cluster="local", nodes=4)
    assert time.monotonic() - began < 10
    assert code == 1
    assert err.startswith("rank 2 on ")
    assert err.count("Traceback") == 1
    assert err.endswith("ValueError: the first of all\n")
    assert status(folder)[0] == "failed"
    assert status(folder)[1].endswith("ValueError: the first of all")
    assert not any(map(alive, pids(folder)))


@pytest.mark.parametrize("rank", [0, 1])
def test_users_error_is_one_line(make_run: MakeRun, run: Run, rank: int) -> None:
    code, _, err = run(make_run("cut", fault="user", rank=rank), cluster="local", nodes=2)
    assert (code, err) == (2, "error: shards of data/x are cut short: write them again\n")


def test_killed_rank_is_named(make_run: MakeRun, run: Run) -> None:
    folder = make_run("killed", fault="kill", rank=2)
    code, _, err = run(folder, cluster="local", nodes=3)
    assert code == 1
    assert err.startswith("rank 2 was killed by SIGKILL")
    assert len(err.splitlines()) == 1
    assert status(folder) == ("failed", f"rank 2 on {socket.gethostname()} was killed by SIGKILL")
    assert json.loads((folder / "logs" / "failure.json").read_text())["rank"] == 2  # not what the others said of it
    assert not any(map(alive, pids(folder)))


def test_failure_takes_along_what_a_rank_has_started(make_run: MakeRun, run: Run) -> None:
    folder = make_run("parent", fault="child-then-raise", rank=0)
    code, _, _ = run(folder, cluster="local")
    assert code == 1
    assert len(pids(folder)) == 2
    assert not any(map(alive, pids(folder)))


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_ending_the_launcher_ends_all(make_run: MakeRun, start: Start, number: int, code: int) -> None:
    folder = make_run("interrupted", fault="child", rank=1)  # the child ignores SIGTERM
    (folder / "status.json").write_text(json.dumps({"state": "pending" if number == signal.SIGINT else "running"}))
    launcher = start(folder, cluster="local", nodes=2)
    wait_for(lambda: len(pids(folder)) == 3)
    assert all(map(alive, pids(folder)))
    launcher.send_signal(number)
    _, err = launcher.communicate(timeout=20)
    assert launcher.returncode == code
    assert err == f"{signal.Signals(number).name}: ending 2 ranks; a second one kills\n"
    assert status(folder) == ("cancelled", signal.Signals(number).name)
    assert not any(map(alive, pids(folder)))


def launch_impatiently(folder: Path) -> None:
    os.chdir(folder.parent)
    local.GRACE = 0.1  # which is for ranks whose peer has failed
    raise SystemExit(local.run("fake_stage", folder, 2))


def test_ranks_may_save_when_the_launcher_is_told(make_run: MakeRun) -> None:
    folder = make_run("saves", stoppable=True, saving=1.0)
    launcher = multiprocessing.get_context("fork").Process(target=launch_impatiently, args=(folder,))
    launcher.start()
    wait_for(lambda: all((folder / f"ready_{rank}").exists() for rank in range(2)))
    seen = pids(folder)
    os.kill(launcher.pid or 0, signal.SIGTERM)
    launcher.join(20)
    assert launcher.exitcode == 143
    assert all((folder / f"saved_{rank}").exists() for rank in range(2))
    assert not any(map(alive, seen))


def test_a_second_signal_ends_ranks_that_still_save(make_run: MakeRun, start: Start) -> None:
    folder = make_run("hasty", stoppable=True, saving=60)
    launcher = start(folder, cluster="local", nodes=2)
    wait_for(lambda: all((folder / f"ready_{rank}").exists() for rank in range(2)))
    launcher.send_signal(signal.SIGTERM)
    launcher.send_signal(signal.SIGTERM)  # `timeout` sends two at once: they count as one
    time.sleep(0.7)
    assert launcher.poll() is None
    assert all(map(alive, pids(folder)))
    launcher.send_signal(signal.SIGINT)
    launcher.communicate(timeout=5)
    assert launcher.returncode == 143
    assert not any(map(alive, pids(folder)))


def test_nohup_is_respected(make_run: MakeRun, start: Start) -> None:
    folder = make_run("nohup", sleep=[0.5, 0])
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # what the launcher inherits from `nohup`
    try:
        launcher = start(folder, cluster="local")
    finally:
        signal.signal(signal.SIGHUP, before)
    wait_for(lambda: (folder / "alive_0").exists())
    launcher.send_signal(signal.SIGHUP)
    launcher.communicate(timeout=20)
    assert launcher.returncode == 0


def test_nothing_outlives_a_killed_launcher(make_run: MakeRun, start: Start) -> None:
    folder = make_run("orphans", fault="child", rank=1)
    launcher = start(folder, cluster="local", nodes=2)
    wait_for(lambda: len(pids(folder)) == 3)
    launcher.kill()
    wait_for(lambda: not any(map(alive, pids(folder))), seconds=5)


def test_ranks_told_to_stop_may_save(make_run: MakeRun, start: Start) -> None:
    folder = make_run("stopped", stoppable=True)
    launcher = start(folder, cluster="local", nodes=2)
    wait_for(lambda: all((folder / f"ready_{rank}").exists() for rank in range(2)))
    for pid in pids(folder):
        os.kill(pid, signal.SIGTERM)
    _, err = launcher.communicate(timeout=20)
    assert (launcher.returncode, err) == (1, "stopped as told, and saved: the same command goes on from there\n")
    assert not (folder / "logs" / "failure.json").exists()


def test_second_launcher_is_refused(make_run: MakeRun, run: Run) -> None:
    folder = make_run("twice")
    with open(folder / "logs" / "launcher.lock", "a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        code, out, err = run(folder, cluster="local")
    assert (code, out) == (2, "")
    assert err == "error: run twice runs here already: end it first, or choose another --run\n"
    assert run(folder, cluster="local")[0] == 0


def test_dry_run_creates_nothing(tmp_path: Path, run: Run) -> None:
    folder = tmp_path / "never"
    code, out, err = run(folder, cluster="local", nodes=2, dry_run=True)
    assert (code, err) == (0, "")
    assert out.count("-m slurm.job.rank fake_stage") == 2
    assert "RANK=1 WORLD_SIZE=2" in out
    assert not folder.exists()


@pytest.mark.parametrize("kind", ["stuck", "hung"])
def test_what_a_watchdog_found_is_the_reason_of_its_kill(
    make_run: MakeRun, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    folder = make_run(kind)
    record_failure(folder, "here-1", 1, "has not moved for 9 s", "trace\n", 1, kind=kind)
    assert outcome(folder, "here-1", [Ended(0, -signal.SIGKILL)]) == (1, "failed")
    assert "failed first:\ntrace" in capsys.readouterr().err
    assert "has not moved" in read_status(folder)["why"]
