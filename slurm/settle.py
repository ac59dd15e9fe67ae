"""python -m slurm.settle RUN_FOLDER EXIT_CODE [--max-failures N]: what a job's script does last, with all ranks gone.

The one place that decides whether the job goes back to the queue, and so once: a run that was told to stop does, one
that failed does unless it fails at the same step again and again, one that finished, was cancelled or has a user's
error does not; nor does one that SLURM puts back itself. Ends with the exit code of the job: 75 where it ought to go
back and this node cannot ask for it, which `RequeueExit=75` in slurm.conf makes SLURM do."""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from barlow import history
from barlow.files import read_json, read_status, write_status
from barlow.stop import SIGNALS, STOPPED
from slurm import scontrol
from slurm.follow import first_words, killed_rank
from slurm.job import attempt, job_name
from slurm.states import read_failure, record_killed

WAIT = 300.0  # seconds for SLURM to end a preempted job that cannot ask to go back; more than most grace times
TWICE = 2  # failures of ranks on a node after which the job avoids it


@dataclass(frozen=True)
class End:
    """How this start of the job has ended. `kind`: stopped, user, late, or a failure's (see states.record_failure)."""

    kind: str
    why: str
    rank: int = 0
    host: str = ""


def settle(folder: Path, code: int, most: int) -> int:
    """Decide, and say so in status.json and history.jsonl; returns the job's exit code."""
    status = read_status(folder)
    state = status.get("state") if status.get("attempt") == attempt(os.environ) else None  # else of an earlier start
    if state == "finished" or (code == 0 and state != "preempted"):
        return 0
    shown = scontrol.show_job()
    end = how_it_ended(folder, state, code)
    if shown and not scontrol.running(shown):
        leave_to_slurm(folder, shown, end)
        return code or STOPPED
    step = newest_step(folder)
    limited = end.kind == "stopped" and "SIGUSR2" in end.why and not scontrol.preempted(shown)
    if limited and step <= started_at(folder):  # it would go on like this for ever
        end = End("late", f"the time limit came before a checkpoint newer than step {step} ({end.why})")
    counts = end.kind != "stopped"
    if counts:
        tell(folder, "failed", "failed", end.why, step=step, rank=end.rank, host=end.host, kind=end.kind)
    else:
        tell(folder, "preempted", "stopped", end.why, step=step)
    if end.kind == "user":
        return code or 1
    if counts and (times := failures_at(folder, step)) >= most:
        why = f"{times} starts have failed without a checkpoint newer than step {step}; the last: {end.why}"
        why = why if times > 1 else end.why
        tell(folder, "failed", "given up", why, step=step)
        print(why, flush=True)
        return code or 1
    return put_back(folder, shown, end)


def how_it_ended(folder: Path, state: str | None, code: int) -> End:
    """The first cause, not what followed from it: a rank's death is told by srun, all else by the ranks."""
    job = job_name(os.environ)
    failure = read_failure(folder, attempt(os.environ))
    known = End(failure.get("kind", "crash"), f"rank {failure['rank']} on {failure['host']}: {failure['error']}",
                failure["rank"], failure["host"]) if failure else None  # fmt: skip
    if failure and failure["exit_code"] == 2:
        return End("user", failure["error"], failure["rank"], failure["host"])
    if known and known.kind in ("stuck", "hung", "node"):
        return known
    killed = killed_rank(folder, job)
    if killed and killed[2] in [f"was killed by {each.name}" for each in SIGNALS]:  # before its Python heard signals
        return known or End("stopped", f"{killed[2].split()[-1]} before it began")
    if killed:
        rank, host, how = killed
        with contextlib.suppress(OSError):
            record_killed(folder, attempt(os.environ), rank, host, how)
        return End("killed", f"rank {rank} on {host} {how}", rank, host)
    if known:
        return known
    words = first_words(folder, job)
    if words and not words.endswith(f"exit code {STOPPED}"):  # srun then told its peers to stop, as if it were SLURM
        return End("killed", words)
    if state == "preempted":
        return End("stopped", str(read_status(folder).get("why", "")))
    return End("killed", words or f"its ranks ended with exit code {code} before the run")


def leave_to_slurm(folder: Path, shown: str, end: End) -> None:
    """The job ends for good, or SLURM or an operator has put it back already."""
    state = scontrol.value(shown, "JobState")
    if scontrol.cancelled(shown):
        why = f"job {job_name(os.environ)} was cancelled"
        tell(folder, "cancelled", "cancelled", f"{why}: {end.why}" if end.kind == "stopped" else why)
    elif scontrol.value(shown, "Restarts") != os.environ.get("SLURM_RESTART_COUNT", "0") or state == "PENDING":
        tell(folder, "pending", "requeued", f"by SLURM or an operator; {end.why}", step=newest_step(folder))
    else:
        tell(folder, "failed", "failed", f"SLURM ended the job: {state.lower()}; {end.why}", step=newest_step(folder))


def put_back(folder: Path, shown: str, end: End) -> int:
    """Back into the queue, away from nodes that it failed on."""
    if shown and not scontrol.may_requeue(shown):
        tell(folder, "failed", "given up", f"job {job_name(os.environ)} may not be requeued; {end.why}")
        return STOPPED
    print(f"job {job_name(os.environ)} goes back to the queue: {end.why}", flush=True)
    if shown and scontrol.requeue():
        tell(folder, "pending", "requeued", end.why)
        avoid(folder, shown)
        return STOPPED
    if "SIGTERM" in end.why and not scontrol.there():
        # A preempted job goes back by itself if SLURM has to end it, but not if it has left before.
        print("there is no scontrol here: waiting for SLURM to end the job", flush=True)
        time.sleep(WAIT)
    return STOPPED


def avoid(folder: Path, shown: str) -> None:
    """Exclude nodes that are not fit, and those on which ranks failed twice, if enough others are left."""
    failed = [event for event in history.read(folder) if event["event"] == "failed" and event.get("host")]
    hosts = [event["host"] for event in failed if event.get("kind") in ("stuck", "killed", "crash")]
    bad = {event["host"] for event in failed if event.get("kind") == "node"}
    bad |= {host for host in hosts if hosts.count(host) >= TWICE}
    known = scontrol.excluded(shown)
    nodes = scontrol.nodes(shown)
    bad &= nodes.keys()  # what a rank says of a node that nobody heard of is no name
    left = {node for node, usable in nodes.items() if usable} - bad - known
    needed = int(scontrol.value(shown, "NumNodes").split("-")[0] or 1)
    names = ", ".join(sorted(bad - known))
    if not names:
        return
    if len(left) < needed:
        print(f"{names} failed, but without it {len(left)} nodes are left of the {needed} needed: it stays", flush=True)
    elif scontrol.exclude(bad - known, shown):
        with contextlib.suppress(OSError):
            history.note(folder, "excluded", nodes=sorted(bad - known))


def failures_at(folder: Path, step: int) -> int:
    """How often the run has failed without a newer checkpoint, since it was last submitted."""
    events = history.read(folder)
    submitted = max((i for i, event in enumerate(events) if event["event"] == "submitted"), default=0)
    return sum(event["event"] == "failed" and event.get("step") == step for event in events[submitted:])


def started_at(folder: Path) -> int:
    """The step that this start of the job began with; if it did not get so far, the newest."""
    starts = [e for e in history.read(folder) if e["event"] == "start" and e["attempt"] == attempt(os.environ)]
    return int(starts[-1]["step"]) if starts else newest_step(folder)


def newest_step(folder: Path) -> int:
    return int(read_json(folder / "checkpoints" / "latest.json").get("step", 0))


def tell(folder: Path, state: str, event: str, why: str, **facts: Any) -> None:
    """A full disk must not keep the job from going back."""
    with contextlib.suppress(OSError):
        write_status(folder, state=state, why=why, settled=attempt(os.environ))
    with contextlib.suppress(OSError):
        history.note(folder, event, why=why, **facts)


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m slurm.settle", description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("code", type=int)
    parser.add_argument("--max-failures", type=int, default=3)
    args = parser.parse_args(argv)
    os.environ["BARLOW_ATTEMPT"] = attempt(os.environ)
    return settle(args.folder, args.code, args.max_failures)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # requeueing ends this very script
    sys.exit(main(sys.argv[1:]))
