"""The command line: a recipe, flags laid over it, and one line for whatever is wrong."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from barlow import cli
from barlow.errors import UserError
from barlow.recipes import PRETRAIN

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Cluster:
    nodes: int = 1


def parse(*words: str) -> tuple:
    return cli.parse(list(words), PRETRAIN, Cluster, "launchers/pretrain.py")


def test_no_recipe_is_the_first_and_flags_override_it() -> None:
    name, config, cluster, swept = parse("--nodes", "4", "--optim.lr", "0.125", "--model.projector", "8", "9")
    assert name == next(iter(PRETRAIN))
    assert (cluster.nodes, config.optim.lr, config.model.projector) == (4, 0.125, (8, 9))
    assert config.views == PRETRAIN[name].views
    assert cli.combinations(config, swept.sweep) == [config]


def test_a_recipe_keeps_what_no_flag_names() -> None:
    _, config, _, _ = parse("cifar10", "--epochs", "3", "--views.b.solarize", "0.5")
    assert (config.epochs, config.views.b.solarize, config.views.b.blur) == (3, 0.5, 0.0)
    assert config.model == PRETRAIN["cifar10"].model


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["cifar", "--epochs", "3"], "no recipe 'cifar' (did you mean cifar10?)"),
        (["--optim.lear", "3"], "unknown flag --optim.lear: did you mean --optim.lr?"),
        (["--objective.mixup", "3"], "unknown flag --objective.mixup"),
        (["--epochs", "x"], "--epochs"),
        (["--epochs"], "missing value for argument '--epochs'"),
        (["--epochs", "0"], "--epochs is 0: give 1 or more"),
        (["--model.stem", "big"], "invalid choice 'big'"),
        (["--nodes", "4", "cifar10"], "a recipe's name comes first"),
        (["--run", "a/b"], "--run is 'a/b'"),
        (["--views.scale", "0", "2"], "--views.scale"),
    ],
)
def test_mistakes_are_told_in_one_line(words: list[str], told: str) -> None:
    with pytest.raises(UserError) as error:
        parse(*words)
    assert told in str(error.value)
    assert "\n" not in str(error.value)
    assert not set("│╭╮╰╯─") & set(str(error.value))


def sweep(*words: str) -> dict[str, Any]:
    name, config, _, swept = parse(*words)
    found = cli.combinations(replace(config, run=config.run or name), swept.sweep)
    return {config.run: config for config in found}


def test_a_sweep_is_every_combination_named_by_its_values() -> None:
    found = sweep("--run", "tune", "--epochs", "3", "--sweep", "seed=0,1", "--sweep", "optim.lr-biases=0.10,1e-7,2.0")
    values = [(config.seed, config.optim.lr_biases) for config in found.values()]
    assert values == [(seed, lr) for seed in (0, 1) for lr in (0.1, 1e-7, 2.0)]
    assert list(found)[1::4] == ["tune,optim.lr_biases=1e-07,seed=0", "tune,optim.lr_biases=2,seed=1"]
    base = parse("--epochs", "3")[1]
    assert found["tune,optim.lr_biases=0.1,seed=1"] == replace(
        base, run="tune,optim.lr_biases=0.1,seed=1", seed=1, optim=replace(base.optim, lr_biases=0.1)
    )


def test_another_value_or_order_later_finds_the_same_runs() -> None:
    first = sweep("--sweep", "seed=0,1", "--sweep", "epochs=2,3")
    later = sweep("--sweep", "epochs=1,3,2", "--sweep", "seed=1,0")
    assert {name: later[name] for name in first} == first


def test_values_have_the_type_of_their_knob() -> None:
    (name, config), _ = sweep("--sweep", "model.projector=256 512, 8").items()
    assert (name, config.model.projector) == ("shapes,model.projector=256+512", (256, 512))
    assert [config.optim.clip for config in sweep("--sweep", "optim.clip=true,False").values()] == [True, False]
    assert list(sweep("--sweep", "optim.clip=True")) == ["shapes,optim.clip=true"]
    assert list(sweep("--sweep", "data.stage=/a b/$c,d")) == ["shapes,data.stage=_a_b_c", "shapes,data.stage=d"]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (
            "optim.lear=1,2",
            "--sweep optim.lear=1,2: no knob 'optim.lear' to sweep (did you mean optim.lr?): see --help",
        ),
        ("optim=1", "no knob 'optim' to sweep"),
        ("nodes=1,2", "no knob 'nodes' to sweep"),
        ("run=a,b", "no knob 'run' to sweep"),
        ("seed=1,fast", "--sweep seed=1,fast: 'fast' is no value of seed: error parsing INT"),
        ("seed=1.5", "'1.5' is no value of seed"),
        ("model.stem=small,bg", "invalid choice 'bg'"),
        ("views.scale=0.1", "'0.1' is no value of views.scale"),
        ("seed", "--sweep seed: a value is empty: write seed=VALUE,VALUE,..."),
        ("seed=", "a value is empty"),
        ("seed=1,,2", "a value is empty"),
        ("optim.lr=1,1.0", "--sweep optim.lr=1,1.0: 1.0 is there twice"),
        ("seed=1 --sweep seed=2", "--sweep seed= is given twice: give all values in one, as in seed=1,2,3"),
        ("optim.lr=1,2 --optim.lr 3", "--optim.lr is given, and swept"),
        ("optim.clip=true,false --optim.no-clip", "--optim.clip is given, and swept"),
        ("optim.lr=1,-2 --sweep seed=3", "run shapes,optim.lr=-2,seed=3: --optim.lr is -2.0: give 0 or more"),
        ("data.stage=/a/b,_a_b", "two runs of the sweep would be named shapes,data.stage=_a_b"),
        ("seed=1,2 --at-once 0", "--at-once 0: must be at least 1"),
        ("seed=1,2 seed=3", "unknown word seed=3"),
    ],
)
def test_mistakes_in_a_sweep_are_told_in_one_line(words: str, told: str) -> None:
    with pytest.raises(UserError) as error:
        sweep("--sweep", *words.split())
    assert told in str(error.value)
    assert "\n" not in str(error.value)


def test_at_once_is_for_a_sweep() -> None:
    with pytest.raises(UserError, match="--at-once 3: there is one run; it is for --sweep"):
        parse("--at-once", "3")
    assert parse("--sweep", "seed=1,2", "--at-once", "3")[3].at_once == 3


def test_help_and_mistakes_never_import_torch() -> None:
    program = (
        "import runpy, sys\nsys.path.insert(0, 'launchers')\n"
        "try: runpy.run_path('launchers/pretrain.py', run_name='__main__')\n"
        "except SystemExit as stop: print('code', stop.code, 'torch' in sys.modules)"
    )
    for words, code in ((["--help"], 0), (["--nope"], 2)):
        done = subprocess.run([sys.executable, "-c", program, *words], cwd=ROOT, capture_output=True, text=True)
        assert done.stdout.splitlines()[-1] == f"code {code} False", done.stderr
        assert len(done.stderr.splitlines()) == (1 if code else 0), done.stderr
