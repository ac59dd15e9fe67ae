"""python launchers/pretrain.py [RECIPE] [--nodes N] [--cluster auto|slurm|local] [--run NAME] [--dry-run] [--follow]
                               [--sweep KNOB=VALUE,VALUE,... ...] [--at-once K]

Pretrains a backbone without labels: here, or on N nodes of a SLURM cluster. The same command again goes on with it.
Without a recipe: the embedded `shapes` set, about two minutes on two cores. --help lists every flag."""

import sys
from dataclasses import replace
from pathlib import Path

from barlow.config import Pretrain
from barlow.data import order
from barlow.engine.run import folder_of
from barlow.errors import UserError, one_line_errors
from barlow.recipes import PRETRAIN
from start import absolute, start


def settled(config: Pretrain) -> Pretrain:
    data = replace(config.data, dir=absolute(config.data.dir))
    return replace(config, data=data, model=replace(config.model, init=absolute(config.model.init)))


def early(config: Pretrain, ranks: int) -> None:
    """Weights to start from must be there, until the run has a checkpoint of its own."""
    order.share(config.batch_size, ranks)
    saved = any((folder_of(config) / "checkpoints").glob("*.pt"))
    if config.model.init and not Path(config.model.init).exists() and not saved:
        raise UserError(f"--model.init: no checkpoint {config.model.init}: name a run folder or a .pt file")


if __name__ == "__main__":
    with one_line_errors():
        raise SystemExit(start(sys.argv[1:], PRETRAIN, "pretrain", __doc__ or "", settled, early))
