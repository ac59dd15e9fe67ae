"""python launchers/fixmatch.py [RECIPE] --from RUN [--labels answered.csv ...] [--nodes N]
                               [--cluster auto|slurm|local] [--run NAME] [--dry-run] [--follow]

Trains a classifier on few labelled and many unlabelled images, from a classifier or a pretrained backbone: here, or on
N nodes of a SLURM cluster. The same command again goes on with it. --help lists every flag."""

import sys

from barlow.config import FixMatch
from barlow.data import order
from barlow.engine import origin
from barlow.errors import one_line_errors
from barlow.recipes import FIXMATCH
from start import from_origin, has_saved, start


def early(config: FixMatch, ranks: int) -> None:
    order.share(config.batch_size, ranks)
    has_saved(config)
    if differ := origin.other_labels(config):
        print(f"note: {differ}")


if __name__ == "__main__":
    with one_line_errors():
        raise SystemExit(start(sys.argv[1:], FIXMATCH, "fixmatch", __doc__ or "", from_origin, early))
