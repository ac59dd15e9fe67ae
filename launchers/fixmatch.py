"""python launchers/fixmatch.py [RECIPE] --from RUN [--labels answered.csv ...] [--nodes N]
                               [--cluster auto|slurm|local] [--run NAME] [--dry-run] [--follow]

Trains a classifier on few labelled and many unlabelled images, from a classifier or a pretrained backbone: here, or on
N nodes of a SLURM cluster. The same command again goes on with it. --help lists every flag."""

import sys
from dataclasses import replace

from barlow.config import FixMatch
from barlow.data import order
from barlow.data.shards import read_index
from barlow.engine import origin
from barlow.errors import UserError, one_line_errors
from barlow.labels.table import learnable
from barlow.recipes import FIXMATCH
from start import absolute, found, start


def settled(config: FixMatch) -> FixMatch:
    config = origin.settled(config)
    data = replace(config.data, dir=absolute(config.data.dir))
    return replace(config, data=data, labels=tuple(map(absolute, config.labels)))


def early(config: FixMatch, ranks: int) -> None:
    order.share(config.batch_size, ranks)
    if config.from_run and origin.awaited(config.from_run):
        raise UserError(f"--from {config.from_run}: that run has saved nothing yet: wait for its first checkpoint")


def late(config: FixMatch, dry_run: bool) -> None:
    if found(config.data, dry_run):
        index = read_index(config.data.dir)
        learnable(config, index)
        count = sum(index.split(name).count for name in dict.fromkeys(config.data.splits))
        order.unlabelled_steps(min(count, config.data.limit or count), config.mu, config.batch_size)


if __name__ == "__main__":
    with one_line_errors():
        raise SystemExit(start(sys.argv[1:], FIXMATCH, "fixmatch", __doc__ or "", settled, early, late))
