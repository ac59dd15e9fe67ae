"""The loader against the arrays that were written and against FFCV's own Loader; broken files; early ends."""

from __future__ import annotations

import contextlib
import gc
import os
import subprocess
import sys
import threading
import time
import tracemalloc
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from torch import Tensor

from barlow.data.loader import AHEAD, FAR_AHEAD, DecodeError, Loader, ahead, share_of_cores
from barlow.data.shards import Index, Shard, Split
from barlow.errors import UserError

SIZE = 32


@pytest.fixture(scope="module", autouse=True)
def threads_of_torch() -> Iterator[None]:
    """FFCV's package, which writes the files here, sets torch's thread count on import."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@dataclass(frozen=True)
class Folder:
    index: Index
    images: np.ndarray  # [n, SIZE, SIZE, 3], as given to the writer
    labels: np.ndarray
    ids: np.ndarray


def write(folder: Path, counts: dict[str, Sequence[int]], mode: str) -> Folder:
    """Splits of shards of that many samples each, written by FFCV. `mode` is FFCV's: raw or jpg."""
    from ffcv.fields import IntField, RGBImageField
    from ffcv.writer import DatasetWriter

    total = sum(map(sum, counts.values()))
    rng = np.random.default_rng(0)
    coarse = rng.integers(0, 256, (total, 8, 8, 3), dtype=np.uint8)
    images = np.stack([cv2.resize(image, (SIZE, SIZE), interpolation=cv2.INTER_CUBIC) for image in coarse])
    labels = rng.integers(-1, 10, total)
    first = 0
    splits = {}
    for name, shards in counts.items():
        files = []
        for i, count in enumerate(shards):
            path = folder / f"{name}-{i:04d}-of-{len(shards):04d}.beton"
            fields = {"image": RGBImageField(mode, jpeg_quality=95), "label": IntField(), "id": IntField()}
            samples = [(images[k], labels[k], k) for k in range(first, first + count)]
            DatasetWriter(str(path), fields, num_workers=2).from_indexed_dataset(samples, chunksize=7)
            files.append(Shard(path, count, first, path.stat().st_size, ""))
            first += count
        splits[name] = Split(name, sum(shards), files[0].first_id, 0, tuple(files), folder / f"{name}.names.txt")
    encoding = "raw" if mode == "raw" else "jpeg95"
    index = Index(folder, "test", SIZE, encoding, ("a",), (0.5,) * 3, (0.2,) * 3, splits)
    return Folder(index, images, labels, np.arange(total))


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> Folder:
    return write(tmp_path_factory.mktemp("raw"), {"unlabeled": [40, 23, 1], "train": [30], "val": [9, 10]}, "raw")


@pytest.fixture(scope="module")
def jpeg(tmp_path_factory: pytest.TempPathFactory) -> Folder:
    return write(tmp_path_factory.mktemp("jpeg"), {"train": [90], "val": [30, 30]}, "jpg")


def one_shard(folder: Folder, tmp_path: Path, change: Callable[[bytearray], None]) -> Index:
    """The first train shard alone, its bytes changed."""
    shard = folder.index.split("train").files[0]
    content = bytearray(shard.path.read_bytes())
    change(content)
    path = tmp_path / "broken.beton"
    path.write_bytes(content)
    split = replace(folder.index.split("train"), files=(replace(shard, path=path),))
    return replace(folder.index, splits={"train": split})


def of_ffcv(path: Path) -> np.ndarray:
    from ffcv.fields.decoders import SimpleRGBImageDecoder
    from ffcv.loader import Loader as FfcvLoader

    pipelines = {"image": [SimpleRGBImageDecoder()], "label": None, "id": None}
    loader = FfcvLoader(str(path), batch_size=15, num_workers=1, pipelines=pipelines, drop_last=False)
    return np.concatenate([images.copy() for (images,) in loader])


@pytest.mark.parametrize("workers", [1, 2, 5])
def test_every_pixel_label_and_id_of_any_order_over_shards_and_splits(raw: Folder, workers: int) -> None:
    loader = Loader(raw.index, ["val", "unlabeled"], workers=workers)  # not the order of the folder
    assert len(loader) == 19 + 64
    row = np.concatenate([np.arange(94, 113), np.arange(0, 64)])  # sample id at each position
    rng = np.random.default_rng(1)
    wanted = [rng.permutation(83)[:20], rng.integers(0, 83, 33), np.zeros(4, np.int64), np.array([82])]
    batches = list(loader.batches(wanted))
    assert [len(batch.ids) for batch in batches] == [20, 33, 4, 1]
    for positions, batch in zip(wanted, batches, strict=True):
        np.testing.assert_array_equal(batch.ids, row[positions])
        np.testing.assert_array_equal(batch.images, raw.images[row[positions]])
        np.testing.assert_array_equal(batch.labels, raw.labels[row[positions]])
        assert (batch.images.dtype, batch.labels.dtype, batch.ids.dtype) == (torch.uint8, torch.int64, torch.int64)


def test_jpeg_is_bit_for_bit_what_ffcv_gives(jpeg: Folder) -> None:
    files = [*jpeg.index.split("train").files, *jpeg.index.split("val").files]
    reference = np.concatenate([of_ffcv(shard.path) for shard in files])
    assert 0 < np.abs(reference.astype(int) - jpeg.images).mean() < 10  # really a JPEG of these images
    loader = Loader(jpeg.index, ["train", "val"], workers=2)
    order = np.random.default_rng(2).permutation(150)
    for positions, batch in zip(np.split(order, 5), loader.batches(np.split(order, 5)), strict=True):
        np.testing.assert_array_equal(batch.images, reference[positions])
        np.testing.assert_array_equal(batch.ids, positions)


def test_a_stream_may_start_anywhere(jpeg: Folder) -> None:
    loader = Loader(jpeg.index, ["train"], workers=2)
    steps = np.split(np.random.default_rng(3).permutation(90), 9)
    whole = list(loader.batches(iter(steps)))
    for start in (1, 5, 8):
        for expected, batch in zip(whole[start:], loader.batches(iter(steps[start:])), strict=True):
            assert all(torch.equal(a, b) for a, b in zip(expected, batch, strict=True))


def test_memory_is_written_to_again_only_when_nothing_refers_to_it(raw: Folder) -> None:
    """Batches kept whole, as a slice, as an array, reshaped or inside a graph; most are dropped."""
    loader = Loader(raw.index, ["train"], workers=2)
    keep: list[Callable[[Tensor], Tensor]] = [
        lambda images: images,
        lambda images: images[3:5],
        lambda images: torch.from_numpy(images.numpy()[1:2]),
        lambda images: images.view(-1)[: SIZE * SIZE * 3].view(1, SIZE, SIZE, 3),
        lambda images: images.permute(0, 3, 1, 2).permute(0, 2, 3, 1),
    ]
    kept: dict[int, Tensor] = {}
    places = set()
    for i, batch in enumerate(loader.batches(np.full(16, k % 30) for k in range(100))):
        places.add(batch.images.data_ptr())
        if i % 4 == 0:
            kept[i] = keep[i // 4 % len(keep)](batch.images)
    assert len({tensor.untyped_storage().data_ptr() for tensor in kept.values()}) == len(kept) == 25
    assert len(places) < 25 + 2 * (AHEAD + 2)  # what was dropped served again
    for i, tensor in kept.items():
        assert np.array_equal(tensor, np.broadcast_to(raw.images[64 + i % 30], tensor.shape)), i


def test_a_batch_is_the_consumers_own(raw: Folder) -> None:
    loader = Loader(raw.index, ["train"], workers=2)
    for batch in loader.batches([np.arange(30)] * 10):
        np.testing.assert_array_equal(batch.images, raw.images[64:94])
        np.testing.assert_array_equal(batch.labels, raw.labels[64:94])
        np.testing.assert_array_equal(batch.ids, raw.ids[64:94])
        for column in batch:
            column.zero_()


def test_two_loaders_at_the_same_time(raw: Folder, jpeg: Folder) -> None:
    one, two = Loader(raw.index, ["train"], workers=2), Loader(jpeg.index, ["train"], workers=1)
    alone = [batch.images for batch in two.batches(np.split(np.arange(90), 6))]
    pairs = zip(one.batches(np.split(np.arange(30), 6)), two.batches(np.split(np.arange(90), 6)), strict=True)
    for i, (a, b) in enumerate(pairs):
        np.testing.assert_array_equal(a.images, raw.images[64 + 5 * i : 69 + 5 * i])
        assert torch.equal(b.images, alone[i])


def test_only_a_few_batches_are_made_ahead(raw: Folder) -> None:
    asked: list[int] = []

    def positions() -> Iterator[np.ndarray]:
        for k in range(200):
            asked.append(k)
            yield np.arange(4)

    loader = Loader(raw.index, ["train"], workers=1)
    begun: list[int] = []
    start = loader._start
    loader._start = lambda *given: begun.append(0) or start(*given)  # type: ignore[func-returns-value,method-assign]
    stream = loader.batches(positions())
    for _ in range(5):
        next(stream)
    time.sleep(0.2)
    assert len(begun) == 5 + AHEAD
    assert len(asked) == 5 + AHEAD + FAR_AHEAD
    stream.close()


def test_an_order_that_takes_its_time_holds_up_no_batch(raw: Folder) -> None:
    """As at an epoch's first step, where the order of the epoch is made."""

    def positions() -> Iterator[np.ndarray]:
        for k in range(22):
            if k == 20:
                time.sleep(0.5)
            yield np.arange(4)

    waited = []
    stream = Loader(raw.index, ["train"], workers=1).batches(positions())
    asked = time.perf_counter()
    for _ in stream:
        waited.append(time.perf_counter() - asked)
        time.sleep(0.04)
        asked = time.perf_counter()
    assert len(waited) == 22
    assert max(waited[1:]) < 0.25


def test_what_is_taken_ahead_is_the_same_and_ends_with_its_thread() -> None:
    threads = threading.active_count()
    assert list(ahead(iter(range(50)), 3)) == list(range(50))
    assert list(ahead([None, None], 1)) == [None, None]
    assert list(ahead([], 1)) == []
    assert threading.active_count() == threads


@pytest.mark.parametrize("end", ["close", "drop", "raise"])
def test_ending_early_stops_the_threads_and_frees_the_memory(raw: Folder, end: str) -> None:
    loader = Loader(raw.index, ["unlabeled"], workers=2)

    def use() -> None:
        stream = loader.batches(np.arange(4096) % 64 for _ in iter(int, 1))  # endless; 12 MB a batch
        next(stream)
        if end == "close":
            stream.close()
        elif end == "raise":
            for _ in stream:
                raise KeyError

    def held() -> int:
        """By numpy: the resident set of a process says more of malloc than of it."""
        gc.collect()
        return tracemalloc.get_traced_memory()[0]

    def repeat(times: int) -> None:
        for _ in range(times):
            with contextlib.suppress(KeyError):
                use()

    tracemalloc.start()
    try:
        repeat(1)
        threads = threading.active_count()
        repeat(10)
        assert threading.active_count() == threads
        assert not [thread for thread in threading.enumerate() if thread.name == "ahead"]
        deadline = time.monotonic() + 20
        while held() > 1e6 and time.monotonic() < deadline:  # parts that were being decoded are decoded to their end
            time.sleep(0.05)
        assert held() < 1e6  # not one batch of them all
    finally:
        tracemalloc.stop()


def test_what_fails_in_the_background_is_raised_after_the_good_batches(raw: Folder) -> None:
    def positions() -> Iterator[np.ndarray]:
        yield np.arange(8)
        yield np.arange(8, 16)
        raise ZeroDivisionError("in the order")

    loader = Loader(raw.index, ["train"], workers=2)
    stream = loader.batches(positions())
    assert [next(stream).ids.tolist() for _ in range(2)] == [list(range(64, 72)), list(range(72, 80))]
    with pytest.raises(ZeroDivisionError, match="in the order"):
        next(stream)
    with pytest.raises(IndexError):
        next(loader.batches([np.array([30])]))


def scribble(content: bytearray, index: int, change: Callable[[np.ndarray], None]) -> None:
    """Changes the image data of one sample in the bytes of a shard."""
    from ffcv.types import ALLOC_TABLE_TYPE, HeaderType

    header = np.frombuffer(content, HeaderType, 1)[0]
    table = np.frombuffer(content, ALLOC_TABLE_TYPE, offset=int(header["alloc_table_ptr"]))
    place = table[table["sample_id"] == index][0]
    start, size = int(place["ptr"]), int(place["size"])
    change(np.frombuffer(content, np.uint8)[start : start + size])


def cut_off(data: np.ndarray) -> None:
    data[len(data) // 2 :] = 0


def not_jpeg(data: np.ndarray) -> None:
    data[:] = 7


def other_size(data: np.ndarray) -> None:
    """Smaller, and a whole JPEG: the decoder itself would leave the rest of the picture as it was."""
    small = cv2.imencode(".jpg", np.zeros((SIZE // 2, SIZE // 2, 3), np.uint8))[1].reshape(-1)
    assert len(small) < len(data)
    data[: len(small)] = small


def much_larger(data: np.ndarray) -> None:
    at = data.tobytes().index(b"\xff\xc0")
    data[at + 5 : at + 9] = 255


@pytest.mark.parametrize("change", [cut_off, not_jpeg, other_size, much_larger])
def test_a_broken_image_is_an_error_that_names_shard_and_sample(
    jpeg: Folder, tmp_path: Path, change: Callable[[np.ndarray], None]
) -> None:
    index = one_shard(jpeg, tmp_path, lambda content: scribble(content, 41, change))
    stream = Loader(index, ["train"], workers=2).batches(np.split(np.arange(90), 9))
    assert [next(stream).ids.tolist() for _ in range(4)] == np.arange(40).reshape(4, 10).tolist()
    with pytest.raises(DecodeError, match=r"broken\.beton: the image of sample 41 cannot"):
        next(stream)
    assert list(stream) == []


def test_the_named_shard_and_sample_are_right_in_a_row_of_several(jpeg: Folder, tmp_path: Path) -> None:
    first, second = jpeg.index.split("val").files
    content = bytearray(second.path.read_bytes())
    scribble(content, 0, not_jpeg)
    broken = tmp_path / second.path.name
    broken.write_bytes(content)
    split = replace(jpeg.index.split("val"), files=(first, replace(second, path=broken)))
    loader = Loader(replace(jpeg.index, splits=jpeg.index.splits | {"val": split}), ["val", "train"], workers=1)
    assert next(loader.batches([np.r_[0:30, 31:150]])).ids.tolist() == [*range(90, 120), *range(121, 150), *range(90)]
    with pytest.raises(DecodeError, match=f"{second.path.name}: the image of sample 120 cannot"):
        next(loader.batches([np.arange(30, 20, -1)]))


def run_python(code: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=40, cwd=Path(__file__).parents[2])


IN_A_PROCESS = """
import sys, pathlib, numba, numpy as np, torch
torch.set_num_threads(3)
numba.set_num_threads(2)
from barlow.data.loader import Loader
from barlow.data.shards import Index, Shard, Split
path = pathlib.Path(sys.argv[1])
split = Split("train", 90, 0, 0, (Shard(path, 90, 0, path.stat().st_size, ""),), path)
loader = Loader(Index(path.parent, "", 32, "jpeg95", (), (), (), {"train": split}), ["train"], workers=4)
stream = loader.batches([np.arange(90)] * 50)
next(stream)
assert torch.get_num_threads() == 3 and numba.get_num_threads() == 2
assert "ffcv" not in sys.modules
print("left open")
"""


def test_a_process_keeps_its_thread_counts_and_ends_with_a_stream_left_open(jpeg: Folder) -> None:
    environment = os.environ.get("NUMBA_NUM_THREADS", "")
    if environment == "1" or len(os.sched_getaffinity(0)) < 2:
        pytest.skip("numba has one thread only here")
    done = run_python(IN_A_PROCESS, jpeg.index.split("train").files[0].path)
    assert (done.returncode, done.stdout) == (0, "left open\n"), done.stderr


def test_a_process_whose_image_is_broken_ends_at_once(jpeg: Folder, tmp_path: Path) -> None:
    index = one_shard(jpeg, tmp_path, lambda content: scribble(content, 89, cut_off))
    done = run_python(IN_A_PROCESS, index.split("train").files[0].path)
    assert done.returncode == 1
    assert done.stderr.rstrip().splitlines()[-1].startswith("barlow.data.loader.DecodeError: ")
    assert "broken.beton: the image of sample 89 cannot" in done.stderr


@pytest.mark.parametrize("left", [0, 10, 1000, 3200, 5000, 8_390_000, -24, -1])
def test_a_shard_cut_short_is_refused(raw: Folder, tmp_path: Path, left: int) -> None:
    """In header, fields, samples, padding, data, table of places. (read_index would see it first, by the size.)"""

    def cut(content: bytearray) -> None:
        del content[left:]

    with pytest.raises(UserError, match=r"broken\.beton: "):
        Loader(one_shard(raw, tmp_path, cut), ["train"])


def test_a_shard_whose_writer_was_interrupted_is_refused(raw: Folder, tmp_path: Path) -> None:
    def unfinished(content: bytearray) -> None:
        content[16:24] = bytes(8)  # FFCV writes the place of the last table last of all

    with pytest.raises(UserError, match=r"broken\.beton: the shard was not written to its end"):
        Loader(one_shard(raw, tmp_path, unfinished), ["train"])


@pytest.mark.parametrize("field", ["ptr", "size"])
@pytest.mark.parametrize("value", [0, 1 << 40, (1 << 64) - 8])
def test_no_damage_to_the_tables_leads_outside_the_file(raw: Folder, tmp_path: Path, field: str, value: int) -> None:
    from ffcv.types import ALLOC_TABLE_TYPE, HeaderType

    def damage(content: bytearray) -> None:
        table_start = int(np.frombuffer(content, HeaderType, 1)[0]["alloc_table_ptr"])
        np.frombuffer(content, ALLOC_TABLE_TYPE, offset=table_start)[field][3] = value

    with pytest.raises(UserError, match=r"broken\.beton: "):
        Loader(one_shard(raw, tmp_path, damage), ["train"])


def test_what_is_not_the_shard_of_the_index_is_refused(raw: Folder, jpeg: Folder, tmp_path: Path) -> None:
    def nothing(content: bytearray) -> None:
        pass

    train = one_shard(raw, tmp_path, nothing)
    shard = train.split("train").files[0]

    def expect(what: str, changed: Shard, size: int = SIZE) -> None:
        splits = {"train": replace(train.split("train"), files=(changed,))}
        with pytest.raises(UserError, match=what):
            Loader(replace(train, splits=splits, size=size), ["train"])

    expect("holds 30 samples, not 31", replace(shard, count=31))
    expect("holds other samples", replace(shard, first_id=0))
    expect("images are not 48 x 48", shard, size=48)
    expect("gone.beton: cannot be read", replace(shard, path=tmp_path / "gone.beton"))
    (tmp_path / "text.beton").write_text("not a shard " * 1000)
    expect("not a shard of this project", replace(shard, path=tmp_path / "text.beton"))
    with pytest.raises(UserError, match="no split 'test'"):
        Loader(train, ["test"])
    with pytest.raises(UserError, match="no split to read from"):
        Loader(train, [])


def test_many_threads_ask_for_batches(jpeg: Folder) -> None:
    loader = Loader(jpeg.index, ["train", "val"], workers=2)
    whole = next(loader.batches([np.arange(150)])).images

    def ask(seed: int) -> bool:
        order = np.random.default_rng(seed).permutation(150)
        batches = loader.batches(np.split(order, 10))
        return torch.equal(torch.cat([batch.images for batch in batches]), whole[order])

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(ask, range(16)))


@pytest.mark.parametrize(
    ("usable", "ranks", "told", "cores"),
    [
        (12, None, None, 12),
        (12, "5", None, 2),  # all ranks of the machine see the same cores
        (12, "64", None, 1),
        (4, "8", "4", 4),  # SLURM has bound each rank to its own
        (64, "8", "4", 4),  # it has not, but has said how many
        (2, "1", "16", 2),  # a node with more cores than the rank may use
        (8, "2", "", 4),
        (8, "2", "many", 4),
    ],
)
def test_the_share_of_the_cores(
    monkeypatch: pytest.MonkeyPatch, usable: int, ranks: str | None, told: str | None, cores: int
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(usable)))
    for name, value in (("LOCAL_WORLD_SIZE", ranks), ("BARLOW_CORES", told), ("OMP_NUM_THREADS", "1")):
        monkeypatch.delenv(name, raising=False)
        if value is not None:
            monkeypatch.setenv(name, value)
    assert share_of_cores() == cores


def test_a_rank_bound_to_one_core_decodes_with_one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel's own answer, as under SLURM's task/affinity: of a thread, so that this process stays as it is."""
    monkeypatch.setenv("BARLOW_CORES", "4")

    def bound() -> int:
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
        return share_of_cores()

    with ThreadPoolExecutor(1) as thread:
        assert thread.submit(bound).result() == 1


def test_samples_are_found_by_their_ids_in_any_order(raw: Folder) -> None:
    """In splits that do not stand in the order of ids, and in a shard's own order."""
    loader = Loader(raw.index, ["val", "unlabeled"], workers=1)
    ids = np.random.default_rng(4).permutation(np.concatenate([np.arange(64), np.arange(94, 113)]))
    found = loader.positions_of(ids)
    assert found.dtype == np.int64
    np.testing.assert_array_equal(loader.samples.ids[found], ids)
    np.testing.assert_array_equal(next(loader.batches([found])).images, raw.images[ids])
    twice = np.array([110, 3, 110])
    np.testing.assert_array_equal(loader.samples.ids[loader.positions_of(twice)], twice)
    assert loader.positions_of(np.empty(0, np.int64)).tolist() == []


@pytest.mark.parametrize("foreign", [-1, 64, 93, 113, 1 << 40])
def test_a_sample_of_another_split_is_refused(raw: Folder, foreign: int) -> None:
    """Below, between and above those that are there: it has no place."""
    loader = Loader(raw.index, ["val", "unlabeled"], workers=1)
    for ids in (np.array([foreign]), np.array([5, foreign, 100])):
        with pytest.raises(ValueError, match="samples of other splits"):
            loader.positions_of(ids)
        with pytest.raises(ValueError, match="samples of other splits"):
            loader.relabelled(ids, np.zeros_like(ids))


def test_some_samples_get_other_labels_and_nothing_else_changes(raw: Folder) -> None:
    loader = Loader(raw.index, ["val", "unlabeled"], workers=2)
    before = loader.samples.labels.copy()
    ids, labels = np.array([100, 7, 0, 112]), np.array([40, 41, 42, -1])
    other = loader.relabelled(ids, labels)
    told = dict(zip(ids.tolist(), labels.tolist(), strict=True))
    for one, expected in ((other, told), (loader, {})):
        for batch in one.batches(np.split(np.random.default_rng(5).permutation(83), [30, 31])):
            known = [expected.get(i, int(raw.labels[i])) for i in batch.ids.tolist()]
            assert batch.labels.tolist() == known
            assert batch.labels.dtype == torch.int64
            np.testing.assert_array_equal(batch.images, raw.images[batch.ids.numpy()])
    np.testing.assert_array_equal(loader.samples.labels, before)
    again = other.relabelled(np.array([7]), np.array([3]))  # on top of the first answers
    found = again.samples.labels[again.positions_of(ids)]
    assert found.tolist() == [40, 3, 42, -1]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_pinned_batches(jpeg: Folder) -> None:
    plain, pinned = (Loader(jpeg.index, ["train"], workers=2, pin=pin) for pin in (False, True))
    steps = np.split(np.arange(90), 9) * 5
    for expected, batch in zip(plain.batches(steps), pinned.batches(steps), strict=True):
        for a, b in zip(expected, batch, strict=True):
            assert b.is_pinned()
            assert torch.equal(b.to("cuda", non_blocking=True).cpu(), a)
