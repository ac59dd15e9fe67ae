"""What a run starts from: whatever a person names of another run; what it takes from there, and must not contradict."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from barlow.config import (
    Data,
    Finetune,
    FixMatch,
    Head,
    Labelled,
    Model,
    Network,
    Pretrain,
    Request,
    Shards,
    Views,
    Visualize,
)
from barlow.engine import origin
from barlow.errors import UserError
from barlow.files import read_json, write_json

NORMALS: dict[str, Any] = {"mean": (0.4, 0.5, 0.6), "std": (0.2, 0.3, 0.25)}
PRETRAIN = Pretrain(
    run="bt",
    views=Views(size=48),
    data=Data(dir="/data/shards", **NORMALS),
    model=Model(backbone="wide_resnet50_2", stem="dense", width=0.5),
)


def made(folder: Path, config: Any, *saved: str) -> Path:
    """A run's folder with its config, and files of these names."""
    write_json(folder / "config.json", asdict(config))
    for name in saved:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"weights")
    return folder


@pytest.fixture
def bt(tmp_path: Path) -> Path:
    (tmp_path / "bt").mkdir()
    return made(tmp_path / "bt", PRETRAIN, "checkpoints/step-000000004.pt", "best/step-000000002.pt")


@pytest.fixture
def classifier(tmp_path: Path, bt: Path) -> Path:
    (tmp_path / "clf").mkdir()
    head = Head(widths=(64, 32), dropout=0.25, norm_input=True)
    config = origin.settled(Finetune(run="clf", from_run=str(bt), head=head))
    return made(tmp_path / "clf", config, "checkpoints/step-000000008.pt")


def test_a_run_is_named_by_any_of_its_places(bt: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for where in ("", "checkpoints", "checkpoints/step-000000004.pt", "best", "best/step-000000002.pt"):
        assert origin.run_folder(str(bt / where)) == bt
        assert not origin.awaited(str(bt / where)), where
    monkeypatch.chdir(bt.parent)
    assert origin.run_folder("bt/best") == bt
    monkeypatch.setenv("HOME", str(bt.parent))
    assert origin.config_of("~/bt")["run"] == "bt"


def test_what_is_no_run_is_told_in_a_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--from nowhere: there is no such run"):
        origin.run_folder("nowhere")
    (tmp_path / "empty" / "deep" / "er").mkdir(parents=True)
    with pytest.raises(UserError, match=r"neither a run's folder nor a checkpoint in one \(there is no config.json\)"):
        origin.run_folder(str(tmp_path / "empty" / "deep" / "er"))


def test_a_place_where_nothing_has_been_saved_is_waited_for(bt: Path) -> None:
    """What `find` would not find, whatever else of the run there is."""
    (bt / "best" / "step-000000002.pt").unlink()
    for where in ("best", "best/step-000000002.pt", "checkpoints/step-000000005.pt", "bset"):
        assert origin.awaited(str(bt / where)), where
    assert not origin.awaited(str(bt))
    (bt / "checkpoints" / "step-000000004.pt").unlink()
    (bt / "checkpoints" / "step-000000004.json").write_text("{}")
    (bt / "best" / "step-000000002.pt").touch()
    assert origin.awaited(str(bt))
    assert origin.awaited(str(bt / "checkpoints"))
    assert not origin.awaited(str(bt / "best"))


@pytest.mark.parametrize("kind", [Finetune, FixMatch])
def test_what_is_left_open_is_as_in_the_run_to_start_from(bt: Path, kind: Any) -> None:
    found = origin.settled(kind(from_run=f"{bt}/"))
    assert found.from_run == str(bt)
    assert found.data == replace(kind().data, dir="/data/shards", **NORMALS)
    assert found.size == 48
    assert found.model == Network("wide_resnet50_2", "dense", 0.5)
    assert found.head == Head()  # there is none to be taken over
    assert origin.settled(found) == found


def test_what_is_given_stays(bt: Path) -> None:
    given = Finetune(
        from_run=str(bt),
        size=64,
        data=Shards(dir="/other", mean=(0.1, 0.1, 0.1)),
        model=Network("wide_resnet50_2", "dense", 0.5),
    )
    found = origin.settled(given)
    assert (found.size, found.model) == (64, given.model)
    assert (found.data.dir, found.data.mean, found.data.std) == ("/other", (0.1, 0.1, 0.1), NORMALS["std"])


def test_fixmatch_goes_on_with_a_classifier_s_head_and_finetune_with_one_of_its_own(classifier: Path) -> None:
    head = Head(widths=(64, 32), dropout=0.25, norm_input=True)
    stored = origin.config_of(str(classifier))
    assert origin.head_of(stored) == head
    assert origin.settled(FixMatch(from_run=str(classifier))).head == head
    assert origin.settled(Finetune(from_run=str(classifier))).head == Head()
    found = origin.settled(FixMatch(from_run=str(classifier)))
    assert (found.size, found.model, found.data.dir) == (48, Network("wide_resnet50_2", "dense", 0.5), "/data/shards")
    assert origin.head_of(asdict(PRETRAIN)) is None


def test_a_linear_classifier_has_one_layer_whatever_the_head_says(bt: Path) -> None:
    for norm in (True, False):
        given = Finetune(from_run=str(bt), form="linear", head=Head(widths=(9, 9), dropout=0.5, norm_input=norm))
        assert origin.settled(given).head == Head(widths=(), dropout=0.0, norm_input=norm)
    given = Finetune(from_run=str(bt), form="head", head=Head(widths=(9, 9)))
    assert origin.settled(given).head.widths == (9, 9)


@pytest.mark.parametrize("kind", [Finetune, FixMatch])
@pytest.mark.parametrize(
    ("asked", "told"),
    [
        (Network(backbone="resnet18"), "--model.backbone resnet18: {} has wide_resnet50_2: leave it out"),
        (Network(stem="small"), "--model.stem small: {} has dense: leave it out"),
        (Network(width=1.0), "--model.width 1.0: {} has 0.5: leave it out"),
    ],
)
def test_a_network_that_contradicts_the_run_is_refused(bt: Path, kind: Any, asked: Network, told: str) -> None:
    with pytest.raises(UserError) as error:
        origin.settled(kind(from_run=str(bt), model=asked))
    assert told.format(bt) in str(error.value)


def test_looking_takes_the_size_and_the_data_and_pictures_need_a_classifier(bt: Path, classifier: Path) -> None:
    found = origin.settled(Request(from_run=str(bt)))
    assert (found.size, found.data.dir, found.data.mean) == (48, "/data/shards", NORMALS["mean"])
    assert origin.settled(Visualize(from_run=str(classifier))).size == 48
    with pytest.raises(UserError, match="that run has a backbone alone: name a classifier's"):
        origin.settled(Visualize(from_run=str(bt)))
    (bt.parent / "asked").mkdir()
    made(bt.parent / "asked", Request(from_run=str(bt)))
    with pytest.raises(UserError, match="that run trained no network: name one that did"):
        origin.settled(Finetune(from_run=str(bt.parent / "asked")))


NEW: dict[str, Any] = {"model": Network("resnet18"), "size": 32, "data": Data(dir="/data/shards")}


@pytest.mark.parametrize(
    ("config", "told"),
    [
        (FixMatch(), "no --from, and no --model.backbone"),
        (Finetune(form="head", **NEW), "--form head keeps the backbone as it is: give --from"),
        (Finetune(form="linear", **NEW), "--form linear keeps the backbone as it is: give --from"),
        (Finetune(**{**NEW, "size": 0}), "--size 0 means that of the run to start from"),
        (FixMatch(**{**NEW, "data": Data()}), "no --from, and no --data.dir"),
        (Request(), "no --from: name the run"),
        (Visualize(), "no --from: name the run"),
    ],
)
def test_without_a_run_to_start_from_all_must_be_given(config: Any, told: str) -> None:
    with pytest.raises(UserError, match=told):
        origin.settled(config)


def test_without_a_run_to_start_from_the_network_is_new() -> None:
    assert origin.settled(FixMatch(**NEW)).model == Network("resnet18", "small", 1.0)
    given = Network("resnet18", "cifar", 0.25)
    assert origin.settled(Finetune(**{**NEW, "model": given})).model == given


def test_fixmatch_is_told_of_other_labels_than_its_classifier_had(classifier: Path, tmp_path: Path) -> None:
    answers = tmp_path / "request.csv"
    answers.write_text("id,label\n1,cat\n")
    same = FixMatch(from_run=str(classifier), labelled=Labelled())
    assert origin.other_labels(same) == ""
    assert "labelled.per_class 0 there, 4 here" in origin.other_labels(replace(same, labelled=Labelled(per_class=4)))
    asked = replace(same, labels=(str(answers),))
    assert "(other answers)" in origin.other_labels(asked)
    stored = read_json(classifier / "config.json")
    write_json(classifier / "config.json", {**stored, "labels": ["/elsewhere/request.csv"]})
    (classifier / "labels").mkdir()
    (classifier / "labels" / "0.csv").write_bytes(answers.read_bytes())
    assert origin.other_labels(asked) == "", "it is what is in them that counts"
    assert "(other answers)" in origin.other_labels(same)
    assert origin.other_labels(FixMatch()) == ""


def test_what_a_run_starts_from_is_kept_where_it_can_be(
    bt: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, run = bt / "checkpoints" / "step-000000004.pt", tmp_path / "run"
    assert origin.keep(path, run) == path, "without a record it is a file of somebody's own"
    path.with_suffix(".json").write_text("{}")
    kept = origin.keep(path, run)
    assert kept == run / "origin" / path.name
    assert kept.samefile(path)
    assert kept.with_suffix(".json").exists()

    def refused(*_: object) -> None:
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(origin.os, "link", refused)
    assert origin.keep(path, run) == kept
    assert not kept.samefile(path)
    assert kept.read_bytes() == path.read_bytes()
    monkeypatch.setattr(origin.shutil, "copyfile", refused)
    assert origin.keep(path, run) == path, "it does without"
    assert not (run / "origin").exists()
