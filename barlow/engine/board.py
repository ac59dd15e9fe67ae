"""TensorBoard's event file, written by hand around its own messages.

Its writer has a thread that dies when the disk is full, and the run with it at the next scalar; here an event goes
into a journal. Only scalars: pictures belong to the report."""

from __future__ import annotations

import io
import os
import socket
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tensorboard.compat.proto.event_pb2 import Event, SessionLog  # type: ignore[import-untyped]
from tensorboard.compat.proto.summary_pb2 import Summary  # type: ignore[import-untyped]
from tensorboard.summary.writer.record_writer import RecordWriter  # type: ignore[import-untyped]

from barlow.engine.journal import Journal


class Board:
    """A run's curves, from the step after `start`: what an earlier process has shown of later steps is purged."""

    def __init__(self, folder: Path, start: int) -> None:
        name = f"events.out.tfevents.{int(time.time()):010d}.{socket.gethostname()}.{os.getpid()}"
        self._journal = Journal(folder / name)
        opening = Event(file_version="brain.Event:2")
        self._add([opening, Event(step=start + 1, session_log=SessionLog(status=SessionLog.START))])

    def write(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """A point a number of each row, at its step."""
        events = []
        for row in rows:
            numbers = {name: value for name, value in row.items() if name not in ("step", "epoch", "images")}
            values = [Summary.Value(tag=name, simple_value=value) for name, value in numbers.items()]
            events.append(Event(step=row["step"], summary=Summary(value=values)))
        self._add(events)

    def close(self) -> None:
        self._journal.close()

    def _add(self, events: Sequence[Event]) -> None:
        records = io.BytesIO()
        for event in events:
            event.wall_time = time.time()
            RecordWriter(records).write(event.SerializeToString())
        self._journal.write(records.getvalue())
