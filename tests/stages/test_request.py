"""A request from a run's backbone to the CSV that a person gets, and what comes back of it."""

from __future__ import annotations

import csv
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from barlow import history, stop
from barlow.config import Data, Labelled, Model, Pretrain, Request, Shards, Views
from barlow.data.loader import Loader
from barlow.data.shards import read_index
from barlow.engine import run
from barlow.engine.checkpoint import Checkpoints, find
from barlow.errors import UserError
from barlow.files import read_json, read_status, write_json
from barlow.labels import rules, table
from barlow.stages import request
from barlow.stages.pretrain import build

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
Answer = list[dict[str, str]]


@pytest.fixture(scope="module")
def pretrained(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of a backbone that has learned nothing."""
    folder = tmp_path_factory.mktemp("pretrained")
    config = Pretrain(data=Data(dir=str(tiny_data)), views=Views(size=32), model=Model(width=0.125, projector=(32, 32)))
    write_json(folder / "config.json", asdict(config))
    (folder / "checkpoints").mkdir()
    checkpoints = Checkpoints(folder / "checkpoints", 1)
    checkpoints.save(3, {"model": build(config, CPU).state_dict()})
    checkpoints.finish()
    return folder


@pytest.fixture
def ask(tmp_path: Path, tiny_data: Path, pretrained: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """ask(name, **knobs): the folder of a request that has been made, in this very process."""
    monkeypatch.setattr(stop, "_told", "")
    monkeypatch.setattr(stop, "_listening", True)

    def make(name: str, **knobs: Any) -> Path:
        config = Request(
            run=name,
            runs_dir=str(tmp_path),
            device="cpu",
            size=32,
            data=Shards(dir=str(tiny_data), workers=1),
            labelled=Labelled(per_class=2),
            **{"count": 20, "from_run": str(pretrained), **knobs},
        )
        folder = run.prepare(config, "", ROOT)
        request.main(str(folder))
        return folder

    return make


def rows_of(folder: Path) -> Answer:
    with open(folder / "request.csv", newline="") as file:
        return list(csv.DictReader(file))


def features_of(pretrained: Path, tiny_data: Path, splits: list[str]) -> tuple[np.ndarray, Tensor]:
    """Ids and features of whole splits, an image at a time."""
    index = read_index(tiny_data)
    loader = Loader(index, splits, workers=1)
    backbone, size = request.backbone_of(str(pretrained), find(str(pretrained)))
    assert size == 32
    mean, std = (torch.tensor(each).view(1, 3, 1, 1) for each in (index.mean, index.std))
    found = []
    with torch.no_grad():
        for batch in loader.batches(np.arange(len(loader)).reshape(-1, 1)):
            found.append(backbone((batch.images.permute(0, 3, 1, 2) / 255 - mean) / std))
    return loader.samples.ids, rules.unit(torch.cat(found))


def test_the_farthest_from_the_labelled_ones_by_the_papers_rule(
    ask: Callable[..., Path], pretrained: Path, tiny_data: Path
) -> None:
    folder = ask("paper")
    asked = rows_of(folder)
    assert list(asked[0]) == ["id", "name", "distance", "label"]
    index = read_index(tiny_data)
    known = table.labelled(index, ["train"], 2, 0)
    ids, features = features_of(pretrained, tiny_data, ["train"])
    labelled = features[np.isin(ids, known.ids)]
    pool_ids, pool = features_of(pretrained, tiny_data, ["unlabeled"])
    expected = rules.farthest_from_centres(labelled, pool, len(index.classes), 20, seed=0)
    assert [int(row["id"]) for row in asked] == pool_ids[expected.rows.numpy()].tolist()
    np.testing.assert_allclose([float(row["distance"]) for row in asked], expected.distances, atol=1e-4)
    assert {row["label"] for row in asked} == {""}
    assert all(row["name"].startswith("unlabeled/") for row in asked)
    results, status = read_json(folder / "results.json"), read_status(folder)
    assert (results["count"], results["rule"], "classes" in results) == (20, "kmeans", False)
    assert results["mean_distance"] == pytest.approx(float(expected.distances.mean()), abs=1e-4)
    assert (status["state"], status["step"], status["steps"]) == ("finished", 96 + len(known.ids), 96 + len(known.ids))
    assert [event["event"] for event in history.read(folder)] == ["start", "finished"]
    assert "20 images to be labelled" in (folder / "logs" / "rank_0.log").read_text()


@pytest.mark.parametrize(("rule", "column"), [("k-centre", "distance"), ("typical", "spread")])
def test_the_other_rules_choose_what_they_say(
    ask: Callable[..., Path], pretrained: Path, tiny_data: Path, rule: str, column: str
) -> None:
    folder = ask("other", rule=rule)
    known = table.labelled(read_index(tiny_data), ["train"], 2, 0)
    ids, features = features_of(pretrained, tiny_data, ["train"])
    pool_ids, pool = features_of(pretrained, tiny_data, ["unlabeled"])
    labelled = features[np.isin(ids, known.ids)]
    expected = {
        "k-centre": lambda: rules.k_centre_greedy(labelled, pool, 20),
        "typical": lambda: rules.typical(labelled, pool, 20, seed=0),
    }[rule]()
    asked = rows_of(folder)
    assert [int(row["id"]) for row in asked] == pool_ids[expected.rows.numpy()].tolist()
    np.testing.assert_allclose([float(row[column]) for row in asked], expected.distances, atol=1e-4)
    assert f"mean_{column}" in read_json(folder / "results.json")


def test_a_simulated_person_answers_and_the_next_request_knows(ask: Callable[..., Path], tiny_data: Path) -> None:
    """The pool is the split whose labels are hidden; what was answered is labelled then, and not asked again."""
    index = read_index(tiny_data)
    true = dict(zip(*(each.tolist() for each in table.in_shards(index, ["train"])), strict=True))
    knobs: dict[str, Any] = {"pool": ("train",), "oracle": True, "count": 8}
    first = ask("first", rule="k-centre", **knobs)
    answered = {int(row["id"]): row["label"] for row in rows_of(first)}
    assert answered == {i: index.classes[true[i]] for i in answered}
    assert 0 < read_json(first / "results.json")["classes"] <= 100
    second = rows_of(ask("second", rule="k-centre", labels=(str(first / "request.csv"),), **knobs))
    known = set(table.labelled(index, ["train"], 2, 0, [first / "request.csv"]).ids.tolist())
    assert set(answered) <= known
    assert not {int(row["id"]) for row in second} & known
    control = rows_of(ask("control", rule="random", from_run="", **knobs))
    assert list(control[0]) == ["id", "name", "label"]
    assert {int(row["id"]) for row in control} != set(answered)
    assert [row["label"] for row in control] == [index.classes[true[int(row["id"])]] for row in control]


def test_a_request_that_has_been_filled_in_is_not_written_over(ask: Callable[..., Path]) -> None:
    folder = ask("twice", rule="random")
    (folder / "request.csv").write_text("what a person wrote")
    request.main(str(folder))
    assert (folder / "request.csv").read_text() == "what a person wrote"
    assert read_status(folder)["state"] == "finished"


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"count": 97}, "unlabeled of .* have 96 samples that are not labelled yet: give --count 96 or less"),
        ({"labelled": Labelled(splits=("unlabeled",))}, "split unlabeled of .* has no labels"),
        ({"oracle": True}, "--oracle answers with the labels of the shards, but unlabeled of .* have 96 samples"),
        ({"labels": ("none.csv",)}, r"none.csv: cannot be read \(No such file"),
        ({"from_run": "nowhere"}, "no checkpoint nowhere: name a run folder or a .pt file"),
    ],
)
def test_what_cannot_be_asked_is_refused_in_a_line(
    tmp_path: Path, tiny_data: Path, pretrained: Path, monkeypatch: pytest.MonkeyPatch, knobs: Any, message: str
) -> None:
    monkeypatch.setattr(stop, "_listening", True)
    given = {"count": 20, "from_run": str(pretrained), "labelled": Labelled(per_class=2), **knobs}
    config = Request(run="r", runs_dir=str(tmp_path), device="cpu", data=Shards(dir=str(tiny_data)), **given)
    folder = run.prepare(config, "", ROOT)
    with pytest.raises(UserError, match=message):
        request.main(str(folder))
    assert not (folder / "request.csv").exists()


def test_a_checkpoint_that_is_not_the_runs_is_refused(pretrained: Path, tmp_path: Path) -> None:
    stored = read_json(pretrained / "config.json")
    (tmp_path / "checkpoints").symlink_to(pretrained / "checkpoints")
    write_json(tmp_path / "config.json", {**stored, "model": {**stored["model"], "stem": "imagenet"}})
    with pytest.raises(UserError, match=r"is of another architecture \(conv1.weight: \(8, 3, 3, 3\) in the checkpoint"):
        request.backbone_of(str(tmp_path), find(str(tmp_path)))


def seen(pretrained: str, data: str, batches: int) -> tuple[Tensor | None, list[int]]:
    """What the first rank has of 75 images, and what it chooses."""
    request.BATCH, request.BATCHES = 8, batches
    index = read_index(data)
    loader = Loader(index, ["unlabeled"], workers=1)
    backbone, _ = request.backbone_of(pretrained, find(pretrained))
    positions = np.arange(75)[::-1].copy()
    features = request.look(backbone, loader, positions, index, 48, CPU, lambda: None, lambda done: None)
    config = replace(Request(rule="k-centre", count=10), pool=("unlabeled",))

    def work(told: request.Tell) -> tuple[Tensor, Tensor | None]:
        return request.choose(config, index, positions, features, 15, told)

    chosen = request.on_first_rank(work, lambda: None, lambda done: None)
    return features, [] if chosen is None else chosen[0].tolist()


def test_two_ranks_see_and_choose_what_one_does(
    on_ranks: Callable[..., list[Any]], pretrained: Path, tiny_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("BATCH", "BATCHES"):
        monkeypatch.setattr(request, name, 0)  # and back again after `seen`
    alone, chosen = seen(str(pretrained), str(tiny_data), 3)
    assert alone is not None
    torch.testing.assert_close(alone.norm(dim=1), torch.ones(75))
    (features, rows), other = on_ranks(2, seen, str(pretrained), str(tiny_data), 1)
    assert torch.equal(features, alone)
    assert (rows, other) == (chosen, (None, []))
