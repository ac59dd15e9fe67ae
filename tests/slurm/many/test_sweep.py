"""A sweep on the real SLURM: one array, whose elements come back, are cancelled and are submitted again each alone."""

from __future__ import annotations

import re
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from barlow import history
from barlow.errors import UserError
from barlow.files import read_json, read_status
from slurm.launch.cluster import Cluster
from slurm.many.sweep import Runs
from slurm.runs.cancel import cancel
from slurm.runs.standing import look
from slurm.states import job_state

MakeRun = Callable[..., Path]
SLURM = Cluster(cluster="slurm")
LOCAL = Cluster(cluster="local")
needs_slurm = pytest.mark.slurm


def wait_for(what: Callable[[], bool], seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end, "did not happen in time"
        time.sleep(0.1)


def events(folder: Path) -> list[str]:
    return [event["event"] for event in history.read(folder)]


def restarts(folder: Path) -> str:
    shown = subprocess.run(["scontrol", "show", "job", read_status(folder)["job"]], capture_output=True, text=True)
    return "".join(re.findall(r"Restarts=\d+", shown.stdout))


def finished(folder: Path) -> bool:
    return read_status(folder)["state"] == "finished"


@needs_slurm
def test_elements_are_runs_of_their_own(
    real_slurm: Path, make_run: MakeRun, capsys: pytest.CaptureFixture[str]
) -> None:
    """The last element is the one that is killed: its own job number is that of the whole array."""
    going = make_run("tune,seed=0", stoppable=True)
    short = make_run("tune,seed=1", finishes=True)
    killed = make_run(
        "tune,seed=2", fault="kill", rank=1, once=True, finishes=True, sleep=[3, 0]
    )  # when rank 0 runs too
    sweep = Runs("tune", [going, short, killed])
    two = Cluster(cluster="slurm", nodes=2)
    assert (sweep.check(two), sweep.left(two), sweep.launch("fake_stage", two)) == (2, sweep, 0)
    array = read_status(killed)["job"].removesuffix("_2")
    assert [read_status(folder)["job"] for folder in (going, short)] == [f"{array}_0", f"{array}_1"]
    told = f"submitted array {array}: 3 runs of sweep tune, 2 nodes of main and 2 ranks each"
    assert capsys.readouterr().out.startswith(told)

    wait_for(lambda: finished(short) and finished(killed) and (going / "ready_1").exists())
    assert events(killed) == ["submitted", "failed", "requeued"]
    assert read_json(killed / "logs" / "failure.json")["error"] == "was killed by SIGKILL"
    assert (killed / "logs" / "rank_0.log").read_text().count("rank 0 of 2 says original") == 2
    script = (killed / "logs" / "submitit" / f"{array}_2_0_log.out").read_text()
    assert re.findall(r"^start \d", script, re.MULTILINE) == ["start 0", "start 1"]
    assert [restarts(folder) for folder in (going, killed)] == ["Restarts=0", "Restarts=1"]
    for folder in (going, short):
        assert events(folder) == ["submitted"]
    assert read_json(going / "place_1.json")["file"] == str(going / "code" / "fake_stage.py")
    assert job_state(f"{array}_0").name == "RUNNING"

    capsys.readouterr()
    assert sweep.left(two).folders == []
    assert f"run tune,seed=0 is running (starting), job {array}_0\n" in capsys.readouterr().out
    assert cancel(look([going])[0], sure=True) == 0
    assert (read_status(going)["state"], events(going)) == ("cancelled", ["submitted", "cancelled"])
    assert (going / "saved_0").exists()
    assert finished(killed)

    again = sweep.left(two)
    assert again.folders == [going]
    assert again.launch("fake_stage", Cluster(cluster="slurm", sbatch=("begin=now+3600",))) == 0
    job = read_status(going)["job"]
    assert job.endswith("_0")
    assert job != f"{array}_0"
    assert sweep.left(two).folders == []
    assert cancel(look([going])[0], sure=True) == 0
    assert not job_state(job).alive


@needs_slurm
def test_what_an_array_cannot_have(real_slurm: Path, tmp_path: Path) -> None:
    many = Runs("many", [tmp_path / f"many,seed={seed}" for seed in range(1002)])
    with pytest.raises(UserError, match="the sweep has 1002 runs: SLURM here takes 1001 in one array"):
        many.check(SLURM)
    with pytest.raises(UserError, match="--follow shows one run: leave it out"):
        Runs("few", many.folders[:2]).check(Cluster(cluster="slurm", follow=True))
    assert list(tmp_path.iterdir()) == []


@needs_slurm
def test_a_dry_run_prints_what_sbatch_accepts(
    real_slurm: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folders = [tmp_path / "with a space" / f"tune,seed={seed}" for seed in range(5)]
    dry = Cluster(cluster="slurm", dry_run=True)
    assert Runs("tune", folders, at_once=2).launch("fake_stage", dry) == 0
    script = capsys.readouterr().out
    assert "#SBATCH --array=0-4%2\n" in script
    assert f"# 4: {folders[4]}\n" in script
    accepted = subprocess.run(["sbatch", "--test-only"], input=script, capture_output=True, text=True)
    assert accepted.returncode == 0, accepted.stderr
    assert list(tmp_path.iterdir()) == []


def test_here_a_run_that_fails_leaves_the_others_be_but_an_error_of_the_user_s_ends_all(
    make_run: MakeRun, capfd: pytest.CaptureFixture[str]
) -> None:
    failing = make_run("a,seed=0", fault="raise", rank=0)
    fine = make_run("a,seed=1", finishes=True)
    wrong = make_run("a,seed=2", fault="user", rank=0)
    never = make_run("a,seed=3", finishes=True)
    assert Runs("a", [failing, fine]).launch("fake_stage", LOCAL) == 1
    assert [read_status(folder)["state"] for folder in (failing, fine)] == ["failed", "finished"]
    assert Runs("a", [fine, wrong, never]).launch("fake_stage", LOCAL) == 2
    told = capfd.readouterr()
    assert told.out.count("run a,seed=1 has finished") == 1
    assert told.err.endswith("error: shards of data/x are cut short: write them again\n")
    assert not (never / "alive_0").exists()
