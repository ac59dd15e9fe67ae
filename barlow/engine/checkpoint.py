"""Checkpoints: written whole or not at all, off the training thread, verified by hash; the newest good one is used.

A checkpoint is `step-N.pt`, a dict that `torch.load(..., weights_only=True)` reads, and beside it `step-N.json` with
its size and hash; `latest.json` names the newest good one."""

from __future__ import annotations

import hashlib
import os
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import IO, Any, cast

import torch

from barlow.errors import UserError
from barlow.files import read_json, write_json


class Checkpoints:
    """The checkpoints of one run folder. One writer (rank 0), any number of readers."""

    def __init__(self, folder: Path, keep: int) -> None:
        self.folder = folder
        self.keep = keep
        self._writer: threading.Thread | None = None
        self.failed: str = ""  # why the last save did not reach the disk

    def save(self, step: int, state: Mapping[str, Any]) -> str:
        """Copy the state to host memory now, write it on a thread; never two writes at once.

        Returns why the save before this one did not reach the disk; empty if it did."""
        self.wait()
        lost, self.failed = self.failed, ""
        copied = _to_host({"step": step, **state})
        self._writer = threading.Thread(target=self._write, args=(step, copied), name="checkpoint")
        self._writer.start()
        return lost

    def wait(self) -> None:
        """Until the save under way has reached the disk."""
        if self._writer is not None:
            self._writer.join()
            self._writer = None

    def finish(self) -> None:
        """Until the last save has reached the disk; that it could not is an error then, for nothing will try again."""
        self.wait()
        if self.failed:
            raise UserError(f"{self.failed}; make room in {self.folder} and give the same command again")

    def newest(self) -> tuple[Path | None, list[str]]:
        """The newest checkpoint that verifies, and a line for each newer one that does not."""
        skipped: list[str] = []
        for record in sorted(self.folder.glob("step-*.json"), reverse=True):
            path = record.with_suffix(".pt")
            fault = _fault(path, record)
            if not fault:
                return path, skipped
            skipped.append(f"checkpoint {path.name} skipped: {fault}")
        return None, skipped

    def _write(self, step: int, state: Mapping[str, Any]) -> None:
        began = time.perf_counter()
        path = self.folder / f"step-{step:09d}.pt"
        fresh = self.folder / f".{path.name}.{os.getpid()}"
        hashing = None
        try:
            with open(fresh, "wb") as file:
                hashing = _Hashing(file)
                torch.save(state, cast(IO[bytes], hashing))
                file.flush()
                os.fsync(file.fileno())
            record = {"file": path.name, "step": step, "bytes": hashing.bytes, "sha256": hashing.sha.hexdigest()}
            fresh.replace(path)
            write_json(path.with_suffix(".json"), {**record, "seconds": round(time.perf_counter() - began, 3)})
            write_json(self.folder / "latest.json", record)
            _sync(self.folder)
        except BaseException as error:  # on a thread: whatever it is, the loop must hear of it
            why = hashing.error if hashing and hashing.error else error
            self.failed = f"the checkpoint of step {step} was not written: {why}"
            fresh.unlink(missing_ok=True)
            return
        self._prune(step)

    def _prune(self, step: int) -> None:
        """Keep the newest ones. Later steps than the one just written are of a past that damage has undone."""
        records = sorted(self.folder.glob("step-*.json"), reverse=True)
        later = [record for record in records if record.stem > f"step-{step:09d}"]
        for old in later + [record for record in records if record not in later][self.keep :]:
            old.unlink()
            old.with_suffix(".pt").unlink(missing_ok=True)

    def tidy(self) -> None:
        """Remove what a killed process has left half written. For the one writer, before it begins."""
        for half in self.folder.glob(".*"):
            half.unlink()


def load(path: Path) -> dict[str, Any]:
    """A checkpoint's dict; a file that is none is a UserError."""
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
        if isinstance(found, dict) and "model" in found:
            return found
        fault = "it has no 'model'"
    except (RuntimeError, UnpicklingError, EOFError, OSError) as error:
        fault = (str(error) or type(error).__name__).splitlines()[0]
    raise UserError(f"{path} is no checkpoint ({fault}): name a run folder or a .pt file from its checkpoints")


def load_weights(module: torch.nn.Module, weights: Mapping[str, torch.Tensor], origin: str) -> None:
    """Put `weights` into `module`; another architecture is refused with the first entry that does not fit."""
    for name, faults in _misfits(module.state_dict(), weights):
        raise UserError(
            f"checkpoint {origin} is of another architecture ({name}: {faults}): choose the --model it was made with"
        )
    module.load_state_dict(weights)


def find(where: str) -> Path:
    """The checkpoint that `where` means: a .pt file, or the newest good one of a run folder."""
    path = Path(where).expanduser()
    if path.is_dir():
        newest, _ = Checkpoints(path / "checkpoints", keep=0).newest()
        if newest is None:
            raise UserError(f"no good checkpoint in {path / 'checkpoints'}: name a run that has saved one")
        return newest
    if not path.is_file():
        raise UserError(f"no checkpoint {where}: name a run folder or a .pt file")
    return path


def _misfits(own: Mapping[str, torch.Tensor], other: Mapping[str, torch.Tensor]) -> Iterator[tuple[str, str]]:
    for name in [*own, *(name for name in other if name not in own)]:
        here = str(tuple(own[name].shape)) if name in own else "absent"
        there = str(tuple(other[name].shape)) if name in other else "absent"
        if here != there:
            yield name, f"{there} in the checkpoint, {here} in the model"


def _fault(path: Path, record: Path) -> str:
    """What is wrong with a checkpoint; empty if nothing is."""
    try:
        told = read_json(record)
        if path.stat().st_size != told["bytes"]:
            return f"{path.stat().st_size} bytes instead of {told['bytes']}"
        with open(path, "rb") as file:
            sha = hashlib.sha256()
            while block := file.read(1 << 22):
                sha.update(block)
        return "" if sha.hexdigest() == told["sha256"] else "its hash is not the one recorded"
    except (OSError, ValueError, KeyError) as error:
        return str(error)


def _to_host(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, Mapping):
        return {key: _to_host(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_to_host(item) for item in value]
    return value


def _sync(folder: Path) -> None:
    """Make the renames in a folder durable."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


class _Hashing:
    """A file that hashes what is written to it."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file = file
        self.sha = hashlib.sha256()
        self.bytes = 0
        self.error: OSError | None = None

    def write(self, data: bytes) -> int:
        self.sha.update(data)
        self.bytes += len(data)
        try:
            return self.file.write(data)
        except OSError as error:
            self.error = error  # torch.save raises one of its own that does not tell
            raise

    def flush(self) -> None:
        self.file.flush()
