"""python launchers/label_request.py [RECIPE] --from RUN [--rule kmeans|k-centre|random] [--count N] [--oracle]
                                    [--labels answered.csv ...] [--cluster auto|slurm|local] [--run NAME] [--dry-run]

Chooses the images whose labels would help most, as the network of a run sees them, and writes them to request.csv in
the run folder: fill its column `label` in, and give the file to the other launchers as --labels. --help lists all."""

import sys
from dataclasses import replace

from barlow.config import Request
from barlow.data.shards import read_index
from barlow.engine import origin
from barlow.errors import UserError, one_line_errors
from barlow.labels import table
from barlow.recipes import REQUEST
from start import absolute, found, start


def settled(config: Request) -> Request:
    config = origin.settled(config)
    data = replace(config.data, dir=absolute(config.data.dir))
    return replace(config, data=data, labels=tuple(map(absolute, config.labels)))


def early(config: Request, ranks: int) -> None:
    if origin.awaited(config.from_run):
        raise UserError(f"--from {config.from_run}: that run has saved nothing yet: wait for its first checkpoint")


def late(config: Request, dry_run: bool) -> None:
    if found(config.data, dry_run):
        table.asked(config, read_index(config.data.dir))


if __name__ == "__main__":
    with one_line_errors():
        raise SystemExit(start(sys.argv[1:], REQUEST, "request", __doc__ or "", settled, early, late))
