"""python -m slurm.job.settle RUN_FOLDER EXIT_CODE [--max-failures N]: what a job's script does last, with all ranks
gone.

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
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from barlow import history
from barlow.files import read_json, read_status, write_status
from barlow.stop import SIGNALS, STOPPED
from slurm import scontrol
from slurm.job.rank import attempt, job_name
from slurm.job.srun import first_words, killed_rank
from slurm.states import BY_WATCHDOG, read_failure, record_killed, why_told

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
    if status.get("state") == "finished" or (code == 0 and state != "preempted"):
        return 0
    shown = scontrol.show_job()
    try:
        end = how_it_ended(folder, state, code)
    except Exception as error:  # a damaged file, a disk that cannot be read: no reason to lose the job
        traceback.print_exc(file=sys.stdout)
        end = End("killed", f"its ranks have left; why, cannot be read ({type(error).__name__}: {error})")
    if shown and not scontrol.running(shown):
        return leave_to_slurm(folder, shown, end)
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
        return 2
    if counts and (times := failures_at(folder, step)) >= most:
        why = f"{times} starts have failed without a checkpoint newer than step {step}; the last: {end.why}"
        why = why if times > 1 else end.why
        tell(folder, "failed", "given up", why, step=step)
        print(why, flush=True)
        return 1
    return put_back(folder, shown, end)


def how_it_ended(folder: Path, state: str | None, code: int) -> End:
    """The first cause, not what followed from it: a rank's death is told by srun, all else by the ranks."""
    job = job_name(os.environ)
    failure = read_failure(folder, attempt(os.environ))
    known = End(failure.get("kind", "crash"), f"rank {failure['rank']} on {failure['host']}: {failure['error']}",
                failure["rank"], failure["host"]) if failure else None  # fmt: skip
    if failure and failure["exit_code"] == 2:
        return End("user", failure["error"], failure["rank"], failure["host"])
    if known and known.kind in (*BY_WATCHDOG, "node"):
        return known
    killed = killed_rank(folder, job)
    signalled = killed and killed[2] in [f"was killed by {each.name}" for each in SIGNALS]
    if killed and not signalled:  # its peers were told to stop by srun then, as if by SLURM
        rank, host, how = killed
        with contextlib.suppress(OSError):
            record_killed(folder, attempt(os.environ), rank, host, how)
        return End("killed", f"rank {rank} on {host} {how}", rank, host)
    if known and failure["told"]:
        return End("stopped", failure["told"])
    if killed:  # before its Python heard signals
        return known or End("stopped", f"{killed[2].split()[-1]} before it began")
    if known:
        return known
    words = first_words(folder, job)
    if state == "preempted":
        return End("stopped", str(read_status(folder).get("why", "")))
    if words and not words.endswith(f"exit code {STOPPED}"):  # srun then told its peers to stop, as if it were SLURM
        return End("killed", words)
    if told := why_told(folder, attempt(os.environ)):
        return End("stopped", told)
    return End("killed", words or f"its ranks ended with exit code {code} before the run")


def leave_to_slurm(folder: Path, shown: str, end: End) -> int:
    """The job ends for good, or SLURM or an operator has put it back already; but at its time limit it may go back."""
    state = scontrol.value(shown, "JobState")
    late = state == "TIMEOUT" or scontrol.value(shown, "Reason") == "TimeLimit"
    if late and scontrol.may_requeue(shown) and scontrol.requeue():
        tell(folder, "pending", "requeued", f"at its time limit; {end.why}", step=newest_step(folder))
    elif scontrol.cancelled(shown):
        why = f"job {job_name(os.environ)} was cancelled"
        tell(folder, "cancelled", "cancelled", f"{why}: {end.why}" if end.kind == "stopped" else why)
    elif scontrol.value(shown, "Restarts") != os.environ.get("SLURM_RESTART_COUNT", "0") or state == "PENDING":
        tell(folder, "pending", "requeued", f"by SLURM or an operator; {end.why}", step=newest_step(folder))
    else:
        tell(folder, "failed", "failed", f"SLURM ended the job: {state.lower()}; {end.why}", step=newest_step(folder))
    return 1


def put_back(folder: Path, shown: str, end: End) -> int:
    """Back into the queue, away from nodes that it failed on."""
    if shown and not scontrol.may_requeue(shown):
        tell(folder, "failed", "given up", f"job {job_name(os.environ)} may not be requeued; {end.why}")
        return STOPPED
    bad = to_avoid(folder, shown)
    print(f"job {job_name(os.environ)} is to go back to the queue: {end.why}", flush=True)
    if scontrol.there() and scontrol.requeue():
        if bad and scontrol.exclude(bad, shown):
            with contextlib.suppress(OSError):
                history.note(folder, "excluded", nodes=sorted(bad))
        tell(folder, "pending", "requeued", end.why)
        return STOPPED
    if "SIGTERM" in end.why and not scontrol.there():
        # A preempted job goes back by itself if SLURM has to end it, but not if it has left before.
        print("there is no scontrol here: waiting for SLURM to end the job", flush=True)
        time.sleep(WAIT)
    return STOPPED


def to_avoid(folder: Path, shown: str) -> set[str]:
    """Nodes that are not fit, and those on which ranks failed twice, if enough others are left."""
    failed = [event for event in since_submitted(folder) if event["event"] == "failed" and event.get("host")]
    hosts = [event["host"] for event in failed if event.get("kind") in ("stuck", "killed", "crash")]
    bad = {event["host"] for event in failed if event.get("kind") == "node"}
    bad |= {host for host in hosts if hosts.count(host) >= TWICE}
    if not bad or not shown:
        return set()
    known, nodes = scontrol.excluded(shown), scontrol.nodes(shown)
    bad = (bad & nodes.keys()) - known  # what a rank says of a node that nobody heard of is no name
    left = {node for node, usable in nodes.items() if usable} - bad - known
    needed = int(scontrol.value(shown, "NumNodes").split("-")[0] or 1)
    if bad and len(left) < needed:
        names = ", ".join(sorted(bad))
        print(f"{names} failed, but without it {len(left)} nodes are left of the {needed} needed: it stays", flush=True)
        return set()
    return bad


def since_submitted(folder: Path) -> list[dict[str, Any]]:
    events = history.read(folder)
    return events[max((i for i, event in enumerate(events) if event["event"] == "submitted"), default=0) :]


def failures_at(folder: Path, step: int) -> int:
    """How often the run has failed without a newer checkpoint, since it was last submitted."""
    return sum(event["event"] == "failed" and event.get("step") == step for event in since_submitted(folder))


def started_at(folder: Path) -> int:
    """The step that this start of the job began with; if it did not get so far, the newest."""
    starts = [e for e in history.read(folder) if e["event"] == "start" and e["attempt"] == attempt(os.environ)]
    return int(starts[-1]["step"]) if starts else newest_step(folder)


def newest_step(folder: Path) -> int:
    try:
        return int(read_json(folder / "checkpoints" / "latest.json").get("step", 0))
    except (OSError, ValueError):
        return 0


def tell(folder: Path, state: str, event: str, why: str, **facts: Any) -> None:
    """A full disk must not keep the job from going back."""
    with contextlib.suppress(OSError):
        write_status(folder, unless=("finished",), state=state, why=why, settled=attempt(os.environ))
    with contextlib.suppress(OSError):
        history.note(folder, event, why=why, **facts)


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m slurm.job.settle", description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("code", type=int)
    parser.add_argument("--max-failures", type=int, default=3)
    args = parser.parse_args(argv)
    os.environ["BARLOW_ATTEMPT"] = attempt(os.environ)
    return settle(args.folder, args.code, args.max_failures)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # requeueing ends this very script
    sys.exit(main(sys.argv[1:]))
