"""python launchers/jobs.py as people run it: beside a real SLURM, beside launchers here, and with each bad input."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from barlow import history
from barlow.files import read_status, write_status
from slurm.launch.cluster import Cluster
from slurm.many.chain import Chain, Link, keep
from slurm.states import job_state

ROOT = Path(__file__).resolve().parents[2]
Run = Callable[..., tuple[int, str, str]]
Start = Callable[..., "subprocess.Popen[str]"]
MakeRun = Callable[..., Path]


def begin(tmp_path: Path, *words: str) -> subprocess.Popen[str]:
    command = [sys.executable, "launchers/jobs.py", *words, "--runs-dir", str(tmp_path / "runs")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    pipe = subprocess.PIPE
    return subprocess.Popen(command, cwd=ROOT, env=environment, stdin=pipe, stdout=pipe, stderr=pipe, text=True)


def jobs(tmp_path: Path, *words: str) -> tuple[int, str, str]:
    process = begin(tmp_path, *words)
    out, err = process.communicate(timeout=60)
    return process.returncode, out, err


def listed(tmp_path: Path, *words: str) -> dict[str, dict[str, Any]]:
    code, out, _ = jobs(tmp_path, "list", "--json", *words)
    assert code == 0
    return {row["run"]: row for row in json.loads(out)}


def wait_for(what: Callable[[], object], seconds: float = 30.0) -> None:
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end, "did not happen in time"
        time.sleep(0.05)


def place(folder: Path, rank: int) -> dict[str, str]:
    found: dict[str, str] = json.loads((folder / f"place_{rank}.json").read_text())
    return found


@pytest.mark.slurm
def test_jobs_are_listed_cancelled_and_resumed(real_slurm: Path, tmp_path: Path, make_run: MakeRun, run: Run) -> None:
    going, waiting, other = (make_run(name, stoppable=True, batch_size=4) for name in ("going", "waits-1", "waits-2"))
    assert run(going, nodes=1, cluster="slurm")[0] == 0
    for folder in (waiting, other):
        assert run(folder, nodes=1, cluster="slurm", sbatch=["begin=now+3600"])[0] == 0
    wait_for((going / "ready_0").exists)
    rows = listed(tmp_path)
    told = {name: (row["state"], row["detail"], row["nodes"], row["waits_for"]) for name, row in rows.items()}
    assert told["waits-1"] == told["waits-2"] == ("pending", "", None, "BeginTime")
    assert told["going"][:2] == ("running", "starting")  # its stage never says that it runs
    assert re.fullmatch(r"n\d", told["going"][2])
    assert all(row["job"] == read_status(tmp_path / "runs" / name)["job"] for name, row in rows.items())
    code, out, _ = jobs(tmp_path, "show", "going")
    assert code == 0
    assert f"{rows['going']['job']} running, {told['going'][2]}, 1d00h of its time limit left" in out.replace(
        "23h59m", "1d00h"
    )

    code, out, err = jobs(tmp_path, "resume", "going")
    assert (code, out) == (2, "")
    assert err == f"error: run going is running (starting), job {rows['going']['job']}: nothing to resume\n"

    subprocess.run(["scancel", rows["waits-2"]["job"]], check=True)  # by hand: nobody is left to say so but `list`
    code, out, err = jobs(tmp_path, "cancel", "waits-*", "going", "--yes")
    assert (code, err) == (0, "")
    assert "run waits-2 is not under way: cancelled\n" in out
    assert f"run waits-1 was pending: job {rows['waits-1']['job']} is cancelled\n" in out
    assert out.endswith("is cancelled\n")
    for folder in (going, waiting, other):
        assert job_state(read_status(folder)["job"]).name == "CANCELLED"
        assert read_status(folder)["state"] == "cancelled"
    for folder in (going, waiting):
        assert [event["event"] for event in history.read(folder)].count("cancelled") == 1
    assert (going / "saved_0").exists()  # told, not killed

    code, out, err = jobs(tmp_path, "resume", "going", "--nodes", "3")
    assert (code, out) == (2, "")
    assert err == "error: run going has batches of 4, which 3 ranks cannot share: give another --nodes\n"
    (going / "ready_0").unlink()
    code, out, err = jobs(tmp_path, "resume", "going", "--nodes", "2")
    assert (code, err) == (0, "")
    assert "run going, 2 nodes of main, 2 ranks" in out
    wait_for(lambda: (going / "ready_0").exists() and (going / "ready_1").exists())
    assert place(going, 1)["WORLD_SIZE"] == "2"
    assert read_status(going)["job"] not in (rows["going"]["job"], "")
    assert jobs(tmp_path, "cancel", "going", "--yes")[0] == 0


@pytest.mark.slurm
def test_a_log_is_followed_over_a_requeue(real_slurm: Path, tmp_path: Path, make_run: MakeRun, run: Run) -> None:
    folder = make_run("back", sleep=[60, 0], finishes=True)
    assert run(folder, nodes=1, cluster="slurm")[0] == 0
    wait_for((folder / "alive_0").exists)
    follower = begin(tmp_path, "logs", "back", "-f")
    assert follower.stdout is not None
    while "says original" not in follower.stdout.readline():
        pass
    subprocess.run(["scontrol", "requeue", read_status(folder)["job"]], check=True)
    wait_for(lambda: job_state(read_status(folder)["job"]).name == "PENDING")
    row = listed(tmp_path, "back")["back"]
    assert (row["state"], row["detail"]) == ("pending", "requeued")
    out, err = follower.communicate(timeout=40)
    assert out.count("rank 0 of 1 says original\n") == 1  # once more, by the second start
    assert "\ndone\n" in out
    assert (follower.returncode, err) == (0, "run back is finished\n")
    code, out, _ = jobs(tmp_path, "resume", "back")
    assert (code, out.split("its")[0]) == (0, "run back has finished ")


@pytest.mark.slurm
def test_a_job_that_slurm_has_forgotten(real_slurm: Path, tmp_path: Path, make_run: MakeRun) -> None:
    """The real squeue, of one unknown job and of several; sacct works nowhere here, for there is no slurmdbd."""
    running, waiting = make_run("ran"), make_run("waited")
    write_status(running, state="running", job="999999")
    assert listed(tmp_path, "ran")["ran"]["state"] == "failed"
    write_status(running, state="running", why="")
    write_status(waiting, state="pending", job="999998_3")
    rows = listed(tmp_path)
    assert rows["ran"]["why"] == "job 999999 has left the queue without a word"
    assert rows["waited"]["why"] == "job 999998_3 was cancelled while it waited, or lost"
    assert [read_status(folder)["state"] for folder in (running, waiting)] == ["failed", "cancelled"]
    (sacct := tmp_path / "sacct").write_text("#!/bin/sh\necho '999999|NODE_FAIL|n3|ran'\n")
    sacct.chmod(0o755)
    write_status(running, state="running", why="")
    (running / "heartbeats").mkdir()
    (running / "heartbeats" / "rank_0.json").write_text("{}")  # where it runs, SLURM may number its jobs the same
    code, out, err = jobs(tmp_path, "cancel", "ran", "--yes")
    assert (code, out) == (2, "")
    assert err == "error: run ran: SLURM does not know job 999999 here, or does not answer: nothing was cancelled\n"
    assert read_status(running)["state"] == "running"
    path = os.environ["PATH"]
    try:
        os.environ["PATH"] = f"{tmp_path}:{path}"
        assert listed(tmp_path, "ran")["ran"]["why"] == "job 999999 ended: node_fail on n3"
    finally:
        os.environ["PATH"] = path


def test_a_run_here(tmp_path: Path, make_run: MakeRun, start: Start) -> None:
    told, killed = make_run("told", stoppable=True), make_run("killed", stoppable=True)
    launchers = [start(folder, cluster="local", nodes=2) for folder in (told, killed)]
    wait_for(lambda: all((folder / f"ready_{rank}").exists() for folder in (told, killed) for rank in range(2)))
    for folder in (told, killed):
        write_status(folder, state="running", step=5)
    assert {row["state"] for row in listed(tmp_path).values()} == {"running"}
    (told / "logs" / "rank_0.log").write_text("step 5\n")
    follower = begin(tmp_path, "logs", "told", "-f")
    assert follower.stdout is not None
    assert follower.stdout.readline() == "step 5\n"
    follower.send_signal(signal.SIGINT)
    assert follower.wait(5) == 130
    code, _, err = jobs(tmp_path, "cancel", "told")
    assert (code, err) == (2, "error: give --yes: there is no terminal to ask on\n")
    code, out, err = jobs(tmp_path, "cancel", "told", "--yes")
    assert (code, err) == (0, "")
    assert out.startswith(f"run told was running: its launcher (process {launchers[0].pid}) is told to end")
    assert out.endswith("run told is cancelled\n")
    assert (told / "saved_1").exists()
    assert launchers[0].wait(5) == 143
    assert [event["event"] for event in history.read(told)] == ["cancelled"]
    launchers[1].kill()
    launchers[1].wait()
    wait_for(lambda: listed(tmp_path, "killed")["killed"]["state"] == "failed")
    assert read_status(killed)["why"] == "its launcher is gone"
    code, out, _ = jobs(tmp_path, "cancel", "told", "killed", "--yes")
    assert code == 0
    assert sorted(out.splitlines()) == ["run killed is not under way: failed", "run told is not under way: cancelled"]


def test_a_chain_here(tmp_path: Path, make_run: MakeRun) -> None:
    """It is resumed in the foreground, told of, cancelled by another command, and resumed again to its end."""
    names = ("one", "two", "three")
    folders = {name: make_run(f"paper,{name}", batch_size=4) for name in names}
    links = [Link(name, "fake_link", folders[name], Cluster(), names[:i][-1:]) for i, name in enumerate(names)]
    (folders["two"] / "held").touch()
    for link in links:
        shutil.copy(ROOT / "tests" / "slurm" / "many" / "fake_link.py", link.folder / "code")
    (tmp_path / "runs" / "paper").mkdir()
    keep(Chain(tmp_path / "runs" / "paper", links), Cluster(cluster="local"))
    code, out, err = jobs(tmp_path, "resume", "paper", "--nodes", "2")
    assert (code, out) == (2, "")
    assert err == "error: --nodes is for one run: resume a link of it, such as paper,one\n"
    process = begin(tmp_path, "resume", "paper")
    wait_for((folders["two"] / "ready").exists)
    code, out, err = jobs(tmp_path, "show", "paper")
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert lines[0] == "chain paper: 1 of 3 links have finished"
    assert re.match("run +needs +state ", lines[1])
    assert [line.split()[0] for line in lines[2:]] == ["paper,one", "paper,two", "paper,three"]
    assert re.match(r"paper,three +two +pending \(not started\)", lines[4])
    told = json.loads(jobs(tmp_path, "show", "paper", "--json")[1])
    assert [link["state"] for link in told["links"]] == ["finished", "running", "pending"]
    assert list(listed(tmp_path, "paper")) == ["paper,one", "paper,two", "paper,three"]
    code, _, err = jobs(tmp_path, "logs", "paper")
    assert (code, err) == (2, "error: logs takes one run, and 'paper' means 3: give a whole name\n")

    code, out, err = jobs(tmp_path, "cancel", "paper", "--yes")
    assert (code, err) == (0, "")
    assert "run paper,two was running" in out
    assert process.wait(5) == 143
    code, out, err = jobs(tmp_path, "show", "paper")
    assert "waits for paper,two, which was cancelled: cancelled with jobs.py" in out
    (folders["two"] / "held").unlink()
    code, out, err = jobs(tmp_path, "resume", "paper")
    assert (code, err) == (0, "")
    assert out.startswith("link one (1 of 3): run paper,one has finished\nlink two (2 of 3): run paper,two\n")
    assert jobs(tmp_path, "show", "paper")[1].startswith("chain paper: 3 of 3 links have finished\n")


def test_logs(tmp_path: Path, make_run: MakeRun) -> None:
    folder = make_run("done")
    write_status(folder, state="failed", why="rank 1 on n2: x")
    code, out, err = jobs(tmp_path, "logs", "done", "-f")
    assert (code, out, err) == (2, "", "error: run done has no log yet: it is failed\n")
    for rank in range(2):
        lines = "".join(f"line {i} of {rank}\n" for i in range(30))
        (folder / "logs" / f"rank_{rank}.log").write_text(lines)
    code, out, err = jobs(tmp_path, "logs", "done", "--rank", "1", "--lines", "2")
    assert (code, out, err) == (0, "line 28 of 1\nline 29 of 1\n", "")
    code, out, err = jobs(tmp_path, "logs", "done", "-f")
    assert (code, len(out.splitlines()), err) == (1, 20, "run done is failed: rank 1 on n2: x\n")
    code, out, err = jobs(tmp_path, "logs", "done", "--rank", "2")
    assert (code, out, err) == (2, "", "error: --rank 2: run done has logs of ranks 0 to 1\n")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["lst"], "no command 'lst': did you mean list?"),
        (["x"], "no command 'x': give one of list, table, show, logs, cancel, resume"),
        (["show"], "the following arguments are required: RUN (see --help)"),
        (["show", "rn-1"], "no run 'rn-1' in {runs}: did you mean run-1?"),
        (["show", "run-*"], "show takes one run, and 'run-*' means 2: give a whole name"),
        (["show", "run-1", "run-2"], "one word too many: run-2: see --help"),
        (["logs", "run-1", "--line", "3"], "unknown flag: --line: did you mean --lines?"),
        (["logs", "run-1", "--rank", "one"], "argument --rank: invalid int value: 'one' (see --help)"),
        (["--jsn"], "unknown flag: --jsn: did you mean --json?"),
        (["resume", "run-1"], "run run-1 was never started: give its command again ({runs}/run-1/command.txt)"),
        (["list", "--runs-dir", "nowhere"], "no folder nowhere: --runs-dir says where your runs are"),
    ],
)
def test_what_is_wrong_is_one_line(tmp_path: Path, make_run: MakeRun, words: list[str], said: str) -> None:
    for name in ("run-1", "run-2"):
        folder = tmp_path / "runs" / name
        folder.mkdir(parents=True)
        (folder / "config.json").write_text("{}")
    if "--runs-dir" in words:
        done = subprocess.run([sys.executable, "launchers/jobs.py", *words], cwd=ROOT, capture_output=True, text=True)
        code, out, err = done.returncode, done.stdout, done.stderr
    else:
        code, out, err = jobs(tmp_path, *words)
    assert (code, out, err) == (2, "", f"error: {said.format(runs=tmp_path / 'runs')}\n")


def test_no_runs_yet_and_a_pipe_that_closes(tmp_path: Path) -> None:
    (tmp_path / "runs").mkdir()
    assert jobs(tmp_path) == (0, "no runs yet\n", "")
    assert jobs(tmp_path, "list", "--json") == (0, "[]\n", "")
    process = begin(tmp_path, "list")
    assert process.stdout is not None
    process.stdout.close()
    assert process.stderr is not None
    assert process.stderr.read() == ""


def test_help_brings_no_torch() -> None:
    code = "import sys; sys.path.insert(0, 'launchers'); import jobs\ntry: jobs.main(['--help'])\n"
    code += "except SystemExit: print('torch' in sys.modules, 'numpy' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.endswith("False False\n"), done.stderr
    assert "resume RUN [--nodes N]" in done.stdout
