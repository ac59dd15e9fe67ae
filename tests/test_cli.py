"""The command line: a recipe, flags laid over it, and one line for whatever is wrong."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

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
    name, config, cluster = parse("--nodes", "4", "--optim.lr", "0.125", "--model.projector", "8", "9")
    assert name == next(iter(PRETRAIN))
    assert (cluster.nodes, config.optim.lr, config.model.projector) == (4, 0.125, (8, 9))
    assert config.views == PRETRAIN[name].views


def test_a_recipe_keeps_what_no_flag_names() -> None:
    _, config, _ = parse("cifar10", "--epochs", "3", "--views.b.solarize", "0.5")
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


def test_help_and_mistakes_never_import_torch() -> None:
    program = (
        "import runpy, sys\nsys.argv[1:] = sys.argv[1:]\n"
        "try: runpy.run_path('launchers/pretrain.py', run_name='__main__')\n"
        "except SystemExit as stop: print('code', stop.code, 'torch' in sys.modules)"
    )
    for words, code in ((["--help"], 0), (["--nope"], 2)):
        done = subprocess.run([sys.executable, "-c", program, *words], cwd=ROOT, capture_output=True, text=True)
        assert done.stdout.splitlines()[-1] == f"code {code} False", done.stderr
        assert len(done.stderr.splitlines()) == (1 if code else 0), done.stderr
