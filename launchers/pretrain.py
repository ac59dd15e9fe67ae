"""python launchers/pretrain.py [RECIPE] [--nodes N] [--cluster auto|slurm|local] [--run NAME] [--dry-run] [--follow]
                               [--sweep KNOB=VALUE,VALUE,... ...] [--at-once K]

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
from barlow.recipes import PRETRAIN
from slurm.cluster import Cluster, resolve
from slurm.sweep import Runs

ROOT = Path(__file__).resolve().parents[1]
STAGE = "barlow.stages.pretrain"


def main(argv: list[str]) -> int:
    recipe, asked, cluster, swept = cli.parse(argv, PRETRAIN, Cluster, "launchers/pretrain.py", __doc__ or "")
    asked = replace(asked, run=asked.run or recipe)
    configs = [found_anywhere(config, cluster) for config in cli.combinations(asked, swept.sweep)]
    runs = Runs(asked.run, [folder_of(config) for config in configs], bool(swept.sweep), swept.at_once)
    ranks = runs.check(cluster)
    for config in configs:
        with cli.named(config.run if len(configs) > 1 else ""):
            refuse_other_config(config)
            order.share(config.batch_size, ranks)
            check_init(config)
    runs = runs.left(cluster)
    configs = [config for config in configs if folder_of(config) in runs.folders]
    for config in configs:
        with cli.named(config.run if len(configs) > 1 else ""):
            check_data(config, cluster.dry_run)
    for config in configs if not cluster.dry_run else ():
        prepare(config, shlex.join(["python", "launchers/pretrain.py", *argv]), ROOT)
    return runs.launch(STAGE, cluster)


def found_anywhere(config: Pretrain, cluster: Cluster) -> Pretrain:
    """The same for ranks that may run elsewhere, on what the cluster has."""
    return replace(
        config,
        data=replace(config.data, dir=absolute(config.data.dir)),
        model=replace(config.model, init=absolute(config.model.init)),
        device="cuda" if config.device == "auto" and resolve(cluster).gpus_per_node else config.device,
    )


def absolute(path: str) -> str:
    return str(Path(path).expanduser().resolve()) if path else ""


def check_init(config: Pretrain) -> None:
    """Weights to start from must be there, until the run has a checkpoint of its own."""
    saved = any((folder_of(config) / "checkpoints").glob("*.pt"))
    if config.model.init and not Path(config.model.init).exists() and not saved:
        raise UserError(f"--model.init: no checkpoint {config.model.init}: name a run folder or a .pt file")


def check_data(config: Pretrain, dry_run: bool) -> None:
    """With the shards written first where the recipe says what of, and the folder has none yet."""
    if not (Path(config.data.dir) / "index.json").exists():
        if dry_run:
            return
        if config.data.source:
            make_shards(config.data)
    index = read_index(config.data.dir)
    count = sum(index.split(name).count for name in config.data.splits)
    order.steps_per_epoch(count, config.batch_size)


def make_shards(data: Data) -> None:
    command = [sys.executable, str(ROOT / "launchers" / "shards.py"), data.source, data.dir]
    made = subprocess.run(command)
    if made.returncode:
        raise SystemExit(made.returncode)


if __name__ == "__main__":
    with one_line_errors():
        raise SystemExit(main(sys.argv[1:]))
