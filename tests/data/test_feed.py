"""Fed views against views made in line; the order of streams against a GPU that runs them as unluckily as it may."""

from __future__ import annotations

import random
import weakref
from collections import deque
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from barlow.config import Views
from barlow.data import order
from barlow.data.feed import feed
from barlow.data.loader import Batch, DecodeError, Loader
from barlow.data.shards import read_index
from barlow.data.views import pair

CPU = torch.device("cpu")
VIEWS = Views(size=24)
STEPS = 12  # an epoch of `tiny_data`, in batches of 8


def loader_of(folder: Path, pin: bool = False) -> Loader:
    return Loader(read_index(folder), ["unlabeled"], workers=2, pin=pin)


def make(batch: Batch, at: int) -> list[Tensor]:
    return pair(batch.images, batch.ids, VIEWS, 7, at // STEPS, (0.5,) * 3, (0.2,) * 3)


def in_line(loader: Loader, start: int, stop: int, device: torch.device) -> Iterator[list[Tensor]]:
    """As a step would make them itself, on its own stream and when it needs them."""
    positions = order.positions(7, len(loader), 8, 0, 1, start, stop)
    for at, batch in enumerate(loader.batches(positions), start):
        yield make(Batch(*(each.to(device) for each in batch)), at)


def fed(loader: Loader, start: int, stop: int, device: torch.device) -> Generator[list[Tensor], None, None]:
    positions = order.positions(7, len(loader), 8, 0, 1, start, stop)
    return feed(loader.batches(positions), make, device, start)


@pytest.mark.parametrize("start", [0, 7])
def test_fed_views_are_those_made_in_line(tiny_data: Path, start: int) -> None:
    """Over the end of an epoch, and from the middle of one."""
    loader = loader_of(tiny_data)
    given = list(fed(loader, start, STEPS + 3, CPU))
    expected = list(in_line(loader, 0, STEPS + 3, CPU))[start:]
    assert len(given) == STEPS + 3 - start
    for ours, theirs in zip(given, expected, strict=True):
        assert [torch.equal(a, b) for a, b in zip(ours, theirs, strict=True)] == [True, True]
    assert not torch.equal(given[0][0], given[0][1])


def counted(n: int, error: Exception | None = None, ends: list[str] | None = None) -> Generator[Batch, None, None]:
    try:
        for k in range(n):
            yield Batch(torch.full((2, 4, 4, 3), k, dtype=torch.uint8), torch.zeros(2), torch.full((2,), k))
        if error:
            raise error
    finally:
        if ends is not None:
            ends.append("closed")


def numbers(batch: Batch, at: int) -> list[Tensor]:
    return [torch.tensor([int(batch.images.max()), int(batch.ids.max()), at])]


# ---------------------------------------------------------------------------------------------------- a GPU that is not


class Gpu:
    """What feed relies on: streams that run in order each and otherwise as they like, memory that goes to the next who
    asks once its owner is gone and the streams noted for it have come that far, and nothing else.

    Work is a function that is called when its turn comes. `broken` names a promise of torch that this one breaks."""

    def __init__(self, seed: int, broken: str = "") -> None:
        self.random, self.broken = random.Random(seed), broken
        self.main = Stream(self)
        self.current = self.main
        self.streams = [self.main]
        self.free: dict[Stream | None, list[tuple[list[Any], list[Event]]]] = {}
        self.blocks = 0

    def allocate(self, pool: Stream | None) -> list[Any]:
        """Memory of a stream, or with None of the host, as soon as it may serve again."""
        for entry in self.free.setdefault(pool, []):
            if all(event.done for event in entry[1]):
                self.free[pool].remove(entry)
                return entry[0]
        self.blocks += 1
        return [None]

    def run(self, tries: int) -> None:
        chosen = self.random.choice([[stream] for stream in self.streams] + [self.streams])  # the others stand still
        for _ in range(tries):
            stream = self.random.choice(chosen)
            if stream.work and stream.work[0]() is not False:
                stream.work.popleft()

    @contextmanager
    def stream(self, stream: Stream) -> Iterator[None]:
        before, self.current = self.current, stream
        try:
            yield
        finally:
            self.current = before


class Event:
    done = False


class Stream:
    def __init__(self, gpu: Gpu) -> None:
        self.gpu, self.work = gpu, deque[Callable[[], Any]]()

    def record_event(self) -> Event:
        event = Event()
        self.work.append(lambda: setattr(event, "done", True))
        return event

    def wait_event(self, event: Event) -> None:
        if self.gpu.broken != "wait_event":
            self.work.append(lambda: event.done)

    def wait_stream(self, stream: Stream) -> None:
        if self.gpu.broken != "wait_stream":
            self.wait_event(stream.record_event())


class Memory:
    """A tensor of one number, on the host (with stream None) or the GPU."""

    def __init__(self, gpu: Gpu, stream: Stream | None) -> None:
        self.gpu, self.stream, self.block = gpu, stream, gpu.allocate(stream)
        notes: list[Stream | Event] = []
        self.notes = notes
        weakref.finalize(self, release, gpu, stream, self.block, notes)

    def record_stream(self, stream: Stream) -> None:
        if self.gpu.broken != "record_stream":
            self.notes.append(stream)

    def to(self, device: torch.device, non_blocking: bool) -> Memory:
        if self.stream is not None:
            return self
        copy = Memory(self.gpu, self.gpu.current)
        computed(copy, lambda value: value, self)
        if self.gpu.broken != "pinned":
            self.notes.append(self.gpu.current.record_event())
        return copy


def release(gpu: Gpu, stream: Stream | None, block: list[Any], notes: list[Any]) -> None:
    events = [note if isinstance(note, Event) else note.record_event() for note in notes]
    gpu.free[stream].append((block, events))


def computed(out: Memory, function: Callable[..., Any], *inputs: Memory) -> Memory:
    """`out` is computed from the inputs on the current stream, when that comes to it."""
    place, places = out.block, [each.block for each in inputs]

    def work() -> None:
        place[0] = function(*(each[0] for each in places))

    out.gpu.current.work.append(work)
    return out


def batches_of(gpu: Gpu, n: int, cached: bool) -> Generator[Any, None, None]:
    """Batch k holds the number k: from pinned memory, or picked out of a cache that the main stream has filled."""
    cache = computed(Memory(gpu, gpu.main), lambda: list(range(n))) if cached else None
    yield None  # made here, before the feed begins

    def column(k: int) -> Memory:
        if cache:
            return computed(Memory(gpu, gpu.current), lambda numbers: numbers[k], cache)
        memory = Memory(gpu, None)
        memory.block[0] = k  # by the threads of the loader, before this returns
        return memory

    for k in range(n):
        yield Batch(column(k), column(k), column(k))  # type: ignore[arg-type]


def train(monkeypatch: pytest.MonkeyPatch, seed: int, cached: bool = False, broken: str = "", n: int = 12) -> Gpu:
    """Feed n batches to a consumer that reads the views twice, late; raises where it read what it should not."""
    gpu = Gpu(seed, broken)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: gpu.streams.append(Stream(gpu)) or gpu.streams[-1])  # type: ignore[func-returns-value]
    monkeypatch.setattr(torch.cuda, "stream", gpu.stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: gpu.current)

    def views(batch: Any, at: int) -> list[Any]:
        between = computed(Memory(gpu, gpu.current), lambda image, i: (image, i), batch.images, batch.ids)
        return [
            computed(Memory(gpu, gpu.current), lambda both, view=view: (*both, at, view), between) for view in (0, 1)
        ]

    batches = batches_of(gpu, n, cached)
    next(batches)
    read: list[Any] = []
    for given in feed(batches, views, torch.device("cuda"), 100):
        places = [view.block for view in given]  # type: ignore[attr-defined]
        for _ in ("forward", "backward"):
            gpu.main.work.append(lambda places=places: read.append([place[0] for place in places]))  # type: ignore[misc]
        gpu.run(gpu.random.choice([0, 3, 20]))
        del given, places
        gpu.run(gpu.random.choice([0, 3, 20]))
    while any(stream.work for stream in gpu.streams):
        gpu.run(1)
    assert read == [[(k, k, 100 + k, 0), (k, k, 100 + k, 1)] for k in range(n) for _ in range(2)]
    return gpu


@pytest.mark.parametrize("cached", [False, True], ids=["pinned", "cached"])
def test_no_stream_reads_what_is_not_yet_or_no_longer_there(monkeypatch: pytest.MonkeyPatch, cached: bool) -> None:
    for seed in range(60):
        train(monkeypatch, seed, cached)


@pytest.mark.parametrize("broken", ["wait_event", "record_stream", "pinned", "wait_stream"])
def test_each_promise_of_torch_that_feed_asks_for_is_needed(monkeypatch: pytest.MonkeyPatch, broken: str) -> None:
    """Or the test above would show nothing: without one of them, most orders of the work end in wrong views."""
    wrong = 0
    for seed in range(20):
        try:
            train(monkeypatch, seed, cached=broken == "wait_stream", broken=broken)
        except (AssertionError, TypeError):
            wrong += 1
    assert wrong > 5


def test_memory_serves_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU that keeps pace needs the memory of some two batches and their views, however many there are."""
    run = Gpu.run
    monkeypatch.setattr(Gpu, "run", lambda self, tries: run(self, 500))
    assert train(monkeypatch, 0, n=30).blocks == train(monkeypatch, 0, n=10).blocks <= 16


# ------------------------------------------------------------------------------------------------ ends, on both devices


@pytest.fixture(params=["cpu", "cuda"])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """The second stands for a GPU where there is none: the same code, its streams without meaning, its tensors here."""
    if request.param == "cuda":

        class Nothing:
            def __getattr__(self, name: str) -> Callable[..., Nothing]:
                return lambda *_: self

        monkeypatch.setattr(torch.cuda, "Stream", lambda device: Nothing())
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Nothing())
        monkeypatch.setattr(Tensor, "to", lambda self, *_, **__: self)
        monkeypatch.setattr(Tensor, "record_stream", lambda self, stream: None)
        monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    return torch.device(request.param)


@pytest.mark.parametrize("n", [0, 1, 2, 5])
def test_every_batch_once_and_in_order(device: torch.device, n: int) -> None:
    ends: list[str] = []
    given = [views[0].tolist() for views in feed(counted(n, ends=ends), numbers, device, 30)]
    assert given == [[k, k, 30 + k] for k in range(n)]
    assert ends == ["closed"]


def test_a_gpu_has_the_next_batch_before_the_step_has_its_own(device: torch.device) -> None:
    taken: list[int] = []

    def watched() -> Generator[Batch, None, None]:
        for k, batch in enumerate(counted(4)):
            taken.append(k)
            yield batch

    seen = [len(taken) for _ in feed(watched(), numbers, device, 0)]
    assert seen == ([2, 3, 4, 4] if device.type == "cuda" else [1, 2, 3, 4])


def test_what_goes_wrong_with_a_batch_comes_after_those_before_it(device: torch.device) -> None:
    stream = feed(counted(3, DecodeError("the fourth")), numbers, device, 0)
    assert [next(stream)[0][0].item() for _ in range(3)] == [0, 1, 2]
    with pytest.raises(DecodeError, match="the fourth"):
        next(stream)
    assert list(stream) == []


def test_what_goes_wrong_with_views_comes_in_its_turn(device: torch.device) -> None:
    def picky(batch: Batch, at: int) -> list[Tensor]:
        if at == 2:
            raise ArithmeticError("of step 2")
        return numbers(batch, at)

    ends: list[str] = []
    stream = feed(counted(9, ends=ends), picky, device, 0)
    assert [next(stream)[0][2].item() for _ in range(2)] == [0, 1]
    with pytest.raises(ArithmeticError, match="of step 2"):
        next(stream)
    assert ends == ["closed"]


@pytest.mark.parametrize("taken", [0, 1, 3])
def test_closed_early_it_closes_its_loader(device: torch.device, taken: int) -> None:
    ends: list[str] = []
    batches = counted(9, ends=ends)
    stream = feed(batches, numbers, device, 0)
    for _ in range(taken):
        next(stream)
    stream.close()
    assert ends == (["closed"] if taken else [])  # what has not begun has nothing to end
    assert list(batches) == [] or not taken


# -------------------------------------------------------------------------------------------------------- a GPU that is


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("cached", [False, True], ids=["pinned", "cached"])
def test_fed_views_on_a_gpu_that_is_kept_busy(tiny_data: Path, cached: bool) -> None:
    """The main stream is behind by some milliseconds all the time, reads the views late, and takes memory itself."""
    from barlow.data.cache import cached as cache

    device, rng = torch.device("cuda", torch.cuda.current_device()), np.random.default_rng(0)
    loader = loader_of(tiny_data, pin=True)
    source = cache(loader, "gpu" if cached else "none", device, 0, lambda done, count: None)
    stop = 10 * STEPS + 5
    positions = order.positions(7, len(loader), 8, 0, 1, 5, stop)
    read: list[list[Tensor]] = []
    for views in feed(source.batches(positions), make, device, 5):
        torch.cuda._sleep(int(rng.integers(0, 5_000_000)))
        read.append([view.clone() for view in views])
        scratch = torch.full((int(rng.integers(1, 64)), 8, 3, 24, 24), -1.0, device=device)
        del views, scratch
    expected = list(in_line(loader, 5, stop, device))
    assert len(read) == len(expected) == stop - 5
    for at, (ours, theirs) in enumerate(zip(read, expected, strict=True), 5):
        for a, b in zip(ours, theirs, strict=True):
            assert torch.equal(a, b), f"step {at}"
