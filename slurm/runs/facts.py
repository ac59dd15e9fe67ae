"""What there is to tell of a run, as plain values: a row of the list, and all of one run."""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Mapping
from pathlib import Path
from statistics import median
from typing import Any

from barlow import history
from barlow.files import read_json
from slurm.runs.standing import Run, launcher, seconds_of
from slurm.states import WAITING

STOPS = ("stopped", "failed", "requeued", "given up", "cancelled")  # events that say why a run stopped
PACE = 32  # rows of metrics.jsonl whose median is the pace
BLOCK = 1 << 16  # bytes
KNOBS = ["epochs", "batch_size", "seed", "data.dir", "views.size", "model.backbone", "model.stem", "model.width"]
KNOBS += ["model.projector", "model.init", "objective.lambd", "optim.lr", "checkpoint.every_steps"]


def row(run: Run) -> dict[str, Any]:
    """What `list` tells; None where there is nothing to tell."""
    rows = metrics(run.folder)
    step, steps = int(run.status.get("step") or 0), run.status.get("steps")
    told: dict[str, Any] = {"run": run.name, "state": run.state, "detail": run.detail, "certain": run.certain}
    told |= {"step": step, "steps": steps, "attempts": int(run.status.get("attempts") or 0)}
    told |= {"images_per_sec": None, "seconds_left": None}
    if rows and run.alive:
        told["step"] = step = rows[-1]["step"]
    if rows and (pace := median(row["images_per_sec"] for row in rows)) > 0:
        told["images_per_sec"] = pace
        if steps and run.state == "running":
            batch = rows[-1]["images"] / rows[-1]["step"]
            told["seconds_left"] = round((steps - step) * batch / pace, 1)
    told |= {"job": run.job or None, "nodes": nodes(run), "waits_for": waits_for(run), "why": why(run)}
    return told | {"needs": run.status.get("needs", []), "updated": run.status.get("updated")}


def metrics(folder: Path) -> list[dict[str, Any]]:
    """The last rows of metrics.jsonl."""
    rows = []
    for line in tail(folder / "metrics.jsonl", PACE):
        try:
            found = json.loads(line)
            rows += [found] if {"step", "images", "images_per_sec"} <= found.keys() else []
        except (ValueError, AttributeError):  # being written, or cut by a crash
            continue
    return rows


def tail(path: Path, lines: int) -> list[bytes]:
    """The last lines of a file, however long it is; none if there is no such file."""
    try:
        with open(path, "rb") as file:
            start, read = file.seek(0, os.SEEK_END), b""
            while start > 0 and read.count(b"\n") <= lines:
                start, end = max(0, start - BLOCK), start
                file.seek(start)
                read = file.read(end - start) + read
    except FileNotFoundError:
        return []
    return read.splitlines(keepends=True)[-lines:] if lines > 0 else []


def nodes(run: Run) -> str | None:
    if run.here:
        return launcher(run.folder)[0] or socket.gethostname()
    return run.queued.nodes or None


def waits_for(run: Run) -> str | None:
    reason = run.queued.reason if run.queued.name in WAITING else ""
    return reason if reason not in ("", "None") else None


def why(run: Run) -> str | None:
    """Why it stopped or, if it goes on again, why it last did."""
    if run.why or run.state == "finished":
        return run.why or None
    stops = [event for event in history.read(run.folder) if event.get("event") in STOPS and event.get("why")]
    return str(stops[-1]["why"]) if stops else None


def everything(run: Run) -> dict[str, Any]:
    """What `show` tells."""
    told = {**row(run), "folder": str(run.folder), "command": command(run.folder), "config": knobs(run.folder)}
    told |= {"slurm": run.queued.name or None, "limit_left": seconds(run.queued.left)}
    told |= {"starts": seconds_of(run.queued.starts) or None, "checkpoint": checkpoint(run.folder)}
    failure = run.folder / "logs" / "failure.json"  # with its traceback
    told |= {"failure": str(failure) if run.state == "failed" and failure.exists() else None}
    told["history"] = history.read(run.folder)
    told["ranks"] = heartbeats(run.folder) if run.state == "running" else []
    return told


def command(folder: Path) -> str | None:
    lines = tail(folder / "command.txt", 1)
    return lines[0].decode(errors="replace").strip() if lines else None


def knobs(folder: Path) -> dict[str, Any]:
    """The values that say what a run is; a stage without one of them is spared it."""
    found = {}
    for name in KNOBS:
        value: Any = read_json(folder / "config.json")
        for part in name.split("."):
            value = value.get(part) if isinstance(value, Mapping) else None
        if value not in (None, ""):
            found[name] = value
    return found


def checkpoint(folder: Path) -> dict[str, Any] | None:
    """The newest one, and when it was saved."""
    latest = read_json(folder / "checkpoints" / "latest.json")
    path = folder / "checkpoints" / str(latest.get("file"))
    if not path.is_file():
        return None
    return {"file": path.name, "step": latest.get("step"), "saved": round(path.stat().st_mtime, 1)}


def heartbeats(folder: Path) -> list[dict[str, Any]]:
    """The newest of each rank of this start, with the seconds since."""
    found = [read_json(path) for path in (folder / "heartbeats").glob("rank_*.json")]
    found = [beat for beat in found if "time" in beat]
    start = max(found, key=lambda beat: beat["time"], default={}).get("attempt")
    beats = [beat | {"ago": round(time.time() - beat["time"], 1)} for beat in found if beat.get("attempt") == start]
    return sorted(beats, key=lambda beat: int(beat.get("rank", 0)))


def seconds(left: str) -> float | None:
    """A span as squeue writes it (D-HH:MM:SS, MM:SS, ...); None if it is without end, or none."""
    days, _, rest = left.rpartition("-")
    parts = rest.split(":")
    if not all(part.isdigit() for part in parts):
        return None
    clock = sum(int(part) * 60**place for place, part in enumerate(reversed(parts)))
    return float(int(days or 0) * 86400 + clock)
