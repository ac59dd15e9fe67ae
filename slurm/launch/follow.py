"""Watch a SLURM job from its submission to its end: its states, rank 0's log, and what ended it."""

from __future__ import annotations

import contextlib
import sys
import time
from pathlib import Path

from barlow.files import read_status, write_status
from slurm.job.srun import killed_rank
from slurm.launch.local import show_failure
from slurm.states import State, job_state, read_failure, record_killed

EVERY = 0.5  # seconds between two looks at the log
ASK_EVERY = 2.0  # seconds between two questions to slurmctld
LINGER = 30.0  # seconds after which a preempted job has been cancelled rather than put back into the queue


def follow(folder: Path, job: str, seen: int = 0) -> int:
    """Show rank 0's log from byte `seen` on, and the job's states, until it ends. Ctrl-C ends the watching only.

    Returns 0 if the run has finished, 2 for a user's error in a rank, 1 otherwise."""
    try:
        state = watch(folder, job, seen)
    except KeyboardInterrupt:
        print(f"\njob {job} goes on: tail -F {folder / 'logs' / 'rank_0.log'}; scancel {job} ends it", file=sys.stderr)
        return 130
    return report(folder, job, state)


def watch(folder: Path, job: str, seen: int) -> State:
    """Returns the job's last state."""
    told, preempted, asked = "", 0.0, 0.0
    state = last = State()
    with contextlib.ExitStack() as stack:
        log = None
        while True:
            if time.monotonic() - asked >= ASK_EVERY:
                asked, state = time.monotonic(), job_state(job)
            if log is None and (folder / "logs" / "rank_0.log").exists():
                log = stack.enter_context(open(folder / "logs" / "rank_0.log", errors="replace"))
                log.seek(seen)
            news = "" if state.name in ("", "COMPLETING") or str(state) == told else f"job {job} {state}\n"
            told = str(state) if news else told
            lines = log.read() if log else ""
            sys.stdout.write(news + lines if state.alive else lines + news)
            sys.stdout.flush()
            preempted = (preempted or time.monotonic()) if state.name == "PREEMPTED" else 0.0
            if not state.alive or (preempted and time.monotonic() - preempted > LINGER):
                return state if state.name else last
            last = state
            time.sleep(EVERY)


def report(folder: Path, job: str, state: State) -> int:
    """Say what ended the job, the cause and not what followed from it, and give its exit code."""
    finished = read_status(folder).get("state") == "finished"
    if state.name == "COMPLETED" or (finished and state.name in ("", "RUNNING", "COMPLETING")):
        return 0
    status = read_status(folder)
    if str(status.get("settled", "")).startswith(f"{job}.") and status["state"] in ("failed", "cancelled"):
        failure, why = read_failure(folder, f"{job}.") if status["state"] == "failed" else {}, status["why"]
        if failure and (failure["exit_code"] == 2 or failure["traceback"]):
            code = show_failure(failure)
            if code == 2 or why.startswith("rank "):
                return code
        print(f"{why}; logs: {folder / 'logs'}", file=sys.stderr)
        return 1
    by_itself = state.name in ("FAILED", "OUT_OF_MEMORY", "")  # not cancelled, at its time limit, off a lost node
    failure = read_failure(folder, f"{job}.") if by_itself else {}
    if killed := killed_rank(folder, job) if by_itself else None:
        rank, host, how = killed
        record_killed(folder, str(failure.get("attempt", f"{job}.0")), rank, host, how)
        why = f"rank {rank} on {host} {how}"
    elif failure:
        return show_failure(failure)
    else:
        why = f"job {job} ended: {state if state.name else 'SLURM has forgotten it'}"
        if not finished:
            write_status(folder, state="cancelled" if state.name == "CANCELLED" else "failed", why=why)
    print(f"{why}; logs: {folder / 'logs'}", file=sys.stderr)
    return 1
