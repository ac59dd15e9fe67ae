"""Small JSON files that several processes write and read: whole or not at all, and no change lost. Torch-free."""

from __future__ import annotations

import fcntl
import json
import os
import socket
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any


def read_json(path: Path) -> dict[str, Any]:
    """What the file holds; nothing where there is none."""
    try:
        return json.loads(path.read_text())
    except (FileNotFoundError, NotADirectoryError):
        return {}


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """A reader never sees half a file, a crash leaves the old one."""
    write_whole(path, (json.dumps(value, indent=1) + "\n").encode())


def write_whole(path: Path, data: bytes) -> None:
    """A reader never sees half a file, a crash leaves the old one."""
    fresh = path.with_name(f".{path.name}.{socket.gethostname()}.{os.getpid()}")
    try:
        with open(fresh, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        fresh.replace(path)
    except BaseException:
        fresh.unlink(missing_ok=True)
        raise


def sync_folder(folder: Path) -> None:
    """Make the names in a folder durable: what was created, renamed or removed."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """What a nested dict holds, by dotted names: optim.lr and so on."""
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def read_status(folder: Path) -> dict[str, Any]:
    """A run's status.json; a damaged one is as good as none."""
    try:
        return read_json(folder / "status.json")
    except ValueError:
        return {}


def write_status(folder: Path, unless: Sequence[str] = (), **changes: Any) -> bool:
    """Lay `changes` over a run's status.json; launcher and ranks take turns, so that none undoes another's.

    Not while its state is one of `unless`; returns whether it was done."""
    with open(folder / ".status.lock", "w") as turn:
        fcntl.flock(turn, fcntl.LOCK_EX)
        before = read_status(folder)
        if before.get("state") in unless:
            return False
        write_json(folder / "status.json", {**before, **changes, "updated": round(time.time(), 1)})
    return True
