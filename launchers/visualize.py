"""python launchers/visualize.py [RECIPE] --from RUN [--split val] [--count 16 | --ids 3 14 15] [--run NAME]

Shows what in an image speaks for a class to the classifier of a run, by Grad-CAM, guided backpropagation and both: PNGs
in the run folder's pictures/. --help lists every flag."""

import sys

from barlow.config import Visualize
from barlow.data.shards import read_index
from barlow.errors import UserError, one_line_errors
from barlow.recipes import VISUALIZE
from start import found, from_origin, has_saved, start


def early(config: Visualize, ranks: int) -> None:
    has_saved(config)


def late(config: Visualize, dry_run: bool) -> None:
    if found(config.data, dry_run):
        split = read_index(config.data.dir).split(config.split)
        last = split.first_id + split.count - 1
        if wrong := [i for i in config.ids if not split.first_id <= i <= last]:
            raise UserError(f"--ids {wrong[0]}: samples of {config.split} are {split.first_id} to {last}")


if __name__ == "__main__":
    with one_line_errors():
        raise SystemExit(start(sys.argv[1:], VISUALIZE, "visualize", __doc__ or "", from_origin, early, late))
