"""Cached batches against the Loader's own, to the bit; what does not fit; that nothing is held twice."""

from __future__ import annotations

import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from barlow.data import cache, order
from barlow.data.cache import Cache, cached, decoded
from barlow.data.loader import Loader
from barlow.data.shards import read_index
from barlow.errors import UserError

CPU = torch.device("cpu")
ROOM = 1 << 40
CUDA = pytest.param("gpu", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")])


def quiet(done: int, count: int) -> None:
    pass


def loader_of(folder: Path, *splits: str) -> Loader:
    pin = torch.cuda.is_available()
    return Loader(read_index(folder), splits or ["val", "unlabeled"], workers=2, pin=pin)


def source_of(loader: Loader, where: str) -> Loader | Cache:
    """`device` is the GPU's cache, on the CPU."""
    if where == "device":
        return Cache(loader, decoded(loader, CPU, quiet))
    return cached(loader, where, torch.device("cuda") if where == "gpu" else CPU, ROOM, quiet)


@pytest.mark.parametrize("where", ["none", "ram", "device", CUDA])
def test_batches_are_the_loaders_to_the_bit(tiny_data: Path, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    """Over several splits and epochs, repeated positions and a batch of one; decoded in chunks that do not come out."""
    monkeypatch.setattr(cache, "CHUNK", 7 * 32 * 32 * 3)
    loader = loader_of(tiny_data)
    source = source_of(loader, where)
    assert len(source) == len(loader) == 144
    rng = np.random.default_rng(0)
    wanted = [
        *order.positions(3, 144, 20, 0, 1, 4, 18),
        np.array([143]),
        np.zeros(9, np.int64),
        rng.integers(0, 144, 50),
    ]
    pairs = list(zip(loader.batches(wanted), source.batches(wanted), strict=True))
    assert len(pairs) == len(wanted)
    for expected, batch in pairs:
        for a, b in zip(expected, batch, strict=True):
            assert a.dtype == b.dtype
            assert torch.equal(a, b.cpu())
    assert len({bytes(batch.images.cpu().numpy()) for _, batch in pairs}) > 10


@pytest.mark.parametrize("where", ["ram", "device"])
def test_a_batch_is_the_consumers_own(tiny_data: Path, where: str) -> None:
    source = source_of(loader_of(tiny_data), where)
    first = next(source.batches([np.arange(144)])).images.clone()
    for batch in source.batches([np.arange(144)] * 5):
        assert torch.equal(batch.images, first)
        for column in batch:
            column.zero_()


@pytest.mark.parametrize("where", ["none", "ram", "device", CUDA])
def test_what_is_wrong_with_positions_comes_after_the_good_batches(tiny_data: Path, where: str) -> None:
    def positions() -> Iterator[np.ndarray]:
        yield np.arange(4)
        yield np.array([3, 144])

    stream = source_of(loader_of(tiny_data), where).batches(positions())
    assert len(next(stream).ids) == 4
    with pytest.raises(IndexError, match="144"):
        next(stream)


def test_what_does_not_fit_is_said_before_anything_is_decoded(tiny_data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loader = loader_of(tiny_data)
    monkeypatch.setattr(Loader, "batches", None)
    need = 144 * 32 * 32 * 3
    with pytest.raises(UserError, match=r"^--data.cache gpu: this run is on a CPU: .*ram") as told:
        cached(loader, "gpu", CPU, ROOM, quiet)
    assert "\n" not in str(told.value)
    line = r"^--data.cache ram: 144 images of 32 px take 0.00 GB decoded, this rank may take 0.00 GB: .* none$"
    with pytest.raises(UserError, match=line):
        cached(loader, "ram", CPU, need - 1, quiet)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (12_800_000_000, 0))
    monkeypatch.setattr(Loader, "__len__", lambda self: 512_000)
    loader.size = 96
    line = (
        r"512,000 images of 96 px take 14.16 GB decoded, its GPU has left beside gradients and momenta 9.80 GB: "
        r"give --data.cache ram, or none$"
    )
    with pytest.raises(UserError, match=line):
        cached(loader, "gpu", torch.device("cuda"), ROOM, quiet, training=3_000_000_000)


def test_what_just_fits_is_taken(tiny_data: Path) -> None:
    assert len(cached(loader_of(tiny_data), "ram", CPU, 144 * 32 * 32 * 3, quiet)) == 144


def test_it_tells_how_far_it_is(tiny_data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "CHUNK", 50 * 32 * 32 * 3)
    told: list[tuple[int, int]] = []
    cached(loader_of(tiny_data), "ram", CPU, ROOM, lambda *far: told.append(far))
    assert told == [(50, 144), (100, 144), (144, 144)]


def test_decoding_needs_no_second_copy(tiny_data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside the images themselves, which are torch's, some chunks and nothing that grows with the data."""
    monkeypatch.setattr(cache, "CHUNK", 100_000)
    split = read_index(tiny_data).split("unlabeled")
    loader = Loader(read_index(tiny_data), ["unlabeled"] * 60, workers=2)
    assert split.count * 60 == len(loader)
    tracemalloc.start()
    try:
        images = decoded(loader, CPU, quiet)
        kept, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert images.nbytes > 17e6
    assert peak < 2e6, (kept, peak)


def test_a_loader_over_other_pixels_keeps_them_alive_and_its_own_as_they_are(tiny_data: Path) -> None:
    loader = loader_of(tiny_data)
    before = next(loader.batches([np.arange(144)])).images.clone()
    other = loader.over(np.full((144, 32, 32, 3), 9, np.uint8))  # no other name for the array
    batch = next(other.batches([np.arange(0, 144, 5)]))
    assert batch.images.unique().tolist() == [9]
    assert torch.equal(batch.ids, next(loader.batches([np.arange(0, 144, 5)])).ids)
    assert torch.equal(next(loader.batches([np.arange(144)])).images, before)
