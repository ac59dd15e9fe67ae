"""The run folder: what a person asks of a run is answered by a file in it. Torch-free, for launchers and ranks."""

from __future__ import annotations

import dataclasses
import fcntl
import json
import os
import shutil
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import IO, Any, TypeVar, get_args, get_origin, get_type_hints

from barlow import history
from barlow.errors import UserError
from barlow.files import leaves, read_json, read_status, write_json, write_status

Config = TypeVar("Config")

# Knobs that may differ when a run goes on: they change neither images nor views.
FREE = {
    "runs_dir",
    "device",
    "log_every",
    "evaluate_every",
    "data.dir",
    "data.source",
    "data.workers",
    "data.cache",
    "data.stage",
    "optim.backend",
    "speed.compile",
    "speed.graphs",
    "speed.views",
    "speed.norms",
    "checkpoint.every_steps",
    "checkpoint.every_minutes",
    "checkpoint.keep",
    "checkpoint.keep_every",
    "watch.seconds",
    "watch.start",
    "preflight.skip",
    "preflight.clock",
    "preflight.bandwidth",
    "preflight.hashes",
}
CODE = ("barlow", "slurm", "launchers")


def folder_of(config: Any) -> Path:
    return Path(config.runs_dir).expanduser().resolve() / config.run


def refuse_other_config(config: Any, waits: bool = False) -> None:
    """A second run of the same name goes on with the first; with another config it is refused, the difference named.

    A run that never began has nothing to lose, unless it `waits` to. A knob that is newer than the run counts with its
    default."""
    folder = folder_of(config)
    if (folder / "chain.json").exists():
        raise UserError(f"run {config.run!r} is a chain of runs: choose another --run")
    stored = read_json(folder / "config.json")
    if stored and (waits or read_status(folder).get("attempts", 0) or any((folder / "checkpoints").glob("*.pt"))):
        defaults = dict(leaves(dataclasses.asdict(type(config)())))
        compare(defaults | dict(leaves(stored)), dict(leaves(dataclasses.asdict(config))), config.run)


def prepare(config: Any, command: str, root: Path) -> Path:
    """Make the run folder, or find it again: its config, the command, and a snapshot of the code under `root`."""
    refuse_other_config(config)
    folder = folder_of(config)
    try:
        for sub in ("checkpoints", "logs"):
            (folder / sub).mkdir(parents=True, exist_ok=True)
        write_json(folder / "config.json", dataclasses.asdict(config))
        with open(folder / "command.txt", "a") as file:
            file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')}  {command}\n")
        snapshot(root, folder / "code")
        if not (folder / "status.json").exists():
            write_status(folder, state="pending", step=0, attempts=0, why="")
    except OSError as error:
        why = error.strerror or error  # copytree's own error has a list instead
        raise UserError(f"cannot write the run folder {folder}: {why}; give another --runs-dir") from error
    return folder


def compare(stored: Mapping[str, Any], asked: Mapping[str, Any], name: str) -> None:
    """Refuse `asked` where it differs from the `stored` knobs of the run, but for those in FREE."""
    old, new = json.loads(json.dumps(stored)), json.loads(json.dumps(asked))  # a tuple is a list there
    differ = [key for key in sorted(old.keys() | new.keys()) if old.get(key) != new.get(key) and key not in FREE]
    if differ:
        told = ", ".join(f"{key} {old.get(key)} there, {new.get(key)} here" for key in differ)
        raise UserError(f"run {name!r} exists with another config ({told}): choose another --run, or the same values")


def load_config(folder: Path, kind: type[Config]) -> Config:
    """The run's config.json as the dataclass it was written from."""
    return _build(kind, read_json(folder / "config.json"))


def _build(kind: Any, value: Any) -> Any:
    if dataclasses.is_dataclass(kind):
        hints = get_type_hints(kind)
        return kind(**{key: _build(hints[key], item) for key, item in value.items()})  # type: ignore[operator]
    if get_origin(kind) is tuple:
        return tuple(_build(get_args(kind)[0], item) for item in value)
    return value


def snapshot(root: Path, code: Path) -> None:
    """Copy the code that will run into the run folder, so that a later edit does not reach a waiting job."""
    fresh, old = code.with_name(".code.new"), code.with_name(".code.old")
    for left in (fresh, old):  # of a copy that was cut off
        shutil.rmtree(left, ignore_errors=True)
    try:
        for part in CODE:
            ignore = shutil.ignore_patterns("__pycache__", "*.egg-info")
            shutil.copytree(root / part, fresh / part, ignore=ignore)
        if code.exists():
            code.rename(old)
        fresh.rename(code)
    finally:
        for left in (fresh, old):
            shutil.rmtree(left, ignore_errors=True)


def claim(folder: Path) -> IO[str]:
    """Be the one writer of a run, until this process ends; a second one is refused while the first lives.

    Only a later start of the same job takes the place of an earlier one, which lives on where SLURM has lost sight of a
    node: that one's watchdogs end it when they see in status.json whose turn it is."""
    mine = os.environ.get("BARLOW_ATTEMPT", "")
    follows = history.later(mine, than=str(read_status(folder).get("attempt", "")))
    lock = None if follows else hold(folder)
    with suppress(OSError):
        write_status(folder, attempt=mine)
    return lock or hold(folder, patience=200.0)  # more than the 90 s for which NFS keeps the lock of a dead node


def hold(folder: Path, patience: float = 0.0) -> IO[str]:
    """The lock of a run's one writer, until the file that this returns is closed or the process ends, however it ends.

    `patience`: seconds for another process to let go of it."""
    lock = open(folder / ".writer.lock", "w")  # noqa: SIM115  (kept by the caller)
    deadline = time.monotonic() + patience
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return lock
        except BlockingIOError:
            if time.monotonic() < deadline:
                time.sleep(0.5)
                continue
            lock.close()
            told = f"another process writes run {folder.name}: end it first, or choose another --run"
            raise RuntimeError(told) if patience else UserError(told) from None  # such a node may yet let go
