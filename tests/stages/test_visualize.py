"""Pictures of a classifier's run: those asked for, of the classifier that was trained, with what it says of them."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from barlow.config import Finetune, Head, Network, Pretrain, Shards, Visualize
from barlow.data.loader import Loader
from barlow.data.shards import read_index
from barlow.engine.checkpoint import Checkpoints, find, load
from barlow.errors import UserError
from barlow.files import write_json
from barlow.models import classifier
from barlow.stages.outputs import whole
from barlow.stages.visualize import drawn_over_classes, main

SIDE = 24  # not that of the images, which are 32
MEAN, STD = (0.4, 0.5, 0.6), (0.3, 0.2, 0.25)


@pytest.fixture(scope="module")
def trained(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that ended with a small classifier, its backbone frozen."""
    folder = tmp_path_factory.mktemp("runs") / "trained"
    (folder / "checkpoints").mkdir(parents=True)
    network, head = Network("resnet18", "cifar", 0.125), Head(widths=(16,))
    config = Finetune(run="trained", form="head", size=SIDE, model=network, head=head, data=Shards(str(tiny_data)))
    write_json(folder / "config.json", asdict(config))
    torch.manual_seed(0)
    model = classifier.build(network, head, 12, frozen=True)
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm2d | nn.BatchNorm1d):
            assert layer.running_mean is not None
            layer.running_mean.normal_(std=0.1)
    classes = list(read_index(tiny_data).classes)
    checkpoints = Checkpoints(folder / "checkpoints", keep=1)
    checkpoints.save(7, {"model": model.state_dict(), "classes": classes, "step": 7})
    checkpoints.finish()
    return folder


def show(config: Visualize, folder: Path) -> dict[str, Any]:
    folder.mkdir()
    write_json(folder / "config.json", asdict(config))
    main(str(folder))
    told = json.loads((folder / "results.json").read_text())
    assert isinstance(told, dict)
    return told


def asked(trained: Path, tiny_data: Path, **knobs: Any) -> Visualize:
    data = Shards(str(tiny_data), workers=1, mean=MEAN, std=STD)
    return Visualize(run="pictures", from_run=str(trained), size=SIDE, data=data, device="cpu", **knobs)


def test_images_are_drawn_over_all_classes_and_each_has_its_picture(
    trained: Path, tiny_data: Path, tmp_path: Path
) -> None:
    told = show(asked(trained, tiny_data, count=14), tmp_path / "run")
    labels = [image["label"] for image in told["images"]]
    assert len(labels) == 14
    assert set(labels) == set(read_index(tiny_data).classes)
    pictures = tmp_path / "run" / "pictures"
    one, sheet = Image.open(tmp_path / "run" / told["images"][0]["picture"]), Image.open(pictures / "grid.png")
    assert one.width == sheet.width
    assert sheet.height > 12 * one.height * 0.9
    assert len(list(pictures.iterdir())) == 15
    right = [image["label"] == image["predicted"] for image in told["images"]]
    assert told["top1"] == pytest.approx(100 * np.mean(right))
    assert json.loads((tmp_path / "run" / "status.json").read_text())["state"] == "finished"


@pytest.mark.parametrize("target", ["predicted", "label"])
def test_what_is_told_is_what_the_classifier_says(trained: Path, tiny_data: Path, tmp_path: Path, target: str) -> None:
    ids = (150, 191, 144)
    told = show(asked(trained, tiny_data, ids=ids, target=target), tmp_path / "run")["images"]
    index = read_index(tiny_data)
    model = classifier.build(Network("resnet18", "cifar", 0.125), Head(widths=(16,)), 12).eval()
    model.load_state_dict(load(find(str(trained)))["model"])
    loader = Loader(index, ["val"], workers=1)
    (batch,) = loader.batches([loader.positions_of(np.array(ids))])
    mean, std = (torch.tensor(numbers).view(1, 3, 1, 1) for numbers in (MEAN, STD))
    with torch.no_grad():
        chances = model((whole(batch.images, SIDE) - mean) / std).softmax(1)
    for at, image in enumerate(told):
        best, label = int(chances[at].argmax()), int(batch.labels[at])
        assert image["id"] == ids[at]
        assert image["predicted"] == index.classes[best]
        assert image["probability"] == pytest.approx(float(chances[at, best]), abs=1e-4)
        assert image["label"] == index.classes[label]
        wanted = best if target == "predicted" else label
        assert image["target"] == index.classes[wanted]
        assert image["its_probability"] == pytest.approx(float(chances[at, wanted]), abs=1e-4)
    first = Image.open(tmp_path / "run" / "pictures" / "150.png")
    shown = np.asarray(first.crop((4, 20, 4 + 192, 20 + 192)).resize((32, 32), Image.Resampling.BOX)).astype(int)
    assert np.abs(shown - batch.images[0].numpy()).mean() < 6


def test_images_without_labels_can_be_shown(trained: Path, tiny_data: Path, tmp_path: Path) -> None:
    config = asked(trained, tiny_data, split="unlabeled", count=3)
    told = show(config, tmp_path / "run")
    assert "top1" not in told
    assert [image["label"] for image in told["images"]] == [""] * 3
    assert show(config, tmp_path / "again") == told
    other = show(replace(config, seed=1), tmp_path / "other")
    assert {image["id"] for image in other["images"]} != {image["id"] for image in told["images"]}


@pytest.mark.parametrize(
    ("knobs", "line"),
    [
        ({"ids": (150, 12)}, "--ids 12: no such sample in --split val, whose ids are 144 to 191"),
        ({"split": "unlabeled", "target": "label"}, "--target label: --split unlabeled has no labels"),
        ({"split": "unlabeled", "ids": (1, 2), "target": "label"}, "--target label: some of --ids have no label"),
        ({"split": "test"}, "no split 'test'"),
    ],
)
def test_what_cannot_be_shown_is_one_line(
    trained: Path, tiny_data: Path, tmp_path: Path, knobs: dict[str, Any], line: str
) -> None:
    with pytest.raises(UserError, match=line) as raised:
        show(asked(trained, tiny_data, **knobs), tmp_path / "run")
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "run" / "results.json").exists()


def test_a_backbone_alone_and_other_classes_are_refused(trained: Path, tiny_data: Path, tmp_path: Path) -> None:
    folder = tmp_path / "pretrained"
    (folder / "checkpoints").mkdir(parents=True)
    write_json(folder / "config.json", asdict(Pretrain(run="pretrained")))
    with pytest.raises(UserError, match="has a backbone alone"):
        show(asked(folder, tiny_data), tmp_path / "a")
    stored = load(find(str(trained)))
    (tmp_path / "other" / "checkpoints").mkdir(parents=True)
    write_json(tmp_path / "other" / "config.json", json.loads((trained / "config.json").read_text()))
    path = tmp_path / "other" / "checkpoints" / "step-00000009.pt"
    torch.save({**stored, "classes": stored["classes"][::-1]}, path)
    with pytest.raises(UserError, match="it tells apart 12 classes"):
        show(asked(path, tiny_data), tmp_path / "b")


def test_a_draw_takes_turns_among_classes_and_depends_on_seed_and_ids_alone() -> None:
    rng = np.random.default_rng(0)
    ids, labels = np.arange(500), rng.choice(5, 500, p=[0.6, 0.2, 0.1, 0.08, 0.02])
    drawn = ids[drawn_over_classes(ids, labels, 20, seed=3)]
    assert len(set(drawn.tolist())) == 20
    assert np.bincount(labels[drawn]).tolist() == [4] * 5
    few = ids[drawn_over_classes(ids, labels, 7, seed=3)]
    assert np.array_equal(few, drawn[:7])
    shuffled = rng.permutation(500)
    assert np.array_equal(shuffled[drawn_over_classes(shuffled, labels[shuffled], 20, seed=3)], drawn)
    assert not np.array_equal(ids[drawn_over_classes(ids, labels, 20, seed=4)], drawn)
    rare = int((labels == 4).sum())
    many = drawn_over_classes(ids, labels, 200, seed=3)
    assert (labels[many] == 4).sum() == rare < 40
    assert len(drawn_over_classes(ids, labels, 900, seed=3)) == 500
