"""Chains: dependent jobs on the real SLURM, one after another here; a broken one says why, and goes on from there."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from barlow.errors import UserError
from barlow.files import read_json, read_status, write_json, write_status
from slurm.job import rank
from slurm.launch import local, submit
from slurm.launch.cluster import Cluster
from slurm.many.chain import Chain, Link, cancel_all, keep, read, resume, to_start
from slurm.runs import facts, standing, table
from slurm.runs.resume import resume as resume_one
from slurm.states import State, in_vain, job_state

MakeRun = Callable[..., Path]
MakeChain = Callable[..., Chain]
SLURM = Cluster(cluster="slurm")
LOCAL = Cluster(cluster="local")
STAGE = Path(__file__).with_name("fake_link.py")
URGENT = ["sbatch", "--partition=urgent", "--nodes=4", "--exclusive", "--output=/dev/null", "--wrap=true"]


@pytest.fixture
def make_chain(make_run: MakeRun, tmp_path: Path) -> MakeChain:
    """make_chain(name, a="", b="a", c="a b"): what each link needs; their runs are prepared, none is started."""

    def make(name: str, /, **needs: str) -> Chain:
        links = []
        for link, needed in needs.items():
            folder = make_run(f"{name},{link}")
            shutil.copy(STAGE, folder / "code")
            links.append(Link(link, "fake_link", folder, Cluster(), tuple(needed.split())))
        return Chain(tmp_path / "runs" / name, links)

    return make


def folder(chain: Chain, link: str) -> Path:
    return chain.folder.parent / f"{chain.folder.name},{link}"


def states(chain: Chain) -> dict[str, str]:
    return {name: str(run) for name, run in chain.runs().items()}


def whys(chain: Chain) -> dict[str, str]:
    return {name: run.why for name, run in chain.runs().items() if run.why}


def starts(chain: Chain, link: str) -> list[float]:
    file = folder(chain, link) / "ran"
    return [float(line) for line in file.read_text().split()] if file.exists() else []


def wait_for(what: Callable[[], bool], seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end, "did not happen in time"
        time.sleep(0.1)


def shown(chain: Chain, link: str) -> str:
    command = ["scontrol", "--oneliner", "show", "job", read_status(folder(chain, link))["job"]]
    return subprocess.run(command, capture_output=True, text=True).stdout


@pytest.mark.slurm
def test_a_chain_runs_through_though_jobs_are_killed_and_preempted(
    real_slurm: Path, make_chain: MakeChain, capsys: pytest.CaptureFixture[str]
) -> None:
    chain = make_chain("paper", first="", killed="first", preempted="first", last="killed preempted")
    write_json(folder(chain, "killed") / "config.json", {"killed_once": True})
    write_json(folder(chain, "preempted") / "config.json", {"slow_once": True})
    chain.check(SLURM)
    assert chain.launch(SLURM) == 0
    jobs = {link.name: read_status(link.folder)["job"] for link in chain.links}
    told = capsys.readouterr().out.splitlines()
    assert told[3] == f"submitted job {jobs['last']}: run paper,last, 1 node of main, 1 rank, after killed, preempted"
    assert told[4].endswith(f"jobs.py show paper --runs-dir {chain.folder.parent}")
    waits = f" Dependency=afterok:{jobs['killed']}(unfulfilled),afterok:{jobs['preempted']}(unfulfilled) "
    assert waits in shown(chain, "last")
    row = facts.row(chain.runs()["last"])
    assert (row["state"], row["waits_for"], row["needs"]) == (
        "pending",
        "Dependency",
        ["paper,killed", "paper,preempted"],
    )
    assert re.search(r"^paper,last +killed preempted +pending ", table.listing([row]), re.MULTILINE)

    assert chain.launch(SLURM) == 0  # at once again: nothing is submitted twice
    assert "submitted" not in capsys.readouterr().out
    assert jobs == {link.name: read_status(link.folder)["job"] for link in chain.links}
    wait_for(lambda: bool(starts(chain, "preempted")) and "Restarts=1" in shown(chain, "killed"))
    subprocess.run(URGENT, check=True, capture_output=True, cwd=chain.folder)
    wait_for(lambda: "Restarts=1" in shown(chain, "preempted"))
    assert chain.launch(replace(SLURM, follow=True)) == 0
    assert "link last: finished\n" in capsys.readouterr().out
    assert [len(starts(chain, link.name)) for link in chain.links] == [1, 2, 2, 1]
    assert starts(chain, "first")[0] < min(starts(chain, "killed")[0], starts(chain, "preempted")[0])
    assert starts(chain, "last")[0] > max(starts(chain, "killed")[1], starts(chain, "preempted")[1])
    assert jobs == {link.name: read_status(link.folder)["job"] for link in chain.links}
    assert chain.finished()
    assert chain.left() == []


@pytest.mark.slurm
def test_a_broken_link_stops_what_needs_it_and_the_chain_goes_on_from_there(
    real_slurm: Path, make_chain: MakeChain, capsys: pytest.CaptureFixture[str]
) -> None:
    chain = make_chain("paper", a="", b="a", c="b", d="c", beside="a")
    (folder(chain, "b") / "broken").touch()
    assert chain.launch(replace(SLURM, follow=True)) == 1
    why = "waits for paper,b, which failed: its shards are gone"
    assert f"link d: cancelled: {why}\n" in capsys.readouterr().out
    assert whys(chain) == {"b": "its shards are gone", "c": why, "d": why}
    assert [read_status(folder(chain, link))["state"] for link in "abcd"] == [
        "finished",
        "failed",
        "cancelled",
        "cancelled",
    ]
    assert [job_state(read_status(folder(chain, link))["job"]).name for link in "cd"] == ["CANCELLED", "CANCELLED"]
    with pytest.raises(UserError, match="run paper,c needs paper,b, which is failed: resume that, or the chain"):
        resume_one(chain.runs()["c"], None)

    before = {link.name: read_status(link.folder)["job"] for link in chain.links}
    assert [link.name for link in chain.left()] == ["b", "c", "d"]
    assert resume(read(chain.folder)) == 0  # broken still: its successors wait in vain once more
    wait_for(lambda: states(chain)["b"] == "failed")
    (folder(chain, "b") / "broken").unlink()
    chain.check(SLURM)
    assert chain.launch(replace(SLURM, follow=True)) == 0  # at once: their jobs may still be there
    after = {link.name: read_status(link.folder)["job"] for link in chain.links}
    assert {name for name, job in after.items() if before[name] != job} == {"b", "c", "d"}
    assert [len(starts(chain, link.name)) for link in chain.links] == [1, 3, 1, 1, 1]
    assert whys(chain) == {}


@pytest.mark.slurm
def test_all_of_a_chain_is_cancelled_and_resumed_and_a_forgotten_dependency_does_no_harm(
    real_slurm: Path, make_chain: MakeChain, capsys: pytest.CaptureFixture[str]
) -> None:
    chain, lost = make_chain("paper", a="", b="a", c="b"), make_chain("lost", need="", run="need")
    (folder(chain, "a") / "held").touch()
    assert chain.launch(SLURM) == 0
    write_status(folder(lost, "run"), needs=["lost,need"])
    there = submit.settled(SLURM)
    submit.submit("fake_link", folder(lost, "run"), there, after=["999999"])  # SLURM knows no such job: it starts
    wait_for((folder(chain, "a") / "ready").exists)
    wait_for(lambda: job_state(read_status(folder(lost, "run"))["job"]).name == "RUNNING")
    assert cancel_all(chain, sure=True) == 0
    assert states(chain) == dict.fromkeys("abc", "cancelled")
    assert [job_state(read_status(link.folder)["job"]).name for link in chain.links] == ["CANCELLED"] * 3
    assert (folder(chain, "a") / "saved").exists()  # told, not killed
    assert starts(lost, "run") == []
    write_status(folder(lost, "need"), state="finished")

    (folder(chain, "a") / "held").unlink()
    capsys.readouterr()
    assert resume(read(chain.folder)) == 0
    assert capsys.readouterr().out.count("submitted job") == 3
    wait_for(chain.finished)
    wait_for(lost.finished)
    assert resume(read(chain.folder)) == 0
    assert capsys.readouterr().out == "chain paper: nothing to resume: all links have finished or are under way\n"


@pytest.mark.slurm
def test_a_dry_run_prints_each_link_and_creates_nothing(
    real_slurm: Path, make_chain: MakeChain, capsys: pytest.CaptureFixture[str]
) -> None:
    chain = make_chain("paper", a="", b="a")
    before = sorted(chain.folder.parent.rglob("*"))
    assert chain.launch(replace(SLURM, dry_run=True)) == 0
    text = capsys.readouterr().out
    assert text.count("#!/bin/bash") == 2
    assert "# link 2 of 2: b, needs a; run paper,b\n" in text
    assert "#SBATCH --dependency='afterok:<job of a>'\n" in text
    assert "#SBATCH --kill-on-invalid-dep=yes\n" in text
    assert sorted(chain.folder.parent.rglob("*")) == before


def test_here_too(make_chain: MakeChain, capsys: pytest.CaptureFixture[str]) -> None:
    chain = make_chain("paper", a="", b="a")
    before = sorted(chain.folder.parent.rglob("*"))
    assert chain.launch(replace(LOCAL, dry_run=True)) == 0
    assert capsys.readouterr().out.count(" -m slurm.job.rank fake_link ") == 2
    assert sorted(chain.folder.parent.rglob("*")) == before


def test_here_the_first_that_fails_stops_the_rest(make_chain: MakeChain, capfd: pytest.CaptureFixture[str]) -> None:
    chain = make_chain("paper", a="", b="a", c="b", beside="a")
    (folder(chain, "b") / "broken").touch()
    chain.check(LOCAL)
    assert chain.launch(LOCAL) == 2
    why = f"waits for paper,b, which failed: {read_status(folder(chain, 'b'))['why']}"
    assert why.endswith(": its shards are gone")
    told = capfd.readouterr()
    assert "link b (2 of 4): run paper,b\n" in told.out
    assert told.err == f"error: its shards are gone\nrun paper,c {why}\n"
    assert states(chain) == {"a": "finished", "b": "failed", "c": "cancelled", "beside": "pending (not started)"}
    assert read_status(folder(chain, "c"))["why"] == why
    assert not starts(chain, "c")
    assert not starts(chain, "beside")
    (folder(chain, "b") / "broken").unlink()
    assert resume(read(chain.folder)) == 0
    assert "link a (1 of 4): run paper,a has finished\n" in capfd.readouterr().out
    assert [len(starts(chain, link.name)) for link in chain.links] == [1, 2, 1, 1]
    assert chain.finished()
    assert whys(chain) == {}


def test_here_a_signal_stops_the_chain_and_the_same_command_goes_on(
    make_chain: MakeChain, capfd: pytest.CaptureFixture[str]
) -> None:
    chain = make_chain("paper", a="", b="a", c="b")
    (folder(chain, "b") / "held").touch()

    def end() -> None:
        wait_for((folder(chain, "b") / "ready").exists)
        assert standing.held(chain.folder)
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=end)
    thread.start()
    assert chain.launch(LOCAL) == 143
    thread.join()
    assert (folder(chain, "b") / "saved").exists()
    assert whys(chain)["c"] == "waits for paper,b, which was cancelled: SIGTERM"
    assert "run paper,c waits for paper,b" in capfd.readouterr().err
    (folder(chain, "b") / "held").unlink()
    assert chain.launch(LOCAL) == 0
    assert [len(starts(chain, link.name)) for link in chain.links] == [1, 2, 1]


def test_here_a_link_that_ends_without_having_finished_stops_the_rest(
    make_chain: MakeChain, capfd: pytest.CaptureFixture[str]
) -> None:
    chain = make_chain("paper", a="", b="a")
    chain = replace(chain, links=[replace(chain.links[0], module="fake_stage"), chain.links[1]])
    assert chain.launch(LOCAL) == 1
    assert "link a has ended, but its run has not finished" in capfd.readouterr().err
    assert not starts(chain, "b")


def test_a_job_that_waits_for_one_that_has_failed_is_replaced(make_chain: MakeChain) -> None:
    chain = make_chain("paper", a="", b="a", c="b", other="")
    waiting, running = State("PENDING", "Dependency"), State("RUNNING", nodes="n1")
    found = {link.name: standing.Run(link.folder, {}, "pending", job="7", queued=waiting) for link in chain.links}
    assert to_start(chain.links, found) == []
    found["a"] = replace(found["a"], state="failed", queued=State())
    assert [link.name for link in to_start(chain.links, found)] == ["a", "b", "c"]
    found["b"] = replace(found["b"], state="running", queued=running)
    assert [link.name for link in to_start(chain.links, found)] == ["a"]
    found["a"] = replace(found["a"], state="finished")
    assert to_start(chain.links, found) == []


def test_what_a_run_needs_is_asked_of_its_own_word(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    need, run = tmp_path / "p,a", tmp_path / "p,b"
    for each in (need, run):
        each.mkdir()
    write_status(need, state="failed", why="disk full")
    write_status(run, state="pending", needs=["p,a"])
    monkeypatch.setattr(rank, "PATIENCE", 0.1)
    with pytest.raises(UserError, match="waits for p,a, which failed: disk full"):
        rank.await_needs(run)
    (found,), _ = standing.look([run])
    assert (str(found), found.why) == ("cancelled", "waits for p,a, which failed: disk full")
    assert read_status(run)["state"] == "cancelled"
    threading.Timer(0.2, write_status, (need,), {"state": "finished"}).start()
    monkeypatch.setattr(rank, "PATIENCE", 20.0)
    rank.await_needs(run)
    assert in_vain("p,c", "cancelled", found.why) == found.why  # the cause, not what followed from it


def test_a_chain_s_name_stands_for_its_links_in_order(make_chain: MakeChain, make_run: MakeRun) -> None:
    chain = make_chain("paper", z="", y="z")
    alone = make_run("alone")
    chain.folder.mkdir()
    keep(chain, LOCAL)
    assert read(chain.folder) == replace(
        chain, links=[replace(link, cluster=replace(link.cluster, cluster="local")) for link in chain.links]
    )
    names = [link.folder for link in chain.links]
    assert standing.find(chain.folder.parent, ["paper"]) == names
    assert standing.find(chain.folder.parent, ["alone", str(chain.folder)]) == [*names, alone]
    assert set(standing.find(chain.folder.parent)) == {*names, alone}
    assert read_json(chain.folder / "chain.json")["links"][1]["needs"] == ["z"]


def test_what_is_no_chain(make_chain: MakeChain, tmp_path: Path) -> None:
    chain = make_chain("paper", a="", b="a")
    a, b = chain.links
    for wrong in ([b, a], [a, a], [a, replace(b, folder=a.folder)], [a, replace(b, folder=tmp_path / "b")]):
        with pytest.raises(ValueError, match="link "):
            Chain(chain.folder, wrong)
    with pytest.raises(UserError, match="link b: --gpus-per-node 2 with --ranks-per-node 1: each GPU is one rank"):
        replace(chain, links=[a, replace(b, cluster=Cluster(gpus_per_node=2, ranks_per_node=1))]).check(LOCAL)
    with pytest.raises(UserError, match="paper,a is a run, not a chain: choose another --run"):
        Chain(a.folder, []).check(LOCAL)
    with local.only_run(a.folder), pytest.raises(UserError, match=r"run paper,a is running .*: end it first, or wait"):
        chain.check(LOCAL)
