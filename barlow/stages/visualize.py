"""python -m barlow.stages.visualize RUN_FOLDER: what a trained classifier looks at in some images, as pictures.

Leaves pictures/grid.png, beside it a picture an image, and results.json. A run that was cut off begins anew."""

from __future__ import annotations

import io
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from barlow import dist, history
from barlow.config import Visualize
from barlow.data import chance
from barlow.data.loader import Batch, Loader
from barlow.data.shards import Index, read_index
from barlow.engine import origin
from barlow.engine.checkpoint import find, load, load_weights
from barlow.engine.loop import patiently
from barlow.engine.run import load_config
from barlow.errors import UserError
from barlow.files import write_json, write_status, write_whole
from barlow.models import classifier
from barlow.models.classifier import Classifier
from barlow.stages.classifiers import check_classes
from barlow.stages.outputs import whole
from barlow.stages.training import Here, begin, enter
from barlow.viz import grid
from barlow.viz.gradcam import grad_cam, guided_backprop, guided_grad_cam, last_stage

AT_ONCE = 16  # images on the device
ON_SHEET = 64  # images, at most; but each has a picture of its own
PICTURES = "pictures"  # in the run's folder
SHEET = f"{PICTURES}/grid.png"
Told = dict[str, "str | int | float"]


class Seen(NamedTuple):
    """By the classifier, in each image [n, ...]."""

    probabilities: Tensor  # [n, classes]
    target: Tensor  # int64 [n]: the class that was looked for
    cam: Tensor  # [n, h, w]
    guided: Tensor  # [n, 3, h, w]
    guided_cam: Tensor  # [n, 3, h, w]


def main(run_folder: str) -> None:
    folder = Path(run_folder)
    config = load_config(folder, Visualize)
    here = enter(folder, config)
    if dist.rank() == 0:  # there is too little to do for more
        show(config, here)
    dist.shutdown()


def show(config: Visualize, here: Here) -> None:
    index = read_index(config.data.dir).normalising(config.data.mean, config.data.std)
    loader = Loader(index, [config.split], workers=config.data.workers)
    positions = chosen(config, loader)
    model = classifier_of(config.from_run, index).to(here.device)
    begin(here.folder, 0, 1)
    rows: list[grid.Row] = []
    told: list[Told] = []
    for batch in loader.batches(np.split(positions, range(AT_ONCE, len(positions), AT_ONCE))):
        here.beats.beat(0, "evaluate", config.watch.start)
        seen = look(model, batch, index, config)
        words = in_words(batch, seen, index.classes)
        rows += rows_of(batch, seen, [caption(each) for each in words])
        told += words
    here.beats.beat(0, "save", config.watch.start)
    patiently(lambda: write(here.folder, rows, told), print)
    print(f"{len(told)} images of {config.split}: {here.folder / SHEET}", flush=True)


def write(folder: Path, rows: Sequence[grid.Row], told: Sequence[Told]) -> None:
    """The pictures, what they show, and that the run has ended."""
    pages = {str(each["picture"]): [row] for each, row in zip(told, rows, strict=True)} | {SHEET: rows[:ON_SHEET]}
    for name, page in pages.items():
        save(folder / name, grid.sheet(page))
    right = [each["predicted"] == each["label"] for each in told if each["label"]]
    results = {"top1": 100 * sum(right) / len(right)} if right else {}  # of these images
    write_json(folder / "results.json", {"steps": 1, **results, "images": told})
    write_status(folder, state="finished", step=1, why="")
    history.note(folder, "finished", step=1)


def chosen(config: Visualize, loader: Loader) -> np.ndarray:
    """Positions of the images to show: those asked for, in that order; or drawn, class after class."""
    ids, labels = loader.samples.ids.astype(np.int64), loader.samples.labels
    if config.ids:
        known = set(ids.tolist())
        if unknown := [id for id in config.ids if id not in known]:
            told = f"no such sample in --split {config.split}, whose ids are {ids.min()} to {ids.max()}"
            raise UserError(f"--ids {unknown[0]}: {told}: give one of them, or another --split")
        positions = loader.positions_of(np.array(config.ids))
    else:
        fit = np.flatnonzero(labels >= 0) if config.target == "label" else np.arange(len(ids))
        drawn = fit[drawn_over_classes(ids[fit], labels[fit], config.count, config.seed)]
        positions = drawn[np.lexsort((ids[drawn], labels[drawn]))]
    if config.target == "label" and not (len(positions) and (labels[positions] >= 0).all()):
        which = "some of --ids have no label" if config.ids else f"--split {config.split} has no labels"
        raise UserError(f"--target label: {which}: give --target predicted")
    return positions


def drawn_over_classes(ids: np.ndarray, labels: np.ndarray, count: int, seed: int) -> np.ndarray:
    """Which of the samples [n], `count` of them or all: one of each class, then a second of each, and so on."""
    keys = chance.words(seed, chance.Use.PICTURES, 0, torch.from_numpy(ids), slots=1)[:, 0, 0].numpy()
    order = np.lexsort((ids, keys, labels))  # class after class, in each by chance
    _, first, sizes = np.unique(labels[order], return_index=True, return_counts=True)
    turn = np.arange(len(ids)) - np.repeat(first, sizes)  # of each, in its class
    return order[np.lexsort((keys[order], turn))][:count]


def classifier_of(where: str, index: Index) -> Classifier:
    """The classifier of another run, in eval mode; all of it takes gradients, frozen in training or not."""
    stored = origin.config_of(where)
    head = origin.head_of(stored)
    if head is None:
        raise UserError(f"--from {where}: that run has a backbone alone: name a classifier's")
    path = find(where)
    found = load(path)
    check_classes(found, index, where)
    model = classifier.build(origin.network_of(stored), head, len(index.classes))
    load_weights(model, found["model"], str(path))
    return model.eval()


def look(model: Classifier, batch: Batch, index: Index, config: Visualize) -> Seen:
    """What `model` sees in the images, at the size at which it sees them."""
    device = next(model.parameters()).device
    mean, std = (torch.tensor(numbers, device=device).view(1, 3, 1, 1) for numbers in (index.mean, index.std))
    images = (whole(batch.images.to(device), config.size) - mean) / std
    with torch.no_grad():
        probabilities = model(images).softmax(1)
    target = probabilities.argmax(1) if config.target == "predicted" else batch.labels.to(device)
    cam = grad_cam(model, last_stage(model.backbone), images, target)
    guided = guided_backprop(model, images, target)
    seen = Seen(probabilities, target, cam, guided, guided_grad_cam(cam, guided))
    return Seen(*(part.cpu() for part in seen))


def rows_of(batch: Batch, seen: Seen, captions: Sequence[str]) -> list[grid.Row]:
    arrays = batch.images, seen.cam, seen.guided.permute(0, 2, 3, 1), seen.guided_cam.permute(0, 2, 3, 1)
    return [grid.Row(*row) for row in zip(*(array.numpy() for array in arrays), captions, strict=True)]


def in_words(batch: Batch, seen: Seen, classes: Sequence[str]) -> list[Told]:
    """For results.json: what each image is, what it was taken for, and which class was looked for in it."""
    told = []
    best = seen.probabilities.max(1)
    for at, (id, label) in enumerate(zip(batch.ids.tolist(), batch.labels.tolist(), strict=True)):
        predicted, target = int(best.indices[at]), int(seen.target[at])
        each: Told = {"id": id, "label": classes[label] if label >= 0 else ""}
        each |= {"predicted": classes[predicted], "probability": round(float(best.values[at]), 4)}
        each |= {"target": classes[target], "its_probability": round(float(seen.probabilities[at, target]), 4)}
        told.append(each | {"picture": f"{PICTURES}/{id}.png"})
    return told


def caption(told: Told) -> str:
    parts = [f"{told['id']}", f"true {told['label'] or 'unknown'}"]
    parts += [f"predicted {told['predicted']} {100 * float(told['probability']):.0f} %"]
    if told["target"] != told["predicted"]:
        parts += [f"looked for {told['target']} {100 * float(told['its_probability']):.0f} %"]
    return "   ".join(parts)


def save(path: Path, picture: Image.Image) -> None:
    """A reader never sees half a picture."""
    path.parent.mkdir(exist_ok=True)
    png = io.BytesIO()
    picture.save(png, "PNG")
    write_whole(path, png.getvalue())


if __name__ == "__main__":
    main(sys.argv[1])
