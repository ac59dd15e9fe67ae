"""From a command to ranks on a real SLURM of four nodes, and what is refused before anything is created."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from barlow.errors import UserError
from barlow.files import read_status
from slurm.launch import submit
from slurm.launch.cluster import Cluster
from slurm.launch.submit import one_line
from slurm.states import job_state

Run = Callable[..., tuple[int, str, str]]
Start = Callable[..., "subprocess.Popen[str]"]
MakeRun = Callable[..., Path]
needs_slurm = pytest.mark.slurm


def wait_for(what: Callable[[], bool], seconds: float = 30.0) -> None:
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end, "did not happen in time"
        time.sleep(0.05)


def place(folder: Path, rank: int) -> dict[str, str]:
    found: dict[str, str] = json.loads((folder / f"place_{rank}.json").read_text())
    return found


def without_slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SLURM_CONF", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))


def test_nodes_without_slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run: Run) -> None:
    without_slurm(tmp_path, monkeypatch)
    code, out, err = run(tmp_path / "a", nodes=4)
    assert (code, out) == (2, "")
    said = "there is no SLURM on this machine (no sinfo, no sbatch); --cluster local runs 4 ranks here"
    assert err == f"error: --nodes 4: {said}\n"
    code, _, err = run(tmp_path / "a", cluster="slurm")
    assert (code, len(err.splitlines())) == (2, 1)
    assert err.startswith("error: --cluster slurm: there is no SLURM on this machine")
    assert not (tmp_path / "a").exists()


def test_auto_runs_here_without_slurm(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make_run: MakeRun, run: Run
) -> None:
    without_slurm(tmp_path, monkeypatch)
    assert run(make_run("here"))[:2] == (0, "rank 0 of 1 says original\ndone\n")


def test_a_development_cluster_that_is_not_exported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run: Run) -> None:
    monkeypatch.setenv("SLURM_CONF", str(tmp_path / "none.conf"))
    (tmp_path / ".cluster").mkdir()
    (tmp_path / ".cluster" / "slurm.conf").touch()
    for name in ("sinfo", "sbatch"):  # a SLURM that is installed, but not configured
        (tmp_path / name).write_text("#!/bin/sh\nexit 1\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin")
    code, _, err = run(tmp_path / "a", nodes=4)
    assert code == 2
    assert f"export SLURM_CONF={tmp_path}/.cluster/slurm.conf" in err


def test_a_slow_slurm_is_not_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("sinfo", "sbatch"):
        (tmp_path / name).write_text("#!/bin/sh\nexec sleep 9\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin")
    monkeypatch.setattr(submit, "PATIENCE", 0.2)
    with pytest.raises(UserError, match=r"no answer after .*--cluster slurm.*--cluster local") as caught:
        submit.check(Cluster())
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("complaint", "line"),
    [
        ("sbatch: error: first\nsbatch: error: Batch job submission failed: Invalid account\n", "Invalid account"),
        ("allocation failure: Node configuration is not available\n", "Node configuration is not available"),
        ("sbatch: unrecognized option '--foo'\nTry \"sbatch --help\"\n", "unrecognized option '--foo'"),
        ("", "no reason given"),
    ],
)
def test_complaints_of_sbatch_become_one_line(complaint: str, line: str) -> None:
    assert one_line(complaint) == line


@needs_slurm
def test_four_nodes_find_each_other(real_slurm: Path, make_run: MakeRun, run: Run) -> None:
    folder = make_run("four", sum=True)
    (folder / "logs" / "rank_0.log").write_text("of an earlier start\n")
    code, out, err = run(folder, nodes=4, follow=True, time="10")
    assert (code, err) == (0, "")
    assert [json.loads((folder / f"sum_{rank}.json").read_text()) for rank in range(4)] == [1111.0] * 4
    assert "4 nodes of main, 4 ranks" in out
    assert "running on n[1-4]" in out
    assert "rank 0 of 4 says original" in out
    assert "earlier start" not in out
    assert out.index("done") < out.index("completed")
    assert place(folder, 3)["MASTER_ADDR"] == "n1"
    assert place(folder, 3)["file"] == str(folder / "code" / "fake_stage.py")
    assert place(folder, 3)["cwd"] == str(folder.parent)
    assert "rank 3 of 4" in (folder / "logs" / "rank_3.log").read_text()
    assert read_status(folder)["job"] in out


@needs_slurm
def test_ranks_of_one_node_follow_each_other(real_slurm: Path, make_run: MakeRun, run: Run) -> None:
    folder = make_run("pairs")
    assert run(folder, nodes=2, ranks_per_node=2, cpus_per_rank=3, follow=True)[0] == 0
    local = [(place(folder, rank)["LOCAL_RANK"], place(folder, rank)["LOCAL_WORLD_SIZE"]) for rank in range(4)]
    assert local == [("0", "2"), ("1", "2"), ("0", "2"), ("1", "2")]
    assert place(folder, 0)["OMP_NUM_THREADS"] == "3"


@needs_slurm
def test_first_failure_ends_all_and_is_shown(real_slurm: Path, make_run: MakeRun, run: Run) -> None:
    folder = make_run("broken", fault="raise", rank=2)
    began = time.monotonic()
    code, _, err = run(folder, nodes=4, follow=True, max_failures=1)
    assert time.monotonic() - began < 15  # the other ranks would sleep for a minute
    assert code == 1
    assert err.startswith("rank 2 on n3 failed first:\nTraceback")
    assert err.count("Traceback") == 1
    assert err.endswith("ValueError: the first of all\n")
    assert read_status(folder)["why"] == "rank 2 on n3: ValueError: the first of all"


@needs_slurm
def test_killed_rank_ends_all_and_is_named(real_slurm: Path, make_run: MakeRun, run: Run) -> None:
    folder = make_run("killed", fault="kill", rank=2)
    code, _, err = run(folder, nodes=4, follow=True, max_failures=1)
    assert code == 1
    assert err == f"rank 2 on n3 was killed by SIGKILL; logs: {folder / 'logs'}\n"
    assert read_status(folder)["state"] == "failed"
    assert json.loads((folder / "logs" / "failure.json").read_text())["error"] == "was killed by SIGKILL"


@needs_slurm
def test_users_error_is_one_line(real_slurm: Path, make_run: MakeRun, run: Run) -> None:
    code, _, err = run(make_run("cut", fault="user", rank=1), nodes=4, follow=True)
    assert (code, err) == (2, "error: shards of data/x are cut short: write them again\n")


@needs_slurm
@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"partition": "gpu"}, "no partition 'gpu': SLURM here has main, urgent (--partition)"),
        ({"nodes": 5}, "--nodes 5: partition main has 4"),
        ({"mem": "2T"}, "Requested node configuration is not available (asked for: partition main, nodes 1, mem 2T"),
        ({"constraint": "a100"}, "SLURM refuses the job: Invalid feature specification"),
        ({"gpus_per_node": 3}, "SLURM refuses the job: Invalid generic resource (gres) specification"),
        ({"sbatch": ["foo=bar"]}, "unrecognized option '--foo=bar'"),
    ],
)
def test_what_slurm_cannot_give_is_one_line(
    real_slurm: Path, tmp_path: Path, run: Run, asked: dict[str, object], said: str
) -> None:
    code, out, err = run(tmp_path / "never", cluster="slurm", **asked)
    assert (code, out, len(err.splitlines())) == (2, "", 1)
    assert said in err
    assert not (tmp_path / "never").exists()


@needs_slurm
def test_dry_run_prints_what_sbatch_accepts(real_slurm: Path, tmp_path: Path, run: Run) -> None:
    folder = tmp_path / "never"
    asked = {"mem": "4G", "exclude": "n4", "exclusive": True, "time": "1:30:00", "cpus_per_rank": 2}
    asked |= {"mail_user": "a@b.c", "mail_type": "END", "setup": ["echo 'ready'"], "sbatch": ["nice=5"]}
    code, out, err = run(folder, nodes=3, dry_run=True, **asked)
    assert (code, err) == (0, "")
    assert not folder.exists()
    wanted = ["nodes=3", "mem=4G", "exclude=n4", "mail-user=a@b.c", "mail-type=END", "exclusive", "time=90", "requeue"]
    for option in [*wanted, "job-name=never", "cpus-per-task=2", "nice=5", "signal=USR2@120", "open-mode=append"]:
        assert f"#SBATCH --{option}\n" in out
    assert "echo 'ready'\n" in out
    assert "--kill-on-bad-exit=1 --wait=0" in out
    assert f"# fake_stage.main('{folder}')" in out
    accepted = subprocess.run(["sbatch", "--test-only"], input=out, capture_output=True, text=True)
    assert accepted.returncode == 0, accepted.stderr


@needs_slurm
def test_the_snapshot_runs_not_what_is_edited_later(real_slurm: Path, make_run: MakeRun, run: Run) -> None:
    folder = make_run("snapshot")
    original = folder.parent / "fake_stage.py"  # where the command is given from, which Python would search first
    shutil.copy(folder / "code" / "fake_stage.py", original)
    assert run(folder, nodes=1, cluster="slurm", sbatch=["begin=now+3"])[0] == 0
    job = read_status(folder)["job"]
    assert job_state(job).alive
    for edited in (original, folder.parent / "slurm" / "job.py", folder.parent / "barlow" / "errors.py"):
        edited.parent.mkdir(exist_ok=True)
        edited.write_text("raise RuntimeError('edited')")
    refused = run(folder, nodes=1, cluster="slurm")
    assert refused[0] == 2
    assert refused[2].startswith(f"error: run snapshot is job {job} already (pending")
    wait_for(lambda: not job_state(job).alive)
    assert "rank 0 of 1 says original" in (folder / "logs" / "rank_0.log").read_text()
    assert job_state(job).name == "COMPLETED"


@needs_slurm
def test_ctrl_c_leaves_the_job_running(real_slurm: Path, make_run: MakeRun, start: Start) -> None:
    folder = make_run("left", sleep=[30, 0])
    launcher = start(folder, nodes=1, cluster="slurm", follow=True)
    wait_for(lambda: (folder / "alive_0").exists())
    launcher.send_signal(signal.SIGINT)
    _, err = launcher.communicate(timeout=10)
    job = read_status(folder)["job"]
    assert launcher.returncode == 130
    assert f"job {job} goes on" in err
    assert job_state(job).name == "RUNNING"
    subprocess.run(["scancel", job], check=True)


@needs_slurm
def test_submitting_from_inside_a_job(
    real_slurm: Path, make_run: MakeRun, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    for key, value in {"JOB_ID": "1", "NTASKS": "9", "CPUS_PER_TASK": "15", "NNODES": "1"}.items():
        monkeypatch.setenv(f"SLURM_{key}", value)
    folder = make_run("inside")
    assert run(folder, nodes=2, follow=True)[0] == 0
    assert place(folder, 1)["WORLD_SIZE"] == "2"
