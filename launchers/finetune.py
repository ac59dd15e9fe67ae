"""python launchers/finetune.py [RECIPE] --from RUN [--form full|head|linear] [--labels answered.csv ...] [--nodes N]
                               [--cluster auto|slurm|local] [--run NAME] [--dry-run] [--follow]

Trains a classifier on labelled images, on the backbone of a pretrained run: here, or on N nodes of a SLURM cluster.
The same command again goes on with it. --help lists every flag."""

import sys
from dataclasses import replace

from barlow.config import Finetune
from barlow.data import order
from barlow.data.shards import read_index
from barlow.engine import origin
from barlow.errors import UserError, one_line_errors
from barlow.labels.table import learnable
from barlow.recipes import FINETUNE
from start import absolute, found, start


def settled(config: Finetune) -> Finetune:
    config = origin.settled(config)
    data = replace(config.data, dir=absolute(config.data.dir))
    return replace(config, data=data, labels=tuple(map(absolute, config.labels)))


def early(config: Finetune, ranks: int) -> None:
    order.share(config.batch_size, ranks)
    if config.from_run and origin.awaited(config.from_run):
        raise UserError(f"--from {config.from_run}: that run has saved nothing yet: wait for its first checkpoint")


def late(config: Finetune, dry_run: bool) -> None:
    if found(config.data, dry_run):
        known = learnable(config, read_index(config.data.dir))
        order.steps_per_epoch(len(known.ids), config.batch_size)


if __name__ == "__main__":
    with one_line_errors():
        raise SystemExit(start(sys.argv[1:], FINETUNE, "finetune", __doc__ or "", settled, early, late))
