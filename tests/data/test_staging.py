"""Staging: copied once whatever happens, only what is undamaged is used, and a disk without room is no end."""

from __future__ import annotations

import errno
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Generator, Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest

from barlow.data import staging
from barlow.data.shards import Index, read_index
from barlow.data.staging import ready, stage, staged, verify
from barlow.errors import UserError

SPLITS = ("unlabeled", "val")
PIECE = 1 << 17  # of a copy in another process
CONTEXT = multiprocessing.get_context("forkserver")


def finish(work: Generator[None, None, str]) -> str:
    while True:
        try:
            next(work)
        except StopIteration as end:
            return end.value


@pytest.fixture
def index(tiny_data: Path, tmp_path: Path) -> Index:
    """Shards that a test may damage."""
    shutil.copytree(tiny_data, tmp_path / "shared")
    return read_index(tmp_path / "shared")


@pytest.fixture
def scratch(tmp_path: Path) -> Path:
    return tmp_path / "local" / "scratch"


def stage_now(index: Index, scratch: Path, hashes: bool = True, splits: tuple[str, ...] = SPLITS) -> list[str]:
    """The lines that it says."""
    told: list[str] = []
    assert finish(stage(index, splits, str(scratch), hashes, told.append)) == ""
    return told


def first(index: Index) -> Path:
    return index.split("unlabeled").files[0].path


def flip(path: Path) -> None:
    """A bit in the middle: nothing but a hash shows it."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.chmod(0o644)
    path.write_bytes(content)


def left_behind(scratch: Path) -> list[Path]:
    return [path for path in scratch.rglob("*") if path.name.startswith(".") or path.suffix == ".tmp"]


def test_a_copy_is_a_folder_of_shards(index: Index, scratch: Path) -> None:
    assert staged(index, SPLITS, str(scratch)) is index
    (told,) = stage_now(index, scratch)
    assert told.startswith("4 shards copied to ")
    copy = staged(index, SPLITS, str(scratch))
    assert copy.folder.parent == scratch
    assert read_index(copy.folder) == copy
    assert set(copy.splits) == set(SPLITS)
    for name in SPLITS:
        assert [shard.sha256 for shard in copy.split(name).files] == [s.sha256 for s in index.split(name).files]
    shutil.rmtree(index.folder)  # from here on the copy stands alone
    assert finish(verify(copy, SPLITS)) == ""
    assert not left_behind(scratch)


@pytest.mark.parametrize("hashes", [True, False])
def test_a_copy_is_found_again(index: Index, scratch: Path, hashes: bool) -> None:
    stage_now(index, scratch)
    before = {path: path.stat().st_mtime_ns for path in scratch.rglob("*.beton")}
    (told,) = stage_now(index, scratch, hashes)
    assert told.startswith("shards found in ")
    assert ("as they were written" in told) == hashes
    assert {path: path.stat().st_mtime_ns for path in scratch.rglob("*.beton")} == before


@pytest.mark.parametrize("damage", ["cut", "flip", "missing", "index missing"])
def test_a_damaged_copy_is_replaced(index: Index, scratch: Path, damage: str) -> None:
    stage_now(index, scratch)
    copy = staged(index, SPLITS, str(scratch))
    shard = first(copy)
    if damage == "cut":
        os.truncate(shard, 1000)
    elif damage == "flip":
        flip(shard)
    else:
        (shard if damage == "missing" else copy.folder / "index.json").unlink()
    (told,) = stage_now(index, scratch)
    assert told.startswith("0 shards copied" if damage == "index missing" else "1 shards copied")
    assert staged(index, SPLITS, str(scratch)).folder == copy.folder
    assert finish(verify(copy, SPLITS)) == ""


@pytest.mark.parametrize("damage", ["flip", "cut"])
def test_damaged_shared_shards_are_refused_and_never_used(index: Index, scratch: Path, damage: str) -> None:
    flip(first(index)) if damage == "flip" else os.truncate(first(index), 1000)
    with pytest.raises(UserError, match=rf"{first(index)}: .*: delete it and give the launchers/shards.py command"):
        stage_now(index, scratch)
    assert staged(index, SPLITS, str(scratch)) is index
    assert not left_behind(scratch)
    with pytest.raises(UserError, match=f"{first(index)}: "):
        finish(verify(index, SPLITS))
    with pytest.raises(UserError, match=f"{first(index)}: "):  # no copy: they are looked at where they are
        finish(ready(index, SPLITS, "", hashes=True))
    assert finish(ready(index, SPLITS, "", hashes=False)) == ""
    assert finish(verify(index, ["val"])) == ""


def test_a_disk_that_reads_other_than_what_was_written(
    index: Index, scratch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rename = Path.replace

    def rename_and_damage(self: Path, to: Path) -> Path:
        rename(self, to)
        if to.suffix == ".beton":
            flip(to)
        return to

    monkeypatch.setattr(Path, "replace", rename_and_damage)
    fault = finish(ready(index, SPLITS, str(scratch), hashes=True))
    assert fault.endswith("unlabeled-0000-of-0002.beton does not read as it was written: its disk fails")
    assert staged(index, SPLITS, str(scratch)) is index


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC, errno.ENOTSUP])
def test_errors_of_the_disk(index: Index, scratch: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    def fail(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(staging.os, "fsync", fail)
    told: list[str] = []
    work = ready(index, SPLITS, str(scratch), hashes=True, say=told.append)
    if number == errno.ENOTSUP:
        with pytest.raises(
            UserError, match=rf"^--data.stage {scratch}: operation not supported: give a folder on each"
        ):
            finish(work)
        return
    fault = finish(work)
    if number == errno.EIO:
        assert fault == f"--data.stage {scratch}: input/output error: its disk fails"
    else:
        assert fault == ""
        assert told[0] == f"warning: --data.stage {scratch}: no space left on device: reading {index.folder} instead"
        assert told[1].startswith("4 shards are as they were written")  # the shared ones, which are used now
    assert staged(index, SPLITS, str(scratch)) is index


@pytest.mark.parametrize(
    ("target", "why"),
    [
        ("/proc/none/scratch", "no such file or directory"),
        ("FILE/scratch", "not a directory"),
        ("$NO_SUCH_DISK/scratch", "this node has no such variable"),
    ],
)
def test_a_wrong_folder_is_refused_in_a_line(index: Index, tmp_path: Path, target: str, why: str) -> None:
    (tmp_path / "file").touch()
    target = target.replace("FILE", str(tmp_path / "file"))
    with pytest.raises(UserError, match=f"^--data.stage .*{why}.*each node's own disk") as caught:
        finish(stage(index, SPLITS, target))
    assert "\n" not in str(caught.value)


def test_a_folder_by_a_variable_of_the_node(index: Index, scratch: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_DISK", str(scratch))
    finish(stage(index, SPLITS, "$MY_DISK/x"))
    assert staged(index, SPLITS, "$MY_DISK/x").folder.parent == scratch / "x"


def test_other_data_and_other_splits_have_other_folders(index: Index, scratch: Path, tmp_path: Path) -> None:
    shutil.copytree(index.folder, tmp_path / "again")
    again = read_index(tmp_path / "again")
    stage_now(index, scratch)
    (told,) = stage_now(again, scratch)  # the same shards in another place: one copy
    assert told.startswith("shards found in ")
    stage_now(index, scratch, splits=("val",))
    stage_now(index, scratch, splits=("val", "unlabeled"))
    assert len(list(scratch.glob("*/index.json"))) == 2


def test_a_shared_shard_that_cannot_be_read_is_no_fault_of_the_disk(index: Index, scratch: Path) -> None:
    first(index).unlink()
    with pytest.raises(RuntimeError, match=f"cannot read {first(index)}: No such file or directory"):
        stage_now(index, scratch)


@pytest.fixture
def disk(scratch: Path) -> Iterator[Path]:
    """A disk of 1 MB, less than a shard."""
    scratch.mkdir(parents=True)
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "none", str(scratch)]
    if os.geteuid() != 0 or subprocess.run(mount).returncode:
        pytest.skip("mounting a small file system needs root")
    yield scratch
    subprocess.run(["umount", str(scratch)], check=True)


@pytest.mark.parametrize("told_beforehand", [True, False])
def test_no_room(index: Index, disk: Path, monkeypatch: pytest.MonkeyPatch, told_beforehand: bool) -> None:
    if not told_beforehand:  # as where others fill the disk meanwhile
        monkeypatch.setattr(staging.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(1 << 40, 0, 1 << 40))
    (warning,) = stage_now(index, disk)
    what = r"no space left \(0.00 GiB free, .* GiB needed\)" if told_beforehand else "no space left on device"
    assert re.fullmatch(f"warning: --data.stage {disk}: {what}: reading {index.folder} instead", warning)
    assert staged(index, SPLITS, str(disk)) is index
    assert [path.suffix for path in disk.iterdir()] == [".lock"]
    assert os.statvfs(disk).f_bfree * os.statvfs(disk).f_frsize > 1000_000


Start = Callable[..., BaseProcess]


@pytest.fixture
def start(on_ranks: object) -> Iterator[Start]:
    """start(*args): `rank(*args)` as a process, from the server that has imported what it needs."""
    running: list[BaseProcess] = []

    def begin(*args: object) -> BaseProcess:
        running.append(CONTEXT.Process(target=rank, args=args, daemon=True))
        running[-1].start()
        return running[-1]

    yield begin
    for process in running:
        process.kill()
        process.join()


def rank(index: Index, scratch: Path, splits: tuple[str, ...], pace: float, pieces: Any) -> None:
    """One that stages; a small piece at a time, which it counts."""
    staging.PIECE, read = PIECE, staging._pieces

    def slowly(shared: Path) -> Iterator[bytes]:
        for piece in read(shared):
            with pieces.get_lock():
                pieces.value += 1
            time.sleep(pace)
            yield piece

    staging._pieces = slowly
    assert finish(stage(index, splits, str(scratch))) == ""
    assert staged(index, splits, str(scratch)) is not index


def pieces_of(index: Index, splits: tuple[str, ...]) -> int:
    """Of one copy."""
    return sum(-(-shard.bytes // PIECE) for name in splits for shard in index.split(name).files)


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def ended_well(*processes: BaseProcess) -> None:
    for process in processes:
        process.join(60)
        assert process.exitcode == 0


def test_four_at_once_copy_once(index: Index, scratch: Path, start: Start) -> None:
    pieces = CONTEXT.Value("i", 0)
    ended_well(*[start(index, scratch, SPLITS, 0.003, pieces) for _ in range(4)])
    assert pieces.value == pieces_of(index, SPLITS)
    assert finish(verify(staged(index, SPLITS, str(scratch)), SPLITS)) == ""


def test_a_killed_one_is_succeeded_by_one_that_waits(index: Index, scratch: Path, start: Start) -> None:
    """What is whole when it is killed stays: here, the first of two splits."""
    pieces, after = CONTEXT.Value("i", 0), CONTEXT.Value("i", 0)
    killed = start(index, scratch, SPLITS, 0.01, pieces)
    until(lambda: pieces.value > pieces_of(index, SPLITS[:1]) + 3)
    waits = start(index, scratch, SPLITS, 0.0, after)
    killed.kill()
    killed.join()
    ended_well(waits)
    assert after.value == pieces_of(index, SPLITS[1:])
    assert finish(verify(staged(index, SPLITS, str(scratch)), SPLITS)) == ""
    assert not left_behind(scratch)


def test_jobs_with_other_data_do_not_disturb_one_another(
    index: Index, scratch: Path, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    pieces = CONTEXT.Value("i", 0)
    held = start(index, scratch, ("unlabeled",), 0.01, pieces)
    until(lambda: pieces.value > 5)
    assert held.pid
    os.kill(held.pid, signal.SIGSTOP)
    stage_now(index, scratch, splits=("val",))  # waits for nobody, and leaves the other's half copy alone
    assert len(left_behind(scratch)) == 1
    monkeypatch.setattr(staging, "PATIENCE", 0.2)
    (warning,) = stage_now(index, scratch, splits=("unlabeled",))
    assert re.fullmatch(r"warning: the process that fills .* stands still: it is not waited for", warning)
    assert staged(index, ("unlabeled",), str(scratch)) is index
    os.kill(held.pid, signal.SIGCONT)
    ended_well(held)
    for splits in (("unlabeled",), ("val",)):
        assert finish(verify(staged(index, splits, str(scratch)), splits)) == ""


def test_what_a_killed_one_of_another_job_left_is_removed(index: Index, scratch: Path, start: Start) -> None:
    pieces = CONTEXT.Value("i", 0)
    killed = start(index, scratch, ("unlabeled",), 0.01, pieces)
    until(lambda: pieces.value > 5)
    killed.kill()
    killed.join()
    assert len(left_behind(scratch)) == 1
    stage_now(index, scratch, splits=("val",))
    assert not left_behind(scratch)


def test_a_long_copy_says_how_far_it_is(index: Index, scratch: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(staging, "EVERY", 0.0)
    *lines, last = stage_now(index, scratch)
    assert all(re.fullmatch(r"copying 4 shards to .*: [\d.]+ of [\d.]+ GiB", line) for line in lines)
    assert len(lines) >= 4
    assert re.fullmatch(r"4 shards copied to .*: [\d.]+ GiB in [\d.]+ s", last)
