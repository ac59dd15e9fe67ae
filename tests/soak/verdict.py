"""What came of a soak: its table, a line a disturbance, and the verdict, a line for each thing that must hold."""

from __future__ import annotations

import contextlib
import csv
import json
import os
import platform
import re
import subprocess
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from barlow import history
from barlow.engine.checkpoint import find, load
from barlow.files import read_json
from slurm import devcluster, devfaults
from slurm.devfaults import until
from tests.soak.run import ROOT, Run

RESULTS = ROOT / "benchmarks" / "results" / "soak.csv"


@dataclass
class Hit:
    """A disturbance: what was meant, and what came of it."""

    number: int
    kind: str
    aim: str
    due: int  # the step to wait for
    at: float = 0.0  # seconds since the command
    step: int = 0  # the last one recorded
    restarts: int = 0  # of the job, before
    ends: bool | None = None  # whether it must end this start of the job; None: it may
    target: str = ""
    after: int = 0  # restarts, when the next one hits
    fault: str = ""


def row(hit: Hit, run: Run) -> dict[str, Any]:
    """A line of the table."""
    new = run.starts().get(run.attempt(hit.after)) if hit.after > hit.restarts else None
    reached = run.watch.reached.get(hit.after, hit.step)  # told to stop, it makes a step more
    to_next = run.watch.next_new_step(hit.at, max(hit.step, reached) if hit.after > hit.restarts else hit.step)
    ended = [e for e in history.read(run.folder) if e["attempt"] == run.attempt(hit.restarts) and e.get("why")]
    followed = {0: "went on", 1: "requeued"}.get(hit.after - hit.restarts, f"{hit.after - hit.restarts} requeues")
    return {
        "number": hit.number,
        "at_s": round(hit.at, 1),
        "kind": hit.kind,
        "target": hit.target,
        "moment": hit.aim,
        "step": hit.step,
        "followed": followed,
        "new_start": "" if new is None else new,
        "made_again": "" if new is None else max(0, reached - new),
        "to_next_new_step_s": "" if to_next is None else round(to_next, 1),
        "because": ended[-1]["why"] if ended and hit.after > hit.restarts else "",
    }


def show(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Print the table, and return it."""
    widths = {key: max(len(str(row[key])) for row in [{key: key}, *rows]) for row in rows[:1] for key in row}
    for line in [{key: key for key in widths}, *rows]:
        print("  ".join(str(line[key]).ljust(width) for key, width in widths.items())[:220].rstrip())
    return rows


def verdict(run: Run, undisturbed: Path, hits: list[Hit], restarts: int, wanted: int) -> list[tuple[bool, str]]:
    """Line by line, and whether each holds; printed, too."""
    lines = [
        same_state(run.folder, undisturbed),
        same_steps(run.folder, undisturbed),
        nothing_lost(run, hits),
        requeued_once(hits, restarts),
        history_agrees(run, restarts),
        nobody_helped(run, hits, wanted),
        nothing_left(run),
    ]
    for well, line in lines:
        print(f"{'ok    ' if well else 'FAILED'}  {line}")
    return lines


def same_state(folder: Path, undisturbed: Path) -> tuple[bool, str]:
    ours, theirs = state_of(folder), state_of(undisturbed)
    same = [key for key in theirs if key in ours and torch.equal(ours[key], theirs[key])]
    well = ours.keys() == theirs.keys() and len(same) == len(theirs)
    return well, f"weights and momentum: {len(same)} of {len(theirs)} tensors bit-identical"


def same_steps(folder: Path, undisturbed: Path) -> tuple[bool, str]:
    """Every step once, in order, with the same loss, learning rate and accuracy: all but the time it took."""
    ours, theirs = rows_of(folder), rows_of(undisturbed)
    same = sum(a == b for a, b in zip(ours, theirs, strict=False))
    once = [row["step"] for row in ours] == list(range(1, len(theirs) + 1))
    results = read_json(folder / "results.json") == read_json(undisturbed / "results.json") != {}
    told = f"metrics: {len(ours)} rows for {len(theirs)} steps, {same} with the same values"
    return once and same == len(theirs) and results, told + ("" if results else "; other results.json")


def nothing_lost(run: Run, hits: list[Hit]) -> tuple[bool, str]:
    """Each start goes on from the newest good checkpoint that its predecessor has left, or later."""
    began = {start: step for start in run.watch.saved if (step := run.starts().get(run.attempt(start))) is not None}
    lost = [f"start {k} went on at {at} of {run.watch.saved[k]}" for k, at in began.items() if at < run.watch.saved[k]]
    again = sum(row(hit, run)["made_again"] or 0 for hit in hits)
    return not lost, f"lost beyond the last checkpoint: {'; '.join(lost) or 'no step'}; made again: {again}"


def requeued_once(hits: list[Hit], restarts: int) -> tuple[bool, str]:
    wrong = [f"{hit.number} {hit.kind}: {fault}" for hit in hits if (fault := fault_of(hit))]
    ended = sum(hit.after > hit.restarts for hit in hits)
    told = f"requeues: {restarts} for {ended} starts that {len(hits)} disturbances have ended"
    return not wrong and restarts == ended, "; ".join([told, *wrong])


def history_agrees(run: Run, restarts: int) -> tuple[bool, str]:
    """With what SLURM counts and what the job's script has said; nothing is there twice."""
    log = (run.folder / "logs" / "submitit" / f"{run.job}_0_log.out").read_text(errors="replace")
    begun = [int(number) for number in re.findall(r"^start (\d+)$", log, re.MULTILINE)]
    events = [(e["event"], e["attempt"]) for e in history.read(run.folder) if e["event"] in ("start", "requeued")]
    twice = [f"{event} {start} is there twice" for event, start in set(events) if events.count((event, start)) > 1]
    trained = [start for event, start in events if event == "start"]
    well = begun == list(range(restarts + 1)) and not twice and trained[-1:] == [run.attempt(restarts)]
    told = f"history: {len(trained)} of {len(begun)} starts came to train; SLURM counts {restarts} restarts"
    return well, "; ".join([told, *twice])


def nobody_helped(run: Run, hits: list[Hit], wanted: int) -> tuple[bool, str]:
    commands = sum(event["event"] == "submitted" for event in history.read(run.folder))
    well = run.finished() and commands == 1 and len(hits) >= wanted
    return well, f"finished: {run.finished()}, after {commands} command and {len(hits)} disturbances"


def nothing_left(run: Run) -> tuple[bool, str]:
    until(lambda: not left_behind(run), 20.0)
    left = sorted(run.watch.left | left_behind(run))
    return not left, f"processes left behind: {'; '.join(left) or 'none'}"


def fault_of(hit: Hit) -> str:
    """What is wrong with the number of requeues that followed a disturbance; empty if nothing is."""
    requeues = hit.after - hit.restarts
    expected = (0, 1) if hit.ends is None else (int(hit.ends),)
    return hit.fault or ("" if requeues in expected else f"{requeues} requeues")


def state_of(folder: Path) -> dict[str, torch.Tensor]:
    """Weights, buffers and momentum of the newest good checkpoint."""
    stored = load(find(str(folder)))
    tensors = {f"model.{key}": value for key, value in stored["model"].items()}
    for number, state in stored["optimizer"]["state"].items():
        tensors |= {f"optimizer.{number}.{key}": torch.as_tensor(value) for key, value in state.items()}
    return tensors | {"step": torch.tensor(stored["step"])}


def rows_of(folder: Path) -> list[dict[str, Any]]:
    """Of metrics.jsonl, without what no two runs have in common."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key not in ("images_per_sec", "data_wait")} for row in rows]


def left_behind(run: Run) -> set[str]:
    """Processes of the job, by its number, by the cluster's steps, and by the run folder in their command."""
    found = {pid: "of the job" for pid in devfaults.of_job(run.job)}
    found |= {pid: name for pid, name in devcluster.processes(run.cluster).items() if name == "slurmstepd"}
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if str(run.folder).encode() in (entry / "cmdline").read_bytes() and int(entry.name) != os.getpid():
                found[int(entry.name)] = "with the run folder in its command"
    return {f"process {pid}, {what}" for pid, what in found.items()}


def record(rows: list[dict[str, Any]], lines: list[tuple[bool, str]], seed: int) -> None:
    """The table, and beside it the verdict."""
    told = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((line.split(":")[1].strip() for line in told if line.startswith("model name")), platform.machine())
    git = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True)
    slurm = subprocess.run(["sinfo", "--version"], capture_output=True, text=True).stdout.split()[-1:]
    where = {"seed": seed, "cpu": model, "cores": len(os.sched_getaffinity(0)), "commit": git.stdout.strip()}
    where |= {"slurm": "".join(slurm), "torch": version("torch"), "submitit": version("submitit")}
    verdict: list[dict[str, Any]] = [{"holds": well, "what": line} for well, line in lines]
    for path, found in ((RESULTS, rows), (RESULTS.with_name("soak_verdict.csv"), verdict)):
        with path.open("w", newline="") as file:
            table = csv.DictWriter(file, [*found[0], *where])
            table.writeheader()
            table.writerows(each | where for each in found)
