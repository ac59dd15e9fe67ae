"""From shards to batches: positions go in, decoded images come out, a few batches ahead of whoever consumes them."""

from __future__ import annotations

import copy
import functools
import os
import sys
import threading
import weakref
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from queue import SimpleQueue
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from barlow.data.decode import Samples, compile_decode, map_file, read_samples
from barlow.data.layout import RAW
from barlow.data.shards import Index
from barlow.errors import UserError

AHEAD = 3
"""Batches in the making while the consumer works on another."""
FAR_AHEAD = 64
"""Batches whose positions are known before: the first of an epoch waits for the order of the whole epoch, which takes
30 ms of a core for 512,000 images."""
T = TypeVar("T")


class DecodeError(RuntimeError):
    """An image that cannot be decoded; names its shard and its sample."""


class Batch(NamedTuple):
    images: Tensor  # uint8 [n, size, size, 3]
    labels: Tensor  # int64 [n], -1 where missing
    ids: Tensor  # int64 [n]


class Started(NamedTuple):
    """A batch that the decoding threads are filling, each its part."""

    batch: Batch
    parts: list[Future[int]]


class Loader:
    """The samples of some splits in a row, split after split and shard after shard; a position is a place in that row.

    All but the pixels is read and checked here: a shard that is cut short or is not the one the index speaks of is a
    UserError before anything expensive starts.
    """

    def __init__(self, index: Index, splits: Sequence[str], *, workers: int = 0, pin: bool = False) -> None:
        self.size = index.size
        self.workers = workers or share_of_cores()
        self.pin = pin
        self.shards = [shard for split in splits for shard in index.split(split).files]
        if not self.shards:
            raise UserError(f"no split to read from {index.folder}: choose of {', '.join(index.splits)}")
        self.ends = np.cumsum([shard.count for shard in self.shards])  # the position after each shard's last
        self.files = [map_file(shard.path) for shard in self.shards]
        read = [
            read_samples(file, shard.path, shard.count, shard.first_id, index.size)
            for shard, file in zip(self.shards, self.files, strict=True)
        ]
        self.samples = Samples(*(np.concatenate(columns) for columns in zip(*read, strict=True)))
        self.decode = compile_decode()

    def __len__(self) -> int:
        return len(self.samples.ids)

    def batches(self, positions: Iterable[np.ndarray]) -> Generator[Batch, None, None]:
        """A batch for each array of positions, in memory of its own.

        What goes wrong in the background (an image, the positions) is raised here, after the batches before it. Closing
        this iterator, early or not, ends what works for it.
        """
        spare: deque[np.ndarray] = deque(maxlen=AHEAD + 2)
        working: deque[Started] = deque()

        def start(positions: Iterable[np.ndarray]) -> Iterator[Started]:
            for wanted in positions:
                started = self._start(wanted, spare)
                working.append(started)
                yield started

        try:
            with closing(ahead(positions, FAR_AHEAD)) as orders, closing(ahead(start(orders), AHEAD)) as queue:
                for started in queue:
                    working.popleft()
                    self._finish(started)
                    yield started.batch
        finally:
            for unwanted in working:
                for part in unwanted.parts:
                    part.cancel()

    def positions_of(self, ids: np.ndarray) -> np.ndarray:
        """Where the samples `ids` [n] stand, int64 [n]; they must be of these splits."""
        order = np.argsort(self.samples.ids, kind="stable")
        found = order[np.searchsorted(self.samples.ids, ids, sorter=order).clip(max=len(order) - 1)]
        if not np.array_equal(self.samples.ids[found], ids):
            raise ValueError("samples of other splits are asked for")
        return found

    def relabelled(self, ids: np.ndarray, labels: np.ndarray) -> Loader:
        """The same samples, but those of `ids` [n] have these labels [n]; the others keep what the shards say."""
        other = copy.copy(self)
        told = self.samples.labels.astype(np.int64)
        told[self.positions_of(ids)] = labels
        other.samples = self.samples._replace(labels=told)
        return other

    def over(self, images: np.ndarray) -> Loader:
        """The same samples, but their pixels are those of `images` [len, size, size, 3], in memory."""
        other = copy.copy(self)
        n, each = len(self), images[:1].nbytes
        addresses = images.ctypes.data + each * np.arange(n, dtype=np.int64)
        pixels = {"addresses": addresses, "sizes": np.full(n, each), "modes": np.full(n, RAW, np.uint8)}
        other.samples = self.samples._replace(**pixels)
        other.files = [images]  # the addresses hold for as long as it is alive
        return other

    def _start(self, positions: np.ndarray, spare: deque[np.ndarray]) -> Started:
        images = self._memory(len(positions), spare)
        labels, ids = (torch.from_numpy(column[positions]) for column in (self.samples.labels, self.samples.ids))
        if self.pin:
            labels, ids = labels.pin_memory(), ids.pin_memory()
        parts = zip(
            np.array_split(positions, self.workers),
            np.array_split(images.numpy(), self.workers),
            strict=True,
        )
        threads = decoding_threads(self.workers)
        return Started(Batch(images, labels, ids), [threads.submit(self._decode, *part) for part in parts])

    def _memory(self, n: int, spare: deque[np.ndarray]) -> Tensor:
        """Room for n images. Memory of an earlier batch serves again once no tensor or view of it is left: new memory
        would cost a tenth of what decoding does. (Pinned memory torch itself keeps for later use.)
        """
        shape = (n, self.size, self.size, 3)
        if self.pin:
            return torch.empty(shape, dtype=torch.uint8, pin_memory=True)
        memory = spare.pop() if spare else None
        if memory is None or memory.shape != shape:
            memory = np.empty(shape, np.uint8)
        images = memory[:]  # the tensor holds this very object for as long as its storage lives
        weakref.finalize(images, spare.append, memory)
        return torch.from_numpy(images)

    def _decode(self, positions: np.ndarray, images: np.ndarray) -> int:
        """Fills `images`; the first position whose image fails, or -1."""
        samples = self.samples
        failed = self.decode(samples.addresses[positions], samples.sizes[positions], samples.modes[positions], images)
        return -1 if failed < 0 else int(positions[failed])

    def _finish(self, started: Started) -> None:
        for part in started.parts:
            position = part.result()
            if position >= 0:
                shard = self.shards[np.searchsorted(self.ends, position, side="right")]
                what = f"{shard.path}: the image of sample {self.samples.ids[position]} cannot be decoded"
                raise DecodeError(f"{what}: launchers/shards.py --verify says whether the file is what was written")


def ahead(items: Iterable[T], depth: int) -> Generator[T, None, None]:
    """The items, taken on a thread of their own, up to `depth` of them before they are asked for.

    What is raised there is raised here, after the items before it. Closing this, early or not, ends the thread.
    """
    taken: SimpleQueue[tuple[T] | BaseException | None] = SimpleQueue()
    room = threading.Semaphore(depth)
    closed = threading.Event()

    def take() -> None:
        try:
            source = iter(items)
            while room.acquire() and not closed.is_set():
                taken.put((next(source),))
        except StopIteration:
            taken.put(None)
        except BaseException as error:  # of any kind, or the consumer would wait for ever
            taken.put(error)

    at_exit = sys.is_finalizing  # kept here: a module's names are gone when Python ends
    thread = threading.Thread(target=take, name="ahead", daemon=True)
    thread.start()
    try:
        while (item := taken.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            room.release()
            yield item[0]
    finally:
        closed.set()
        room.release()
        if not at_exit():  # Python has stopped the thread for good then; to wait for it would be for ever
            thread.join()


def share_of_cores() -> int:
    """The cores of this rank: as many as its launcher says are its own, else an equal share of what the process may
    use. Never more than that, for a rank that is bound to some cores sees these alone.

    OMP_NUM_THREADS is not asked: many clusters set it to 1 for everybody, and mean libraries, not images.
    """
    usable = len(os.sched_getaffinity(0))
    told = os.environ.get("BARLOW_CORES", "")
    if told.isdigit() and int(told) > 0:
        return min(int(told), usable)
    return max(1, usable // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


@functools.cache
def decoding_threads(workers: int) -> ThreadPoolExecutor:
    """One pool for the whole process: each thread that ends would leave 10 KB of FFCV's decoder behind."""
    return ThreadPoolExecutor(workers, thread_name_prefix="decode")
