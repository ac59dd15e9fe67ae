"""How runs stand, by their folder, squeue, sacct and the launcher here; and that status.json is put right only where
that is certain."""

from __future__ import annotations

import fcntl
import json
import os
import socket
import time
from pathlib import Path

import pytest

from barlow import history
from barlow.errors import UserError
from barlow.files import read_status, write_json
from slurm.runs import facts, standing, table
from slurm.states import State


def make(root: Path, name: str, **status: object) -> Path:
    folder = root / name
    (folder / "logs").mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    write_json(folder / "status.json", {"state": "pending", "why": "", **status, "updated": time.time()})
    return folder


def program(folder: Path, name: str, body: str) -> None:
    (folder / name).write_text(f"#!/bin/sh\n{body}\n")
    (folder / name).chmod(0o755)


def hours_ago(hours: float) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.localtime(time.time() - 3600 * hours))


@pytest.mark.parametrize(
    ("status", "answer", "shown", "why"),
    [
        (("pending", ""), State("PENDING", "Resources"), "pending", ""),
        (("pending", "SIGTERM; saved at step 7"), State("PENDING", "BeginTime"), "pending (requeued)", "SIGTERM"),
        (("running", ""), State("PENDING", "BeginTime"), "pending (requeued)", ""),
        (("preempted", "saved"), State("REQUEUED"), "pending (requeued)", "saved"),
        (("pending", ""), State("RUNNING", starts=hours_ago(1)), "running (starting)", ""),
        (("running", ""), State("RUNNING", starts=hours_ago(1)), "running", ""),
        (("running", ""), State("RUNNING", starts=hours_ago(-1)), "running (starting)", ""),  # again, after a kill
        (("preempted", "saved"), State("RUNNING", starts=hours_ago(1)), "running (ending)", "saved"),
        (("running", ""), State("COMPLETING", starts=hours_ago(1)), "running (ending)", ""),
        (("running", ""), State("SUSPENDED", starts=hours_ago(1)), "running (suspended)", ""),
        (("running", ""), State("PREEMPTED"), "preempted", ""),
        (("failed", "x"), State("PENDING", "BeginTime"), "pending (requeued)", "x"),
        (("finished", ""), State("COMPLETING"), "finished", ""),
        (("failed", "rank 1 on n2: x"), State("CANCELLED"), "failed", "rank 1 on n2: x"),
        (("pending", ""), State("CANCELLED", starts="N/A"), "cancelled", "job 12 was cancelled"),
        (("running", ""), State("TIMEOUT", nodes="n1"), "failed", "job 12 ended: timeout on n1"),
        (("preempted", "saved"), State("FAILED"), "failed", "job 12 ended: failed (saved)"),
        (("running", ""), State("COMPLETED", starts=hours_ago(1)), "running?", ""),  # squeue: the word is on its way
        (("running", ""), State("COMPLETED"), "failed", "job 12 completed, but the run did not"),  # sacct, later
        (("running", ""), State(), "failed", "job 12 has left the queue without a word"),
        (("pending", ""), State(), "cancelled", "job 12 was cancelled while it waited, or lost"),
        (("preempted", "saved"), State(), "failed", "job 12 did not come back to the queue (saved)"),
        (("cancelled", "by hand"), State(), "cancelled", "by hand"),
        (("running", ""), None, "running?", ""),
        (("failed", "x"), None, "failed", "x"),
        (("finished", ""), None, "finished", ""),
    ],
)
def test_a_run_with_a_job(tmp_path: Path, status: tuple[str, str], answer: State | None, shown: str, why: str) -> None:
    folder = make(tmp_path, "mine", state=status[0], why=status[1], job="12")
    run = standing.stands(folder, read_status(folder), False, answer)
    assert str(run) == shown
    assert run.why.startswith(why)
    assert run.alive == (shown.split()[0] in ("pending", "running", "preempted", "running?"))


def test_a_job_that_is_gone_is_not_given_up_while_ranks_beat(tmp_path: Path) -> None:
    folder = make(tmp_path, "elsewhere", state="running", job="12")
    (folder / "heartbeats").mkdir()
    write_json(folder / "heartbeats" / "rank_0.json", {"rank": 0})
    assert str(standing.stands(folder, read_status(folder), False, State())) == "running?"
    os.utime(folder / "heartbeats" / "rank_0.json", (1, 1))
    assert str(standing.stands(folder, read_status(folder), False, State())) == "failed"


def test_a_run_here_lives_as_long_as_its_launcher(tmp_path: Path) -> None:
    folder = make(tmp_path, "here", state="running", why="", steps=10)
    lock = folder / "logs" / "launcher.lock"
    lock.write_text(f"{socket.gethostname()} 1\n")
    os.utime(lock, (1, 1))
    with open(lock, "a") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        (run,), silence = standing.look([folder])
        assert (str(run), run.alive, run.here, silence) == ("running", True, True, "")
        os.utime(lock, (time.time() + 9, time.time() + 9))
        assert str(standing.look([folder])[0][0]) == "running (starting)"
        assert read_status(folder)["state"] == "running"
    lock.write_text("another-host 1\n")
    assert str(standing.look([folder])[0][0]) == "running?"
    lock.write_text(f"{socket.gethostname()} 1\n")
    assert str(standing.look([folder])[0][0]) == "failed"
    assert (read_status(folder)["state"], read_status(folder)["why"]) == ("failed", "its launcher is gone")


def test_slurm_that_does_not_answer_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    running = make(tmp_path, "one", state="running", job="12")
    ended = make(tmp_path, "two", state="failed", why="x", job="13")
    program(tmp_path, "squeue", "echo 'slurm_load_jobs error: Unable to contact slurm controller' >&2; exit 1")
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin")
    found, silence = standing.look([running, ended])
    assert [str(run) for run in found] == ["running?", "failed"]
    assert silence == "slurm_load_jobs error: Unable to contact slurm controller"
    assert read_status(running)["state"] == "running"
    (tmp_path / "squeue").unlink()
    monkeypatch.setenv("PATH", str(tmp_path))
    assert standing.look([running])[1] == "there is no SLURM on this machine (no squeue)"


def test_what_sacct_knows_of_a_forgotten_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """slurmdbd needs a database server, so sacct is a script here; its lines are as sacct prints them."""
    names = ("cut", "late", "kept", "other", "never")
    folders = [make(tmp_path, name, state="running", job=str(21 + i)) for i, name in enumerate(names)]
    array = make(tmp_path, "of-array", state="pending", job="30_4")
    program(tmp_path, "squeue", f'echo "$@" >> {tmp_path}/asked')
    lines = ["21|CANCELLED by 1000|n[1-2]|cut", "22|TIMEOUT|n1|late", "23|RUNNING|n1|kept", "24|FAILED|n1|a-stranger"]
    lines += ["30_4|CANCELLED by 0|None assigned|sweep"]
    program(tmp_path, "sacct", "cat <<'END'\n" + "\n".join(lines) + "\nEND")
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    found, _ = standing.look([*folders, array])
    lost = "has left the queue without a word"
    assert [(run.state, run.why) for run in found] == [
        ("cancelled", "job 21 was cancelled"),
        ("failed", "job 22 ended: timeout on n1"),
        ("failed", f"job 23 {lost}"),
        ("failed", f"job 24 {lost}"),
        ("failed", f"job 25 {lost}"),
        ("cancelled", "job 30_4 was cancelled"),
    ]
    assert [read_status(folder)["state"] for folder in folders] == ["cancelled", *["failed"] * 4]
    assert (tmp_path / "asked").read_text().count("--jobs=21,22,23,24,25,30_4") == 1  # one question for all


def test_names_and_patterns(tmp_path: Path) -> None:
    for i, name in enumerate(("sweep-1", "sweep-2", "base")):
        os.utime(make(tmp_path, name) / "config.json", (i, i))
    (tmp_path / "no-run").mkdir()

    def names(*words: str) -> list[str]:
        return [path.name for path in standing.find(tmp_path, words)]

    assert names() == ["base", "sweep-2", "sweep-1"]  # newest first
    assert names("sweep-*") == ["sweep-2", "sweep-1"]
    assert names(f"{tmp_path}/base/", "sweep-1", "s*-1") == ["base", "sweep-1"]
    with pytest.raises(UserError, match="no run 'other/base'"):
        names("other/base")
    with pytest.raises(UserError, match=r"no run 'swep-1' in .*: did you mean sweep-1\?"):
        names("base", "swep-1")
    with pytest.raises(UserError, match=r"no run 'x\*' in .*: it has base, sweep-2, sweep-1$"):
        names("x*")


def test_a_row_and_a_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make(tmp_path, "long", state="running", step=60, steps=1000, attempts=2, job="12")
    rows = [{"step": i, "images": i * 64, "loss": 1.0, "images_per_sec": 100.0 + i % 3} for i in range(1, 101)]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "metrics.jsonl").write_text(text + '{"step": 101, "ima')
    write_json(folder / "config.json", {"epochs": 10, "model": {"backbone": "resnet50", "projector": [8, 8]}})
    (folder / "command.txt").write_text("2026-01-01 00:00:00  first\n2026-01-02 00:00:00  python launchers/x.py\n")
    history.note(folder, "submitted", job="12")
    history.note(folder, "failed", step=60, rank=2, host="n3", why="rank 2 on n3 was killed by SIGKILL")
    history.note(folder, "start", step=60, ranks=4, nodes=["n1", "n2"])
    (folder / "heartbeats").mkdir()
    beat = {"node": "n1", "step": 100, "phase": "data", "time": time.time()}
    write_json(folder / "heartbeats" / "rank_10.json", {**beat, "rank": 10, "late": 20.2})
    write_json(folder / "heartbeats" / "rank_11.json", {**beat, "rank": 11, "attempt": "11.0", "time": 1.0})
    write_json(folder / "heartbeats" / "rank_9.json", {**beat, "rank": 9, "late": -200.0})
    squeue = "12|RUNNING|None|n[1-4]|1-02:00:05|2026-01-01T00:00:00|long"
    program(tmp_path, "squeue", f"echo '{squeue}'")
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin")
    (run,), _ = standing.look([folder])
    row = facts.row(run)
    assert (row["step"], row["images_per_sec"], row["seconds_left"]) == (100, 101.0, round(900 * 64 / 101, 1))
    assert (row["job"], row["nodes"], row["why"]) == ("12", "n[1-4]", "rank 2 on n3 was killed by SIGKILL")
    told = facts.everything(run)
    assert told["config"] == {"epochs": 10, "model.backbone": "resnet50", "model.projector": [8, 8]}
    assert (told["limit_left"], told["command"]) == (26 * 3600 + 5, "2026-01-02 00:00:00  python launchers/x.py")
    assert [beat["rank"] for beat in told["ranks"]] == [9, 10]
    assert json.loads(json.dumps(told)) == told
    page = table.page(told)
    for line in ("100/1000, 101 images/s, 9m30s left", "12 running, n[1-4], 1d02h of its time limit left"):
        assert line in page
    assert page.count("submitted              job 12\n") == 1
    assert "10  n1     100  data   late by 20s" in page
    line = table.listing([row]).splitlines()[1]
    assert line == "long  running  100/1000       2       101  9m30s  12   n[1-4]"
    long = {**row, "run": "a" * 60, "detail": "starting"}
    assert max(map(len, table.listing([long, row]).splitlines())) <= 100


def test_the_tail_of_a_long_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(facts, "BLOCK", 7)
    lines = [f"{i} é\n".encode() for i in range(50)]
    (tmp_path / "log").write_bytes(b"".join(lines) + b"cut off")
    assert facts.tail(tmp_path / "log", 4) == [*lines[-3:], b"cut off"]
    assert facts.tail(tmp_path / "log", 99) == [*lines, b"cut off"]
    assert facts.tail(tmp_path / "log", 0) == facts.tail(tmp_path / "none", 9) == []


@pytest.mark.parametrize(
    ("left", "seconds", "shown"),
    [("9:58", 598, "9m58s"), ("1:00:00", 3600, "1h00m"), ("2-04:30:00", 189000, "2d04h"), ("0:45", 45, "45s")],
)
def test_spans(left: str, seconds: float, shown: str) -> None:
    assert facts.seconds(left) == seconds
    assert table.span(seconds) == shown


@pytest.mark.parametrize("left", ["UNLIMITED", "INVALID", "NOT_SET", ""])
def test_no_span(left: str) -> None:
    assert facts.seconds(left) is None
