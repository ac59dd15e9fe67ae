"""What classifiers learn from, start from and are judged by; what stays as it is where a backbone is frozen."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from barlow import dist, stop
from barlow.config import Data, Finetune, FixMatch, Head, Labelled, Model, Network, Pretrain, Shards, Views
from barlow.data import operations
from barlow.data.ctaugment import Bins
from barlow.data.loader import Loader
from barlow.data.shards import Index, read_index
from barlow.data.weak import normalised
from barlow.engine import checkpoint, loop, origin
from barlow.engine.checkpoint import Checkpoints, find, load
from barlow.errors import UserError
from barlow.files import read_json, write_json, write_status
from barlow.labels import table
from barlow.objectives.supervised import Supervised
from barlow.stages import classifiers, finetune, fixmatch, pretrain, training
from barlow.stages.classifiers import Judge
from barlow.stages.training import distribute

Ranks = Callable[..., list[Any]]
NOWHERE = Path("/proc/nowhere")  # what a run starts from would be kept there
CPU = torch.device("cpu")
NETWORK = Network("resnet10t", "small", 0.125)


def pretrained_run(folder: Path, data: Path) -> Path:
    """The run of a backbone whose weights and statistics are not those that any network begins with."""
    config = Pretrain(
        data=Data(dir=str(data)),
        views=Views(size=32),
        model=Model(backbone="resnet10t", width=0.125, projector=(16, 16)),
        seed=7,
    )
    model = pretrain.build(config, CPU)
    with torch.no_grad():
        model(list(torch.rand(2, 64, 3, 32, 32)))
    (folder / "checkpoints").mkdir(parents=True)
    write_json(folder / "config.json", asdict(config))
    checkpoints = Checkpoints(folder / "checkpoints", 1)
    checkpoints.save(3, {"model": model.state_dict()})
    checkpoints.finish()
    return folder


@pytest.fixture(scope="module")
def bt(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pretrained_run(tmp_path_factory.mktemp("runs") / "bt", tiny_data)


def asked(kind: Any, data: Path, **knobs: Any) -> Any:
    given = {"size": 24, "model": NETWORK, "head": Head(widths=(16,)), "labelled": Labelled(per_class=2), **knobs}
    return kind(data=(Data if kind is FixMatch else Shards)(dir=str(data), workers=1), device="cpu", **given)


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stage in this very process."""
    monkeypatch.setattr(stop, "_told", "")
    monkeypatch.setattr(stop, "_listening", True)
    monkeypatch.setattr(loop, "AGAIN", 0.0)


def test_what_there_is_to_learn_from(tiny_data: Path, tmp_path: Path) -> None:
    config = asked(Finetune, tiny_data)
    config = replace(config, data=replace(config.data, mean=(0.1, 0.2, 0.3)))
    index, known, _ = classifiers.data_of(config, NOWHERE)
    assert index.mean == (0.1, 0.2, 0.3)
    assert index.std == read_index(tiny_data).std
    expected = table.labelled(index, ["train"], 2, 0)
    assert (known.ids.tolist(), known.labels.tolist()) == (expected.ids.tolist(), expected.labels.tolist())
    assert np.bincount(known.labels).tolist() == [2] * 12


def without_labels_in_val(data: Path, folder: Path) -> Path:
    content = read_json(data / "index.json")
    content["splits"]["val"]["labeled"] = 0
    folder.mkdir()
    for path in data.iterdir():
        (folder / path.name).symlink_to(path)
    (folder / "index.json").unlink()
    write_json(folder / "index.json", content)
    return folder


def test_what_a_classifier_is_judged_on_has_labels_and_is_not_learned_from(tiny_data: Path, tmp_path: Path) -> None:
    def told(config: Finetune | FixMatch) -> str:
        with pytest.raises(UserError) as error:
            classifiers.data_of(config, NOWHERE)
        return str(error.value)

    on_val = Labelled(splits=("train", "val"))
    assert "--labelled.splits val: classifiers are judged on it" in told(asked(Finetune, tiny_data, labelled=on_val))
    config = asked(FixMatch, tiny_data)
    config = replace(config, data=replace(config.data, splits=("unlabeled", "val")))
    assert "--data.splits val: classifiers are judged on it" in told(config)
    bare = without_labels_in_val(tiny_data, tmp_path / "bare")
    assert "has no split val with labels" in told(asked(FixMatch, bare))
    content = read_json(bare / "index.json")
    del content["splits"]["val"]
    write_json(bare / "index.json", content)
    assert "has no split val with labels" in told(asked(Finetune, bare))


def test_the_splits_that_are_read_and_what_tells_them_from_others(tiny_data: Path) -> None:
    index, known, _ = classifiers.data_of(asked(Finetune, tiny_data), NOWHERE)
    assert classifiers.splits_with(index, known) == ["train"]
    names = sorted(("train", "unlabeled"), key=lambda name: index.split(name).first_id)
    assert classifiers.splits_with(index, known, ["unlabeled"]) == names
    ids = np.sort(np.append(known.ids, index.split("unlabeled").first_id + 5))
    answered = replace(known, ids=ids, labels=np.append(known.labels, 3))
    assert classifiers.splits_with(index, answered) == names

    one = classifiers.fingerprint(index, ["train"], known)
    assert one == classifiers.fingerprint(index, ["train"], replace(known))
    other = replace(known, labels=np.roll(known.labels, 1))
    for splits, labels in ((["train"], other), (["train"], answered), (["train", "unlabeled"], known)):
        assert classifiers.fingerprint(index, splits, labels) != one


def state_of(config: Finetune | FixMatch, index: Index) -> tuple[dict[str, Tensor], list[str]]:
    model = classifiers.build(config, index, CPU)
    told = classifiers.start_from(model, config, index, NOWHERE)
    return dict(model.state_dict()), told


def same(a: dict[str, Tensor], b: dict[str, Tensor], prefix: str) -> bool:
    names = [name for name in a if name.startswith(prefix)]
    assert names == [name for name in b if name.startswith(prefix)]
    return all(torch.equal(a[name], b[name]) for name in names)


def test_a_backbone_is_taken_over_and_fixmatch_goes_on_with_a_head(bt: Path, tiny_data: Path, tmp_path: Path) -> None:
    index = read_index(tiny_data)
    backbone = load(find(str(bt)))["model"]
    fresh, told = state_of(asked(Finetune, tiny_data), index)
    assert told == ["from nothing: no --from"]
    assert not same(fresh, backbone, "backbone.")
    for kind in (Finetune, FixMatch):
        found, told = state_of(asked(kind, tiny_data, from_run=str(bt)), index)
        assert same(found, backbone, "backbone.")
        assert same(found, fresh, "head.")
        assert told == ["backbone of bt, step 3"]

    (tmp_path / "clf" / "best").mkdir(parents=True)
    best = Checkpoints(tmp_path / "clf" / "best", 1)
    moved = {name: tensor + 1 for name, tensor in fresh.items()}
    best.save(9, {"model": moved, "classes": list(index.classes)})
    best.finish()
    where = {"from_run": str(tmp_path / "clf" / "best")}
    found, told = state_of(asked(FixMatch, tiny_data, **where), index)
    assert same(found, moved, "")
    assert told == ["backbone and head of clf, step 9"]
    found, told = state_of(asked(Finetune, tiny_data, **where), index)
    assert same(found, moved, "backbone.")
    assert same(found, fresh, "head.")

    with pytest.raises(UserError, match=r"it tells apart 12 classes \(.+\), .+ has 11 classes"):
        state_of(asked(FixMatch, tiny_data, **where), replace(index, classes=index.classes[1:]))
    renamed = ("another", *index.classes[1:])
    with pytest.raises(UserError, match=r"has 12 classes \(another, "):
        state_of(asked(FixMatch, tiny_data, **where), replace(index, classes=renamed))
    with pytest.raises(UserError, match=r"\(head\) is of another architecture"):
        state_of(asked(FixMatch, tiny_data, head=Head(widths=(17,)), **where), index)
    with pytest.raises(UserError, match=r"\(backbone\) is of another architecture"):
        state_of(asked(Finetune, tiny_data, model=replace(NETWORK, stem="imagenet"), **where), index)


def judged(data: str, bt: str) -> dict[str, float]:
    """The accuracies of a classifier, in training, as ranks compute them."""
    config = asked(Finetune, Path(data), from_run=bt)
    index, known, _ = classifiers.data_of(config, NOWHERE)
    model = classifiers.build(config, index, CPU)
    classifiers.start_from(model, config, index, NOWHERE)
    loader = Loader(index, ["train"], workers=1).relabelled(known.ids, known.labels)
    judge = Judge(config, index, loader, known, CPU)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    found = dict(judge.accuracies(model.train(), torch.float32, lambda: None))
    assert model.training
    assert same(before, dict(model.state_dict()), "")
    return found


def by_hand(data: Path, bt: Path) -> dict[str, float]:
    """The same, an image at a time: on the labelled ones alone, and on all of val."""
    index, known, _ = classifiers.data_of(asked(Finetune, data), NOWHERE)
    weights, _ = state_of(asked(Finetune, data, from_run=str(bt)), index)
    model = classifiers.build(asked(Finetune, data), index, CPU).eval()
    model.load_state_dict(weights)
    mean, std = (torch.tensor(each).view(1, 3, 1, 1) for each in (index.mean, index.std))
    hits: dict[str, list[bool]] = {"train_top1": [], "val_top1": [], "val_top5": []}
    for split in ("train", "val"):
        loader = Loader(index, [split], workers=1)
        for batch in loader.batches(np.arange(len(loader)).reshape(-1, 1)):
            x = torch.nn.functional.interpolate(
                batch.images.permute(0, 3, 1, 2) / 255, (24, 24), mode="bicubic", antialias=True
            )
            with torch.no_grad():
                order = model((x.clamp(0, 1) - mean) / std)[0].argsort(descending=True).tolist()
            place = order.index(int(batch.labels[0]))
            if split == "val":
                hits["val_top1"].append(place < 1)
                hits["val_top5"].append(place < 5)
            elif int(batch.ids[0]) in known.ids:
                hits["train_top1"].append(place < 1)
    assert [len(each) for each in hits.values()] == [24, 48, 48]
    return {name: 100 * sum(each) / len(each) for name, each in hits.items()}


def kept(data: str, bt: str) -> list[str]:
    """What of a frozen backbone stays as it is when its head learns, as the stage hangs both on its ranks."""
    config = asked(Finetune, Path(data), from_run=bt, form="head")
    classifier = classifiers.build(config, read_index(data), CPU)
    classifiers.start_from(classifier, config, read_index(data), NOWHERE)
    before = {name: tensor.clone() for name, tensor in classifier.state_dict().items()}
    model = distribute(Supervised(classifier), CPU).train()
    images = torch.rand(4, 3, 24, 24, generator=torch.Generator().manual_seed(dist.rank()))
    model([images, torch.tensor([0, 1, 2, 3])])[0].backward()
    with torch.no_grad():
        for p in classifier.parameters():
            p.sub_(0 if p.grad is None else p.grad)
    return [name for name, tensor in classifier.state_dict().items() if torch.equal(tensor, before[name])]


def refused(where: str) -> str:
    try:
        training.checkpoint_of(where, NOWHERE)
    except UserError as error:
        return str(error)
    return ""


def on_a_rank(data: str, bt: str, empty: str) -> tuple[dict[str, float], list[str], str]:
    return judged(data, bt), kept(data, bt), refused(empty)


@pytest.fixture(scope="module")
def ranks(on_ranks: Ranks, tiny_data: Path, bt: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    empty = tmp_path_factory.mktemp("empty")
    (empty / "checkpoints").mkdir()
    (empty / "checkpoints" / "step-000000001.pt").touch()  # no record beside it
    return on_ranks(2, on_a_rank, str(tiny_data), str(bt), str(empty))


def test_accuracies_are_what_a_hand_counts_on_whole_images(ranks: list[Any], tiny_data: Path, bt: Path) -> None:
    expected = by_hand(tiny_data, bt)
    assert 0 < expected["val_top1"] < expected["val_top5"] < 100
    for found in (judged(str(tiny_data), str(bt)), *(found for found, _, _ in ranks)):
        assert found == pytest.approx(expected)


def test_a_frozen_backbone_keeps_its_statistics_among_ranks_too(ranks: list[Any], bt: Path) -> None:
    of_backbone = [name for name in load(find(str(bt)))["model"] if name.startswith("backbone.")]
    for _, same_as_before, _ in ranks:
        assert same_as_before == of_backbone


def test_what_rank_0_cannot_find_every_rank_refuses(ranks: list[Any]) -> None:
    for _, _, told in ranks:
        assert told.startswith("no good checkpoint in ")
        assert told.endswith("/checkpoints: name a run that has saved one")


@pytest.fixture
def judge(tiny_data: Path) -> Judge:
    index, known, _ = classifiers.data_of(asked(Finetune, tiny_data), NOWHERE)
    return Judge(asked(Finetune, tiny_data), index, Loader(index, ["train"], workers=1), known, CPU)


def noted(judge: Judge, best: Checkpoints, values: dict[int, float], told: list[str] | None = None) -> None:
    """An evaluation after each of these steps, at which the weights are the step's number."""
    for step, value in values.items():
        weights = {"w": torch.full((3,), float(step))}
        say = told.append if told is not None else print
        judge.note({"val_top1": value}, step, best, lambda w=weights: {"model": w, "data": ["d"]}, say)  # type: ignore[misc]


def test_the_best_is_on_the_disk_before_the_run_goes_on(judge: Judge, tmp_path: Path) -> None:
    best = Checkpoints(tmp_path, keep=1)
    for step, value, kept in ((3, 0.0, 3), (6, 25.0, 6), (9, 20.0, 6), (12, 25.0, 6), (15, 26.0, 15)):
        noted(judge, best, {step: value})
        path, _ = Checkpoints(tmp_path, keep=1).newest()  # as another process would find it at this moment
        assert path == find(str(tmp_path)) == tmp_path / f"step-{kept:09d}.pt"
        assert load(path)["model"]["w"].tolist() == [kept] * 3
        assert load(path)["best"] == judge.best
    assert judge.best == {"step": 15, "val_top1": 26.0}


def test_a_run_that_goes_on_knows_the_best_there_was(judge: Judge, tiny_data: Path, tmp_path: Path) -> None:
    """It may be newer than the checkpoint that the run goes on from, and newer than what that one knows of: a run that
    is told to stop leaves an evaluation to its next start."""
    best = Checkpoints(tmp_path, keep=1)
    judge.remember(best, ["d"])
    assert judge.best["val_top1"] < 0  # there is none: any accuracy is better, 0 as well
    noted(judge, best, {6: 25.0})
    for data, expected in ((["d"], 25.0), (["other"], -1.0)):
        judge.best = {"step": 0, "val_top1": -1.0}
        judge.remember(Checkpoints(tmp_path, keep=1), data)
        assert judge.best["val_top1"] == expected


def test_a_disk_that_does_not_take_the_best_is_waited_for(
    judge: Judge, tmp_path: Path, here: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    tries: list[int] = []

    def full(*given: Any) -> None:
        tries.append(1)
        if len(tries) < 3:
            raise OSError(28, "No space left on device")
        write_json(*given)

    monkeypatch.setattr(checkpoint, "write_json", full)
    told: list[str] = []
    noted(judge, Checkpoints(tmp_path, keep=1), {6: 25.0}, told)
    assert load(find(str(tmp_path)))["best"] == {"step": 6, "val_top1": 25.0}
    assert len(told) == 2
    assert all("No space left on device" in line for line in told)


def fine_tuned(data: Path, bt: Path, folder: Path, form: str) -> Path:
    """The folder of a short run, in this very process."""
    config = asked(Finetune, data, from_run=str(bt), form=form, epochs=2, batch_size=8, run=form)
    if form == "linear":
        config = replace(config, head=Head(widths=(), dropout=0.0))
    for sub in ("checkpoints", "logs"):
        (folder / sub).mkdir(parents=True)
    write_json(folder / "config.json", asdict(config))
    finetune.main(str(folder))
    return folder


@pytest.mark.parametrize("form", ["full", "head", "linear"])
def test_a_frozen_backbone_keeps_every_weight_and_statistic(
    form: str, tiny_data: Path, bt: Path, tmp_path: Path, here: None
) -> None:
    before = load(find(str(bt)))["model"]
    after = load(find(str(fine_tuned(tiny_data, bt, tmp_path / form, form))))["model"]
    names = [name for name in before if name.startswith("backbone.")]
    changed = [name for name in names if not torch.equal(before[name], after[name])]
    assert changed == (names if form == "full" else [])
    heads = [name for name in after if name.startswith("head.")]
    assert (heads == ["head.0.weight", "head.0.bias"]) == (form == "linear")
    results = read_json(tmp_path / form / "results.json")
    assert results["steps"] == 6
    assert {"train_top1", "val_top1", "val_top5", "best_step", "best_val_top1"} <= results.keys()


def test_ctaugment_s_bins_learn_from_how_the_classifier_answers_and_leave_it_as_it_was(tiny_data: Path) -> None:
    """Whole, not as it trains: no dropout, no statistics of the batch; and it goes on training."""
    config = asked(FixMatch, tiny_data, head=Head(widths=(16,), dropout=0.5))
    index = read_index(tiny_data)
    model = classifiers.build(config, index, CPU).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    chance = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (6, 3, 24, 24), dtype=torch.uint8, generator=chance)
    labels, looks = torch.arange(6), torch.arange(40, 46)
    bins, expected = Bins(CPU), Bins(CPU)
    fixmatch.teach(bins, model, images, labels, looks, config, index, torch.float32)
    assert all(part.training for part in model.modules())
    assert same(before, dict(model.state_dict()), "")

    policy, chosen = expected.probe(config.seed, 0, looks)
    probed = normalised(operations.apply(images, policy), index.mean, index.std)
    with torch.no_grad():
        answers = [model.eval()(one[None]).softmax(1)[0] for one in probed]
    expected.update(chosen, torch.stack([p[y] for p, y in zip(answers, labels, strict=True)]).double())
    torch.testing.assert_close(bins.weights, expected.weights, rtol=0, atol=1e-6)
    assert float(bins.weights.min()) < 0.995


def test_a_run_goes_on_with_the_answers_that_it_began_with(tmp_path: Path, tiny_data: Path) -> None:
    answers = tmp_path / "answered.csv"
    index = read_index(tiny_data)
    pool = index.split("unlabeled")
    names = pool.names.read_text().splitlines()
    lines = [f"{pool.first_id + i},{names[i]},{index.classes[0]}" for i in range(4)]
    answers.write_text("\n".join(["id,name,label", *lines]) + "\n")
    config = replace(asked(Finetune, tiny_data), labels=(str(answers),))
    run = tmp_path / "run"
    _, first, told = classifiers.data_of(config, run)
    assert told == []
    answers.write_text("\n".join(["id,name,label", *lines[:3]]) + "\n")
    _, fewer, told = classifiers.data_of(config, run)
    assert told == []
    assert len(fewer.ids) == len(first.ids) - 1, "it has not begun, so it takes them as they are"
    answers.write_text("\n".join(["id,name,label", *lines]) + "\n")
    classifiers.data_of(config, run)
    write_status(run, attempts=1)
    answers.write_text("\n".join(["id,name,label", *lines[:2]]) + "\n")
    with pytest.raises(
        UserError, match=r"answered.csv has changed since run 'run' began with it: choose another --run"
    ):
        origin.refuse_other_answers(run, config.labels)
    _, again, told = classifiers.data_of(config, tmp_path / "run")
    assert np.array_equal(first.ids, again.ids)
    assert told == [f"{answers} is not what it was when this run began, which goes on with what it was"]
    answers.unlink()
    origin.refuse_other_answers(run, config.labels)  # whoever has filled it in may put it away
    _, gone, told = classifiers.data_of(config, run)
    assert np.array_equal(first.ids, gone.ids)
    assert told == []


def saved(folder: Path, step: int, state: dict[str, Any]) -> None:
    checkpoints = Checkpoints(folder / "checkpoints", 1)
    checkpoints.save(step, state)
    checkpoints.finish()


def test_a_run_starts_from_the_same_checkpoint_again_though_that_run_went_on(bt: Path, tmp_path: Path) -> None:
    """Its own folder keeps it, until it has one of its own."""
    other, run = tmp_path / "other", tmp_path / "run"
    shutil.copytree(bt, other)
    first = training.checkpoint_of(str(other), run)
    assert first == run / "origin" / find(str(other)).name
    before = load(first)["step"]
    state = {"model": load(first)["model"]}
    saved(other, before + 1, state)
    assert load(training.checkpoint_of(str(other), run))["step"] == before + 1, (
        "it has not begun, so it takes the newest"
    )
    write_status(run, attempts=1)
    saved(other, before + 2, state)
    assert load(training.checkpoint_of(str(other), run))["step"] == before + 1
    assert load(find(str(other)))["step"] == before + 2
    shutil.rmtree(other)
    assert load(training.checkpoint_of(str(other), run))["step"] == before + 1
    (run / "origin" / "step-000000004.pt").rename(run / "lost.pt")
    with pytest.raises(UserError, match="no checkpoint"):
        training.checkpoint_of(str(other), run)


def test_a_damaged_best_is_put_aside(tmp_path: Path) -> None:
    (tmp_path / "best").mkdir()
    kept = Checkpoints(tmp_path / "best", keep=1)
    kept.save(3, {"model": {"w": torch.ones(3)}, "best": {"step": 3, "val_top1": 50.0}})
    kept.finish()
    file = tmp_path / "best" / "step-000000003.pt"
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    best, told = classifiers.best_of(tmp_path, writes=True)
    assert len(told) == 1
    assert "put aside" in told[0]
    assert best.newest()[0] is None
    assert (tmp_path / "best" / f"damaged-{file.name}").exists()
    assert classifiers.best_of(tmp_path, writes=True)[1] == []
