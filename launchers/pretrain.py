"""python launchers/pretrain.py [RECIPE] [--nodes N] [--cluster auto|slurm|local] [--run NAME] [--dry-run] [--follow]

Pretrains a backbone without labels: here, or on N nodes of a SLURM cluster. The same command again goes on with it.
Without a recipe: the embedded `shapes` set, about two minutes on two cores. --help lists every flag."""

import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

from barlow import cli
from barlow.config import Data, Pretrain
from barlow.data import order
from barlow.data.shards import read_index
from barlow.engine.run import folder_of, prepare, refuse_other_config
from barlow.errors import UserError, one_line_errors
from barlow.files import read_status
from barlow.recipes import PRETRAIN
from slurm import submit
from slurm.cluster import Cluster, resolve

ROOT = Path(__file__).resolve().parents[1]
STAGE = "barlow.stages.pretrain"


def main(argv: list[str]) -> int:
    recipe, config, cluster = cli.parse(argv, PRETRAIN, Cluster, "launchers/pretrain.py", __doc__ or "")
    config = replace(
        config,
        run=config.run or recipe,
        data=replace(config.data, dir=absolute(config.data.dir)),
        model=replace(config.model, init=absolute(config.model.init)),
        device="cuda" if config.device == "auto" and resolve(cluster).gpus_per_node else config.device,
    )
    folder = folder_of(config)
    ranks = submit.check(cluster, None if cluster.dry_run else folder)
    refuse_other_config(config)
    order.share(config.batch_size, ranks)
    check_init(config, folder)
    if cluster.dry_run:
        if (Path(config.data.dir) / "index.json").exists():
            check_data(config)
        return submit.launch(STAGE, folder, cluster)
    status = read_status(folder)
    if status.get("state") == "finished":
        print(f"run {config.run} has finished its {status['steps']} steps: {folder / 'results.json'}")
        return 0
    make_shards(config.data)
    check_data(config)
    prepare(config, shlex.join(["python", "launchers/pretrain.py", *argv]), ROOT)
    return submit.launch(STAGE, folder, cluster)


def check_init(config: Pretrain, folder: Path) -> None:
    """Weights to start from must be there, until the run has a checkpoint of its own."""
    if config.model.init and not Path(config.model.init).exists() and not any((folder / "checkpoints").glob("*.pt")):
        raise UserError(f"--model.init: no checkpoint {config.model.init}: name a run folder or a .pt file")


def check_data(config: Pretrain) -> None:
    index = read_index(config.data.dir)
    count = sum(index.split(name).count for name in config.data.splits)
    order.steps_per_epoch(count, config.batch_size)


def absolute(path: str) -> str:
    """What a job that runs elsewhere can find."""
    return str(Path(path).expanduser().resolve()) if path else ""


def make_shards(data: Data) -> None:
    """Write the shards first where the recipe says what of, and the folder has none yet."""
    if data.source and not (Path(data.dir) / "index.json").exists():
        command = [sys.executable, str(ROOT / "launchers" / "shards.py"), data.source, data.dir]
        made = subprocess.run(command)
        if made.returncode:
            raise SystemExit(made.returncode)


if __name__ == "__main__":
    with one_line_errors():
        raise SystemExit(main(sys.argv[1:]))
