"""The chain's plan: every run closed and fed by the one before; what is left out where nobody answers; rehearsals."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path

import pytest

from barlow.config import Data, Reproduce
from barlow.data.shards import Index, Split
from barlow.errors import UserError
from barlow.papers.barlowmatch import parts
from barlow.recipes import REPRODUCE

NAMES = [
    "pretrain",
    "finetune",
    "fixmatch",
    "request-kmeans",
    "finetune-kmeans",
    "fixmatch-kmeans",
    "pictures",
    "table",
]


def index(pool_labels: int = 0, per_class: int = 32) -> Index:
    """The paper's set: 512,000 images without labels, 32 labelled ones a class for training and for val."""
    labelled = 800 * per_class
    counts = {"unlabeled": (512_000, pool_labels), "train": (labelled, labelled), "val": (25_600, 25_600)}
    splits, first = {}, 0
    for name, (count, known) in counts.items():
        splits[name] = Split(name, count, first, known, (), Path(f"{name}.names.txt"))
        first += count
    classes = tuple(str(number) for number in range(800))
    return Index(Path("data/nyu"), "nyu:DIR", 96, "jpeg95", classes, (0.5,) * 3, (0.3,) * 3, splits)


def chain(**changes: object) -> Reproduce:
    asked = replace(REPRODUCE["barlowmatch"], run="paper", runs_dir="/runs", data=Data(dir="/data/nyu"))
    return replace(asked, **changes)  # type: ignore[arg-type]


def test_the_whole_chain_is_the_paper_s() -> None:
    found = {part.name: part for part in parts(chain(answered=("/answered.csv",)), index())}
    assert list(found) == NAMES
    assert found["finetune-kmeans"].needs == ("pretrain", "request-kmeans")
    assert found["fixmatch-kmeans"].needs == ("finetune-kmeans",)
    assert set(found["table"].needs) == {"finetune", "fixmatch", "finetune-kmeans", "fixmatch-kmeans"}
    pretrain, finetune, fixmatch = (found[name].config for name in NAMES[:3])
    assert (pretrain.epochs, pretrain.batch_size, pretrain.model.backbone) == (400, 512, "wide_resnet50_2")
    assert pretrain.optim.lr * pretrain.batch_size / 256 == pytest.approx(0.05)
    assert pretrain.optim.lr * pretrain.batch_size / 256 * pretrain.optim.end_lr == pytest.approx(0.002)
    assert finetune.head.widths == (8192, 8192, 8192) == fixmatch.head.widths
    assert (fixmatch.batch_size, fixmatch.mu, fixmatch.threshold, fixmatch.lambda_u) == (64, 7, 0.9, 1.0)
    assert found["request-kmeans"].config.count == 12800
    assert not found["request-kmeans"].config.oracle
    assert found["finetune-kmeans"].config.labels == ("/answered.csv",)


def test_every_run_starts_from_the_one_that_it_needs() -> None:
    found = {part.name: part for part in parts(chain(), index(pool_labels=512_000))}
    origins = {
        name: Path(part.config.from_run).name for name, part in found.items() if hasattr(part.config, "from_run")
    }
    assert origins == {
        "finetune": "paper,pretrain",
        "fixmatch": "paper,finetune",
        "request-kmeans": "paper,pretrain",
        "finetune-kmeans": "paper,pretrain",
        "fixmatch-kmeans": "paper,finetune-kmeans",
        "pictures": "paper,fixmatch",
    }
    for name, part in found.items():
        assert part.config.run == f"paper,{name}"
        if name in ("finetune", "fixmatch"):
            assert (part.config.model.backbone, part.config.model.stem) == ("wide_resnet50_2", "small")
            assert part.config.size == 96
        if name != "table":
            assert part.config.data.dir == "/data/nyu"
    assert found["finetune-kmeans"].config.labels == ("/runs/paper,request-kmeans/request.csv",)
    assert found["request-kmeans"].config.oracle


def test_without_answers_the_chain_ends_with_the_request() -> None:
    found = parts(chain(), index())
    assert [part.name for part in found] == ["pretrain", "finetune", "fixmatch", "request-kmeans", "pictures", "table"]
    table = found[-1].config
    assert table.columns == ()
    assert table.runs == ("paper,finetune", "paper,fixmatch")


def test_each_rule_asks_and_is_trained_with() -> None:
    found = parts(chain(rules=("kmeans", "random")), index(pool_labels=512_000))
    table = found[-1].config
    assert table.columns == ("kmeans", "random")
    assert table.runs == tuple(
        f"paper,{stage}{label}" for stage in ("finetune", "fixmatch") for label in ("", "-kmeans", "-random")
    )


@pytest.mark.parametrize("scale", [0.001, 0.01, 0.03, 0.05, 0.1])
def test_a_rehearsal_is_smaller_in_everything_and_can_be_answered(scale: float) -> None:
    whole = {part.name: part.config for part in parts(chain(), index(pool_labels=512_000))}
    small = {part.name: part.config for part in parts(chain(scale=scale), index())}
    assert list(small) == NAMES
    for name in ("pretrain", "finetune", "fixmatch"):
        assert small[name].epochs == max(2, round(whole[name].epochs * scale))
        assert small[name].batch_size <= whole[name].batch_size
    assert small["pretrain"].data.limit == max(256, round(512_000 * scale))
    assert small["pretrain"].model.width < 0.5
    assert max(small["pretrain"].model.projector) < 8192
    assert small["finetune"].labelled.per_class * 800 + small["request-kmeans"].count <= 25_600
    assert small["request-kmeans"].count <= small["request-kmeans"].limit
    assert small["request-kmeans"].pool == ("train",)
    assert small["request-kmeans"].oracle
    assert small["fixmatch"].mu * small["fixmatch"].batch_size <= small["fixmatch"].data.limit


def test_a_rehearsal_needs_labels() -> None:
    bare = index()
    with pytest.raises(UserError, match="no split 'train' in data/nyu: it has unlabeled, val"):
        parts(chain(scale=0.01), replace(bare, splits={name: bare.splits[name] for name in ("unlabeled", "val")}))
    none = replace(bare.splits["train"], labeled=0)
    with pytest.raises(UserError, match=r"--scale 0\.01: a rehearsal needs labels, and train of data/nyu has none"):
        parts(chain(scale=0.01), replace(bare, splits={**bare.splits, "train": none}))


def test_the_variant_differs_only_in_what_text_and_code_disagree_in() -> None:
    text, code = REPRODUCE["barlowmatch"], REPRODUCE["barlowmatch-code"]
    for name in ("request", "visualize", "data"):
        assert asdict(getattr(text, name)) == asdict(getattr(code, name))
    assert asdict(text.pretrain.model) == asdict(code.pretrain.model)
    assert asdict(text.pretrain.views) == asdict(code.pretrain.views)
    assert code.pretrain.optim.lr * 512 / 256 == pytest.approx(0.1)
    assert code.fixmatch.strong.kind == "randaugment"
    assert code.finetune.head.norm_input
    assert code.fixmatch.head.norm_input
