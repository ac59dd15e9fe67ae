"""What a disk may hold after the power is cut: a model of one, fed with the calls of a run.

It promises as little as POSIX does: the bytes of a file are there once it was fsynced, a name (created, renamed,
removed) once its folder was. Of what was not, anything may be there, in any order. The model tries, of names, each
alone, all but each, and all up to each; of bytes, all, none, zeros, and all but those of each file."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from tests.engine.tracer import Call

Names = dict[str, int]  # path -> file


class Disk:
    def __init__(self, folder: Path) -> None:
        """All that is there already is durable."""
        self.now: Names = {}
        self.durable: Names = {}
        self.bytes: list[bytearray] = []  # a file's, as processes see them
        self.safe: list[bytes] = []  # as they were when it was last fsynced
        self.pending: list[dict[str, int | None]] = []  # changes of names not yet durable: path -> file, None: removed
        self.folders = {str(folder)} | {str(path) for path in folder.rglob("*") if path.is_dir()}
        for path in folder.rglob("*"):
            if path.is_file():
                self.now[str(path)] = self._new(path.read_bytes())
        self.durable = dict(self.now)

    def apply(self, call: Call) -> None:
        if call.result < 0:
            return
        path = call.paths[0]
        if call.name in ("open", "openat"):
            if path not in self.now:
                self._change({path: self._new(b"")})
            elif call.arguments[1 if call.name == "open" else 2] & os.O_TRUNC:
                self.bytes[self.now[path]].clear()
        elif call.name == "write":
            self.bytes[self.now[path]] += call.data[: call.result]  # all of ours append
        elif call.name == "ftruncate":
            del self.bytes[self.now[path]][call.arguments[1] :]
        elif call.name in ("fsync", "fdatasync"):
            self._sync(path)
        elif call.name.startswith("rename"):
            self._change({call.paths[-1]: self.now[path], path: None})
        elif call.name in ("unlink", "unlinkat"):
            self._change({path: None})
        elif call.name in ("mkdir", "mkdirat"):
            self.folders.add(path)  # a folder that is there without its files is as good as none
        else:
            raise NotImplementedError(f"the model of a disk does not have {call}")

    def after_a_cut(self) -> Iterator[dict[str, bytes]]:
        """What may be there: path -> bytes."""
        count = len(self.pending)
        chosen = {tuple(range(n)) for n in range(count + 1)}
        chosen |= {(n,) for n in range(count)}
        chosen |= {(*range(n), *range(n + 1, count)) for n in range(count)}
        for choice in sorted(chosen):
            names = dict(self.durable)
            for n in choice:
                _rename(names, self.pending[n])
            loose = {file for file in names.values() if self.safe[file] != self.bytes[file]}
            for lost in (set[int](), loose, *({file} for file in loose)):
                yield {path: self._after(file, file in lost, b"") for path, file in names.items()}
            yield {path: self._after(file, file in loose, b"\0") for path, file in names.items()}

    def _after(self, file: int, lost: bool, fill: bytes) -> bytes:
        safe, now = self.safe[file], bytes(self.bytes[file])
        return safe + fill * (len(now) - len(safe)) if lost else now

    def _new(self, data: bytes) -> int:
        self.bytes.append(bytearray(data))
        self.safe.append(data)
        return len(self.bytes) - 1

    def _change(self, change: dict[str, int | None]) -> None:
        _rename(self.now, change)
        self.pending.append(change)

    def _sync(self, path: str) -> None:
        if path not in self.folders:
            self.safe[self.now[path]] = bytes(self.bytes[self.now[path]])
            return
        still = []
        for change in self.pending:
            if {os.path.dirname(name) for name in change} == {path}:
                _rename(self.durable, change)
            else:
                still.append(change)
        self.pending = still


def _rename(names: Names, change: dict[str, int | None]) -> None:
    for name, file in change.items():
        if file is None:
            names.pop(name, None)
        else:
            names[name] = file
