"""What makes an interrupted writing of shards go on: the settings it was begun with, and the shards that are whole."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from barlow.data.shards import INDEX, INDEX_VERSION, PROGRESS, sha256
from barlow.data.sources import Source
from barlow.errors import UserError

Settings = dict[str, Any]
"""What was asked for and decides the bytes, as JSON values."""


@dataclass
class Record:
    """Kept in progress.json, then in index.json; `files` are the whole shards by name, as index.json describes them."""

    settings: Settings
    digest: str = ""
    """Of the source: it must still be the same when the writing goes on."""
    files: dict[str, dict[str, Any]] = field(default_factory=dict)

    def save(self, out: Path) -> None:
        content = {"version": INDEX_VERSION, "settings": self.settings, "digest": self.digest}
        content["files"] = list(self.files.values())
        replace_text(out / PROGRESS, json.dumps(content, indent=1))

    def go_on(self, out: Path, digest: str) -> None:
        """Keep those of the files that are on disk as they were written, down to the last bit."""
        if self.digest not in ("", digest):
            raise UserError(f"{self.settings['source']} has changed since {out} was begun: take another folder")
        self.digest = digest
        self.files = {name: entry for name, entry in self.files.items() if _is(out / name, entry)}


def _is(path: Path, entry: dict[str, Any]) -> bool:
    return path.is_file() and path.stat().st_size == entry["bytes"] and sha256(path) == entry["sha256"]


def load(out: Path, settings: Settings) -> Record:
    """The record in `out`, or a new one. Other settings than those it was begun with are refused."""
    for name in (INDEX, PROGRESS):
        path = out / name
        if not path.is_file():
            continue
        try:
            content = json.loads(path.read_text())
            record = Record(content["settings"], content["digest"], {f["file"]: f for f in _files(content)})
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path} is damaged ({type(error).__name__}): take another folder") from None
        for key, value in settings.items():
            if record.settings.get(key) != value:
                was, now = _show(record.settings.get(key)), _show(value)
                raise UserError(f"{out} was written with {key} {was}, now asked for {now}: take another folder")
        return record
    if any(out.glob("*.beton")):
        raise UserError(f"{out} holds .beton files but no {INDEX}: take another folder")
    return Record(settings)


def _files(content: dict[str, Any]) -> list[dict[str, Any]]:
    if "files" in content:
        return list(content["files"])
    return [entry for split in content["splits"].values() for entry in split["files"]]


def _show(value: Any) -> str:
    if value is None:
        return "unset"
    return ",".join(value) or "all" if isinstance(value, list) else str(value)


def digest(source: Source, samples: Sequence[np.ndarray]) -> str:
    """Names, labels and classes of the source, and a few of its images."""
    total = hashlib.sha256("\n".join(source.classes).encode())
    for split in source.splits:
        total.update(f"\n{split.name} {split.count}\n".encode())
        total.update("\n".join(split.names).encode(errors="surrogateescape"))
        total.update(split.labels.tobytes())
    for image in samples:
        total.update(image.tobytes())
    return total.hexdigest()


def replace_text(path: Path, text: str) -> None:
    """The file has the old content or the new, never a part."""
    temporary = path.with_name(f".{path.name}.tmp")
    with open(temporary, "w", errors="surrogateescape") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    rename(temporary, path)


def rename(temporary: Path, path: Path) -> None:
    """Durable: after a power cut the new name stands too."""
    temporary.replace(path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
