"""How fast do batches come, beside FFCV's own Loader on the same file with the same number of threads?

    python benchmarks/loader.py [--quick] [--threads 1 2]

Writes the shapes (96 px, JPEG of quality 95 and raw) to a temporary folder and lets both loaders, in turns, bring
random batches of 512 to a consumer that does nothing; then takes the time from starting Python to the first batch. Five
minutes, 160 MB of disk; the result replaces benchmarks/results/loader.csv. --quick: one minute, and writes no file.
"""

from __future__ import annotations

import argparse
import csv
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import numpy as np

from barlow.data.loader import Loader
from barlow.data.shards import Index, read_index

BATCH = 512
SPLIT = "unlabeled"
ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "loader.csv"
Run = Callable[[], None]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer rounds; writes no file")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2], help="numbers of threads to compare at")
    parser.add_argument("--first-batch", nargs=3, metavar=("LOADER", "FOLDER", "THREADS"), help="what the children run")
    arguments = parser.parse_args()
    if arguments.first_batch:
        name, folder, threads = arguments.first_batch
        LOADERS[name](read_index(folder), int(threads), 1)()
        return
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for encoding in (["--jpeg-quality", "95"], ["--raw"]):
            out = Path(folder) / encoding[0].strip("-")
            command = [sys.executable, "launchers/shards.py", "shapes", str(out), "--splits", SPLIT, *encoding]
            subprocess.run(command, check=True, cwd=ROOT)
            for threads in arguments.threads:
                rows += compare(read_index(out), threads, rounds=2 if arguments.quick else 10)
    if not arguments.quick:
        RESULTS.parent.mkdir(exist_ok=True)
        with RESULTS.open("w", newline="") as file:
            table = csv.DictWriter(file, [*rows[0], *(where := circumstances())])
            table.writeheader()
            table.writerows(row | where for row in rows)


def compare(index: Index, threads: int, rounds: int) -> list[dict[str, object]]:
    """A row for each loader; `share` is the median over rounds of its rate against FFCV's in the same round."""
    batches = 100 if index.encoding == "raw" else 40  # long: FFCV takes 0.1 s to begin an epoch
    runs: dict[str, Run] = {}
    for name, make in LOADERS.items():  # ours has run before FFCV's is made, which edits numba's type of byte arrays
        runs[name] = make(index, threads, batches)
        runs[name]()
    rates: dict[str, list[float]] = {name: [] for name in runs}
    processor: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            wall, cpu = time.perf_counter(), time.process_time()
            run()
            rates[name].append(batches * BATCH / (time.perf_counter() - wall))
            processor[name].append((time.process_time() - cpu) / (batches * BATCH) * 1e6)
    rows = []
    for name in runs:
        starts = [first_batch(name, index.folder, threads) for _ in range(min(rounds // 2, 3))]
        row: dict[str, object] = {
            "encoding": index.encoding,
            "threads": threads,
            "loader": name,
            "images_per_sec": round(statistics.median(rates[name])),
            "slowest": round(min(rates[name])),
            "fastest": round(max(rates[name])),
            "share": round(statistics.median(a / b for a, b in zip(rates[name], rates["ffcv"], strict=True)), 3),
            "cpu_us_per_image": round(statistics.median(processor[name]), 2),
            "first_batch_s": round(statistics.median(starts), 2),
        }
        print("  ".join(f"{key} {value}" for key, value in row.items()), flush=True)
        rows.append(row)
    return rows


def ours(index: Index, threads: int, batches: int) -> Run:
    loader = Loader(index, [SPLIT], workers=threads)
    rng = np.random.default_rng(0)

    def run() -> None:
        order = rng.permutation(np.arange(batches * BATCH) % len(loader))
        for _ in loader.batches(np.split(order, batches)):
            pass

    return run


def ffcv(index: Index, threads: int, batches: int) -> Run:
    from ffcv.fields.decoders import IntDecoder, SimpleRGBImageDecoder
    from ffcv.loader import Loader as FfcvLoader
    from ffcv.loader import OrderOption
    from ffcv.transforms import Squeeze, ToTensor

    split = index.split(SPLIT)
    numbers = [IntDecoder(), ToTensor(), Squeeze()]
    loader = FfcvLoader(
        str(split.files[0].path),
        BATCH,
        num_workers=threads,
        order=OrderOption.RANDOM,
        indices=np.arange(batches * BATCH) % split.count,
        pipelines={"image": [SimpleRGBImageDecoder(), ToTensor()], "label": numbers, "id": numbers},
    )

    def run() -> None:
        for _ in loader:
            pass

    return run


LOADERS = {"ours": ours, "ffcv": ffcv}


def first_batch(name: str, folder: Path, threads: int) -> float:
    """Seconds of a process of its own, from the start of Python, imports and compilation included."""
    start = time.perf_counter()
    subprocess.run([sys.executable, __file__, "--first-batch", name, str(folder), str(threads)], check=True)
    return time.perf_counter() - start


def circumstances() -> dict[str, object]:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())
    git = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True)
    packages = {name: version(name) for name in ("torch", "ffcv", "numba", "numpy")}
    return {"cpu": model, "cores": len(os.sched_getaffinity(0)), "commit": git.stdout.strip(), **packages}


if __name__ == "__main__":
    main()
