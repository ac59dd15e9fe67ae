"""What SLURM knows of many jobs: one question to squeue and, for those it has forgotten, one to sacct."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Iterable, Sequence

from slurm.states import State

PATIENCE = 30.0  # seconds for an answer
JOB = re.compile(r"\d+(_\d+)?")  # of an array: 123_4
QUEUE = "--format=%i|%T|%r|%N|%L|%S|%j"  # the name last: it may hold anything
HISTORY = "--format=JobID,State,NodeList,JobName"


def jobs_in_queue(jobs: Iterable[str]) -> tuple[dict[str, State], str]:
    """The state of each job that squeue knows, and why there is no answer; empty if there is one.

    A job that an answer leaves out has been forgotten: SLURM keeps ended ones for some minutes."""
    asked = sorted(job for job in jobs if JOB.fullmatch(job))
    if not asked:
        return {}, ""
    flags = ["--noheader", "--all", "--array", "--states=all"]
    lines, error = ask("squeue", *flags, f"--jobs={','.join(asked)}", QUEUE)
    if error and "Invalid job id" not in error:  # which is what it says of a single one
        return {}, error
    found = {}
    for line in lines:
        job, name, reason, nodes, left, starts, run = line.split("|", 6)
        found[job] = State(name, reason, nodes, run, left, starts)
    return found, ""


def jobs_in_history(jobs: Iterable[str]) -> dict[str, State]:
    """How jobs have ended by the books of slurmdbd; nothing where there are none."""
    asked = sorted(job for job in jobs if JOB.fullmatch(job))
    if not asked:
        return {}
    flags = ["--noheader", "--parsable2", "--allocations", "--allusers"]
    lines, _ = ask("sacct", *flags, f"--jobs={','.join(asked)}", HISTORY)
    found = {}
    for line in lines:
        job, told, nodes, run = line.split("|", 3)
        state = State(told.split()[0], "", "" if nodes == "None assigned" else nodes, run)  # "CANCELLED by 1000"
        if not state.alive:  # else the books were never closed
            found[job] = state
    return found


def end_jobs(jobs: Sequence[str]) -> str:
    """scancel; returns its complaint."""
    return ask("scancel", *jobs)[1] if jobs else ""


def ask(command: str, *options: str) -> tuple[list[str], str]:
    """Its lines, and its complaint in one line if it failed. What a user's SQUEUE_* would leave out is not left out."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("SQUEUE_", "SACCT_"))}
    try:
        done = subprocess.run([command, *options], env=environment, capture_output=True, text=True, timeout=PATIENCE)
    except FileNotFoundError:
        return [], f"there is no SLURM on this machine (no {command})"
    except subprocess.TimeoutExpired:
        return [], f"{command} has no answer after {PATIENCE:.0f} s"
    complaint = "; ".join(done.stderr.split("\n")).strip("; ")
    return done.stdout.splitlines(), (complaint or f"{command} failed") if done.returncode else ""
