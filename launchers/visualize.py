"""python launchers/visualize.py [RECIPE] --from RUN [--split val] [--count 16 | --ids 3 14 15] [--run NAME]

Shows what in an image speaks for a class to the classifier of a run, by Grad-CAM, guided backpropagation and both: PNGs
in the run folder's pictures/. --help lists every flag."""

import sys

from barlow.config import Visualize
from barlow.errors import one_line_errors
from barlow.recipes import VISUALIZE
from start import from_origin, has_saved, start


def early(config: Visualize, ranks: int) -> None:
    has_saved(config)


if __name__ == "__main__":
    with one_line_errors():
        raise SystemExit(start(sys.argv[1:], VISUALIZE, "visualize", __doc__ or "", from_origin, early))
