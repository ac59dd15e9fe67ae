"""What does an interruption cost? The stall of a save, the time from a signal to the exit, and from a start to a step.

    python benchmarks/interruption.py [--quick] [--rounds 3]

For networks of about 10, 100 and 220 million parameters: pretrains on small pictures on one rank here, saves every few
steps, is told to stop by SIGUSR2 in mid-step, and is started again; each round is one such interruption. Ten minutes
on two cores, 10 GB of disk; the result replaces benchmarks/results/interruption.csv. --quick: the smallest network and
one round, and writes no file.
"""

from __future__ import annotations

import json
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from measure import ROOT, Row, asked, report

SIZES = {  # name -> flags; parameters are counted by the run itself
    "10M": "--model.backbone resnet18 --model.projector 256",
    "100M": "--model.backbone wide_resnet50_2 --model.projector 4096 4096 4096",
    "220M": "--model.backbone wide_resnet50_2 --model.projector 8192 8192 8192",
}
FLAGS = "shapes --cluster local --device cpu --batch-size 8 --views.size 32 --model.width 1 --model.stem small"
FLAGS += " --knn.every-epochs 0 --knn.no-baselines --log-every 1 --checkpoint.every-steps 6 --checkpoint.keep 1"
FLAGS += " --checkpoint.every-minutes 0 --preflight.no-hashes"
SAVED = re.compile(r"checkpoint of step \d+ written in ([\d.]+) s \(stall ([\d.]+) s, ([\d.]+) MB\)")


def main() -> None:
    parser = asked(__doc__)
    parser.add_argument("--rounds", type=int, default=3, help="interruptions of each network")
    given = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory(dir=ROOT / "runs" if (ROOT / "runs").exists() else None) as folder:
        for name in list(SIZES)[: 1 if given.quick else None]:
            rows.append(interrupt(name, Path(folder), 1 if given.quick else given.rounds))
    report("interruption", rows, given.quick)


def interrupt(name: str, runs: Path, rounds: int) -> Row:
    """Medians over the rounds; of a save, over all saves but each start's first, which takes its memory."""
    words = [sys.executable, "launchers/pretrain.py", *FLAGS.split(), *SIZES[name].split()]
    words += ["--runs-dir", str(runs), "--run", name, "--data.dir", str(runs / "data")]
    folder = runs / name
    starts, exits, firsts = [], [], []
    for _ in range(rounds):
        before = steps(folder)
        began = time.perf_counter()
        with subprocess.Popen(words, cwd=ROOT, stdout=subprocess.DEVNULL) as launcher:
            wait_for_step(folder, before + 1, launcher)
            starts.append(time.perf_counter() - began)
            wait_for_step(folder, before + 20, launcher)
            rank = int(read(folder / "heartbeats" / "rank_0.json")["pid"])
            told = time.perf_counter()
            os.kill(rank, signal.SIGUSR2)
            launcher.wait()
            exits.append(time.perf_counter() - told)
    log = (folder / "logs" / "rank_0.log").read_text()
    saves = [[tuple(map(float, save)) for save in SAVED.findall(start)] for start in log.split("steps ")[1:]]
    later = [save for start in saves for save in start[1:]]
    firsts = [start[0][1] for start in saves if start]
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    seconds = statistics.median(save[0] for save in later)
    stall = statistics.median(save[1] for save in later)
    millions = re.search(r"([\d.]+) M parameters", log)
    return {
        "parameters_m": float(millions.group(1)) if millions else 0.0,
        "checkpoint_mb": later[0][2],
        "step_s": round(statistics.median(8 / row["images_per_sec"] for row in rows), 3),
        "save_s": round(seconds, 3),
        "stall_s": round(stall, 4),
        "stall_share": round(stall / seconds, 4),
        "first_stall_s": round(statistics.median(firsts), 4),
        "signal_to_exit_s": round(statistics.median(exits), 2),
        "start_to_step_s": round(statistics.median(starts), 2),
    }


def read(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text())
    return found


def steps(folder: Path) -> int:
    metrics = folder / "metrics.jsonl"
    return len(metrics.read_text().splitlines()) if metrics.exists() else 0


def wait_for_step(folder: Path, step: int, launcher: subprocess.Popen[bytes]) -> None:
    while steps(folder) < step:
        if launcher.poll() is not None:
            raise SystemExit(f"the run ended before step {step}: see above")
        time.sleep(0.01)


if __name__ == "__main__":
    main()
