"""A rank's place among the ranks, and how it leaves."""

from __future__ import annotations

import json
import os
import pickle
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from slurm.job.rank import Job, attempt, port, slurm_ranks

STEP = {
    "SLURM_JOB_ID": "1234",
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "2",
    "SLURM_STEP_NUM_TASKS": "8",
    "SLURM_STEP_NUM_NODES": "4",
    "SLURM_JOB_NODELIST": "gpu[07-09],login1",
    "SLURM_CPUS_ON_NODE": "12",
    "SLURM_LAUNCH_NODE_IPADDR": "127.0.0.1",
}


@pytest.fixture
def known_hosts(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Names that resolve in the test, and to what."""
    hosts: dict[str, str] = {}

    def look_up(host: str, *_: object) -> list[object]:
        if host not in hosts:
            raise socket.gaierror(host)
        return []

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    return hosts


def ranks(monkeypatch: pytest.MonkeyPatch, **changes: str) -> dict[str, str]:
    for key, value in {**STEP, **changes}.items():
        monkeypatch.setenv(key, value)
    return slurm_ranks({**STEP, **changes})


def test_ranks_from_the_step(monkeypatch: pytest.MonkeyPatch, known_hosts: dict[str, str]) -> None:
    known_hosts.update(dict.fromkeys(("gpu07", "gpu08", "gpu09", "login1"), "10.0.0.1"))
    got = ranks(monkeypatch)
    assert (got["RANK"], got["WORLD_SIZE"], got["LOCAL_RANK"], got["LOCAL_WORLD_SIZE"]) == ("5", "8", "1", "2")
    assert got["MASTER_ADDR"] == "gpu07"
    assert got["OMP_NUM_THREADS"] == "6"  # 12 cores of this node for its two ranks
    assert ranks(monkeypatch, SLURM_CPUS_PER_TASK="5")["OMP_NUM_THREADS"] == "5"


def test_what_the_user_set_stays(monkeypatch: pytest.MonkeyPatch, known_hosts: dict[str, str]) -> None:
    told = ranks(monkeypatch, OMP_NUM_THREADS="3")
    assert "OMP_NUM_THREADS" not in told
    assert told["BARLOW_CORES"] == "6"


def test_unknown_names_fall_back_to_sruns_address(monkeypatch: pytest.MonkeyPatch, known_hosts: dict[str, str]) -> None:
    assert ranks(monkeypatch)["MASTER_ADDR"] == "127.0.0.1"


def test_ports_differ_after_a_restart_and_between_jobs() -> None:
    seen = {port(job, restarts) for job in range(1, 501) for restarts in range(7)}
    assert len(seen) == 3500
    assert min(seen) >= 20000
    assert max(seen) < 32000


def test_attempts() -> None:
    assert attempt({"SLURM_JOB_ID": "7"}) == "7.0"
    assert attempt({"SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": "2"}) == "7.2"
    assert attempt({"SLURM_JOB_ID": "7", "BARLOW_ATTEMPT": "here-1"}) == "here-1"
    assert attempt({"SLURM_JOB_ID": "9", "SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "2"}) == "7_2.0"


def test_job_travels_as_strings() -> None:
    job = Job("some.module", "/runs/a", "/home/me")
    assert pickle.loads(pickle.dumps(job)) == job
    assert len(pickle.dumps(job)) < 300


@pytest.mark.parametrize(
    ("body", "code", "failure"),
    [
        ("pass", 0, {}),
        ("raise UserError('no shards in x')", 2, {"error": "no shards in x", "traceback": ""}),
        ("raise ValueError('bad')", 1, {"error": "ValueError: bad"}),
        ("raise SystemExit('enough')", 1, {"error": "SystemExit: enough"}),
        ("raise SystemExit(0)", 0, {}),
        ("raise Preempted('SIGTERM', 7)", 75, {}),
        ("import threading; threading.Thread(target=time.sleep, args=[99]).start(); 1 / 0", 1, {"rank": 3}),
    ],
)
def test_how_a_rank_leaves(tmp_path: Path, body: str, code: int, failure: dict[str, object]) -> None:
    stage = f"import time\nfrom barlow.errors import Preempted, UserError\ndef main(folder):\n    {body}\n"
    (tmp_path / "tiny_stage.py").write_text(stage)
    root = str(Path(__file__).parents[3])
    path = os.pathsep.join([str(tmp_path), root])
    environment = {
        **os.environ,
        "PYTHONPATH": path,
        "BARLOW_ATTEMPT": "a",
        "RANK": "3",
        "BARLOW_LAUNCHER": str(os.getpid()),
    }
    command = [sys.executable, "-m", "slurm.job.rank", "tiny_stage", str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=30)
    assert done.returncode == code
    record = tmp_path / "logs" / "failure.json"
    found = json.loads(record.read_text()) if record.exists() else {}
    assert found.items() >= failure.items()
    assert bool(found) == bool(failure)
    if failure:
        assert found["exit_code"] == code
        assert str(found["error"]) in done.stderr or "ZeroDivisionError" in done.stderr
        assert json.loads((tmp_path / "status.json").read_text())["state"] == "failed"
        assert "slurm/job/rank.py" not in str(found["traceback"])


def test_a_full_disk_does_not_hide_the_error(make_run: Callable[..., Path]) -> None:
    folder = make_run("full", fault="user", rank=0)
    (folder / "logs").rmdir()
    (folder / "logs").write_text("in the way: nothing can be written below it")
    command = [sys.executable, "-m", "slurm.job.rank", "fake_stage", str(folder)]
    environment = {**os.environ, "BARLOW_ATTEMPT": "a", "RANK": "0", "WORLD_SIZE": "1"}
    environment |= {"BARLOW_LAUNCHER": str(os.getpid())}
    done = subprocess.run(command, cwd=folder / "code", env=environment, capture_output=True, text=True, timeout=30)
    assert done.returncode == 2
    assert done.stderr == "error: shards of data/x are cut short: write them again\n"
