"""What a run starts from: another run's newest checkpoint, its best, or one by name. Torch-free, for launchers too.

A run that goes on from another takes from it what its own config leaves open (data and their mean, size, network, and
from a classifier the head), and must not contradict it."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from barlow.config import Finetune, FixMatch, Head, Network, Request, Visualize
from barlow.errors import UserError
from barlow.files import read_json

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
