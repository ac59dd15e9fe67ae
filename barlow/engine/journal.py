"""Files that only grow, and outlive a full disk: what it refuses is held here, and written, in order and once, when
there is room again. Nothing in here raises because a disk is full, slow or gone."""

from __future__ import annotations

import os
import threading
from pathlib import Path

from barlow.files import sync_folder


class Journal:
    """A file to append to; others may append to it too. `fault` says why something is held, if anything is."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.fault = ""
        self._held = b""
        self._handle: int | None = None
        self.write(b"")

    def write(self, data: bytes) -> None:
        """One write where the disk takes it; it is not durable yet."""
        self._held += data
        try:
            handle = self._open()
            while self._held:
                self._wrote(os.write(handle, self._held))
            self.fault = ""
        except OSError as error:
            self._gave_up(error)

    def fileno(self) -> int:
        """The file's, -1 if it could not be opened yet."""
        return -1 if self._handle is None else self._handle

    def close(self) -> None:
        self.write(b"")
        self._drop()

    def _open(self) -> int:
        if self._handle is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._handle = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o666)
        return self._handle

    def _wrote(self, count: int) -> None:
        self._held = self._held[count:]

    def _gave_up(self, error: OSError) -> None:
        self.fault = f"{self.path.name}: {error.strerror or error}"

    def _drop(self) -> None:
        try:
            if self._handle is not None:
                os.close(self._handle)
        except OSError as error:  # a network's disk may say only now that it was full
            self.fault = f"{self.path.name}: {error.strerror or error}"
        self._handle = None


class DurableJournal(Journal):
    """A file to which this process alone appends, and of which `sync` says whether all of it would survive a crash.

    A disk may take a write and say only in `sync` that it had no room, and then nobody knows what of it is there. So
    what is not yet durable is held, and after a failure the file is cut back to what is before it is written again.
    One thread may sync while another writes, which does not wait for the disk."""

    def __init__(self, path: Path) -> None:
        self._lock = threading.RLock()  # never held during a sync
        self._failures = 0
        self._loose = b""  # written, and not yet durable
        self._durable: int | None = None  # length of the file that is; what it begins with counts as durable
        self._torn = False  # behind that length lies nobody knows what
        self._named = False  # the folder has its name durably
        super().__init__(path)

    def sync(self) -> bool:
        """Whether everything written so far is durable now."""
        with self._lock:
            self.write(b"")
            if self.fault or self._handle is None:
                return False
            failures, count = self._failures, len(self._loose)
            handle = os.dup(self._handle)  # the writer may drop its own meanwhile
        try:
            os.fsync(handle)
            if not self._named:
                sync_folder(self.path.parent)
                self._named = True
        except OSError as error:
            self._gave_up(error)
            return False
        finally:
            os.close(handle)
        with self._lock:
            if self._failures > failures:  # a write has failed since: all that is not yet durable is written again
                return False
            self._durable = (self._durable or 0) + count
            self._loose = self._loose[count:]
        return True

    def write(self, data: bytes) -> None:
        with self._lock:
            super().write(data)

    def _open(self) -> int:
        handle = super()._open()
        if self._durable is None:
            self._durable = os.fstat(handle).st_size
        if self._torn:
            os.ftruncate(handle, self._durable)
            self._torn = False
        return handle

    def _wrote(self, count: int) -> None:
        self._loose += self._held[:count]
        super()._wrote(count)

    def _gave_up(self, error: OSError) -> None:
        with self._lock:
            super()._gave_up(error)
            self._failures += 1
            self._held, self._loose = self._loose + self._held, b""
            self._torn = True
            self._drop()  # a handle that has gone stale is opened anew
