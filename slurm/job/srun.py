"""What srun has said of a job's ranks since its last start: which of them ended first, and how."""

from __future__ import annotations

import re
import signal
from pathlib import Path

ENDED = re.compile(r"srun: error: (\S+): tasks? ([\d,-]+): (.+?)(?: \(.*\))?$", re.MULTILINE)
BEGINS = "start"  # what the job's script writes first, with a number, each time it starts


def killed_rank(folder: Path, job: str) -> tuple[int, str, str] | None:
    """Rank, node and how, if the end began with a rank's death by a signal, as srun tells it; none if otherwise."""
    first = ENDED.search(output_of(folder, job))
    if first is None or first.group(3).startswith("Exited with exit code"):
        return None
    name = {signal.strsignal(number): f"killed by {number.name}" for number in signal.Signals}.get(first.group(3))
    rank = int(re.split("[,-]", first.group(2))[0])
    return rank, first.group(1), f"was {name or 'ended: ' + first.group(3)}"


def first_words(folder: Path, job: str) -> str:
    """What srun said of the first rank to end, or of its own end; empty if it said nothing."""
    said = re.findall(r"^srun: error: (.+)", output_of(folder, job), re.MULTILINE)
    return next((line for line in said if ": task" in line), said[-1] if said else "")


def output_of(folder: Path, job: str) -> str:
    """What the job's script and srun have said since its last start."""
    log = folder / "logs" / "submitit" / f"{job}_0_log.out"
    return re.split(rf"^{BEGINS} \d+$", log.read_text(errors="replace"), flags=re.MULTILINE)[-1] if log.exists() else ""
