"""Jobs that lose nodes, ranks or time on the real SLURM: each goes back to the queue once, or ends with a reason."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from barlow import history
from barlow.files import read_status
from slurm.states import job_state

Run = Callable[..., tuple[int, str, str]]
Start = Callable[..., "subprocess.Popen[str]"]
MakeRun = Callable[..., Path]
pytestmark = pytest.mark.slurm
URGENT = ["sbatch", "--partition=urgent", "--nodes=4", "--exclusive", "--output=/dev/null", "--wrap=true"]


def wait_for(what: Callable[[], bool], seconds: float = 40.0) -> None:
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end, "did not happen in time"
        time.sleep(0.05)


def scontrol(*words: str) -> str:
    return subprocess.run(["scontrol", *words], check=True, capture_output=True, text=True).stdout


def restarts(folder: Path) -> int:
    found = re.search(r"Restarts=(\d+)", scontrol("show", "job", job(folder)))
    return int(found.group(1)) if found else -1


def job(folder: Path) -> str:
    return str(read_status(folder)["job"])


def events(folder: Path) -> list[str]:
    return [event["event"] for event in history.read(folder)]


def ready(folder: Path, ranks: int = 2) -> Callable[[], bool]:
    return lambda: all((folder / f"ready_{rank}").exists() for rank in range(ranks))


@pytest.fixture
def grace(real_slurm: Path) -> Iterator[None]:
    scontrol("update", "PartitionName=main", "GraceTime=20")
    yield
    scontrol("update", "PartitionName=main", "GraceTime=0")


def test_preempted_without_notice_it_comes_back(real_slurm: Path, make_run: MakeRun, start: Start) -> None:
    folder = make_run("preempted", sleep=[30, 0])
    launcher = start(folder, nodes=4, follow=True)
    wait_for(lambda: all((folder / f"alive_{rank}").exists() for rank in range(4)))
    subprocess.run(URGENT, check=True, capture_output=True, cwd=folder)
    out, err = launcher.communicate(timeout=60)
    assert (launcher.returncode, err) == (0, "")
    assert "pending: BeginTime" in out
    assert out.count("rank 0 of 4 says original") == 2
    assert out.count("done") == 1
    assert len(set((folder / "ports").read_text().split())) == 2  # a new rendezvous for the new start
    assert restarts(folder) == 1


def test_told_before_its_stage_heeds_it_comes_back(real_slurm: Path, make_run: MakeRun, run: Run, grace: None) -> None:
    """Preempted with notice while rank 0 waits deep in C for a late rank; and while Python itself still starts."""
    joining, starting = make_run("joining", sum=True, late=[60, 0]), make_run("starting", sum=True)
    slow = "import os, pathlib, time\nif 'SLURM_STEP_ID' in os.environ and 'SLURM_RESTART_COUNT' not in os.environ:\n"
    slow += f"    pathlib.Path('{starting}', 'slow_' + os.environ['SLURM_PROCID']).touch()\n    time.sleep(60)\n"
    (starting / "sitecustomize.py").write_text(slow)
    assert run(joining, nodes=2)[0] == 0
    assert run(starting, nodes=2, setup=[f"export PYTHONPATH={starting}"])[0] == 0
    marks = [joining / "alive_0", joining / "alive_1", starting / "slow_0", starting / "slow_1"]
    wait_for(lambda: all(mark.exists() for mark in marks))
    time.sleep(3)  # rank 0 imports torch and waits for rank 1
    began = time.monotonic()
    subprocess.run(URGENT, check=True, capture_output=True, cwd=joining)
    jobs = [job(joining), job(starting)]
    wait_for(lambda: all(job_state(each).name == "PENDING" for each in jobs), seconds=15)
    assert time.monotonic() - began < 15  # not at the end of the grace time, but by themselves
    wait_for(lambda: all(job_state(each).name == "COMPLETED" for each in jobs), seconds=60)
    for folder in (joining, starting):
        assert [json.loads((folder / f"sum_{rank}.json").read_text()) for rank in range(2)] == [11.0, 11.0]
        assert not (folder / "logs" / "failure.json").exists()
        assert events(folder) == ["submitted", "stopped", "requeued"]
        assert restarts(folder) == 1


def test_a_killed_rank_sends_the_job_back_though_nobody_follows(real_slurm: Path, make_run: MakeRun, run: Run) -> None:
    killed = make_run("killed-once", fault="kill", rank=1, once=True, finishes=True, sleep=[1, 0])
    silent = make_run("silent", fault="silent", rank=1)
    assert run(killed, nodes=2)[0] == 0
    assert run(silent, nodes=2, max_failures=2)[0] == 0
    wait_for(lambda: read_status(killed)["state"] == "finished", seconds=60)
    told = [event for event in history.read(killed) if event["event"] == "failed"]
    assert [(event["rank"], event["kind"]) for event in told] == [(1, "killed")]
    assert re.fullmatch(r"rank 1 on n\d was killed by SIGKILL", told[0]["why"])
    assert restarts(killed) == 1
    wait_for(lambda: not job_state(job(silent)).alive, seconds=60)
    assert job_state(job(silent)).name == "FAILED"
    assert restarts(silent) == 1
    why = read_status(silent)["why"]
    assert why.startswith("2 starts have failed without a checkpoint newer than step 0; the last: ")
    assert "Exited with exit code 9" in why


def test_told_to_stop_it_goes_back_and_cancelled_it_does_not(real_slurm: Path, make_run: MakeRun, run: Run) -> None:
    told, alone, cancelled = (make_run(name, stoppable=True) for name in ("told", "alone", "cancelled"))
    empty = alone / "bin"
    empty.mkdir()
    for program in ("bash", "srun", "env"):  # all that its script needs, but no scontrol
        found = subprocess.run(["which", program], check=True, capture_output=True, text=True).stdout.strip()
        (empty / program).symlink_to(found)
    assert run(told, nodes=2)[0] == run(cancelled, nodes=2)[0] == 0
    assert run(alone, nodes=2, setup=[f"export PATH={empty}"])[0] == 0
    wait_for(lambda: all(ready(folder)() for folder in (told, alone, cancelled)))
    subprocess.run(["scancel", "--signal=USR2", job(told), job(alone)], check=True)
    subprocess.run(["scancel", job(cancelled)], check=True)
    wait_for(lambda: job_state(job(told)).name == "PENDING")
    assert read_status(told)["state"] == "pending"
    wait_for(lambda: not job_state(job(alone)).alive)  # nothing here could ask for it
    assert "ExitCode=75:0" in scontrol("show", "job", job(alone))
    wait_for(lambda: not job_state(job(cancelled)).alive)
    assert job_state(job(cancelled)).name == "CANCELLED"
    wait_for(lambda: read_status(cancelled)["state"] == "cancelled")
    assert restarts(cancelled) == 0
    assert not any((folder / "logs" / "failure.json").exists() for folder in (told, alone, cancelled))
    subprocess.run(["scancel", job(told)], check=True)


def test_an_operators_requeue_is_the_only_one(real_slurm: Path, make_run: MakeRun, run: Run) -> None:
    folder = make_run("operator", stoppable=True, saving=0.2)
    assert run(folder, nodes=2)[0] == 0
    wait_for(ready(folder))
    scontrol("requeue", job(folder))
    wait_for(lambda: "requeued" in events(folder))
    assert [event["why"][:24] for event in history.read(folder) if event["event"] == "requeued"] == [
        "by SLURM or an operator;"
    ]
    assert read_status(folder)["state"] == "pending"
    wait_for(lambda: job_state(job(folder)).name == "PENDING")
    assert restarts(folder) == 1
    subprocess.run(["scancel", job(folder)], check=True)


def test_at_its_time_limit_it_goes_back_and_meanwhile_a_node_that_fails_twice_is_avoided(
    real_slurm: Path, make_run: MakeRun, run: Run
) -> None:
    """The rank on the second node dies in each start, until SLURM gives the job another one."""
    limited = make_run("limited", stoppable=True, saving=0.2)
    unlucky = make_run("unlucky", fault="kill", rank=1, node="n2", finishes=True)
    assert run(limited, nodes=1, time="1", sbatch=["nodelist=n4"])[0] == 0
    assert run(unlucky, nodes=2, max_failures=4)[0] == 0
    wait_for(lambda: read_status(unlucky)["state"] == "finished", seconds=90)
    assert [event["nodes"] for event in history.read(unlucky) if event["event"] == "excluded"] == [["n2"]]
    assert restarts(unlucky) == 2
    assert re.search(r"ExcNodeList=n2\b", scontrol("show", "job", job(unlucky)))

    wait_for(lambda: "requeued" in events(limited), seconds=75)
    assert [event["why"] for event in history.read(limited) if event["event"] == "requeued"]
    assert job_state(job(limited)).alive  # it waits, or on a busy machine runs again already
    wait_for(lambda: restarts(limited) == events(limited).count("requeued"))
    subprocess.run(["scancel", job(limited)], check=True)


def test_what_a_rank_starts_does_not_die_of_usr2(real_slurm: Path, make_run: MakeRun, run: Run) -> None:
    folder = make_run("children", fault="child", rank=1)
    assert run(folder, nodes=2)[0] == 0
    wait_for(lambda: (folder / "child").exists())
    child = int(json.loads((folder / "child").read_text())["pid"])
    os.kill(child, signal.SIGUSR2)
    time.sleep(0.5)
    assert Path(f"/proc/{child}").exists()
    subprocess.run(["scancel", job(folder)], check=True)
