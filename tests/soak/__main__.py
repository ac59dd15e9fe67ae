"""python -m tests.soak [--seed 0] [--disturbances 25] [--steps N] [--only KIND ...] [--keep] [--record]

Can a job be killed? On a SLURM of four nodes of its own, a run of four ranks is hit by disturbances of all kinds
(tests/soak/kinds.py), in random order and at random moments: start-up, training, saving, evaluation. Nobody gives its
command again. In the end its weights, momentum and losses must be the bits of a run that nothing happened to, each step
recorded once, nothing lost that had been saved, one requeue for each start that was ended, and no process left.

A table tells what happened, then a verdict line by line; exit code 0 only if all hold, else the folder with all files
is kept. 25 disturbances take about 25 minutes on two cores. Filling the disk needs root, for a small one is mounted.
--record writes benchmarks/results/soak.csv and soak_verdict.csv."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from barlow.errors import UserError
from slurm import devcluster, devfaults
from slurm.devfaults import until
from tests.soak.kinds import END, KINDS
from tests.soak.run import PATIENCE, RANKS, ROOT, WAITING, Broken, Run, last_step, send
from tests.soak.verdict import RESULTS, Hit, record, row, show, verdict

IMAGES = {"unlabeled": 192, "train": 480, "val": 240}  # an evaluation takes long enough to be hit
BATCH = 32
EPOCH = IMAGES["unlabeled"] // BATCH  # steps
EVALUATION = 10 * EPOCH  # steps between two
LOST = 10  # SlurmdTimeout: a silent node is down within half a minute
DISK = 96  # MB
TRAINING = 4.0  # seconds for each disturbance
CONFIG = f"shapes --batch-size {BATCH} --log-every 1 --checkpoint.every-steps 10 --knn.no-baselines --data.source="
CONFIG += " --data.workers 1 --views.size 32 --model.width 0.125 --model.projector 32 32 --device cpu"
CONFIG += " --optim.warmup-epochs 1 --optim.lr 0.2 --optim.eta 0.001 --optim.no-clip --optim.lr-biases 0.0005"
CONFIG += f" --watch.seconds 10 --watch.start 60 --cluster slurm --nodes {RANKS} --max-failures 10"
AIMS = {"step": 0.45, "start": 0.3, "save": 0.15, "evaluate": 0.1}  # what the run is to be doing when it is hit


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0, help="of kinds, order, moments and victims")
    parser.add_argument("--disturbances", type=int, default=25)
    parser.add_argument("--steps", type=int, default=0, help="of the run (default: enough for all to hit)")
    parser.add_argument("--only", nargs="+", choices=list(KINDS), metavar="KIND", help=f"of {', '.join(KINDS)}")
    parser.add_argument("--keep", action="store_true", help="keep the folder with runs and logs")
    parser.add_argument("--record", action="store_true", help=f"write {RESULTS.relative_to(ROOT)}")
    given = parser.parse_args()
    signal.signal(signal.SIGTERM, interrupt)
    folder = Path(tempfile.mkdtemp(prefix="soak-"))
    chance = random.Random(given.seed)
    try:
        with a_cluster(folder) as disk:
            kinds = given.only or [name for name in KINDS if disk or name != "disk-full"]
            if "disk-full" not in kinds:
                print("disk-full is left out" + ("" if disk else ": a small disk can only be mounted by root"))
            well = soak(folder, given, kinds, chance)
    except (Broken, UserError) as error:
        print(f"FAILED: {error}")
        well = False
    except KeyboardInterrupt:
        print("\ninterrupted")
        well = False
    if well and not given.keep:
        shutil.rmtree(folder)
    else:
        print(f"all files: {folder}")
    return 0 if well else 1


def interrupt(*_: object) -> None:
    raise KeyboardInterrupt


@contextlib.contextmanager
def a_cluster(folder: Path) -> Iterator[bool]:
    """A SLURM of its own, and runs on a small disk of their own; yields whether there is such a disk.

    In the end both are gone, whatever happens, and the files of the runs and the logs of the daemons stay."""
    runs, cluster = folder / "runs", folder / "cluster"
    runs.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={DISK}m", "none", str(runs)]
    mounted = os.geteuid() == 0 and subprocess.run(mount, stderr=subprocess.DEVNULL).returncode == 0
    for name in [name for name in os.environ if name.startswith(("SLURM", "SBATCH", "BARLOW"))]:
        del os.environ[name]
    try:
        devcluster.up(cluster, RANKS, lost=LOST)
        os.environ["SLURM_CONF"] = str(cluster / "slurm.conf")
        yield mounted
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        for log in cluster.glob("*.log"):
            shutil.copy(log, folder)
        devcluster.down(cluster, quiet=True)
        if mounted:
            shutil.copytree(runs, folder / "copy", ignore=shutil.ignore_patterns("code"))
            subprocess.run(["umount", "--lazy", str(runs)], check=True)
            (folder / "copy").rename(runs)


def soak(folder: Path, given: argparse.Namespace, kinds: list[str], chance: random.Random) -> bool:
    """All of it; whether every line of the verdict holds."""
    make_data(folder / "data")
    rate = 0.9 * given.steps / given.disturbances / TRAINING or rate_of(folder, chance)
    planned = plan(given, kinds, rate, chance)
    steps = given.steps or planned[-1].due + round(2 * rate * (TRAINING + KINDS[planned[-1].kind].meanwhile))
    steps = -(-steps // EPOCH) * EPOCH
    with give(folder, "undisturbed", steps, chance) as undisturbed:
        undisturbed.wait_for_end()
    first, whole = undisturbed.watch.steps[1][0], undisturbed.watch.steps[-1][0]
    print(f"undisturbed: {steps} steps in {whole:.0f} s, the first after {first:.0f} s", flush=True)

    if not given.only:
        planned.append(Hit(len(planned) + 1, "kill-at-end", "end", steps - 10))
    hits: list[Hit] = []
    broken = ""
    with give(folder, "soak", steps, chance) as run:
        try:
            for hit in planned:
                wait_for(run, hit, first)
                hits.append(hit)
                strike(run, hit)
            run.wait_for_end()
        except (Broken, UserError) as error:
            broken = str(error)
        restarts = run.watch.job.restarts if broken else run.look().restarts
    for hit, later in zip(hits, [*(hit.restarts for hit in hits[1:]), restarts], strict=True):
        hit.after = later
    rows = show([row(hit, run) for hit in hits])
    if broken:
        print(f"FAILED after {len(hits)} disturbances: {broken}")
        return False
    lines = verdict(run, undisturbed.folder, hits, restarts, given.disturbances)
    if given.record:
        record(rows, lines, given.seed)
    return all(well for well, _ in lines)


def make_data(folder: Path) -> None:
    from PIL import Image

    from barlow.data.shapes import CLASSES, render
    from barlow.data.writing.plan import Request
    from barlow.data.writing.write import write

    number = 0
    for split, count in IMAGES.items():
        for _ in range(count):
            pixels, label = render(number, 0, 32)
            place = folder / "images" / split / ("" if split == "unlabeled" else CLASSES[label])
            place.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(place / f"{number}.png")
            number += 1
    write(Request(f"folder:{folder / 'images'}", folder / "shards", None, None, 2, 1, ()))


def give(folder: Path, name: str, steps: int, chance: random.Random) -> Run:
    """Give the command of a run, for the only time."""
    words = [*CONFIG.split(), "--run", name, "--runs-dir", str(folder / "runs"), "--epochs", str(steps // EPOCH)]
    words += ["--data.dir", str(folder / "data" / "shards"), "--knn.every-epochs", str(EVALUATION // EPOCH)]
    # A rank that stops before its stage reads --watch.start has half an hour else.
    words += ["--setup", "export BARLOW_START_WITHIN=60"]
    return Run(words, folder / "cluster", folder / "runs" / name, steps, chance)


def rate_of(folder: Path, chance: random.Random) -> float:
    """Steps a second, of a short run."""
    with give(folder, "probe", 60, chance) as run:
        run.wait_for_end()
    lines = (run.folder / "metrics.jsonl").read_text().splitlines()
    return statistics.median(json.loads(line)["images_per_sec"] for line in lines) / BATCH


def plan(given: argparse.Namespace, kinds: list[str], rate: float, chance: random.Random) -> list[Hit]:
    """Every kind before any comes again, at random moments of a run that makes so many steps a second."""
    deck: list[str] = []
    hits: list[Hit] = []
    moments = sorted(chance.uniform(0, given.disturbances * TRAINING) for _ in range(given.disturbances))
    meanwhile = 0.0
    for number, moment in enumerate(moments, 1):
        deck = deck or chance.sample(kinds, len(kinds))
        aim = chance.choices(list(AIMS), list(AIMS.values()))[0]
        due = round(rate * (moment + meanwhile))
        if aim == "evaluate":
            due = (due // EVALUATION + 1) * EVALUATION - 1  # the last one recorded before it
        hits.append(Hit(number, deck.pop(), aim, due))
        meanwhile += 0.0 if given.steps else KINDS[hits[-1].kind].meanwhile
    return hits


def strike(run: Run, hit: Hit) -> None:
    """Disturb, and wait until that has ended this start of the job, if it must."""
    hit.restarts, hit.step, hit.at = run.look().restarts, last_step(run.folder), time.monotonic() - run.watch.began
    if not run.trains():
        hit.aim = "start"
    elif (hit.step + 1) % EVALUATION == 0:
        hit.aim = "evaluate"
    kind = KINDS.get(hit.kind, END)
    # A run cannot start where nothing can be written.
    hit.ends = None if hit.kind == "disk-full" and hit.aim == "start" else kind.ends
    told = f"{hit.at:5.0f} s  {hit.number:2}  {hit.kind:17}  {hit.aim:8}  step {hit.step:4} of start {hit.restarts:2}"
    print(told, end="  ", flush=True)
    hit.target = kind.strike(run)
    print(hit.target, flush=True)
    if hit.ends and not until(lambda: run.look().restarts > hit.restarts or run.finished(), PATIENCE):
        hit.fault = f"has not ended start {hit.restarts} within {PATIENCE:.0f} s"
        print(f"         {hit.fault}", flush=True)
        for rank in devfaults.ranks(run.job, hit.restarts).values():
            send(rank.process, signal.SIGCONT)
    if run.later and until(lambda: run.look().state in WAITING, PATIENCE):
        run.later.pop()()


def wait_for(run: Run, hit: Hit, startup: float) -> None:
    """The moment that the plan has chosen, or one in start-up; at once if the run is past it."""
    run.ranks()
    if hit.aim == "start" and not run.trains():
        time.sleep(run.random.uniform(0, max(0.0, startup - run.look().seconds)))
        return
    if hit.aim == "start":
        hit.aim = "step"
    run.wait_until(lambda: run.trains() and last_step(run.folder) >= hit.due)
    if hit.aim == "save":  # a checkpoint is written under a name that begins with a dot
        run.wait_until(lambda: any((run.folder / "checkpoints").glob(".step-*")), every=0.002, most=30.0)
    else:
        time.sleep(run.random.uniform(0, 0.3))


if __name__ == "__main__":
    sys.exit(main())
