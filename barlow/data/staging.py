"""Shards on each node: copied to its own disk if that is asked for, and in any case compared with their hashes.

A copy is named by its content, so that jobs with different data share a disk in peace and a later job finds it again.
One process fills it while the others of its node wait; a killed one is succeeded by the next. What is used has been
hashed; where there is no room, or a job stands still with half a copy, a line says so and the shared shards are read.

The work is done by generators that yield after every few megabytes and return what is wrong with this node, empty if
nothing is. So whoever runs them can do something in between: tell other ranks that this one is alive, say."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import IO

from barlow.data.shards import INDEX, Index, Shard, check_size
from barlow.errors import UserError
from barlow.files import sync_folder, write_json

Work = Generator[None, None, str]
Say = Callable[[str], object]

PIECE = 1 << 22  # bytes read at once
SYNC = 1 << 28  # bytes written between two fsyncs, so that none takes minutes
PATIENCE = 600.0  # seconds to wait for another process whose copy does not grow
GIB = 1 << 30
EVERY = 10.0  # seconds between two lines of progress
FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
BROKEN = {errno.EIO, errno.EROFS, errno.ENXIO, errno.ENODEV, errno.EUCLEAN}  # of a disk; all else is a wrong folder
PREFIX = f"barlow-{os.getuid()}-"  # of the folders of copies: users share the disk, not the copies
CHANGED = "its bytes have changed since it was written (sha256 differs)"
REPAIR = "delete it and give the launchers/shards.py command that wrote it again"


def _print(line: str) -> None:
    print(line, flush=True)


def ready(index: Index, splits: Sequence[str], target: str, hashes: bool, say: Say = _print) -> Work:
    """Have the shards of `splits` where `staged` will find them: for one process of each node, before the others ask.

    Shared shards that are damaged are a UserError; where only some nodes see it, it is their own fault."""
    if target:
        fault = yield from stage(index, splits, target, hashes, say)
        if fault:
            return fault
    if hashes and staged(index, splits, target) is index:
        return (yield from verify(index, splits, say))
    return ""


def staged(index: Index, splits: Sequence[str], target: str) -> Index:
    """The index of the copy in `target`, if it is whole; otherwise `index` itself, the shared shards."""
    if not target:
        return index
    copy = _copy(index, splits, target)
    return copy if _is_whole(copy) else index


def verify(index: Index, splits: Sequence[str], say: Say = _print) -> Work:
    """Compare the shards with their hashes, where they are."""
    shards = _shards(index, splits)
    told = _Told(f"comparing the hashes of {len(shards)} shards in {index.folder}", shards, say)
    for shard in shards:
        problem = check_size(shard)
        if not problem and (yield from _sha256(shard.path, told)) != shard.sha256:
            problem = CHANGED
        if problem:
            raise UserError(f"{shard.path}: {problem}: {REPAIR}")
    say(f"{len(shards)} shards are as they were written: {told.end()}")
    return ""


def stage(index: Index, splits: Sequence[str], target: str, hashes: bool = True, say: Say = _print) -> Work:
    """Copy the shards into a folder in `target`, or find them there; compared with their hashes if `hashes`.

    No room is no error: it is said, and `staged` answers with the shared shards."""
    copy = _copy(index, splits, target)
    where, content = copy.folder.parent, json.loads((index.folder / INDEX).read_text())
    try:
        where.mkdir(parents=True, exist_ok=True)
        with open(_lock_of(copy.folder), "a") as lock:
            if not (yield from _turn(lock, copy.folder)):
                say(f"warning: the process that fills {copy.folder} stands still: it is not waited for")
                return ""
            _tidy(where, copy.folder)
            try:
                return (yield from _fill(index, content, copy, hashes, say))
            except OSError as error:
                if error.errno in FULL:  # half a copy serves nobody
                    shutil.rmtree(copy.folder, ignore_errors=True)
                raise
    except OSError as error:
        why = error.strerror or str(error)
        told = f"--data.stage {where}: {why[:1].lower()}{why[1:]}"
        if error.errno in FULL:
            say(f"warning: {told}: reading {index.folder} instead")
            return ""
        if error.errno in BROKEN:
            return f"{told}: its disk fails"
        raise UserError(f"{told}: give a folder on each node's own disk that this job may write") from None


def _fill(index: Index, content: dict, copy: Index, hashes: bool, say: Say) -> Work:
    """Copy what is not there, or not as it should be; the index last, for it stands for a whole copy."""
    pairs = list(zip(_shards(index, copy.splits), _shards(copy, copy.splits), strict=True))
    told = _Told(f"comparing the hashes of the copy in {copy.folder}", [here for _, here in pairs], say)
    missing = []
    for shared, here in pairs:
        if check_size(here) or (hashes and (yield from _sha256(here.path, told)) != here.sha256):
            missing.append((shared, here))
    if not missing and _is_whole(copy):
        say(f"shards found in {copy.folder}" + (f", as they were written: {told.end()}" if hashes else ""))
        return ""
    copy.folder.mkdir(exist_ok=True)
    (copy.folder / INDEX).unlink(missing_ok=True)
    for _, here in missing:
        here.path.unlink(missing_ok=True)
    free, needed = shutil.disk_usage(copy.folder).free, sum(here.bytes for _, here in missing)
    if needed > free:
        raise OSError(errno.ENOSPC, f"no space left ({free / GIB:.2f} GiB free, {needed / GIB:.2f} GiB needed)")
    told = _Told(f"copying {len(missing)} shards to {copy.folder}", [here for _, here in missing], say)
    for shared, here in missing:
        if (yield from _copy_shard(shared, here.path, told)) != shared.sha256:
            raise UserError(f"{shared.path}: {CHANGED}: {REPAIR}")
        if hashes and (yield from _sha256(here.path)) != here.sha256:
            here.path.unlink()
            return f"{here.path} does not read as it was written: its disk fails"
    chosen = {name: {**content["splits"][name], "names": str(split.names)} for name, split in copy.splits.items()}
    write_json(copy.folder / INDEX, {**content, "splits": chosen})
    sync_folder(copy.folder)
    say(f"{len(missing)} shards copied to {copy.folder}: {told.end()}")
    return ""


def _copy_shard(shared: Shard, path: Path, told: _Told) -> Work:
    """-> the hash of what was read. If it is the right one, the file has its name once it is on the disk."""
    fresh, digest, written = path.with_name(f".{path.name}.tmp"), hashlib.sha256(), 0
    with open(fresh, "wb") as file:
        for piece in _pieces(shared.path):
            digest.update(piece)
            file.write(piece)
            before, written = written, written + len(piece)
            if written // SYNC > before // SYNC:
                os.fsync(file.fileno())
            told.more(len(piece))
            yield
        file.flush()
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)  # what is read next is read from the disk
    if digest.hexdigest() == shared.sha256:
        fresh.replace(path)
        sync_folder(path.parent)
    else:
        fresh.unlink()
    return digest.hexdigest()


def _pieces(shared: Path) -> Iterator[bytes]:
    """Of a shared file. That it cannot be read is no fault of the disk it is copied to."""
    try:
        with open(shared, "rb") as file:
            while piece := file.read(PIECE):
                yield piece
    except OSError as error:
        raise RuntimeError(f"cannot read {shared}: {error.strerror}") from error


def _sha256(path: Path, told: _Told | None = None) -> Work:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while piece := file.read(PIECE):
            digest.update(piece)
            if told:
                told.more(len(piece))
            yield
    return digest.hexdigest()


def _turn(lock: IO[str], folder: Path) -> Generator[None, None, bool]:
    """Wait for another process that fills the folder; False if it no longer moves."""
    size, since = -1, time.monotonic()
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            now = 0
        with contextlib.suppress(FileNotFoundError):  # one that has got its name meanwhile
            now = sum(path.stat().st_size for path in folder.glob("*"))
        if now != size:
            size, since = now, time.monotonic()
        elif time.monotonic() - since > PATIENCE:
            return False
        time.sleep(0.1)
        yield


def _tidy(where: Path, own: Path) -> None:
    """Remove what killed processes have left half written, here and in the folders that nobody fills."""
    for folder in filter(Path.is_dir, where.glob(f"{PREFIX}*")):
        with open(_lock_of(folder), "a") as lock, contextlib.suppress(BlockingIOError):
            if folder != own:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            for half in folder.glob(".*"):
                half.unlink(missing_ok=True)


def _copy(index: Index, splits: Sequence[str], target: str) -> Index:
    """The index of the copy. Its folder's name stands for all that is in it."""
    where = Path(os.path.expandvars(target)).expanduser().absolute()
    if "$" in str(where):
        raise UserError(f"--data.stage {target}: this node has no such variable: give a folder on each node's own disk")
    for name in splits:
        index.split(name)
    chosen = [split for split in index.splits.values() if split.name in splits]

    def within(folder: Path, names: bool) -> Index:
        moved = {
            split.name: replace(
                split,
                files=tuple(replace(shard, path=folder / shard.path.name) for shard in split.files),
                names=split.names.absolute() if names else folder,
            )
            for split in chosen
        }
        return replace(index, folder=folder, splits=moved)

    key = hashlib.sha256(repr(within(Path(), names=False)).encode()).hexdigest()[:16]
    return within(where / f"{PREFIX}{key}", names=True)


def _is_whole(copy: Index) -> bool:
    shards = _shards(copy, copy.splits)
    return (copy.folder / INDEX).is_file() and not any(check_size(shard) for shard in shards)


def _shards(index: Index, splits: Iterable[str]) -> list[Shard]:
    return [shard for name in splits for shard in index.split(name).files]


def _lock_of(folder: Path) -> Path:
    """Beside the folder, for that one may go while others wait for their turn."""
    return folder.with_name(f"{folder.name}.lock")


class _Told:
    """How far a work is: a line every ten seconds, and what it was in the end."""

    def __init__(self, what: str, shards: Sequence[Shard], say: Say) -> None:
        self.what, self.say = what, say
        self.total, self.done = sum(shard.bytes for shard in shards), 0
        self.began = self.last = time.monotonic()

    def more(self, size: int) -> None:
        self.done += size
        if time.monotonic() - self.last > EVERY:
            self.last = time.monotonic()
            self.say(f"{self.what}: {self.done / GIB:.2f} of {self.total / GIB:.2f} GiB")

    def end(self) -> str:
        return f"{self.done / GIB:.2f} GiB in {time.monotonic() - self.began:.1f} s"
