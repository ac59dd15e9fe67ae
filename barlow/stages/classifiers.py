"""What training a classifier takes, on labels alone or with FixMatch: the data with the labels that are known, a
network with another run's weights, and how good it is."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from barlow import dist
from barlow.config import Classifying, Finetune, FixMatch
from barlow.data import order
from barlow.data.loader import Loader
from barlow.data.shards import Index, read_index
from barlow.engine import origin
from barlow.engine.checkpoint import Checkpoints, load, load_weights, part
from barlow.engine.loop import patiently
from barlow.engine.preflight import together
from barlow.errors import UserError
from barlow.files import write_whole
from barlow.labels.table import HELD_OUT, Labelled, learnable
from barlow.models import classifier as classifiers
from barlow.models.classifier import Classifier
from barlow.stages.outputs import outputs, top
from barlow.stages.training import autocast, checkpoint_of, hashes

Encode = Callable[[Tensor], Tensor]


def data_of(config: Classifying, folder: Path) -> tuple[Index, Labelled, list[str]]:
    """What there is to learn from; lines for the log beside it.

    Answers are copied into the run's folder at its first start and read there from then on: people may go on to fill
    them in while the run is put back."""
    index = together(lambda: read_index(config.data.dir)).normalising(config.data.mean, config.data.std)
    labels, told = answers_of(config.labels, folder)
    known = together(lambda: learnable(replace(config, labels=labels), index))
    keep_answers(labels, folder)
    return index, known, told


def answers_of(labels: tuple[str, ...], folder: Path) -> tuple[tuple[str, ...], list[str]]:
    """The files to read, the same on all ranks; lines for the log, of those that have changed since the run began."""
    own, changed = dist.broadcast((origin.answers(folder, labels), origin.changed_answers(folder, labels)))
    return own, [f"{name} is not what it was when this run began, which goes on with what it was" for name in changed]


def keep_answers(labels: tuple[str, ...], folder: Path) -> None:
    """Copy the answers that have been read into the run's folder, unless they are those."""
    for copy, name in zip(origin.copies(folder, labels), labels, strict=True):
        if dist.rank() == 0 and Path(name) != copy:
            copy.parent.mkdir(parents=True, exist_ok=True)
            write_whole(copy, Path(name).read_bytes())


def best_of(folder: Path, writes: bool) -> tuple[Checkpoints, list[str]]:
    """Where a run keeps its best. One that is damaged is put aside: the run itself does not need it."""
    best = Checkpoints(folder / "best", keep=1)
    if writes:
        best.folder.mkdir(exist_ok=True)
        try:
            best.tidy()
        except RuntimeError as damage:
            for file in best.folder.glob("step-*"):
                file.rename(file.with_name(f"damaged-{file.name}"))
            return best, [f"warning: {damage}; put aside: the best from here on is kept"]
    return best, []


def splits_with(index: Index, known: Labelled, besides: Sequence[str] = ()) -> list[str]:
    """The splits that the labelled images are of, and these, in the order of ids."""
    found = []
    for split in sorted(index.splits.values(), key=lambda split: split.first_id):
        first, last = np.searchsorted(known.ids, [split.first_id, split.first_id + split.count])
        if last > first or split.name in besides:
            found.append(split.name)
    return found


def fingerprint(index: Index, splits: Sequence[str], known: Labelled) -> list[str]:
    """Of all that a run learns from: the shards, and which labels."""
    digest = hashlib.sha256(known.ids.tobytes() + known.labels.tobytes()).hexdigest()
    return [*hashes(index, splits), digest]


def build(config: Classifying, index: Index, device: torch.device) -> Classifier:
    """The network as it is initialised by the seed alone."""
    torch.manual_seed(config.seed)
    frozen = isinstance(config, Finetune) and config.form != "full"
    classifier = classifiers.build(config.model, config.head, len(index.classes), frozen)
    return classifier.to(device).to(memory_format=torch.channels_last)


def start_from(classifier: Classifier, config: Classifying, index: Index, folder: Path) -> list[str]:
    """Lay the weights of the run to start from over it: the backbone's, and FixMatch goes on with its head too."""
    if not config.from_run:
        return ["from nothing: no --from"]
    path = checkpoint_of(config.from_run, folder)
    stored = load(path)
    parts = [("backbone", classifier.backbone)]
    if isinstance(config, FixMatch) and any(name.startswith("head.") for name in stored["model"]):
        check_classes(stored, index, config.from_run)
        parts.append(("head", classifier.head))
    for name, own in parts:
        load_weights(own, part(stored, name), f"{path} ({name})")
    return [f"{' and '.join(name for name, _ in parts)} of {name_of(config.from_run)}, step {stored['step']}"]


def name_of(where: str) -> str:
    """The run's, whichever of its files is named."""
    path = Path(where).resolve()
    path = path.parent if path.suffix == ".pt" else path
    return path.parent.name if path.name in ("best", "checkpoints") else path.name


def check_classes(stored: dict[str, Any], index: Index, where: str) -> None:
    there, here = stored.get("classes", []), list(index.classes)
    if there != here:
        known, have = (f"{len(names)} classes ({', '.join(names[:3])}, ...)" for names in (there, here))
        what = f"it tells apart {known}, {index.folder} has {have}"
        raise UserError(f"--from {where}: {what}: start from a run on these data, or give its --data.dir")


class Judge:
    """How often a classifier is right, on what it learned from and on val, seen whole; and its best so far."""

    def __init__(
        self, config: Classifying, index: Index, loader: Loader, known: Labelled, device: torch.device
    ) -> None:
        self.index, self.size, self.device = index, config.size, device
        self.train, self.positions = loader, loader.positions_of(known.ids)
        self.labels = torch.from_numpy(known.labels).to(device)
        self.val = Loader(index, [HELD_OUT], workers=config.data.workers, pin=device.type == "cuda")
        judged = np.flatnonzero(self.val.samples.labels >= 0)
        self.judged = judged[order.limited(config.seed, len(judged), config.val_limit)]
        self.truth = torch.from_numpy(self.val.samples.labels[self.judged].astype(np.int64)).to(device)
        self.best: dict[str, float] = {"step": 0, "val_top1": -1.0}

    def accuracies(
        self, classifier: nn.Module, dtype: torch.dtype, beat: Callable[[], object]
    ) -> Iterator[tuple[str, float]]:
        """train_top1, val_top1 and val_top5, in per cent."""
        was_training = classifier.training
        classifier.eval()

        def encode(images: Tensor) -> Tensor:
            with autocast(dtype, self.device):
                logits: Tensor = classifier(images.contiguous(memory_format=torch.channels_last))
            return logits

        try:
            learned = outputs(encode, self.train, self.positions, self.index, self.size, self.device, beat)
            unseen = outputs(encode, self.val, self.judged, self.index, self.size, self.device, beat)
        finally:
            classifier.train(was_training)
        yield "train_top1", top(learned, self.labels, [1])[0]
        yield from zip(("val_top1", "val_top5"), top(unseen, self.truth, [1, 5]), strict=True)

    def note(
        self,
        found: dict[str, float],
        step: int,
        best: Checkpoints,
        state: Callable[[], dict[str, Any]],
        say: Callable[[str], object],
    ) -> None:
        """Keep what is better on val than all before. It is on the disk before the run goes on, for nothing later would
        make it again: neither a row of metrics.jsonl nor a checkpoint may know of an evaluation that it does not."""

        def keep() -> None:
            best.save(step, {**state(), "best": self.best})
            best.finish()

        if found["val_top1"] > self.best["val_top1"]:
            self.best = {"step": step, "val_top1": found["val_top1"]}
            if dist.rank() == 0:  # only one writes
                patiently(keep, say)
            dist.barrier()  # the others wait here, where they may take their time

    def remember(self, best: Checkpoints, data: Sequence[str]) -> None:
        """What an earlier process of this run has kept, if it learned from the same `data`."""
        path = best.newest()[0] if dist.rank() == 0 else None
        kept = load(path) if path else {}
        self.best = dist.broadcast(kept["best"] if kept.get("data") == list(data) else self.best)
