"""python -m tests.engine.cutting FOLDER: cuts the run of cut_run.py wherever it changes a file, and sees what becomes
of it. One process that has imported torch and forks each run, so that one takes a fraction of a second.

Prints as JSON how much it tried and, a line each, what was wrong."""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

from barlow import history
from barlow.engine.checkpoint import Checkpoints
from barlow.files import read_json, read_status
from tests.engine import cut_run, tracer
from tests.engine.power import Disk
from tests.engine.tracer import Call

STEPS = list(range(1, cut_run.PLAN.steps + 1))


class Cutting:
    def __init__(self, work: Path) -> None:
        self.work = work
        self.faults: list[str] = []
        self.folder = work / "run"  # always the same one: an undisturbed run and all that are cut
        self.fresh()
        self.before = Disk(self.folder)
        self.calls, _ = tracer.follow(self.program, self.folder)
        self.expected = final(self.folder)
        if self.expected["faults"]:
            raise RuntimeError(f"the undisturbed run: {self.expected['faults']}")

    def program(self) -> None:
        cut_run.run(self.folder)

    def fresh(self, origin: Path | None = None) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)
        if origin is None:
            cut_run.prepare(self.folder)
        else:
            shutil.copytree(origin, self.folder)

    def kills(self) -> int:
        """The run is killed before each of its calls in turn; another process ends it."""
        for at in (*self.calls, None):
            self.fresh()
            what = f"killed before {at}" if at else "not killed"
            _, killed = tracer.follow(self.program, self.folder, (at.thread, at.number) if at else None)
            if killed != (at is not None):
                self.faults.append(f"{what}: that call did not come again")
            self.resume(what, told_in(self.folder))
        return len(self.calls)

    def kills_of_a_resume(self) -> int:
        """The run is killed where it leaves most behind, and what resumes it at each call until it trains again."""
        tried, kept = 0, self.work / "kept"
        for first in self.left_behind():
            self.fresh()
            tracer.follow(self.program, self.folder, (first.thread, first.number))
            shutil.rmtree(kept, ignore_errors=True)
            shutil.copytree(self.folder, kept)
            calls, _ = tracer.follow(self.program, self.folder)
            for at in until_it_trains(calls):
                self.fresh(kept)
                tracer.follow(self.program, self.folder, (at.thread, at.number))
                self.resume(f"killed before {first}, then before {at}", told_in(self.folder))
                tried += 1
        return tried

    def left_behind(self) -> Iterable[Call]:
        """Half a checkpoint; a checkpoint without its record; rows of later steps; an old one half removed."""
        half = [c for c in self.calls if c.name == "write" and ".step-000000004.pt" in c.paths[0]][1]
        renames = [c for c in self.calls if c.name.startswith("rename")]
        lone = next(c for c in renames if c.paths[-1].endswith("step-000000004.json"))
        later = next(c for c in renames if c.paths[-1].endswith("step-000000004.pt"))
        removed = next(c for c in self.calls if c.name.startswith("unlink") and c.paths[0].endswith("2.pt"))
        return half, lone, later, removed

    def power_cuts(self, resume: bool) -> int:
        """After each call the power fails; another process goes on with what the disk may then hold.

        Without `resume`: only what is there is looked at, up to the first checkpoint that is said to be written."""
        disk, reported, seen = self.before, 0, set()
        for at in self.calls:
            disk.apply(at)
            before, reported = reported, max(reported, told(at.data))
            if reported == before and not counts(at.paths[-1]):
                continue
            for files in disk.after_a_cut():
                matters = [(path, data) for path, data in sorted(files.items()) if counts(path)]
                key = hash((reported, str(matters)))
                if key in seen:
                    continue
                seen.add(key)
                self.fresh()
                for path, data in files.items():
                    Path(path).parent.mkdir(exist_ok=True)
                    Path(path).write_bytes(data)
                what = f"power cut after {at}, {len(seen)}"
                if resume:
                    self.resume(what, reported)
                else:
                    self.faults += [f"{what}: {fault}" for fault in intact(self.folder, reported)]
            if reported and not resume:
                break
        return len(seen)

    def resume(self, what: str, reported: int) -> None:
        """Another process goes on, and ends as the undisturbed one did."""
        self.faults += [f"{what}: {fault}" for fault in intact(self.folder, reported)]
        pid = os.fork()
        if pid == 0:
            finished(self.program)
        if os.waitpid(pid, 0)[1] != 0:
            self.faults.append(f"{what}: what goes on fails")
            return
        found = final(self.folder)
        self.faults += [f"{what}: {fault}" for fault in found["faults"]]
        differ = [key for key, value in self.expected.items() if key != "faults" and found.get(key) != value]
        self.faults += [f"{what}: another {key}" for key in differ]


def finished(program: Callable[[], None]) -> None:
    code = 1
    try:
        program()
        code = 0
    finally:
        os._exit(code)


def told(log: bytes) -> int:
    """The newest step whose checkpoint a log says is written."""
    return max((int(step) for step in re.findall(rb"checkpoint of step (\d+) written", log)), default=0)


def told_in(folder: Path) -> int:
    log = folder / "logs" / "rank_0.log"
    return told(log.read_bytes()) if log.exists() else 0


def counts(path: str) -> bool:
    """Whether what goes on depends on a file: logs and curves are only added to, half written files removed."""
    return "/logs/" not in path and "/tensorboard/" not in path and not Path(path).name.startswith(".")


def until_it_trains(calls: list[Call]) -> Iterable[Call]:
    for call in calls:
        if call.name == "write" and call.paths[0].endswith("metrics.jsonl"):
            return
        yield call


def rows(folder: Path) -> list[dict[str, Any]]:
    """Whole rows, without what depends on the clock, up to the first that is not."""
    found = []
    try:
        for line in (folder / "metrics.jsonl").read_bytes().split(b"\n")[:-1]:
            row = json.loads(line)
            found.append({key: row[key] for key in row if key not in ("images_per_sec", "data_wait")})
    except (ValueError, FileNotFoundError):
        pass
    return found


def intact(folder: Path, reported: int) -> list[str]:
    """A checkpoint is there that is as new as people were told, and the rows of all its steps are."""
    path, _ = Checkpoints(folder / "checkpoints", keep=1).newest()
    step = int(path.stem.removeprefix("step-")) if path else 0
    faults = []
    if step < reported:
        faults.append(f"the newest good checkpoint is of step {step}; it was said that that of {reported} is written")
    if [row["step"] for row in rows(folder)][:step] != STEPS[:step]:
        faults.append(f"a checkpoint of step {step}, and not the rows of all its steps")
    return faults


def final(folder: Path) -> dict[str, Any]:
    """What a run has come to, and what is wrong with that on its own."""
    path, skipped = Checkpoints(folder / "checkpoints", keep=1).newest()
    found = torch.load(path, weights_only=True) if path else {}
    faults = list(skipped)
    if [row["step"] for row in rows(folder)] != STEPS or not (folder / "metrics.jsonl").read_bytes().endswith(b"\n"):
        faults.append(f"metrics.jsonl has steps {[row['step'] for row in rows(folder)]}")
    names = sorted(path.name for path in (folder / "checkpoints").iterdir())
    kept = [f"step-{step:09d}.{kind}" for step in STEPS[-1:] for kind in ("json", "pt")]
    if names != ["latest.json", *kept]:
        faults.append(f"checkpoints/ holds {names}")
    if read_json(folder / "checkpoints" / "latest.json").get("step") != STEPS[-1]:
        faults.append("latest.json names another one")
    if "finished" not in [event["event"] for event in history.read(folder)]:
        faults.append("its history has no end")
    bits = {f"{kind} {name}": tensor.numpy().tobytes() for kind, name, tensor in tensors(found)}
    status = read_status(folder)
    end = {"results": read_json(folder / "results.json"), "state": (status.get("state"), status.get("step"))}
    return {"faults": faults, "rows": rows(folder), **bits, **end}


def tensors(found: dict[str, Any]) -> Iterable[tuple[str, Any, torch.Tensor]]:
    yield from (("weight", name, tensor) for name, tensor in found.get("model", {}).items())
    momenta = found.get("optimizer", {}).get("state", {})
    yield from (("momentum", name, kept["momentum_buffer"]) for name, kept in momenta.items())


def main(work: Path, careless: bool) -> dict[str, Any]:
    """`careless`: the power fails for a run whose fsync does nothing, to see that this is noticed."""
    torch.set_num_threads(1)
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()  # imports what a first step imports, and what each fork would import anew
    if careless:
        os.fsync = lambda handle: None  # type: ignore[assignment]
    began = time.monotonic()
    cutting = Cutting(work)
    if careless:
        tried = {"power cuts": cutting.power_cuts(resume=False)}
    else:
        tried = {"kills": cutting.kills(), "kills of a resume": cutting.kills_of_a_resume()}
        tried |= {"power cuts": cutting.power_cuts(resume=True)}
    return {"tried": tried, "seconds": round(time.monotonic() - began, 1), "faults": cutting.faults}


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]).resolve(), "careless" in sys.argv)))
