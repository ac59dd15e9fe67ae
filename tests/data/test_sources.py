"""Every kind of source, faked in a few kilobytes, against what its format says; and what can be wrong with one."""

from __future__ import annotations

import io
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.datasets import CIFAR10, STL10, ImageFolder

from barlow.data import shapes
from barlow.data.sources import open_source, parse
from barlow.data.sources.cifar10 import CLASSES
from barlow.errors import UserError

RNG = np.random.default_rng(0)


def noise(*shape: int) -> np.ndarray:
    return RNG.integers(0, 256, shape, dtype=np.uint8)


def save(path: Path, image: np.ndarray | None = None) -> np.ndarray:
    image = noise(16, 16, 3) if image is None else image
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image).save(path)
    return image


def fails(spec: str, *parts: str, splits: tuple[str, ...] = ()) -> None:
    with pytest.raises(UserError) as raised:
        open_source(spec, splits)
    message = str(raised.value)
    assert "\n" not in message
    for part in parts:
        assert part in message


# --- specification ---


@pytest.mark.parametrize(
    ("spec", "part"),
    [
        ("shape", "did you mean shapes"),
        ("cifar:x", "did you mean cifar10"),
        ("imagenet", "folder:DIR"),
        ("folder", "folder:DIR"),
        ("stl10:", "stl10:DIR"),
        ("shapes:/tmp", "write just shapes"),
    ],
)
def test_a_source_that_is_none(spec: str, part: str) -> None:
    with pytest.raises(UserError, match=part):
        parse(spec)


@pytest.mark.parametrize("kind", ["folder", "cifar10", "stl10", "nyu"])
def test_directories_that_are_none(kind: str, tmp_path: Path) -> None:
    fails(f"{kind}:{tmp_path}/missing", "no such directory", "missing")
    (tmp_path / "file").write_text("")
    fails(f"{kind}:{tmp_path}/file", "not a directory")
    (tmp_path / "empty").mkdir()
    fails(f"{kind}:{tmp_path}/empty", "is empty")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("nothing here")
    fails(f"{kind}:{tmp_path}/other", str(tmp_path / "other"))


# --- folder ---


def test_folder_without_splits_is_torchvisions_image_folder(tmp_path: Path) -> None:
    for name in ("dog/b.png", "dog/a.jpg", "cat/2.png", "cat/10.png", "cat/deep/1.png", "ant/x.PNG"):
        save(tmp_path / name)
    (tmp_path / "cat" / "notes.txt").write_text("no image")
    (tmp_path / "cat" / "._2.png").write_text("a leaving of another system")
    source = open_source(f"folder:{tmp_path}")
    (split,) = source.splits
    (tmp_path / "cat" / "._2.png").unlink()  # torchvision would take it
    reference = ImageFolder(str(tmp_path))
    assert split.name == "train"
    assert list(source.classes) == reference.classes
    assert [str(tmp_path / name) for name in split.names] == [path for path, _ in reference.samples]
    assert split.labels.tolist() == reference.targets
    for i, (image, _) in enumerate(reference):
        np.testing.assert_array_equal(split.image(i), np.asarray(image))


def test_folder_with_splits_numbers_classes_over_all_of_them(tmp_path: Path) -> None:
    for name in ("train/ant/1.png", "train/bee/1.png", "val/bee/1.png", "test/cat/1.png", "test/ant/1.png"):
        save(tmp_path / name)
    for name in ("unlabeled/1.png", "unlabeled/more/2.png"):
        save(tmp_path / name)
    source = open_source(f"folder:{tmp_path}")
    assert source.classes == ("ant", "bee", "cat")
    assert [split.name for split in source.splits] == ["unlabeled", "train", "val", "test"]
    assert [split.labels.tolist() for split in source.splits] == [[-1, -1], [0, 1], [1], [0, 2]]
    assert list(source.splits[0].names) == ["unlabeled/1.png", "unlabeled/more/2.png"]

    part = open_source(f"folder:{tmp_path}", ("val", "unlabeled"))
    assert [split.name for split in part.splits] == ["unlabeled", "val"]
    assert part.splits[1].labels.tolist() == [1]
    fails(f"folder:{tmp_path}", "no split 'valid'", "train", splits=("valid",))


def test_a_class_may_be_called_train(tmp_path: Path) -> None:
    for name in ("bus/1.png", "train/1.png"):
        save(tmp_path / name)
    source = open_source(f"folder:{tmp_path}")
    assert source.classes == ("bus", "train")
    assert [split.name for split in source.splits] == ["train"]


def test_folders_with_images_in_the_wrong_place(tmp_path: Path) -> None:
    save(tmp_path / "flat" / "1.png")
    fails(f"folder:{tmp_path}/flat", "no folders", "unlabeled")
    save(tmp_path / "split" / "train" / "1.png")
    fails(f"folder:{tmp_path}/split", "split/train", "no class folders")
    (tmp_path / "bare" / "ant").mkdir(parents=True)
    fails(f"folder:{tmp_path}/bare", "no images")


@pytest.mark.parametrize("mode", ["L", "1", "P", "RGBA", "LA", "CMYK"])
def test_any_kind_of_image_becomes_rgb(mode: str, tmp_path: Path) -> None:
    image = Image.fromarray(noise(16, 16, 3)).convert(mode)
    (tmp_path / "ant").mkdir()
    image.save(tmp_path / "ant" / f"1.{'tiff' if mode == 'CMYK' else 'png'}")
    (split,) = open_source(f"folder:{tmp_path}").splits
    pixels = split.image(0)
    assert pixels.dtype == np.uint8
    assert pixels.shape == (16, 16, 3)
    np.testing.assert_array_equal(pixels, np.asarray(image.convert("RGB")))
    assert split.measure is not None
    assert split.measure(split.keys[0]) == (16, 16)


def test_unreadable_images_are_named(tmp_path: Path) -> None:
    save(tmp_path / "ant" / "cut.png", noise(64, 64, 3))
    content = (tmp_path / "ant" / "cut.png").read_bytes()
    (tmp_path / "ant" / "cut.png").write_bytes(content[: len(content) // 2])
    (tmp_path / "ant" / "junk.jpg").write_bytes(b"no image at all")
    (tmp_path / "ant" / "none.png").write_bytes(b"")
    Image.fromarray(RNG.integers(0, 60000, (16, 16)).astype(np.uint16)).save(tmp_path / "ant" / "deep.png")
    (split,) = open_source(f"folder:{tmp_path}").splits
    for i, name in enumerate(["cut.png", "deep.png", "junk.jpg", "none.png"]):
        with pytest.raises(UserError, match=f"cannot read image .*/ant/{name}"):
            split.image(i)
    assert split.measure is not None
    with pytest.raises(UserError, match="/ant/junk"):
        split.measure(split.keys[2])


# --- CIFAR-10 ---


def save_string(pickler: Any, value: str | bytes) -> None:
    content = value.encode("latin1") if isinstance(value, str) else value
    pickler.write(pickle.BINSTRING + len(content).to_bytes(4, "little") + content)
    pickler.memoize(value)


class Python2Pickler(pickle._Pickler):
    """The batches were pickled by Python 2, where text and bytes are the same strings."""

    dispatch = pickle._Pickler.dispatch | {str: save_string, bytes: save_string}


def cifar10(root: Path, per_file: int = 6) -> None:
    root.mkdir(parents=True, exist_ok=True)
    for name in [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]:
        batch = {
            "data": noise(per_file, 3072),
            "labels": RNG.integers(0, 10, per_file).tolist(),
            "filenames": [f"{name}_{i}.png" for i in range(per_file)],
        }
        content = io.BytesIO()
        Python2Pickler(content, protocol=2).dump(batch)
        (root / name).write_bytes(content.getvalue())


def test_cifar10_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = tmp_path / "cifar-10-batches-py"
    cifar10(root)
    (root / "batches.meta").write_bytes(pickle.dumps({"label_names": list(CLASSES)}))
    monkeypatch.setattr(CIFAR10, "_check_integrity", lambda self: True)
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *_: True)
    for spec in (f"cifar10:{root}", f"cifar10:{tmp_path}"):
        source = open_source(spec)
        assert [split.name for split in source.splits] == ["train", "val"]
        assert source.side == 32
        for split, train in zip(source.splits, (True, False), strict=True):
            reference = CIFAR10(str(tmp_path), train=train)
            assert split.labels.tolist() == reference.targets
            images = np.stack([split.image(i) for i in range(split.count)])
            np.testing.assert_array_equal(images, reference.data)
            assert len(set(split.names)) == split.count == len(reference)


def test_cifar10_jpeg_folder(tmp_path: Path) -> None:
    for name in CLASSES:
        save(tmp_path / "train" / name / "1.jpg", noise(32, 32, 3))
        save(tmp_path / "test" / name / "7.jpg", noise(32, 32, 3))
    source = open_source(f"cifar10:{tmp_path}")
    assert source.classes == CLASSES
    assert [(split.name, split.count) for split in source.splits] == [("train", 10), ("val", 10)]
    assert source.splits[1].names[3] == "test/cat/7.jpg"
    assert source.splits[1].labels.tolist() == list(range(10))
    assert [split.name for split in open_source(f"cifar10:{tmp_path}", ("val",)).splits] == ["val"]
    (tmp_path / "train" / "zebra").mkdir()
    fails(f"cifar10:{tmp_path}", "not CIFAR-10's", "folder:")


class Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return print, ("this ran",)


def test_cifar10_files_that_are_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    short = {"data": noise(3, 3072), "labels": [1], "filenames": ["a"]}
    for number, content in enumerate((b"junk", pickle.dumps(Evil()), pickle.dumps(short))):
        root = tmp_path / str(number)
        cifar10(root)
        (root / "data_batch_3").write_bytes(content)
        fails(f"cifar10:{root}", "data_batch_3")
    assert "this ran" not in capsys.readouterr().out
    (root / "data_batch_3").unlink()
    fails(f"cifar10:{root}", "data_batch_3", "no such file")
    fails(f"cifar10:{root}", "no split 'unlabeled'", splits=("unlabeled",))


# --- STL-10 ---


def stl10(root: Path, unlabeled: int = 7, train: int = 5, test: int = 4) -> None:
    root.mkdir(parents=True, exist_ok=True)
    for name, count in (("unlabeled", unlabeled), ("train", train), ("test", test)):
        (root / f"{name}_X.bin").write_bytes(noise(count, 3, 96, 96).tobytes())
        if name != "unlabeled":
            (root / f"{name}_y.bin").write_bytes(bytes(1 + i % 10 for i in range(count)))
    (root / "class_names.txt").write_text("airplane\nbird\ncar\ncat\ndeer\ndog\nhorse\nmonkey\nship\ntruck\n")
    (root / "fold_indices.txt").write_text("".join(f"{i % train} {(i + 1) % train} \n" for i in range(10)))


def test_stl10(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stl10(tmp_path / "stl10_binary")
    monkeypatch.setattr(STL10, "_check_integrity", lambda self: True)
    source = open_source(f"stl10:{tmp_path}")
    assert [split.name for split in source.splits] == ["unlabeled", "train", "val"]
    assert source.classes[0] == "airplane"
    assert len(source.classes) == 10
    assert source.side == 96
    for split, name in zip(source.splits, ("unlabeled", "train", "test"), strict=True):
        reference = STL10(str(tmp_path), split=name)
        images = np.stack([split.image(i) for i in range(split.count)])
        np.testing.assert_array_equal(images, np.stack([np.asarray(image) for image, _ in reference]))
        assert split.labels.tolist() == [int(label) for label in reference.labels]
        assert images.flags["C_CONTIGUOUS"]
    assert source.splits[1].folds == tuple((i % 5, (i + 1) % 5) for i in range(10))
    stored = np.fromfile(tmp_path / "stl10_binary" / "train_X.bin", dtype=np.uint8)
    assert source.splits[1].image(2)[10, 20, 1] == stored[2 * 27648 + 1 * 9216 + 20 * 96 + 10]  # columns first


def test_stl10_files_that_are_wrong(tmp_path: Path) -> None:
    stl10(tmp_path / "a")
    path = tmp_path / "a" / "unlabeled_X.bin"
    path.write_bytes(path.read_bytes()[:-1])
    fails(f"stl10:{tmp_path}/a", "unlabeled_X.bin", "cut short")
    path.unlink()
    fails(f"stl10:{tmp_path}/a", "unlabeled_X.bin", "--splits")
    assert len(open_source(f"stl10:{tmp_path}/a", ("train", "val")).splits) == 2
    (tmp_path / "a" / "train_y.bin").write_bytes(bytes([1, 2]))
    fails(f"stl10:{tmp_path}/a", "train_y.bin: 2 labels for 5 images", splits=("train",))
    (tmp_path / "a" / "train_y.bin").write_bytes(bytes([0, 1, 2, 3, 11]))
    fails(f"stl10:{tmp_path}/a", "train_y.bin", "0 to 11", splits=("train",))
    stl10(tmp_path / "b")
    (tmp_path / "b" / "fold_indices.txt").write_text("0 1 2\n3 5\n")
    fails(f"stl10:{tmp_path}/b", "fold_indices.txt", "beyond")
    (tmp_path / "b" / "fold_indices.txt").write_text("0 1 two\n")
    fails(f"stl10:{tmp_path}/b", "fold_indices.txt")


# --- NYU ---


def nyu(root: Path) -> None:
    for split, count in (("unlabeled", 3), ("train", 12), ("val", 2)):
        for i in range(count):
            save(root / split / f"{i}.png", noise(96, 96, 3))
    torch.save(torch.arange(12) * 70, root / "train_label_tensor.pt")
    torch.save(torch.tensor([799]), root / "val_label_tensor.pt")


def test_nyu(tmp_path: Path) -> None:
    nyu(tmp_path)
    source = open_source(f"nyu:{tmp_path}")
    assert len(source.classes) == 800
    assert source.side == 96
    assert {split.name: split.labels.tolist() for split in source.splits} == {
        "unlabeled": [-1, -1, -1],  # no label tensor
        "train": [70 * i for i in range(12)],
        "val": [799, -1],  # a tensor that ends early
    }
    train = source.splits[1]
    assert train.names[2] == "train/2.png"  # by number, not by letter
    np.testing.assert_array_equal(train.image(10), np.asarray(Image.open(tmp_path / "train" / "10.png")))
    (tmp_path / "train" / "3.png").unlink()
    assert open_source(f"nyu:{tmp_path}", ("train",)).splits[0].labels.tolist()[2:5] == [140, 280, 350]


@pytest.mark.parametrize(
    ("labels", "part"),
    [
        (torch.zeros(13, dtype=torch.long), "13 labels"),
        (torch.zeros(12, 1, dtype=torch.long), "[12, 1]"),
        (torch.zeros(12), "float"),
        (torch.full((12,), 800), "800"),
        (torch.full((12,), -2), "-2"),
        ([1, 2, 3], "list"),
        (b"junk", "cannot load"),
    ],
)
def test_nyu_labels_that_do_not_fit(labels: object, part: str, tmp_path: Path) -> None:
    nyu(tmp_path)
    path = tmp_path / "train_label_tensor.pt"
    if isinstance(labels, bytes):
        path.write_bytes(labels)
    else:
        torch.save(labels, path)
    fails(f"nyu:{tmp_path}", "train_label_tensor.pt", part)


# --- shapes ---


def test_shapes() -> None:
    source = open_source("shapes")
    assert {split.name: split.count for split in source.splits} == {"unlabeled": 5000, "train": 1000, "val": 1000}
    assert source.classes == shapes.CLASSES
    keys = [key for split in source.splits for key in split.keys]
    assert len(set(keys)) == 7000  # no picture stands in two splits
    unlabeled, train, val = source.splits
    assert set(unlabeled.labels.tolist()) == {-1}
    for split in (train, val):
        for i in (0, 1, 5, 500, 999):
            image, label = shapes.render(split.keys[i], seed=0, size=96)
            np.testing.assert_array_equal(split.image(i), image)
            assert split.labels[i] == label
    assert [split.name for split in open_source("shapes", ("val", "train")).splits] == ["train", "val"]
    fails("shapes", "no split 'test'", splits=("test",))
