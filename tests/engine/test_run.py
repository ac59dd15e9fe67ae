"""The run folder: made once, found again, refused to another config, never half written."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path

import pytest

from barlow import files
from barlow.config import Checkpoint, Pretrain
from barlow.engine import run
from barlow.errors import UserError
from barlow.recipes import PRETRAIN

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def config(tmp_path: Path) -> Pretrain:
    return Pretrain(run="first", runs_dir=str(tmp_path))


def test_prepare_leaves_what_a_rank_needs(config: Pretrain) -> None:
    folder = run.prepare(config, "python launchers/pretrain.py --run first", ROOT)
    assert run.load_config(folder, Pretrain) == config
    assert "--run first" in (folder / "command.txt").read_text()
    assert files.read_status(folder)["state"] == "pending"
    copied = (folder / "code" / "barlow" / "engine" / "run.py").read_text()
    assert copied == (ROOT / "barlow" / "engine" / "run.py").read_text()
    assert not list(folder.glob("code.*"))


@pytest.mark.parametrize("name", PRETRAIN)
def test_every_recipe_survives_config_json(name: str, tmp_path: Path) -> None:
    files.write_json(tmp_path / "config.json", asdict(PRETRAIN[name]))
    assert run.load_config(tmp_path, Pretrain) == PRETRAIN[name]


def test_same_config_goes_on_and_another_is_refused_by_name(config: Pretrain) -> None:
    folder = run.prepare(config, "a", ROOT)
    files.write_status(folder, state="preempted", step=7)
    run.prepare(replace(config, log_every=3, checkpoint=Checkpoint(every_steps=9)), "b", ROOT)
    assert files.read_status(folder)["step"] == 7  # going on does not reset what the run has done
    files.write_status(folder, attempts=1)
    with pytest.raises(UserError, match=r"run 'first' exists with another config \(optim.lr 0.2 there, 0.3 here\)"):
        run.prepare(replace(config, optim=replace(config.optim, lr=0.3)), "c", ROOT)
    assert run.load_config(folder, Pretrain).optim.lr == 0.2


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write the run folder"):
        run.prepare(Pretrain(run="x", runs_dir=str(tmp_path / "file")), "", ROOT)


def test_a_run_that_never_began_takes_another_config(config: Pretrain) -> None:
    run.prepare(config, "a", ROOT)
    folder = run.prepare(replace(config, batch_size=64), "b", ROOT)
    assert run.load_config(folder, Pretrain).batch_size == 64


def test_a_knob_newer_than_the_run_counts_with_its_default(config: Pretrain) -> None:
    folder = run.prepare(config, "a", ROOT)
    files.write_status(folder, attempts=1)
    stored = files.read_json(folder / "config.json")
    del stored["knn"]["size"]
    files.write_json(folder / "config.json", stored)
    assert run.load_config(folder, Pretrain) == config
    run.refuse_other_config(config)
    with pytest.raises(UserError, match=r"knn.size 0 there, 64 here"):
        run.refuse_other_config(replace(config, knn=replace(config.knn, size=64)))


def test_a_run_has_one_writer(tmp_path: Path) -> None:
    first = run.hold(tmp_path)
    with pytest.raises(UserError, match="another process writes run"):
        run.hold(tmp_path)
    first.close()
    run.hold(tmp_path).close()
