"""python launchers/label_request.py [RECIPE] --from RUN [--rule kmeans|k-centre|typical|random] [--count N] [--oracle]
                                    [--labels answered.csv ...] [--cluster auto|slurm|local] [--run NAME] [--dry-run]

Chooses the images whose labels would help most, as the network of a run sees them, and writes them to request.csv in
the run folder: fill its column `label` in, and give the file to the other launchers as --labels. --help lists all."""

import sys

from barlow.config import Request
from barlow.errors import one_line_errors
from barlow.recipes import REQUEST
from start import from_origin, has_saved, start


def early(config: Request, ranks: int) -> None:
    has_saved(config)


if __name__ == "__main__":
    with one_line_errors():
        raise SystemExit(start(sys.argv[1:], REQUEST, "request", __doc__ or "", from_origin, early))
