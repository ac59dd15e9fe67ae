"""What is told of runs as text: aligned, coloured on a terminal, as wide as that is, and 100 columns elsewhere."""

from __future__ import annotations

import os
import re
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

NAME = 28  # columns of a run's name in the list; `show` has it whole
COLOURS = {"running": 32, "pending": 33, "preempted": 33, "failed": 31, "cancelled": 35, "finished": 36}
RIGHT = ("starts", "images/s", "left", "step", "rank")  # columns of numbers
INDENT = 12  # columns of what `show` says on its left
GAP = "  "


def listing(rows: Sequence[Mapping[str, Any]]) -> str:
    """A line a run. Why it stopped goes below where it does not fit beside."""
    if not rows:
        return "no runs yet"
    heads, *lines = columns([cells(row) for row in rows])
    room = max(len(plain(line)) for line in (heads, *lines))
    beside = [said(row) if room + len(GAP + said(row)) <= width() else "" for row in rows]
    told = [f"{heads:{room}}{GAP}why it stopped" if any(beside) else heads]
    for row, line, why in zip(rows, lines, beside, strict=True):
        told.append(line + " " * (room - len(plain(line))) + GAP + why if why else line)
        told += [cut(GAP + said(row), width())] if said(row) and not why else []
    return "\n".join(told)


def cells(row: Mapping[str, Any]) -> dict[str, str]:
    pace = f"{row['images_per_sec']:,.0f}" if row["images_per_sec"] and row["state"] == "running" else ""
    return {
        "run": cut(row["run"], NAME),
        "needs": " ".join(need.removeprefix(f"{row['run'].split(',')[0]},") for need in row["needs"]),
        "state": state(row),
        "step": f"{row['step']}/{row['steps']}" if row["steps"] else str(row["step"] or ""),
        "starts": str(row["attempts"] or ""),
        "images/s": pace,
        "left": span(row["seconds_left"]),
        "job": row["job"] or "",
        "nodes": row["nodes"] or "",
    }


def state(row: Mapping[str, Any]) -> str:
    word = paint(row["state"] + ("" if row["certain"] else "?"), COLOURS.get(row["state"], 0))
    return word + (f" ({row['detail']})" if row["detail"] else "")


def said(row: Mapping[str, Any]) -> str:
    """Why it stopped; for one that goes on, what it waits for and why it last did."""
    last = f"last: {row['why']}" if row["why"] and row["state"] in ("pending", "running") else row["why"]
    return "; ".join(filter(None, [f"waits: {row['waits_for']}" if row["waits_for"] else "", last]))


def page(told: Mapping[str, Any]) -> str:
    """All of one run."""
    row = cells(told)
    pace = [f"{row['images/s']} images/s" if row["images/s"] else "", f"{row['left']} left" if row["left"] else ""]
    slurm = [told["job"] and f"{told['job']} {str(told['slurm'] or 'gone from the queue').lower()}", told["nodes"]]
    slurm.append(f"{span(told['limit_left'])} of its time limit left" if told["limit_left"] is not None else "")
    slurm.append(f"starts about {moment(told['starts'])}" if told["starts"] and told["state"] == "pending" else "")
    saved = told["checkpoint"]
    lines = {
        "run": told["folder"],
        "state": state(told),
        "why": said(told),
        "step": ", ".join(filter(None, [row["step"], *pace])),
        "job" if told["job"] else "nodes": ", ".join(filter(None, slurm)),
        "starts": row["starts"],
        "needs": ", ".join(told["needs"]),
        "checkpoint": f"{saved['file']}, saved {ago(saved['saved'])}" if saved else "none yet",
        "failure": told["failure"],
        "config": ", ".join(f"{name} {short(value)}" for name, value in told["config"].items()),
        "command": told["command"],
    }
    text = [folded(name, value) for name, value in lines.items() if value]
    for name, table in (("history", events(told["history"])), ("ranks", ranks(told["ranks"]))):
        text += ["", name, *(f"{GAP}{line}" for line in columns(table))] if table else []
    return "\n".join(text)


def events(history: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    table = []
    for event in history:
        why = event.get("why") or (f"job {event['job']}" if event.get("job") else event.get("nodes"))
        told = {"time": moment(event["time"]), **{key: words(event.get(key)) for key in ("event", "step", "host")}}
        table.append({**told, "why": cut(words(why), 60)})
    return table


def ranks(beats: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    """Where each rank is; one that is past its deadline, or is not heard of, in red."""
    table = []
    for beat in beats:
        late, silent = float(beat.get("late") or 0), beat["ago"] > SILENT
        told = [f"late by {span(late)}" if late > 0 else "", f"not heard of for {span(beat['ago'])}" if silent else ""]
        heard = paint(", ".join(filter(None, told)), 31) or f"{span(beat['ago'])} ago"
        table.append({**{key: words(beat.get(key)) for key in ("rank", "node", "step", "phase")}, "heard of": heard})
    return table


SILENT = 60.0  # seconds without a heartbeat, which comes every ten, after which it is remarkable


def columns(rows: Sequence[Mapping[str, str]]) -> list[str]:
    """Heads and rows, aligned; a column that is empty throughout is left out."""
    heads = [head for head in rows[0] if any(row[head] for row in rows)]
    table = [{head: head for head in heads}, *rows]
    widths = {head: max(len(plain(row[head])) for row in table) for head in heads}
    return [GAP.join(padded(row[head], widths[head], head in RIGHT) for head in heads).rstrip() for row in table]


def padded(text: str, room: int, right: bool) -> str:
    space = " " * (room - len(plain(text)))
    return space + text if right else text + space


def folded(name: str, value: str) -> str:
    """A name, and beside it as many lines as its words need."""
    lines, room = [""], width() - INDENT
    for word in value.split():
        if lines[-1] and len(plain(lines[-1])) + 1 + len(plain(word)) > room:
            lines.append("")
        lines[-1] += f" {word}" if lines[-1] else word
    return "\n".join(f"{name if i == 0 else '':{INDENT}}{line}" for i, line in enumerate(lines))


def cut(text: str, room: int) -> str:
    return text if len(text) <= room else text[: room - 1] + "…"


def words(value: Any) -> str:
    return "" if value is None else short(value)


def short(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def span(seconds: float | None) -> str:
    """As 45s, 3m20s, 7h43m, 2d04h."""
    if seconds is None:
        return ""
    whole = round(seconds)
    for name, size, below, part in (("d", 86400, "h", 3600), ("h", 3600, "m", 60), ("m", 60, "s", 1)):
        if whole >= size:
            return f"{whole // size}{name}{whole % size // part:02d}{below}"
    return f"{whole}s"


def moment(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))


def ago(seconds: float) -> str:
    return f"{span(max(0.0, time.time() - seconds))} ago ({moment(seconds)})"


def width() -> int:
    return shutil.get_terminal_size((100, 24)).columns if sys.stdout.isatty() else 100


def paint(text: str, colour: int) -> str:
    painted = text and colour and sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    return f"\x1b[{colour}m{text}\x1b[0m" if painted else text


def plain(text: str) -> str:
    return re.sub(r"\x1b\[\d+m", "", text)
