"""Which labels are trained with: those in the shards, so many a class if asked, and those that people have answered.

A request and its answer are the same CSV file, with the columns id, name and label; an answer is taken whole or not at
all. What the shards hold of an image beyond that is hidden from training, so a pool may be a split that has labels.
Everything goes by sample id. Torch-free, for launchers and ranks."""

from __future__ import annotations

import codecs
import csv
import difflib
import hashlib
import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from barlow.config import Classifying, FixMatch, Request
from barlow.data.layout import FIELD, FIELDS, HEADER, SAMPLE
from barlow.data.shards import Index
from barlow.errors import UserError
from barlow.files import write_whole

COLUMNS = ("id", "name", "label")
HELD_OUT = "val"
"""The split that classifiers are judged on: it is neither asked for nor learned from."""


@dataclass(frozen=True)
class Labelled:
    ids: np.ndarray  # int64 [n], ascending
    labels: np.ndarray  # int64 [n]
    unanswered: int = 0
    """Lines of the answers that had no label."""


@dataclass(frozen=True)
class Row:
    """A line of an answered request."""

    line: int
    id: str
    name: str
    label: str


def labelled(
    index: Index, splits: Sequence[str], per_class: int, seed: int, answers: Sequence[str | Path] = ()
) -> Labelled:
    """The labelled samples of `splits`, `per_class` a class if that is above 0, and those of the answered CSV files."""
    ids, labels = in_shards(index, splits)
    for split in splits:
        if not index.split(split).labeled:
            raise UserError(f"split {split} of {index.folder} has no labels: name one that has (--labelled.splits)")
    ids, labels = ids[labels >= 0], labels[labels >= 0]
    if per_class:
        short = np.bincount(labels, minlength=len(index.classes))
        if short.min() < per_class:
            what = f"class {index.classes[short.argmin()]} has {short.min()} labels in {' and '.join(splits)}"
            fewer = f"{short.min()} or less" if short.min() else "0 for all there are"
            raise UserError(f"{what}, {per_class} a class are asked for: give --labelled.per-class {fewer}")
        drawn = draw(ids, labels, per_class, seed)
        ids, labels = ids[drawn], labels[drawn]
    known = dict(zip(ids.tolist(), labels.tolist(), strict=True))
    unanswered = 0
    for path in answers:
        answered = read_answers(path, index, known)
        known |= zip(answered.ids.tolist(), answered.labels.tolist(), strict=True)
        unanswered += answered.unanswered
    return Labelled(*_sorted(known), unanswered)


def unlabelled(
    index: Index, splits: Sequence[str], known: Labelled, count: int, limit: int = 0, seed: int = 0
) -> np.ndarray:
    """The pool that `count` samples are to be chosen from, as ids int64 [n] ascending: `splits` without what is known,
    of which no more than `limit` are drawn if that is above 0. A pool that is smaller than `count` is refused."""
    if HELD_OUT in splits:
        raise UserError(f"--pool {HELD_OUT}: classifiers are judged on it; name splits that may be learned from")
    ids = np.concatenate([_ids(index, split) for split in splits])
    ids = np.setdiff1d(ids, known.ids)
    if len(ids) < count:
        what = f"{' and '.join(splits)} of {index.folder} have {len(ids)} samples that are not labelled yet"
        raise UserError(f"{what}: give --count {len(ids)} or less" if len(ids) else f"{what}: name another --pool")
    if 0 < limit < count:
        raise UserError(f"--limit {limit} leaves fewer images than are to be chosen: give --count {limit} or less")
    return ids[draw(ids, np.zeros_like(ids), limit, seed)] if limit else ids


def learnable(config: Classifying, index: Index) -> Labelled:
    """The labels that a classifier learns from. What it is judged on has labels as well, and is not learned from."""
    if HELD_OUT not in index.splits or not index.split(HELD_OUT).labeled:
        raise UserError(f"{index.folder} has no split {HELD_OUT} with labels, which classifiers are judged on: add one")
    splits = {"--labelled.splits": config.labelled.splits}
    if isinstance(config, FixMatch):
        splits["--data.splits"] = config.data.splits
    for flag, names in splits.items():
        if HELD_OUT in names:
            raise UserError(f"{flag} {HELD_OUT}: classifiers are judged on it: name splits to learn from")
    knobs = config.labelled
    return labelled(index, knobs.splits, knobs.per_class, knobs.seed, config.labels)


def asked(config: Request, index: Index) -> tuple[Labelled, np.ndarray]:
    """What a request knows, and the ids of the pool that it chooses from; one that cannot be made is refused."""
    if HELD_OUT in config.labelled.splits:
        raise UserError(f"--labelled.splits {HELD_OUT}: classifiers are judged on it: name splits to learn from")
    known = labelled(index, config.labelled.splits, config.labelled.per_class, config.labelled.seed, config.labels)
    pool = unlabelled(index, config.pool, known, config.count, config.limit, config.seed)
    unknown = int((truth(index, config.pool, pool) < 0).sum())
    if config.oracle and unknown:
        what = f"{' and '.join(config.pool)} of {index.folder} have {unknown} samples without a label"
        raise UserError(f"--oracle answers with the labels of the shards, but {what}: leave it out")
    return known, pool


def truth(index: Index, splits: Sequence[str], ids: np.ndarray) -> np.ndarray:
    """The labels that the shards have for these samples of the splits, -1 where they have none."""
    known, labels = in_shards(index, splits)
    return labels[np.searchsorted(known, ids)]


def in_shards(index: Index, splits: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Ids and labels (-1: none) of all samples of the splits, both int64 [n], by id."""
    shards = [shard for split in splits for shard in index.split(split).files]
    ids, labels = [np.empty(0, np.int64)], [np.empty(0, np.int64)]
    for shard in shards:
        rows = np.fromfile(shard.path, SAMPLE, shard.count, offset=HEADER.itemsize + len(FIELDS) * FIELD.itemsize)
        ours = np.arange(shard.first_id, shard.first_id + shard.count)
        right = np.array_equal(rows["id"], ours) and rows["label"].max(initial=-1) < len(index.classes)
        if not right:
            raise UserError(f"{shard.path}: not what index.json says: write this folder again with launchers/shards.py")
        ids.append(ours)
        labels.append(rows["label"].astype(np.int64))
    all_ids, all_labels = np.concatenate(ids), np.concatenate(labels)
    order = np.argsort(all_ids, kind="stable")
    return all_ids[order], all_labels[order]


def draw(ids: np.ndarray, labels: np.ndarray, per_class: int, seed: int) -> np.ndarray:
    """Which of the samples [n] bool: of each class the `per_class` whose hash of (seed, id) is the least.

    Of a hash no version of a library can change anything; and more a class, by the same seed, holds the fewer."""
    words = (hashlib.blake2b(f"{seed} {i}".encode(), digest_size=8).digest() for i in ids.tolist())
    keys = np.frombuffer(b"".join(words), "<u8")
    order = np.lexsort((keys, labels))
    by_class = labels[order]
    place = np.arange(len(ids)) - np.searchsorted(by_class, by_class)
    chosen = np.zeros(len(ids), bool)
    chosen[order[place < per_class]] = True
    return chosen


def read_answers(path: str | Path, index: Index, known: Mapping[int, int] | None = None) -> Labelled:
    """An answered request: a CSV file with the columns id, name and label (a class's name or number), and any others.

    Lines without a label are not answered yet, and counted. Whatever is wrong with a line, or contradicts the labels
    `known` by id, is a UserError with the file and the line, and nothing of the file is used."""
    path = Path(path).expanduser()
    rows, names, classes = list(_rows(path)), _names(index), Classes(index.classes)
    if len(rows) > 1 and not any(_fits(row, names) for row in rows):
        told = f"{rows[0].name!r} is not sample {rows[0].id} of {index.folder}, and no other line fits it either"
        raise UserError(f"{path}, line {rows[0].line}: {told}: give the answer to a request for these data")
    lines: dict[int, int] = {}
    found: dict[int, int] = {}
    for row in rows:
        fault = _misnamed(row, names, index) or _unwanted(int(row.id), lines, index)
        if not fault and row.label:
            fault = classes.fault(row.label) or _contradicts(int(row.id), classes, row.label, known or {})
        if fault:
            raise UserError(f"{path}, line {row.line}: {fault}")
        lines[int(row.id)] = row.line
        if row.label:
            found[int(row.id)] = classes.number(row.label)
    if not found:
        raise UserError(f"{path}: none of its {len(rows)} lines has a label: fill its column 'label' in")
    return Labelled(*_sorted(found), len(rows) - len(found))


def write_request(
    path: Path, index: Index, ids: np.ndarray, columns: Mapping[str, Sequence[object]], labels: np.ndarray | None = None
) -> None:
    """Samples to be labelled, in the order of `ids`: id, name, further columns, label. The label is for a person to
    fill in, unless `labels` are given. The file is written whole or not at all."""
    names = _names(index)
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(["id", "name", *columns, "label"])
    words = [""] * len(ids) if labels is None else [index.classes[label] for label in labels]
    for i, *others, label in zip(ids.tolist(), *columns.values(), words, strict=True):
        table.writerow([i, names[i], *others, label])
    write_whole(path, text.getvalue().encode(errors="surrogateescape"))


class Classes:
    """What a person may write for a class: its name, or its number where no class has a number for a name."""

    def __init__(self, names: Sequence[str]) -> None:
        self.names = names
        self.numbers = {name: number for number, name in enumerate(names)}
        if not any(name.isdecimal() for name in names):
            self.numbers |= {str(number): number for number in range(len(names))}

    def number(self, label: str) -> int:
        plain = label.removesuffix(".0")  # what spreadsheets make of numbers with gaps between them
        return self.numbers[label if label in self.numbers else plain]

    def fault(self, label: str) -> str:
        """Why it is none of them; empty if it is one."""
        if label in self.numbers or label.removesuffix(".0") in self.numbers:
            return ""
        if label.removeprefix("-").isdecimal() and "0" in self.numbers:
            return f"class {label} is out of range: there are 0 to {len(self.names) - 1}"
        lower = {name.lower(): name for name in self.names}
        near = difflib.get_close_matches(label.lower(), lower, n=1, cutoff=0.7)
        some = ", ".join(self.names[:3]) + (", ..." if len(self.names) > 3 else "")
        return f"no class {label!r}: " + (f"did you mean {lower[near[0]]}?" if near else f"the classes are {some}")


def _rows(path: Path) -> Iterator[Row]:
    """The lines of the file; commas, semicolons or tabs between columns, in UTF-8 or UTF-16: so spreadsheets write."""
    try:
        written = path.read_bytes()
        if written.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
            text = written.decode("utf-16", errors="replace")
        else:
            text = written.decode("utf-8-sig", errors="surrogateescape")
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}): give --labels an answered request") from None
    head = text.lstrip().partition("\n")[0]
    if not head:
        raise UserError(f"{path}: the file is empty: give --labels an answered request")
    lines = csv.reader(io.StringIO(text, newline=""), delimiter=max(",;\t", key=head.count))
    columns: list[str] = []
    found = False
    try:
        for cells in lines:
            if not any(cell.strip() for cell in cells):
                continue
            if not columns:
                columns = [cell.strip().lower() for cell in cells]
                for name in COLUMNS:
                    if columns.count(name) != 1:
                        what = "no column" if name not in columns else "more than one column"
                        told = f"{what} {name!r}: the first line names the columns, as in {','.join(COLUMNS)}"
                        raise UserError(f"{path}, line {lines.line_num}: {told}")
                continue
            if len(cells) != len(columns):
                told = f"{len(cells)} columns instead of {len(columns)}"
                raise UserError(f"{path}, line {lines.line_num}: {told}: a name with a comma in it needs quotes")
            found = True
            row = dict(zip(columns, cells, strict=True))
            yield Row(lines.line_num, row["id"].strip(), row["name"], row["label"].strip())
    except csv.Error as error:
        raise UserError(f"{path}, line {lines.line_num}: not a line of a CSV file ({error})") from None
    if not found:
        raise UserError(f"{path}: no line below the names of the columns: give --labels an answered request")


def _fits(row: Row, names: Sequence[str]) -> bool:
    return row.id.isdecimal() and int(row.id) < len(names) and names[int(row.id)] == row.name


def _misnamed(row: Row, names: Sequence[str], index: Index) -> str:
    """What is wrong with the line's id and name; empty if they are one another's."""
    if _fits(row, names):
        return ""
    if not row.id.isdecimal():
        return f"{row.id!r} is no sample id: leave the column as it was in the request"
    if int(row.id) >= len(names):
        return f"no sample {row.id} in {index.folder}, which has 0 to {len(names) - 1}"
    whose = f"sample {names.index(row.name)}" if row.name in names else f"not in {index.folder}"
    return f"sample {row.id} is {names[int(row.id)]}, and {row.name!r} is {whose}"


def _unwanted(sample: int, lines: Mapping[int, int], index: Index) -> str:
    if sample in lines:
        return f"sample {sample} is in line {lines[sample]} already: leave one of them"
    held_out = index.splits.get(HELD_OUT)
    if held_out and held_out.first_id <= sample < held_out.first_id + held_out.count:
        return f"sample {sample} is of {HELD_OUT}, which classifiers are judged on: take the line out"
    return ""


def _contradicts(sample: int, classes: Classes, label: str, known: Mapping[int, int]) -> str:
    if known.get(sample, classes.number(label)) == classes.number(label):
        return ""
    return f"sample {sample} is labelled {classes.names[known[sample]]} already, not {label}: correct one of them"


def _ids(index: Index, split: str) -> np.ndarray:
    first = index.split(split).first_id
    return np.arange(first, first + index.split(split).count)


def _names(index: Index) -> list[str]:
    """Where each sample of the folder came from, by id."""
    names: list[str] = []
    for split in sorted(index.splits.values(), key=lambda split: split.first_id):
        try:
            lines = split.names.read_bytes().decode(errors="surrogateescape").split("\n")[:-1]
        except OSError as error:
            raise UserError(f"{split.names}: cannot be read ({error.strerror}): write the shards again") from None
        if len(lines) != split.count or split.first_id != len(names):
            raise UserError(f"{split.names}: {len(lines)} names for {split.count} samples: write the shards again")
        names += lines
    return names


def _sorted(found: Mapping[int, int]) -> tuple[np.ndarray, np.ndarray]:
    ids = np.array(sorted(found), np.int64)
    return ids, np.array([found[i] for i in ids.tolist()], np.int64)
