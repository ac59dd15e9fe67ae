"""Checkpoints: written whole or not at all, off the training thread, verified by hash; the newest good one is used.

A checkpoint is `step-N.pt`, a dict that `torch.load(..., weights_only=True)` reads, and beside it `step-N.json` with
its size and hash, without which it was never finished; `latest.json` names the newest."""

from __future__ import annotations

import hashlib
import json
import os
import re
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from pickle import UnpicklingError
from typing import IO, Any, cast

import torch

from barlow.engine.snapshot import Snapshot
from barlow.errors import UserError
from barlow.files import sync_folder, write_json

NAME = re.compile(r"(step-\d+)\.(pt|json)")


class Checkpoints:
    """The checkpoints of one run folder. One writer (rank 0), any number of readers."""

    def __init__(self, folder: Path, keep: int, every: int = 0) -> None:
        """Keeps the newest `keep` good ones, and for good those whose step is a multiple of `every` (0: none)."""
        self.folder = folder
        self.keep = keep
        self.every = every
        self.broken: str = ""  # what of a state was not finite: a run that is beyond help
        self.failed: str = ""  # why the newest save did not reach the disk
        self.saved: int | None = None  # the newest step that did
        self.seconds = 0.0  # from the beginning of that save to when it was durable
        self._writer = ThreadPoolExecutor(1, "checkpoint")  # started once: starting a thread waits for it
        self._snapshot = Snapshot(self._writer)
        self._save: Future[None] | None = None
        self._news: deque[str] = deque()
        self._damaged: set[str] = set()  # stems: they do not count as kept
        self._found: tuple[Path | None, list[str]] | None = None  # by `tidy`

    @property
    def busy(self) -> bool:
        """Whether a save is under way; another would wait for it."""
        return self._save is not None and not self._save.done()

    def prepare(self, state: Mapping[str, Any]) -> None:
        """Before the first save, and beside the training: memory for the copies of such a state."""
        self.wait()

        def make_room() -> None:
            try:
                self._snapshot.make_room(state)
            except Exception as error:  # the save itself will tell whether it matters
                self._news.append(f"warning: no memory could be made ready for checkpoints: {error}")

        self._save = self._writer.submit(make_room)

    def save(
        self,
        step: int,
        state: Mapping[str, Any],
        began: float | None = None,
        first: Callable[[], object] = lambda: None,
    ) -> None:
        """Copy the state now, write it on a thread; never two writes at once. `take_news` tells how it went.

        `began`: when training began to stand still for it (perf_counter). `first`: called on the thread, before there
        is a checkpoint; if it raises, there will be none."""
        began = time.perf_counter() if began is None else began
        self.wait()
        self.failed = ""
        self._snapshot.take({"step": step, **state})
        stall = time.perf_counter() - began
        self._save = self._writer.submit(self._write_and_tell, step, began, stall, first)

    def take_news(self) -> list[str]:
        """Lines for the log since last asked: how long each save took, or why it did not reach the disk."""
        return [self._news.popleft() for _ in range(len(self._news))]

    def wait(self) -> None:
        """Until the save under way has reached the disk."""
        if self._save is not None:
            self._save.result()
            self._save = None

    def finish(self) -> None:
        """Until the last save has reached the disk; that it could not is an error then, for nothing will try again."""
        self.wait()
        if self.failed:
            raise OSError(f"{self.failed}; make room in {self.folder} and give the same command again")

    def newest(self) -> tuple[Path | None, list[str]]:
        """The newest checkpoint that verifies, and a line for each newer one that does not.

        An OSError where that cannot be known: what a sick file server does not give is no damage."""
        found, self._found = self._found, None
        if found is not None:
            return found
        skipped: list[str] = []
        for stem in _stems(self.folder):
            path = self.folder / f"{stem}.pt"
            fault = _fault(path)
            if not fault:
                return path, skipped
            skipped.append(f"checkpoint {path.name} skipped: {fault}")
            self._damaged.add(stem)
        return None, skipped

    def tidy(self) -> None:
        """Finish what a killed process has begun: remove what is half written, or old. For the one writer, before it
        begins: a run that was killed in its very last save makes no other."""
        for half in (*self.folder.glob(".step-*"), *self.folder.glob(".latest.json.*")):
            half.unlink()
        path, skipped = self._found = self.newest()
        if path is None:
            # A pair is more than a save leaves that was cut: to begin anew would be to lose a run.
            pairs = [_pair(self.folder, stem) for stem in _stems(self.folder)]
            if any(record.exists() and weights.exists() for record, weights in pairs):
                told = f"no checkpoint in {self.folder} can be read ({'; '.join(skipped)})"
                raise RuntimeError(f"{told}: move them away to begin anew")
            return
        with suppress(OSError):  # the same will fail, and be told, when it saves
            sync_folder(self.folder)
            if not skipped:  # what looks damaged goes when there is a newer one
                self._prune(_step(path.stem))
            told = json.loads(path.with_suffix(".json").read_bytes())
            write_json(self.folder / "latest.json", {name: told[name] for name in ("file", "step", "bytes", "sha256")})

    def _write_and_tell(self, step: int, began: float, stall: float, first: Callable[[], object]) -> None:
        """On the thread: whatever happens, the loop must hear of it."""
        try:
            size = self._write(step, began, first)
        except FloatingPointError as error:
            self.broken = str(error)
            return
        except BaseException as error:
            self.failed = f"the checkpoint of step {step} was not written: {error}"
            self._news.append(f"warning: {self.failed}")
            return
        self.saved, self.seconds = step, time.perf_counter() - began
        told = f"written in {self.seconds:.2f} s (stall {stall:.3f} s, {size / 1e6:.1f} MB)"
        self._news.append(f"checkpoint of step {step} {told}")
        try:
            self._prune(step)
        except OSError as error:
            self._news.append(f"warning: an older checkpoint was not removed: {error}")

    def _write(self, step: int, began: float, first: Callable[[], object]) -> int:
        """Its size, once it is durable. What it could not finish it takes away again: a full disk lacks the room."""
        path = self.folder / f"step-{step:09d}.pt"
        record = path.with_suffix(".json")
        fresh = self.folder / f".{path.name}.{os.getpid()}"
        hashing = None
        try:
            with open(fresh, "wb") as file:
                hashing = _Hashing(file)
                state = self._snapshot.settle()
                _refuse_non_finite(state, step)
                torch.save(state, cast(IO[bytes], hashing))
                file.flush()
                os.fsync(file.fileno())
            told = {"file": path.name, "step": step, "bytes": hashing.bytes, "sha256": hashing.sha.hexdigest()}
            first()
            fresh.replace(path)
            write_json(record, {**told, "seconds": round(time.perf_counter() - began, 3)})
            self._damaged.discard(path.stem)
            write_json(self.folder / "latest.json", told)
            sync_folder(self.folder)
        except BaseException as error:
            with suppress(OSError):
                fresh.unlink(missing_ok=True)
                if not record.exists():
                    path.unlink(missing_ok=True)
            raise (hashing and hashing.error) or error from None
        return hashing.bytes

    def _prune(self, step: int) -> None:
        """Once a newer one is durable. Later steps than that one are of a past that damage has undone: they are put
        aside, for who may want to look at them."""
        stems = _stems(self.folder)
        later = {stem for stem in stems if _step(stem) > step}
        good = [stem for stem in stems if stem not in later | self._damaged]
        keep = {*good[: max(1, self.keep)], *(stem for stem in stems if self.every and _step(stem) % self.every == 0)}
        for stem in stems:
            for file in _pair(self.folder, stem):
                if stem in later:
                    with suppress(FileNotFoundError):
                        file.rename(file.with_name(f"damaged-{file.name}"))
                elif stem not in keep:
                    file.unlink(missing_ok=True)
        self._damaged &= keep - later


def _refuse_non_finite(state: Mapping[str, Any], step: int) -> None:
    """A finite loss can still leave broken weights behind: never let them replace a good checkpoint."""
    weights = [tensor for tensor in state.get("model", {}).values() if tensor.is_floating_point()]
    if weights and not torch.stack([norm.float() for norm in torch._foreach_norm(weights)]).isfinite().all():
        raise FloatingPointError(f"weights are not finite after step {step}; the last good checkpoint is kept")


def load(path: Path) -> dict[str, Any]:
    """A checkpoint's dict; a file that is none is a UserError."""
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
        if isinstance(found, dict) and "model" in found:
            return found
        fault = "it has no 'model'"
    except FileNotFoundError:  # where a run keeps its newest, they come and go
        raise UserError(f"{path} is gone: its run has saved a newer one since: give the command again") from None
    except (RuntimeError, UnpicklingError, EOFError) as error:
        fault = (str(error) or type(error).__name__).splitlines()[0]
    raise UserError(f"{path} is no checkpoint ({fault}): name a run folder or a .pt file from its checkpoints")


def part(stored: Mapping[str, Any], name: str) -> dict[str, torch.Tensor]:
    """The weights of one part of a checkpoint's network, by the part's own names."""
    return {key.removeprefix(f"{name}."): w for key, w in stored["model"].items() if key.startswith(f"{name}.")}


def load_weights(module: torch.nn.Module, weights: Mapping[str, torch.Tensor], origin: str) -> None:
    """Put `weights` into `module`; another architecture is refused with the first entry that does not fit."""
    for name, faults in _misfits(module.state_dict(), weights):
        raise UserError(
            f"checkpoint {origin} is of another architecture ({name}: {faults}): choose the --model it was made with"
        )
    module.load_state_dict(weights)


def find(where: str) -> Path:
    """The checkpoint that `where` means: a .pt file, or the newest good one of a run's folder, or of its `best`."""
    path = Path(where).expanduser()
    if path.is_dir():
        folder = path if any(path.glob("step-*.pt")) else path / "checkpoints"
        newest, _ = Checkpoints(folder, keep=0).newest()
        if newest is None:
            raise UserError(f"no good checkpoint in {folder}: name a run that has saved one")
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


def _stems(folder: Path) -> list[str]:
    """Of all that looks like a checkpoint or its record, the newest first."""
    try:
        names = os.listdir(folder)  # unlike glob, it tells when it may not look
    except FileNotFoundError:
        return []
    return sorted({found[1] for name in names if (found := NAME.fullmatch(name))}, key=_step, reverse=True)


def _pair(folder: Path, stem: str) -> tuple[Path, Path]:
    """The record first: without it a checkpoint counts for nothing."""
    return folder / f"{stem}.json", folder / f"{stem}.pt"


def _step(stem: str) -> int:
    return int(stem.removeprefix("step-"))


def _fault(path: Path) -> str:
    """What is wrong with a checkpoint; empty if nothing is. That it cannot be read now is another thing, an OSError."""
    try:
        told = json.loads(path.with_suffix(".json").read_bytes())
        if (told["file"], told["step"]) != (path.name, _step(path.stem)):
            return f"its record is that of {told['file']}, step {told['step']}"
        if path.stat().st_size != told["bytes"]:
            return f"{path.stat().st_size} bytes instead of {told['bytes']}"
        with open(path, "rb") as file:
            sha = hashlib.sha256()
            while block := file.read(1 << 22):
                sha.update(block)
        return "" if sha.hexdigest() == told["sha256"] else "its hash is not the one recorded"
    except FileNotFoundError as error:
        return f"{Path(error.filename or path).name}: {error.strerror}"
    except (ValueError, KeyError, TypeError):
        return "its record is damaged"


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
