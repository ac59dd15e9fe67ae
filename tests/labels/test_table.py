"""Labels that come and go: what is drawn from the shards, what a person sends back, and each thing wrong with it."""

from __future__ import annotations

import hashlib
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from barlow.data.loader import Loader
from barlow.data.shards import Index, read_index
from barlow.errors import UserError
from barlow.labels.table import Labelled, draw, in_shards, labelled, read_answers, unlabelled, write_request

Answer = Callable[..., Path]


@pytest.fixture(scope="module")
def index(tiny_data: Path) -> Index:
    return read_index(tiny_data)


@pytest.fixture(scope="module")
def names(index: Index) -> dict[int, str]:
    """Of every sample, by the split files themselves."""
    named: dict[int, str] = {}
    for split in index.splits.values():
        named |= dict(enumerate(split.names.read_text().splitlines(), split.first_id))
    return named


@pytest.fixture
def answer(tmp_path: Path) -> Answer:
    """answer(*lines): a CSV file of these lines."""

    def write(*lines: str, name: str = "answered.csv") -> Path:
        path = tmp_path / name
        path.write_text("".join(f"{line}\n" for line in lines))
        return path

    return write


def first(index: Index, split: str) -> int:
    return index.split(split).first_id


def test_labels_are_those_the_loader_gives(index: Index) -> None:
    for splits in (["train"], ["val", "unlabeled"], ["unlabeled", "train", "val"]):
        ids, labels = in_shards(index, splits)
        samples = Loader(index, splits, workers=1).samples
        order = np.argsort(samples.ids)
        assert np.array_equal(ids, samples.ids[order])
        assert np.array_equal(labels, samples.labels[order])


def test_all_labels_of_a_split(index: Index) -> None:
    found = labelled(index, ["train"], per_class=0, seed=0)
    assert found.ids.tolist() == list(range(first(index, "train"), first(index, "train") + 48))
    assert (found.ids.dtype, found.labels.dtype) == (np.int64, np.int64)
    assert np.array_equal(found.labels, in_shards(index, ["train"])[1])


def test_so_many_a_class_by_the_seed_and_more_hold_fewer() -> None:
    labels = np.random.default_rng(0).integers(0, 7, 4000)
    ids = np.arange(100, 4100)
    few, more, other = (draw(ids, labels, n, seed) for n, seed in ((4, 0), (25, 0), (25, 1)))
    assert np.bincount(labels[few]).tolist() == [4] * 7
    assert np.bincount(labels[more]).tolist() == [25] * 7
    assert (few <= more).all()
    assert (more & other).sum() < 30
    by_definition = min(ids[labels == 3], key=lambda i: hashed(0, int(i)))
    assert ids[draw(ids, labels, 1, 0) & (labels == 3)].tolist() == [by_definition]
    part = labels != 3
    assert np.array_equal(ids[part][draw(ids[part], labels[part], 4, 0)], ids[few & part])


def hashed(seed: int, i: int) -> int:
    return int.from_bytes(hashlib.blake2b(f"{seed} {i}".encode(), digest_size=8).digest(), "little")


def test_a_draw_is_the_same_for_ever() -> None:
    drawn = draw(np.arange(1000), np.arange(1000) % 2, 5, 42)
    assert np.flatnonzero(drawn).tolist() == [68, 205, 237, 268, 292, 489, 618, 648, 863, 911]


def test_too_few_of_a_class_and_splits_without_labels_are_refused(index: Index) -> None:
    with pytest.raises(UserError, match=r"^class \w+ has \d labels in train, 40 a class .*: give --labelled.per-class"):
        labelled(index, ["train"], per_class=40, seed=0)
    with pytest.raises(UserError, match=r"^split unlabeled of .* has no labels: name one that has"):
        labelled(index, ["train", "unlabeled"], per_class=0, seed=0)
    with pytest.raises(UserError, match="no split 'trian'"):
        labelled(index, ["trian"], per_class=0, seed=0)


def test_answers_by_name_and_number_join_the_labels(index: Index, names: dict[int, str], answer: Answer) -> None:
    last = len(index.classes) - 1
    path = answer("id,name,distance,label", f"7,{names[7]},0.25,{index.classes[2]}", "", f"3,{names[3]},0.5,{last}")
    other = answer(f"label;id;name\n;90;{names[90]}\n1.0;91;{names[91]}", name="b.csv")
    before = labelled(index, ["train"], per_class=0, seed=0)
    found = labelled(index, ["train"], 0, 0, [path, other])
    assert found.ids.tolist() == sorted([3, 7, 91, *before.ids.tolist()])
    told = dict(zip(found.ids.tolist(), found.labels.tolist(), strict=True))
    assert (told[7], told[3], told[91], found.unanswered) == (2, last, 1, 1)
    assert all(told[i] == label for i, label in zip(before.ids.tolist(), before.labels.tolist(), strict=True))


@pytest.mark.parametrize("encoding", ["utf-8", "utf-16-le", "utf-16-be"])
def test_what_a_spreadsheet_makes_of_a_file_is_read(
    index: Index, names: dict[int, str], tmp_path: Path, encoding: str
) -> None:
    path = tmp_path / "a.csv"
    written = f'\ufeff"ID"\tName\tLabel\r\n5\t"{names[5]}"\t 2 \r\n6\t{names[6]}\t\r\n'
    path.write_bytes(written.encode(encoding))
    found = read_answers(path, index)
    assert (found.ids.tolist(), found.labels.tolist(), found.unanswered) == ([5], [2], 1)


def test_an_answer_counts_though_the_shards_know_better(index: Index, names: dict[int, str], answer: Answer) -> None:
    """A pool may be a split whose labels are hidden, and people err."""
    few = labelled(index, ["train"], per_class=1, seed=0)
    ids, labels = in_shards(index, ["train"])
    hidden = next(int(i) for i in ids if i not in few.ids)
    wrong = (int(labels[ids == hidden][0]) + 1) % len(index.classes)
    found = labelled(index, ["train"], 1, 0, [answer("id,name,label", f"{hidden},{names[hidden]},{wrong}")])
    assert found.labels[found.ids == hidden].tolist() == [wrong]
    assert len(found.ids) == len(few.ids) + 1


HEAD = "id,name,label"
WRONG = {
    "unknown id": (["9999,{name},0"], r"line 3: no sample 9999 in .*, which has 0 to 191"),
    "no id": (["x7,{name},0"], r"line 3: 'x7' is no sample id"),
    "unknown name": (["1,nothing.png,0"], r"line 3: sample 1 is unlabeled/.*, and 'nothing.png' is not in "),
    "name of another": (["2,{name},0"], r"line 3: sample 2 is unlabeled/.*, and '{name}' is sample 1$"),
    "twice": (["1,{name},0", "1,{name},0"], r"line 4: sample 1 is in line 3 already"),
    "class too high": (["1,{name},99"], r"line 3: class 99 is out of range: there are 0 to \d+$"),
    "class below 0": (["1,{name},-1"], r"line 3: class -1 is out of range"),
    "class misspelt": (["1,{name},{misspelt}"], r"line 3: no class '{misspelt}': did you mean {right}\?$"),
    "no such class": (["1,{name},qqqqqq"], r"line 3: no class 'qqqqqq': the classes are {right}, "),
    "known otherwise": (["{train},{train_name},{other}"], r"line 3: sample {train} is labelled \w+ already, not \w+"),
    "held out": (["{val},{val_name},0"], r"line 3: sample {val} is of val, which classifiers are judged on"),
    "a comma too many": (["1,{name},0,5"], r"line 3: 4 columns instead of 3"),
}


@pytest.mark.parametrize("fault", WRONG)
def test_each_fault_is_one_line_with_its_number(
    index: Index, names: dict[int, str], answer: Answer, fault: str
) -> None:
    known = labelled(index, ["train"], per_class=0, seed=0)
    train, val = first(index, "train"), first(index, "val")
    words = {"name": names[1], "train": train, "train_name": names[train], "val": val, "val_name": names[val]}
    words |= {"other": index.classes[(known.labels[0] + 1) % len(index.classes)], "right": index.classes[0]}
    words["misspelt"] = index.classes[0][:-1] + "q"
    lines, message = WRONG[fault]
    path = answer(HEAD, f"0,{names[0]},1", *(line.format(**words) for line in lines))
    pattern = re.sub(r"{(\w+)}", lambda found: re.escape(str(words[found[1]])), message)
    with pytest.raises(UserError, match=rf"^{re.escape(str(path))}, {pattern}") as error:
        labelled(index, ["train"], 0, 0, [path])
    assert "\n" not in str(error.value)


def test_a_file_that_is_no_answer_is_refused(
    index: Index, names: dict[int, str], answer: Answer, tmp_path: Path
) -> None:
    for lines, message in (
        ([], "the file is empty"),
        ([HEAD], "no line below the names of the columns"),
        ([f"0,{names[0]},1"], "line 1: no column 'id': the first line names the columns, as in id,name,label"),
        (["id,name", f"0,{names[0]}"], "line 1: no column 'label'"),
        (["id,name,label,label", "0,a,0,0"], "line 1: more than one column 'label'"),
        ([HEAD, f"0,{names[0]},", f"1,{names[1]}, "], "none of its 2 lines has a label"),
        ([HEAD, "0,cat/1.png,0", "1,cat/2.png,0"], "line 2: 'cat/1.png' is not sample 0 of .* no other line fits it"),
    ):
        with pytest.raises(UserError, match=message):
            read_answers(answer(*lines), index)
    with pytest.raises(UserError, match=r"cannot be read \(No such file"):
        read_answers(tmp_path / "none.csv", index)
    (tmp_path / "book.xlsx").write_bytes(bytes(range(256)) * 9)
    with pytest.raises(UserError, match="no column 'id'"):
        read_answers(tmp_path / "book.xlsx", index)


def test_two_answers_may_agree_and_not_contradict(index: Index, names: dict[int, str], answer: Answer) -> None:
    a = answer(HEAD, f"4,{names[4]},1", name="a.csv")
    b = answer(HEAD, f"4,{names[4]},{index.classes[1]}", f"5,{names[5]},0", name="b.csv")
    c = answer(HEAD, f"8,{names[8]},1", f"4,{names[4]},0", name="c.csv")
    assert len(labelled(index, ["train"], 0, 0, [a, b]).ids) == 50
    with pytest.raises(UserError, match=r"c.csv, line 3: sample 4 is labelled \w+ already, not 0"):
        labelled(index, ["train"], 0, 0, [a, c])


def test_classes_that_are_named_by_numbers_go_by_name(index: Index, names: dict[int, str], answer: Answer) -> None:
    """A folder of 0, 1, 10, 11, 2 has class 10 in third place: a number that is no name would be anybody's guess."""
    numbered = replace(index, classes=("1", "10", "2"))
    found = read_answers(answer(HEAD, f"0,{names[0]},10", f"1,{names[1]},2", f"2,{names[2]},2.0"), numbered)
    assert found.labels.tolist() == [1, 2, 2]
    with pytest.raises(UserError, match="no class '0': the classes are 1, 10, 2"):
        read_answers(answer(HEAD, f"0,{names[0]},0"), numbered)


def test_the_pool_is_what_is_not_labelled_yet(index: Index) -> None:
    few = labelled(index, ["train"], per_class=1, seed=0)
    pool = unlabelled(index, ["train", "unlabeled"], few, 10)
    assert len(pool) == 96 + 48 - len(few.ids)
    assert not set(pool.tolist()) & set(few.ids.tolist())
    assert (np.diff(pool) > 0).all()
    part, more = (unlabelled(index, ["train", "unlabeled"], few, 10, limit, seed=3) for limit in (10, 50))
    assert (len(part), len(more), (np.diff(more) > 0).all()) == (10, 50, True)
    assert set(part.tolist()) <= set(more.tolist()) <= set(pool.tolist())
    with pytest.raises(UserError, match="--limit 10 leaves fewer images than are to be chosen: give --count 10"):
        unlabelled(index, ["unlabeled"], few, 11, limit=10)
    with pytest.raises(UserError, match=r"unlabeled of .* have 96 samples that are not labelled yet: give --count 96"):
        unlabelled(index, ["unlabeled"], few, 97)
    with pytest.raises(UserError, match=r"have 0 samples .*: name another --pool"):
        unlabelled(index, ["train"], labelled(index, ["train"], 0, 0), 1)
    with pytest.raises(UserError, match="--pool val: classifiers are judged on it"):
        unlabelled(index, ["train", "val"], few, 1)


def test_a_request_that_comes_back_with_labels_is_its_answer(index: Index, tmp_path: Path) -> None:
    ids = np.array([30, 2, 77])
    path = tmp_path / "request.csv"
    write_request(path, index, ids, {"distance": ["0.9", "0.8", "0.7"]})
    lines = path.read_text().splitlines()
    assert lines[0] == "id,name,distance,label"
    assert lines[1].startswith("30,unlabeled/")
    assert lines[1].endswith(",0.9,")
    with pytest.raises(UserError, match="none of its 3 lines has a label"):
        read_answers(path, index)
    path.write_text("\n".join([lines[0], lines[1] + index.classes[1], lines[2], lines[3] + "0"]))
    found = read_answers(path, index)
    assert (found.ids.tolist(), found.labels.tolist(), found.unanswered) == ([30, 77], [1, 0], 1)
    write_request(path, index, ids, {}, np.array([0, 1, 2]))
    assert read_answers(path, index).labels.tolist() == [1, 0, 2]  # by id


def test_names_of_any_bytes_come_back(index: Index, tmp_path: Path) -> None:
    odd = [b'a, "b".png', b"caf\xe9.png", "ü ;\t.png".encode()]
    file = tmp_path / "odd.names.txt"
    file.write_bytes(b"".join(name + b"\n" for name in odd))
    split = replace(index.split("unlabeled"), count=3, names=file)
    strange = replace(index, splits={"unlabeled": split})
    write_request(tmp_path / "r.csv", strange, np.arange(3), {}, np.array([1, 1, 0]))
    assert read_answers(tmp_path / "r.csv", strange).labels.tolist() == [1, 1, 0]


def test_launchers_need_no_torch_for_it() -> None:
    code = "import sys; import barlow.labels.table; assert 'torch' not in sys.modules and 'numba' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_nothing_known_is_a_labelled_of_nothing(index: Index) -> None:
    assert len(unlabelled(index, ["unlabeled"], Labelled(np.empty(0, np.int64), np.empty(0, np.int64)), 96)) == 96
