"""A stage of a few seconds, for the tests of slurm/: all ranks sum their numbers over gloo, then do what the run's
config.json tells them ("fault": on which rank to fail, and how)."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from barlow import stop
from barlow.errors import Preempted, UserError
from barlow.files import write_json, write_status

WORD = "original"  # a test changes it after submitting


def main(run_folder: str) -> None:
    folder = Path(run_folder)
    config = json.loads((folder / "config.json").read_text())
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    print(f"rank {rank} of {world} says {WORD}", flush=True)
    place = {key: os.environ.get(key, "") for key in PLACE} | {"cwd": os.getcwd(), "file": __file__, "word": WORD}
    write_json(folder / f"place_{rank}.json", place | {"pid": os.getpid()})
    if rank == 0:
        with open(folder / "ports", "a") as file:
            file.write(place["MASTER_PORT"] + "\n")
    again = (folder / f"alive_{rank}").exists()
    (folder / f"alive_{rank}").touch()
    if rank == 1 and "late" in config:  # a number of seconds a start, as in "sleep"
        time.sleep(config["late"][again])
    if config.get("sum", False):
        (folder / f"sum_{rank}.json").write_text(json.dumps(all_reduce(rank)))
    if "sleep" in config:
        time.sleep(config["sleep"][again])
    spared = (again and config.get("once", False)) or os.environ.get("SLURMD_NODENAME") != config.get(
        "node", os.environ.get("SLURMD_NODENAME")
    )
    if rank == config.get("rank", -1) and not spared:
        fault(config["fault"], folder)
    if config.get("stoppable", False):
        stop_when_told(folder / f"ready_{rank}", config.get("saving", 0.5))
    if "fault" in config and not (again and config.get("finishes", False)):
        time.sleep(60)
    if rank == 0 and config.get("finishes", False):
        time.sleep(2)  # the others may still fail
        write_status(folder, state="finished")
    print("done", flush=True)


PLACE = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "OMP_NUM_THREADS")


def all_reduce(rank: int) -> float:
    import torch

    from barlow import dist

    dist.init(torch.device("cpu"))
    total = dist.all_reduce_sum(torch.tensor([float(10**rank)])).item()
    dist.barrier()
    dist.shutdown()
    return total


def stop_when_told(ready: Path, seconds: float) -> None:
    """As a real stage: within the loop a signal is only noted, the loop saves (here: takes a moment) and leaves."""
    with stop.heeding():
        ready.touch()
        while not stop.told():
            time.sleep(0.05)
        time.sleep(seconds)
        ready.with_name(ready.name.replace("ready", "saved")).touch()
        if os.environ["RANK"] == "0" and "SLURM_JOB_ID" in os.environ:
            this = os.environ["BARLOW_ATTEMPT"]
            write_status(ready.parent, state="preempted", attempt=this, why=f"{stop.told()}; saved at step 7")
        raise Preempted("SIGTERM", 7)


def fault(kind: str, folder: Path) -> None:
    if kind == "raise":
        raise ValueError("the first of all")
    if kind == "user":
        raise UserError("shards of data/x are cut short: write them again")
    if kind == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if kind == "silent":
        os._exit(9)
    if kind.startswith("child"):  # a process of its own, which ignores SIGTERM
        code = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(flush=True); time.sleep(600)"
        child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
        assert child.stdout is not None
        child.stdout.readline()
        write_json(folder / "child", {"pid": child.pid})
    if kind == "child-then-raise":
        raise ValueError("its child goes on")
    time.sleep(600)
