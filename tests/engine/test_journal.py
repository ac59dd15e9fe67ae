"""Rows that one thread writes while another syncs: none is lost, none is there twice, and the writer does not wait."""

from __future__ import annotations

import os
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from barlow.engine.journal import DurableJournal


class SlowDisk:
    """An fsync that takes until it is let go, and then comes out as asked."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.begun, self.go, self.fails, self.fsync = threading.Event(), threading.Event(), False, os.fsync
        monkeypatch.setattr(os, "fsync", self)

    def __call__(self, handle: int) -> None:
        self.begun.set()
        assert self.go.wait(10)
        if self.fails:
            raise OSError(28, "No space left on device")
        self.fsync(handle)


@pytest.fixture
def journal(tmp_path: Path) -> DurableJournal:
    journal = DurableJournal(tmp_path / "rows")
    journal.write(b"1\n")
    return journal


def test_what_is_written_during_a_sync_is_not_durable_by_it(
    journal: DurableJournal, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = SlowDisk(monkeypatch)
    with ThreadPoolExecutor(1) as beside:
        syncing = beside.submit(journal.sync)
        assert disk.begun.wait(10)
        journal.write(b"2\n")  # does not wait
        disk.go.set()
        assert syncing.result()
    disk.fails = True
    assert not journal.sync()  # and now the disk may have lost the second
    with open(journal.path, "rb+") as file:
        file.truncate(2)
    disk.fails = False
    assert journal.sync()
    assert journal.path.read_bytes() == b"1\n2\n"


def test_a_write_that_fails_during_a_sync_makes_nothing_durable_twice(
    journal: DurableJournal, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk, write = SlowDisk(monkeypatch), os.write

    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    with ThreadPoolExecutor(1) as beside:
        syncing = beside.submit(journal.sync)
        assert disk.begun.wait(10)
        monkeypatch.setattr(os, "write", full)
        journal.write(b"2\n")
        monkeypatch.setattr(os, "write", write)
        journal.write(b"3\n")
        disk.go.set()
        assert not syncing.result()
    assert journal.sync()
    journal.close()
    assert journal.path.read_bytes() == b"1\n2\n3\n"
