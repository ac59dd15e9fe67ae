"""From argv to runs under way: what the launchers that start a stage have in common. Not a command itself."""

import shlex
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

from barlow import cli
from barlow.config import Classifying, Finetune, FixMatch, Pretrain, Request, Run, Shards, Visualize
from barlow.data import order
from barlow.data.shards import Index, read_index
from barlow.engine import origin
from barlow.engine.origin import Asked
from barlow.engine.run import folder_of, prepare, refuse_other_config
from barlow.errors import UserError
from barlow.labels import table
from slurm.launch.cluster import Cluster, resolve
from slurm.many.sweep import Runs

ROOT = Path(__file__).resolve().parents[1]
Config = TypeVar("Config", bound=Run)


def start(
    argv: Sequence[str],
    recipes: Mapping[str, Config],
    stage: str,
    about: str,
    settled: Callable[[Config], Config],
    early: Callable[[Config, int], object],
) -> int:
    """Runs of the stage barlow.stages.STAGE, one or a sweep of them; returns the command's exit code.

    `settled` closes what a config leaves open. `early` refuses what cannot be, given the number of ranks, before the
    data are looked at. No run is created before all of them can be.
    """
    script = "launchers/label_request.py" if stage == "request" else f"launchers/{stage}.py"
    recipe, asked, cluster, swept = cli.parse(argv, recipes, Cluster, script, about)
    asked = replace(asked, run=asked.run or (recipe if stage == "pretrain" else f"{recipe}-{stage}"))
    configs = [elsewhere(settled(config), cluster) for config in cli.combinations(asked, swept.sweep)]
    runs = Runs(asked.run, [folder_of(config) for config in configs], bool(swept.sweep), swept.at_once)
    ranks = runs.check(cluster)
    for config in configs:
        with cli.named(config.run if len(configs) > 1 else ""):
            refuse_other_config(config)
            if isinstance(config, Classifying | Request):
                origin.refuse_other_answers(folder_of(config), config.labels)
            early(config, ranks)
    runs = runs.left(cluster)
    configs = [config for config in configs if folder_of(config) in runs.folders]
    for config in configs:
        with cli.named(config.run if len(configs) > 1 else ""):
            if found(config.data, cluster.dry_run):
                refuse_unfit(config, read_index(config.data.dir))
    for config in configs if not cluster.dry_run else ():
        prepare(config, shlex.join(["python", script, *argv]), ROOT)
    return runs.launch(f"barlow.stages.{stage}", cluster)


def elsewhere(config: Config, cluster: Cluster) -> Config:
    """The same for ranks that may run on other machines, on what the cluster has."""
    device = "cuda" if config.device == "auto" and resolve(cluster).gpus_per_node else config.device
    return replace(config, device=device)


def from_origin(config: Asked) -> Asked:
    """The same with all taken from the run to start from that is left open, and with paths that hold elsewhere."""
    config = origin.settled(config)
    config = replace(config, data=replace(config.data, dir=absolute(config.data.dir)))
    return config if isinstance(config, Visualize) else replace(config, labels=tuple(map(absolute, config.labels)))


def has_saved(config: Asked) -> None:
    """What is started from must be there, until the run has begun, and keeps it."""
    if config.from_run and origin.awaited(config.from_run) and not origin.began(folder_of(config)):
        raise UserError(f"--from {config.from_run}: that run has saved nothing yet: wait for its first checkpoint")


def refuse_unfit(config: Run, index: Index) -> None:
    """What a run asks of its data that these shards have not."""
    if isinstance(config, Classifying | Request):
        config = replace(config, labels=origin.answers(folder_of(config), config.labels))
    match config:
        case Pretrain():
            order.steps_per_epoch(index.images(config.data.splits, config.data.limit), config.batch_size)
        case Finetune():
            order.steps_per_epoch(len(table.learnable(config, index).ids), config.batch_size)
        case FixMatch():
            table.learnable(config, index)
            order.unlabelled_steps(index.images(config.data.splits, config.data.limit), config.mu, config.batch_size)
        case Request():
            table.asked(config, index)
        case Visualize():
            split = index.split(config.split)
            if config.target == "label" and not split.labeled:
                raise UserError(f"--target label: no image of {config.split} has a label: leave it out")
            last = split.first_id + split.count - 1
            if wrong := [i for i in config.ids if not split.first_id <= i <= last]:
                raise UserError(f"--ids {wrong[0]}: samples of {config.split} are {split.first_id} to {last}")


def absolute(path: str) -> str:
    return str(Path(path).expanduser().resolve()) if path else ""


def found(data: Shards, dry_run: bool) -> bool:
    """Whether there are shards to look at: written first where it is said what of, and the folder has none yet."""
    if (Path(data.dir) / "index.json").exists():
        return True
    if dry_run:
        return False
    if data.source:
        made = subprocess.run([sys.executable, str(ROOT / "launchers" / "shards.py"), data.source, data.dir])
        if made.returncode:
            raise SystemExit(made.returncode)
    return True
