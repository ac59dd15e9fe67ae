"""python fake_launcher.py RUN_FOLDER CLUSTER: what a launcher does, with fake_stage.py as its stage.

CLUSTER is a JSON object of Cluster's fields."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from barlow.errors import one_line_errors
from slurm.launch import submit
from slurm.launch.cluster import Cluster


def main(folder: Path, cluster: Cluster) -> int:
    submit.check(cluster, folder)
    return submit.launch("fake_stage", folder, cluster)


if __name__ == "__main__":
    with one_line_errors():
        fields: dict[str, Any] = json.loads(sys.argv[2])
        fields = {key: tuple(value) if isinstance(value, list) else value for key, value in fields.items()}
        raise SystemExit(main(Path(sys.argv[1]), Cluster(**fields)))
