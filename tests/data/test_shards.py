"""Shards: FFCV reads what we write, the bytes depend on images and settings alone, damage is found."""

from __future__ import annotations

import fcntl
import hashlib
import io
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import CenterCrop, Compose, InterpolationMode, Resize

from barlow.data import layout
from barlow.data.shards import Index, read_index, verify
from barlow.data.writing import beton, encode, plan
from barlow.data.writing.encode import Encoding, Pixels
from barlow.data.writing.plan import Request
from barlow.data.writing.pool import DeadWorkerError, processes
from barlow.data.writing.write import write
from barlow.errors import UserError

SIDE = 48
COUNTS = {"unlabeled": 23, "train": 14, "val": 9}


@pytest.fixture(scope="module", autouse=True)
def threads_of_torch() -> Iterator[None]:
    """Importing FFCV sets torch's thread count for the process."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def picture(rng: np.random.Generator, height: int = SIDE, width: int = SIDE) -> np.ndarray:
    """Smooth enough that JPEG changes little."""
    coarse = rng.integers(0, 256, (6, 6, 3), dtype=np.uint8)
    return cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An image folder of three splits, two classes."""
    root = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for split, count in COUNTS.items():
        for i in range(count):
            folder = root / split if split == "unlabeled" else root / split / ("ant", "bee")[i % 2]
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(picture(rng)).save(folder / f"{i:03d}.png")
    return root


@pytest.fixture(scope="module")
def raw(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Index:
    out = tmp_path_factory.mktemp("raw") / "out"
    return write(Request(f"folder:{images}", out, jpeg_quality=None, shards=2, workers=2))


def originals(images: Path, index: Index) -> dict[str, np.ndarray]:
    return {
        name: np.stack([np.asarray(Image.open(images / line)) for line in split.names.read_text().splitlines()])
        for name, split in index.splits.items()
    }


def hashes(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.glob("*.beton"))}


def ffcv_reads(path: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Images, labels and ids of one file through FFCV's own Loader."""
    from ffcv.fields.basics import IntDecoder
    from ffcv.fields.rgb_image import SimpleRGBImageDecoder
    from ffcv.loader import Loader, OrderOption

    decoders = {"image": [SimpleRGBImageDecoder()], "label": [IntDecoder()], "id": [IntDecoder()]}
    loader = Loader(
        str(path), batch_size=4, num_workers=1, order=OrderOption.SEQUENTIAL, drop_last=False, pipelines=decoders
    )
    batches = [tuple(np.array(part) for part in batch) for batch in loader]  # FFCV reuses its buffers
    images, labels, ids = (np.concatenate(parts) for parts in zip(*batches, strict=True))
    return images, labels[:, 0], ids[:, 0]


# --- what is written ---


def test_the_layout_is_ffcvs() -> None:
    from ffcv import types
    from ffcv.fields import IntField, RGBImageField

    def same(ours: np.dtype, theirs: np.dtype) -> bool:
        """Offsets and formats; the names are ours."""
        a = [ours.fields[name][:2] for name in ours.names or ()] if ours.fields else []
        b = [theirs.fields[name][:2] for name in theirs.names or ()] if theirs.fields else []
        pairs = zip(a, b, strict=True)
        inner = all(x[1] == y[1] and (same(x[0], y[0]) if x[0].names else x[0] == y[0]) for x, y in pairs)
        return inner and ours.itemsize == theirs.itemsize

    assert layout.VERSION == types.CURRENT_VERSION
    assert same(layout.HEADER, types.HeaderType)
    assert same(layout.FIELD, types.FieldDescType)
    assert same(layout.PLACE, types.ALLOC_TABLE_TYPE)
    assert same(layout.SAMPLE, types.get_metadata_type([RGBImageField(), IntField(), IntField()]))
    assert [types.TYPE_ID_HANDLER[kind] for kind, _ in layout.FIELDS] == [RGBImageField, IntField, IntField]


@pytest.mark.parametrize("quality", [None, 90])
def test_a_file_is_byte_for_byte_what_ffcv_writes(quality: int | None, tmp_path: Path) -> None:
    from ffcv.fields import IntField, RGBImageField
    from ffcv.writer import DatasetWriter

    rng = np.random.default_rng(1)
    side, count = 300, 60  # several pages
    samples = [(rng.integers(0, 256, (side, side, 3), dtype=np.uint8), i % 3 - 1, 100 + i) for i in range(count)]
    fields = {
        "image": RGBImageField("raw" if quality is None else "jpg", jpeg_quality=quality or 90),
        "label": IntField(),
        "id": IntField(),
    }
    DatasetWriter(str(tmp_path / "ffcv"), fields, beton.page_size(side), num_workers=1).from_indexed_dataset(samples)

    encoding = Encoding(side, False, quality)
    runs = [encode.encode(lambda i: samples[i][0], range(i, min(i + 7, count)), encoding) for i in range(0, count, 7)]
    ids, labels = np.arange(100, 100 + count), np.array([label for _, label, _ in samples])
    with open(tmp_path / "ours", "wb") as file:
        beton.write(file, ids, labels, side, quality is None, ((run.sizes, run.blob) for run in runs))
    ours, theirs = (tmp_path / "ours").read_bytes(), (tmp_path / "ffcv").read_bytes()
    assert len(ours) == len(theirs) >= 3 * beton.page_size(side)
    assert ours == theirs


def test_ffcv_reads_raw_shards_exactly(images: Path, raw: Index) -> None:
    expected = originals(images, raw)
    next_id = 0
    for name, split in raw.splits.items():
        assert [shard.path.name for shard in split.files] == [f"{name}-{i:04d}-of-0002.beton" for i in range(2)]
        assert split.first_id == next_id
        parts = [ffcv_reads(shard.path) for shard in split.files]
        pixels, labels, ids = (np.concatenate(column) for column in zip(*parts, strict=True))
        np.testing.assert_array_equal(pixels, expected[name])
        np.testing.assert_array_equal(ids, np.arange(next_id, next_id + split.count))
        lines = split.names.read_text().splitlines()
        classes = [-1 if name == "unlabeled" else raw.classes.index(line.split("/")[1]) for line in lines]
        assert labels.tolist() == classes
        assert split.labeled == sum(label >= 0 for label in classes)
        assert [len(part[0]) for part in parts] == [shard.count for shard in split.files]
        next_id += split.count
    assert next_id == sum(COUNTS.values())


def test_ffcv_reads_jpeg_shards_closely(images: Path, tmp_path: Path) -> None:
    from ffcv.reader import Reader

    index = write(Request(f"folder:{images}", tmp_path / "out", workers=1, splits=("val", "train")))
    assert list(index.splits) == ["train", "val"]
    assert (index.encoding, index.size, index.classes) == ("jpeg95", SIDE, ("ant", "bee"))
    expected = originals(images, index)
    for name, split in index.splits.items():
        (shard,) = split.files
        pixels, _, _ = ffcv_reads(shard.path)
        error = np.abs(pixels.astype(int) - expected[name].astype(int))
        assert 0 < error.mean() < 4
        data = shard.path.read_bytes()
        for _, start, size in Reader(str(shard.path)).alloc_table:
            with Image.open(io.BytesIO(data[start : start + size])) as image:
                layers: Any = getattr(image, "layer")  # noqa: B009
                assert [layer[1:3] for layer in layers] == [(2, 2), (1, 1), (1, 1)]  # 4:2:0


def test_mean_and_std_are_those_of_the_pixels(images: Path, raw: Index, tmp_path: Path) -> None:
    index = write(Request(f"folder:{images}", tmp_path / "out", jpeg_quality=40, workers=1, splits=("train", "val")))
    for one, split in ((raw, "unlabeled"), (index, "train")):
        pixels = originals(images, raw)[split].astype(np.float64).reshape(-1, 3) / 255
        np.testing.assert_allclose(one.mean, pixels.mean(axis=0), rtol=1e-12)
        np.testing.assert_allclose(one.std, pixels.std(axis=0), rtol=1e-12)


def test_pixel_sums_are_exact() -> None:
    rng = np.random.default_rng(2)
    for side in [8, 32, 48, 96, 511, 2048] * 3:
        image = rng.integers(0, 256, (side, side, 3), dtype=np.uint8)
        flat = image.reshape(-1, 3).astype(np.int64)
        counted = encode.count_pixels(image)
        assert counted == Pixels(side * side, tuple(flat.sum(0).tolist()), tuple((flat**2).sum(0).tolist()))
    # A spread of one part in 255 around a large mean: lost at once in sums of floats.
    many = sum((Pixels(10**9, (255 * 10**9 - 1,) * 3, (255**2 * 10**9 - 509,) * 3) for _ in range(100)), Pixels())
    n, missing = 10**11, 100
    assert many.std()[0] == pytest.approx((missing / n - (missing / n) ** 2) ** 0.5 / 255, rel=1e-12)


@pytest.mark.parametrize("shape", [(96, 96), (200, 120), (37, 96), (50, 31), (97, 96)])
def test_resizing_is_torchvisions(shape: tuple[int, int]) -> None:
    image = np.random.default_rng(3).integers(0, 256, (*shape, 3), dtype=np.uint8)
    ours = encode.fit(image, "x", Encoding(48, True, None))
    theirs = Compose([Resize(48, InterpolationMode.BICUBIC), CenterCrop(48)])(Image.fromarray(image))
    np.testing.assert_array_equal(ours, np.asarray(theirs))


def test_size_brings_all_images_to_one(tmp_path: Path) -> None:
    rng = np.random.default_rng(4)
    (tmp_path / "in" / "ant").mkdir(parents=True)
    for i, shape in enumerate([(64, 64), (100, 40), (20, 30)]):
        Image.fromarray(picture(rng, *shape)).save(tmp_path / "in" / "ant" / f"{i}.png")
    spec = f"folder:{tmp_path}/in"
    with pytest.raises(UserError, match=r"differ in size \(ant/0.png 64x64, ant/1.png 40x100\): give --size"):
        write(Request(spec, tmp_path / "out", workers=1))
    assert not (tmp_path / "out").exists()
    index = write(Request(spec, tmp_path / "out", size=32, jpeg_quality=None, workers=1))
    pixels, _, _ = ffcv_reads(index.split("train").files[0].path)
    for i in range(3):
        source = np.asarray(Image.open(tmp_path / "in" / "ant" / f"{i}.png"))
        np.testing.assert_array_equal(pixels[i], encode.fit(source, "x", Encoding(32, True, None)))
    for i in (0, 2):
        (tmp_path / "in" / "ant" / f"{i}.png").unlink()
    with pytest.raises(UserError, match="are 40x100: give --size"):
        write(Request(spec, tmp_path / "other", workers=1))


def test_the_bytes_do_not_depend_on_the_workers(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    monkeypatch.setattr("barlow.data.writing.write.WORTH_A_WORKER", 1)
    for workers, chunk in ((1, 1 << 20), (2, 3 * SIDE * SIDE * 4)):
        monkeypatch.setattr("barlow.data.writing.write.CHUNK_BYTES", chunk)
        out = tmp_path / f"{workers}"
        write(Request(f"folder:{images}", out, shards=2, workers=workers))
        made.append((hashes(out), (out / "index.json").read_text()))
    assert made[0] == made[1]
    assert len(made[0][0]) == 6


def test_folds_become_sample_ids(tmp_path: Path) -> None:
    rng = np.random.default_rng(5)
    root = tmp_path / "in"
    root.mkdir()
    for name, count in (("unlabeled", 6), ("train", 5), ("test", 3)):
        (root / f"{name}_X.bin").write_bytes(rng.integers(0, 256, (count, 3, 96, 96), dtype=np.uint8).tobytes())
        (root / f"{name}_y.bin").write_bytes(bytes(range(1, count + 1)))
    (root / "class_names.txt").write_text("\n".join("abcdefghij"))
    (root / "fold_indices.txt").write_text("0 2 4\n1 3\n")
    index = write(Request(f"stl10:{root}", tmp_path / "out", workers=1))
    assert {name: (split.count, split.first_id) for name, split in index.splits.items()} == {
        "unlabeled": (6, 0),
        "train": (5, 6),
        "val": (3, 11),
    }
    assert index.split("train").folds == ((6, 8, 10), (7, 9))
    assert index.split("val").folds == ()
    assert ffcv_reads(index.split("train").files[0].path)[1].tolist() == [0, 1, 2, 3, 4]


# --- going on, and refusing to ---


def test_again_with_the_same_settings(images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    request = Request(f"folder:{images}", tmp_path / "out", shards=2, workers=1)
    write(request)
    before = hashes(tmp_path / "out"), [path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()]
    start = time.monotonic()
    index = write(request)
    assert time.monotonic() - start < 0.5
    assert "complete already" in capsys.readouterr().out
    assert before == (hashes(tmp_path / "out"), [path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()])
    assert {path.name[0] for path in (tmp_path / "out").iterdir()}.isdisjoint({".", "p"})  # nothing of the work is left

    # A shard that went missing, and one with a flipped bit, are written anew; the others are left alone.
    first, second = index.split("unlabeled").files[0], index.split("val").files[1]
    kept = index.split("train").files[0]
    first.path.unlink()
    content = bytearray(second.path.read_bytes())
    content[-200] ^= 1
    second.path.write_bytes(content)
    modified = kept.path.stat().st_mtime_ns
    write(request)
    assert hashes(tmp_path / "out") == before[0]
    assert kept.path.stat().st_mtime_ns == modified


@pytest.mark.parametrize(
    ("change", "part"),
    [
        ({"size": 32}, "size unset, now asked for 32"),
        ({"jpeg_quality": None}, "encoding jpeg95, now asked for raw"),
        ({"shards": 3}, "shards 2, now asked for 3"),
        ({"splits": ("train",)}, "splits all, now asked for train"),
        ({"source": "shapes"}, "now asked for shapes"),
    ],
)
def test_other_settings_are_refused(change: dict[str, Any], part: str, images: Path, tmp_path: Path) -> None:
    """Of a finished folder as of a begun one."""
    settings: dict[str, Any] = {"source": f"folder:{images}", "out": tmp_path, "shards": 2, "workers": 1}
    record = {"settings": Request(**settings).settings(), "digest": "", "files": [], "version": 1}
    (tmp_path / "progress.json").write_text(json.dumps(record))
    for _ in range(2):
        with pytest.raises(UserError, match=part) as raised:
            write(Request(**settings | change))
        assert "take another folder" in str(raised.value)
        (tmp_path / "progress.json").rename(tmp_path / "index.json")
        (tmp_path / "index.json").write_text(json.dumps(record | {"splits": {}}))
        (tmp_path / "progress.json").touch()


def test_folders_that_cannot_be_written_to(images: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "train.beton").write_text("")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "index.json").write_text("{")
    for name, part in (("file", "cannot make"), ("foreign", "no index.json"), ("broken", "damaged")):
        with pytest.raises(UserError, match=part):
            write(Request(f"folder:{images}", tmp_path / name, workers=1))
    (tmp_path / "busy").mkdir()
    other = os.open(tmp_path / "busy", os.O_RDONLY)
    fcntl.flock(other, fcntl.LOCK_EX)
    with pytest.raises(UserError, match="another process is writing"):
        write(Request(f"folder:{images}", tmp_path / "busy", workers=1))
    os.close(other)


def test_an_unreadable_image_ends_it_and_mending_it_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("barlow.data.writing.write.CHUNK_BYTES", 1)  # an image at a time
    rng = np.random.default_rng(6)
    root, out = tmp_path / "in" / "ant", tmp_path / "out"
    root.mkdir(parents=True)
    for i in range(60):
        Image.fromarray(picture(rng)).save(root / f"{i:02d}.png")
    whole = (root / "41.png").read_bytes()
    (root / "41.png").write_bytes(whole[: len(whole) // 2])  # the header is sound
    request = Request(f"folder:{root.parent}", out, shards=3, workers=1)
    with pytest.raises(UserError, match=r"cannot read image .*ant/41\.png"):
        write(request)
    assert sorted(path.name for path in out.iterdir()) == [
        "progress.json",
        "train-0000-of-0003.beton",
        "train-0001-of-0003.beton",
    ]
    with pytest.raises(UserError, match="not finished"):
        read_index(out)
    kept = hashes(out)
    times = [(out / name).stat().st_mtime_ns for name in kept]

    (root / "41.png").write_bytes(whole)
    (out / ".train-0002-of-0003.beton.tmp").write_text("what a killed writer leaves")
    write(request)
    assert [(out / name).stat().st_mtime_ns for name in kept] == times
    assert not list(out.glob(".*"))
    write(Request(f"folder:{root.parent}", tmp_path / "undisturbed", shards=3, workers=1))
    assert hashes(out) == hashes(tmp_path / "undisturbed")
    assert (out / "index.json").read_text() == (tmp_path / "undisturbed" / "index.json").read_text()


def test_a_source_that_changed_is_refused(tmp_path: Path) -> None:
    rng = np.random.default_rng(7)
    (tmp_path / "in" / "ant").mkdir(parents=True)
    for i in range(4):
        Image.fromarray(picture(rng)).save(tmp_path / "in" / "ant" / f"{i}.png")
    request = Request(f"folder:{tmp_path}/in", tmp_path / "out", shards=2, workers=1)
    write(request).split("train").files[0].path.unlink()
    Image.fromarray(picture(rng)).save(tmp_path / "in" / "ant" / "4.png")
    with pytest.raises(UserError, match="has changed since"):
        write(request)
    (tmp_path / "in" / "ant" / "4.png").unlink()
    Image.fromarray(picture(rng)).save(tmp_path / "in" / "ant" / "0.png")  # same name, another picture
    with pytest.raises(UserError, match="has changed since"):
        write(request)


@pytest.mark.parametrize(
    ("change", "part"),
    [
        ({"jpeg_quality": 0}, "quality 0"),
        ({"jpeg_quality": 101}, "quality 101"),
        ({"size": 4}, "size 4"),
        ({"shards": 0}, "0 shards"),
        ({"workers": -1}, "-1 workers"),
        ({"shards": 10}, "split val has 9 images"),
        ({"splits": ("training",)}, "no split 'training'"),
        ({"source": "folders:x"}, "did you mean folder"),
    ],
)
def test_requests_that_cannot_be_met(change: dict[str, Any], part: str, images: Path, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"source": f"folder:{images}", "out": tmp_path / "out", "workers": 1}
    with pytest.raises(UserError, match=part):
        write(Request(**settings | change))
    assert not (tmp_path / "out").exists()


def test_space_is_reckoned_first(images: Path, raw: Index, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written = sum(shard.bytes for split in raw.splits.values() for shard in split.files)

    class Usage:
        free = written - 1

    monkeypatch.setattr(plan.shutil, "disk_usage", lambda _: Usage)
    request = Request(f"folder:{images}", tmp_path / "out", jpeg_quality=None, shards=2, workers=1)
    with pytest.raises(UserError, match="no space for"):
        write(request)
    assert not (tmp_path / "out").exists()
    Usage.free = written
    write(request)


@pytest.mark.parametrize("quality", [None, 95])
def test_the_estimate_of_space_is_close(quality: int | None, tmp_path: Path) -> None:
    rng = np.random.default_rng(8)
    images = [picture(rng, 128, 128) for _ in range(400)]
    encoded = encode.encode(lambda i: images[i], range(400), Encoding(128, False, quality))
    with open(tmp_path / "file", "wb") as file:
        beton.write(file, np.arange(400), np.zeros(400), 128, quality is None, [(encoded.sizes, encoded.blob)])
    guess = beton.estimate(400, 128, sum(encoded.sizes[::25]) / 16)
    assert abs(guess - (tmp_path / "file").stat().st_size) <= (0 if quality is None else beton.page_size(128))


def test_a_worker_that_dies_is_an_error_and_no_hang() -> None:
    with processes(2, encode.one_thread, []) as in_order, pytest.raises(DeadWorkerError):
        list(in_order((os._exit, (9,)) for _ in range(5)))


# --- reading and verifying ---


def copy(index: Index, to: Path) -> dict[str, Any]:
    """A folder of its own to damage -> its index as JSON."""
    to.mkdir()
    for path in index.folder.iterdir():
        (to / path.name).write_bytes(path.read_bytes())
    content: dict[str, Any] = json.loads((to / "index.json").read_text())
    return content


def problems(folder: Path) -> dict[str, str]:
    return {name: problem for name, problem in verify(folder) if problem}


def test_verify_finds_nothing_wrong_with_what_was_written(raw: Index) -> None:
    found = dict(verify(raw.folder))
    assert set(found.values()) == {""}
    assert set(found) == {path.name for path in raw.folder.iterdir()} - {"index.json"}


@pytest.mark.parametrize("place", [0, 30, 2000, -1])
def test_verify_names_a_file_with_one_flipped_bit(place: int, raw: Index, tmp_path: Path) -> None:
    copy(raw, tmp_path / "x")
    path = tmp_path / "x" / "train-0001-of-0002.beton"
    content = bytearray(path.read_bytes())
    content[place] ^= 4
    path.write_bytes(content)
    assert problems(tmp_path / "x") == {path.name: "its bytes have changed since it was written (sha256 differs)"}
    read_index(tmp_path / "x")  # only reading everything tells


def test_a_file_cut_short_or_missing_or_too_long(raw: Index, tmp_path: Path) -> None:
    copy(raw, tmp_path / "x")
    path = tmp_path / "x" / "val-0001-of-0002.beton"
    content = path.read_bytes()
    path.write_bytes(content[:-1000])
    assert "cut short" in problems(tmp_path / "x")[path.name]
    with pytest.raises(UserError, match=r"val-0001-of-0002.beton: the shard is cut short"):
        read_index(tmp_path / "x")
    path.write_bytes(content + b"x")
    assert "too long" in problems(tmp_path / "x")[path.name]
    path.unlink()
    assert "missing" in problems(tmp_path / "x")[path.name]
    with pytest.raises(UserError, match=r"val-0001-of-0002.beton: the shard is missing"):
        read_index(tmp_path / "x")


def test_verify_compares_the_index_with_the_files(raw: Index, tmp_path: Path) -> None:
    content = copy(raw, tmp_path / "x")
    train = content["splits"]["train"]

    def with_index(**changed: Any) -> dict[str, str]:
        (tmp_path / "x" / "index.json").write_text(json.dumps(content | changed))
        return problems(tmp_path / "x")

    def with_train(**changed: Any) -> dict[str, str]:
        return with_index(splits=content["splits"] | {"train": train | changed})

    assert with_index() == {}
    assert all("other sizes" in problem for problem in with_index(size=47).values())
    assert "labels from 1 to 1" in with_index(classes=["ant"])["train-0001-of-0002.beton"]
    assert "15 labels announced, 14 found" in with_train(labeled=15)["index.json"]
    assert "has 14 of 15" in with_train(count=15)["index.json"]
    assert "begins at id 24, not 23" in with_train(first_id=24)["index.json"]
    swapped = with_train(files=train["files"][::-1])
    assert "ids are not 23 to 29" in swapped["train-0001-of-0002.beton"]
    fewer = [train["files"][0] | {"count": 3}, *train["files"][1:]]
    assert "7 samples, the index says 3" in with_train(files=fewer)["train-0000-of-0002.beton"]
    (tmp_path / "x" / "train.names.txt").write_text("one\n")
    assert with_index()["train.names.txt"] == "1 names for 14 samples"


def test_folders_that_are_no_shards(raw: Index, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such folder of shards"):
        read_index(tmp_path / "none")
    with pytest.raises(UserError, match=r"no index.json in .*launchers/shards.py SOURCE"):
        read_index(tmp_path)
    with pytest.raises(UserError, match=r"no split 'test' in .*: it has unlabeled, train, val"):
        raw.split("test")
    for text in ("{", "[]", "{}", '{"version": 1}'):
        (tmp_path / "index.json").write_text(text)
        with pytest.raises(UserError, match="not an index of shards"):
            read_index(tmp_path)
    (tmp_path / "index.json").write_text('{"version": 7}')
    with pytest.raises(UserError, match="version 7"):
        read_index(tmp_path)
