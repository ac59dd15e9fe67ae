"""Writing a folder of shards: other processes load and encode, this one lays out and writes.

So the bytes depend on the images and settings alone, not on the number of processes or on interruptions; a process that
dies is an error, not a hang; and a shard that has its final name is whole.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from barlow.data import shards
from barlow.data.sources import Source, open_source
from barlow.data.writing import beton, encode, plan, record
from barlow.data.writing.encode import Encoded, Encoding, Pixels
from barlow.data.writing.plan import Job, Request
from barlow.data.writing.pool import DeadWorkerError, InOrder, processes
from barlow.data.writing.progress import progress
from barlow.errors import UserError

WORTH_A_WORKER = 64
"""Fewer images than this do not pay for starting a process."""
CHUNK_BYTES = 1 << 20
"""Raw pixels that a process handles in one go: enough that handing over costs little, not so much as to be long."""


def write(request: Request) -> shards.Index:
    """Write the folder, go on where an earlier call was interrupted, or find that all is there."""
    plan.check(request)
    settings = request.settings()
    out = request.out.expanduser().absolute()
    with _one_writer(out):
        begun = record.load(out, settings)
        if _complete(out):
            (out / shards.PROGRESS).unlink(missing_ok=True)
            print(f"{out} is complete already", flush=True)
            return shards.read_index(out)
        source = open_source(request.source, request.splits)
        jobs = plan.jobs(source, request.shards)
        counts = ", ".join(f"{split.name} {split.count:,}" for split in source.splits)
        print(f"{request.source}: {counts} images, {len(source.classes)} classes", flush=True)
        useful = 1 + sum(job.count for job in jobs) // WORTH_A_WORKER
        workers = min(request.workers or len(os.sched_getaffinity(0)), useful)
        with processes(workers, encode.one_thread, [encode.__name__]) as in_order:
            encoding = Encoding(plan.side(request, source, in_order), request.size is not None, request.jpeg_quality)
            few = plan.samples(source, encoding)
            begun.go_on(out, record.digest(source, few))
            plan.check_space(out, [job for job in jobs if job.file not in begun.files], encoding, few)
            with _kept(out, len(jobs), begun):
                begun.save(out)
                _write_all(in_order, out, jobs, begun, encoding)
                _write_index(out, request, source, encoding, jobs, begun)
    return shards.read_index(out)


@contextmanager
def _one_writer(out: Path) -> Iterator[None]:
    """Makes the folder and keeps a second writer out of it; what a killed one left half done is removed."""
    new = not out.exists()
    try:
        out.mkdir(parents=True, exist_ok=True)
        folder = os.open(out, os.O_RDONLY)
    except OSError as error:
        raise UserError(f"cannot make the folder {out}: {(error.strerror or str(error)).lower()}") from None
    try:
        with suppress(OSError):  # a file system without locks
            try:
                fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UserError(f"another process is writing {out}: wait for it, or take another folder") from None
        _remove_halves(out)
        yield
    finally:
        os.close(folder)
        if new:
            with suppress(OSError):  # it holds something by now
                out.rmdir()


def _remove_halves(out: Path) -> None:
    for kind in (".beton", ".json", ".names.txt"):
        for half in out.glob(f".*{kind}.tmp"):
            half.unlink(missing_ok=True)


def _complete(out: Path) -> bool:
    if not (out / shards.INDEX).is_file():
        return False
    try:
        shards.read_index(out)
    except UserError as error:
        print(f"{error}", flush=True)
        return False
    return True


@contextmanager
def _kept(out: Path, count: int, begun: record.Record) -> Iterator[None]:
    """However the writing ends, half a shard is removed, and a line says what is kept."""

    def kept() -> str:
        return f"{len(begun.files)} of {count} shards are whole, the same command goes on from there"

    try:
        yield
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        what = "no space left" if full else (error.strerror or str(error)).lower()
        raise UserError(f"writing {out}: {what}; {kept()}") from None
    except DeadWorkerError:
        raise UserError(f"a worker process was killed (out of memory?): give fewer --workers; {kept()}") from None
    except KeyboardInterrupt:
        print(f"interrupted: {kept()}", file=sys.stderr)
        raise
    finally:
        _remove_halves(out)


def _write_all(in_order: InOrder, out: Path, jobs: list[Job], begun: record.Record, encoding: Encoding) -> None:
    todo = [job for job in jobs if job.file not in begun.files]
    if len(todo) < len(jobs):
        print(f"{len(jobs) - len(todo)} of {len(jobs)} shards are whole already", flush=True)
    run = max(1, CHUNK_BYTES // (3 * encoding.side**2))
    encoded = in_order(call for job in todo for call in _calls(job, run, encoding))
    total, left = sum(job.count for job in jobs), sum(job.count for job in todo)
    with progress(total, total - left) as advance:
        for job in todo:
            part = islice(encoded, -(-job.count // run))
            _write_shard(out, job, encoding, part, begun, advance)


def _calls(job: Job, run: int, encoding: Encoding) -> Iterator[tuple[Callable[..., Encoded], tuple[Any, ...]]]:
    end = job.first + job.count
    for i in range(job.first, end, run):
        yield encode.encode, (job.split.load, job.split.keys[i : min(i + run, end)], encoding)


def _write_shard(
    out: Path,
    job: Job,
    encoding: Encoding,
    encoded: Iterable[Encoded],
    begun: record.Record,
    advance: Callable[[int], None],
) -> None:
    """The hash is of what the file system gives back: the head is written last.

    Recorded, then named: a file with its final name is never written twice.
    """
    pixels = Pixels()

    def images() -> Iterator[tuple[list[int], bytes]]:
        nonlocal pixels
        for run in encoded:
            pixels += run.pixels
            yield run.sizes, run.blob
            advance(len(run.sizes))

    temporary = out / f".{job.file}.tmp"
    ids = np.arange(job.first_id, job.first_id + job.count)
    labels = job.split.labels[job.first : job.first + job.count]
    with open(temporary, "wb") as file:
        beton.write(file, ids, labels, encoding.side, encoding.jpeg_quality is None, images())
        file.flush()
        os.fsync(file.fileno())
    begun.files[job.file] = {
        "file": job.file,
        "count": job.count,
        "first_id": job.first_id,
        "bytes": temporary.stat().st_size,
        "sha256": shards.sha256(temporary),
        "pixels": asdict(pixels),
    }
    begun.save(out)
    record.rename(temporary, out / job.file)


def _write_index(
    out: Path, request: Request, source: Source, encoding: Encoding, jobs: list[Job], begun: record.Record
) -> None:
    """Names and, last of all, the index."""
    splits: dict[str, Any] = {}
    for split in source.splits:
        mine = [job for job in jobs if job.split is split]
        names = f"{split.name}.names.txt"
        lines = (" ".join(name.splitlines()) for name in split.names)
        record.replace_text(out / names, "".join(f"{line}\n" for line in lines))
        splits[split.name] = {
            "count": split.count,
            "first_id": mine[0].first_id,
            "labeled": int((split.labels >= 0).sum()),
            "names": names,
            "files": [begun.files[job.file] for job in mine],
        }
        if split.folds:
            splits[split.name]["folds"] = [[mine[0].first_id + i for i in fold] for fold in split.folds]
    measured = next((splits[name] for name in ("unlabeled", "train") if name in splits), next(iter(splits.values())))
    pixels = sum((Pixels(**entry["pixels"]) for entry in measured["files"]), Pixels())
    index = {
        "version": shards.INDEX_VERSION,
        "source": begun.settings["source"],
        "size": encoding.side,
        "encoding": request.encoding,
        "classes": list(source.classes),
        "mean": pixels.mean(),
        "std": pixels.std(),
        "splits": splits,
        "settings": begun.settings,
        "digest": begun.digest,
    }
    record.replace_text(out / shards.INDEX, json.dumps(index, indent=1))
    (out / shards.PROGRESS).unlink()
    size = sum(entry["bytes"] for split in splits.values() for entry in split["files"]) / 1e6
    count = sum(job.count for job in jobs)
    print(f"{out}: {count:,} images of {encoding.side} px, {len(jobs)} shards, {size:,.1f} MB", flush=True)
