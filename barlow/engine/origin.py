"""What a run starts from: another run's newest checkpoint, its best, or one by name. Torch-free, for launchers too.

A run that goes on from another takes from it what its own config leaves open (data and their mean, size, network, and
from a classifier the head), and must not contradict it."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from barlow.config import Finetune, FixMatch, Head, Network, Request, Visualize
from barlow.errors import UserError
from barlow.files import read_json, read_status

Asked = TypeVar("Asked", Finetune, FixMatch, Request, Visualize)
FILE = re.compile(r"step-\d+\.pt")


def run_folder(where: str) -> Path:
    """The run that `where` means: its folder itself, the folder of its checkpoints or of its best, or one of these."""
    path = Path(where).expanduser().resolve()
    for folder in (path, path.parent, path.parent.parent):
        if (folder / "config.json").is_file():
            return folder
    if not path.exists():
        raise UserError(f"--from {where}: there is no such run: name a run's folder, or one of its checkpoints")
    raise UserError(f"--from {where}: neither a run's folder nor a checkpoint in one (there is no config.json)")


def config_of(where: str) -> dict[str, Any]:
    return read_json(run_folder(where) / "config.json")


def awaited(where: str) -> bool:
    """Whether the run has saved nothing there yet."""
    path = Path(where).expanduser().resolve()
    return not path.is_file() and not any(any(folder.glob("step-*.pt")) for folder in (path, path / "checkpoints"))


def began(folder: Path) -> bool:
    """Whether a run has taken what it starts from: it may have made steps, and goes on with that."""
    return read_status(folder).get("attempts", 0) > 0 or any((folder / "checkpoints").glob("step-*.pt"))


def copies(folder: Path, labels: Sequence[str]) -> list[Path]:
    """Where a run keeps the answers that it began with."""
    return [folder / "labels" / f"{number}.csv" for number in range(len(labels))]


def answers(folder: Path, labels: Sequence[str]) -> tuple[str, ...]:
    """The files of answers to be read: the run's own copies once it has begun, for people go on to fill theirs in."""
    own = copies(folder, labels)
    return tuple(map(str, own)) if began(folder) and all(copy.exists() for copy in own) else tuple(labels)


def changed_answers(folder: Path, labels: Sequence[str]) -> list[str]:
    """Those of `labels` that are not what they were when the run began, as far as they are still there."""
    pairs = zip(answers(folder, labels), labels, strict=True)
    return [name for own, name in pairs if own != name and _differ(Path(own), Path(name))]


def _differ(one: Path, other: Path) -> bool:
    try:
        return one.read_bytes() != other.read_bytes()
    except OSError:  # one is gone
        return False


def refuse_other_answers(folder: Path, labels: Sequence[str], resumed: str = "") -> None:
    """What a run learns from is settled when it begins, be it by flags or by files. `resumed`: the name by which
    launchers/jobs.py resumes it, if it is not its own."""
    for name in changed_answers(folder, labels):
        raise UserError(
            f"{name} has changed since run {folder.name!r} began with it: choose another --run to use it as it is now; "
            f"python launchers/jobs.py resume {resumed or folder.name} goes on with what it was"
        )


def keep(path: Path, folder: Path) -> Path:
    """Keep the checkpoint that a run starts from in its folder, and return it there: the run that it is of may go on,
    and remove it. As a second name of the same file, or where there can be none a copy; where there is no room for
    that, the run does without. A file without the record that runs save beside theirs is somebody's own, and stays."""
    own, record = folder / "origin", path.with_suffix(".json")
    if not record.exists():
        return path
    try:
        shutil.rmtree(own, ignore_errors=True)
        own.mkdir(parents=True)
        for file in (path, record):  # the record last: without it a checkpoint counts for nothing
            try:
                os.link(file, own / file.name)
            except OSError:  # another file system
                shutil.copyfile(file, own / file.name)
    except OSError:
        shutil.rmtree(own, ignore_errors=True)
        return path
    return own / path.name


def other_labels(config: FixMatch) -> str:
    """In what the labels that a classifier has learned from are others than those that FixMatch is to use."""
    stored = config_of(config.from_run) if config.from_run else {}
    if "labelled" not in stored:
        return ""
    mine, theirs = json.loads(json.dumps(dataclasses.asdict(config.labelled))), stored["labelled"]
    differ = [
        f"labelled.{name} {theirs.get(name)} there, {mine[name]} here"
        for name in mine
        if mine[name] != theirs.get(name)
    ]
    there = run_folder(config.from_run)
    if _contents(answers(there, stored.get("labels", ()))) != _contents(config.labels):
        differ.append("other answers")
    return f"{config.from_run} learned from other labels ({'; '.join(differ)})" if differ else ""


def _contents(files: Sequence[str]) -> list[bytes]:
    return sorted(Path(name).read_bytes() for name in files if Path(name).is_file())


def size_of(stored: dict[str, Any]) -> int:
    """The side at which the run's network sees images."""
    return int(stored.get("size") or stored.get("views", {}).get("size", 0))


def network_of(stored: dict[str, Any]) -> Network:
    model = stored["model"]
    return Network(model["backbone"], model["stem"], float(model["width"]))


def head_of(stored: dict[str, Any]) -> Head | None:
    """Of a classifier's run; None: there is a backbone alone."""
    head = stored.get("head")
    return Head(tuple(head["widths"]), head["dropout"], head["norm_input"]) if head else None


def settled(config: Asked, stored: dict[str, Any] | None = None) -> Asked:
    """The same with nothing left open: data, size, network and head are those that will be used. `stored`: the config
    of the run that it starts from, where that is yet to be made."""
    if not config.from_run:
        return _from_nothing(config)
    where, stored = config.from_run, stored or config_of(config.from_run)
    if "model" not in stored:
        raise UserError(f"--from {where}: that run trained no network: name one that did")
    there = stored["data"]
    mean, std = (getattr(config.data, name) or tuple(there.get(name, ())) for name in ("mean", "std"))
    data = replace(config.data, dir=config.data.dir or there["dir"], mean=mean, std=std)
    config = replace(
        config, from_run=str(Path(where).expanduser().resolve()), data=data, size=config.size or size_of(stored)
    )
    if isinstance(config, Visualize) and head_of(stored) is None:
        raise UserError(f"--from {where}: that run has a backbone alone: name a classifier's")
    if isinstance(config, Request | Visualize):
        return config
    head = config.head
    if isinstance(config, FixMatch):
        head = head_of(stored) or head
    elif config.form == "linear":
        head = Head(widths=(), dropout=0.0, norm_input=head.norm_input)
    network = network_of(stored)
    for name in ("backbone", "stem", "width"):
        asked, found = getattr(config.model, name), getattr(network, name)
        if asked and asked != found:
            raise UserError(f"--model.{name} {asked}: {where} has {found}: leave it out, or start from another run")
    return replace(config, model=network, head=head)


def _from_nothing(config: Asked) -> Asked:
    if isinstance(config, Request | Visualize):
        raise UserError("no --from: name the run whose network is to look at the images")
    if not config.model.backbone:
        raise UserError("no --from, and no --model.backbone: name a run to start from, or a backbone to train anew")
    if isinstance(config, Finetune) and config.form != "full":
        raise UserError(f"--form {config.form} keeps the backbone as it is: give --from a run that has trained one")
    if not config.size:
        raise UserError("--size 0 means that of the run to start from, and there is none: give the images' side")
    if not config.data.dir:
        raise UserError("no --from, and no --data.dir: name a folder of shards")
    model = config.model
    return replace(config, model=Network(model.backbone, model.stem or "small", model.width or 1.0))
