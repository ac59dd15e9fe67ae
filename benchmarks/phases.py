"""python benchmarks/phases.py PRETRAIN_FLAGS...: the real launcher and the real rank, which says when it was where.

For startup.py and memory.py. The launcher starts this module as the stage, which times what the stage itself calls on
its way to the first steps, leaves a line of JSON in the run folder, a file a rank, and then is told to stop: the run is
saved and can go on. The clock is the machine's, the same in all processes."""

from __future__ import annotations

import functools
import importlib
import json
import os
import runpy
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
ENDS = {  # what the stage calls -> the phase that is over when it returns
    "build": "build",
    "ready": "preflight",
    "Loader": "data",
    "distribute": "restore",
    "restore": "restore",
}
STEPS = 3  # the first, with all that is compiled at its first use; one more; one that is timed


def main(run_folder: str) -> None:
    """As barlow.stages.pretrain.main."""
    wall: dict[str, float] = {}
    cpu: dict[str, float] = {}
    held: dict[str, dict[str, float]] = {}
    began = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19]) / os.sysconf("SC_CLK_TCK")
    last = [began, 0.0]

    def mark(phase: str) -> None:
        now = [time.monotonic(), time.process_time()]
        for seconds, at, before in zip((wall, cpu), now, last, strict=True):
            seconds[phase] = seconds.get(phase, 0.0) + at - before
        if "PHASES_MEMORY" in os.environ:
            held[phase] = megabytes()
        last[:] = now

    def marking(call: Callable[..., Any], phase: str) -> Callable[..., Any]:
        @functools.wraps(call, updated=())
        def marked(*args: Any, **kwargs: Any) -> Any:
            result = call(*args, **kwargs)
            mark(phase)
            return result

        return marked

    mark("python")
    stage: Any = importlib.import_module("barlow.stages.pretrain")
    mark("imports")
    for name, phase in ENDS.items():
        setattr(stage, name, marking(getattr(stage, name), phase))
    stage.dist.init = marking(stage.dist.init, "join")
    whole_fit = stage.fit

    def fit(step: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
        from barlow import stop

        calls = 0

        @functools.wraps(step)
        def counted(*of_step: Any) -> Any:
            nonlocal calls
            if calls:
                finish(stage.torch)
                mark({1: "first step", STEPS: "a later step"}.get(calls, "rest"))
            if calls == STEPS:
                with open(Path(run_folder) / f"phases_{os.environ['RANK']}.jsonl", "a") as file:
                    file.write(json.dumps({"began": began, "wall": wall, "cpu": cpu, "held": held}) + "\n")
                stop.note(signal.SIGUSR2)
            calls += 1
            return step(*of_step)

        mark("begin")
        whole_fit(counted, *args, **kwargs)

    stage.fit = fit
    stage.main(run_folder)


def megabytes(process: int | str = "self") -> dict[str, float]:
    """Of a process: in memory (Rss), its share of that (Pss), and what is its own and no file's (Anonymous)."""
    lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()[1:]
    held = {name: float(rest.split()[0]) / 1024 for name, rest in (line.split(":") for line in lines)}
    return {name: held[name] for name in ("Rss", "Pss", "Anonymous")}


def finish(torch: Any) -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


if __name__ == "__main__":
    sys.path[:0] = [str(ROOT), str(ROOT / "launchers")]
    from slurm.launch import local

    command = local.command
    local.command = lambda module, folder: command("phases", folder)  # all else is as ever
    try:
        runpy.run_path(str(ROOT / "launchers" / "pretrain.py"), run_name="__main__")
    finally:
        print(json.dumps({"cpu": time.process_time()}))
