"""python launchers/reproduce.py PAPER [--nodes N] [--scale 0.01] [--data.source SOURCE] [--answered requests.csv]
                                [--rules kmeans k-centre random] [--cluster auto|slurm|local] [--run NAME] [--dry-run]

The whole chain of a paper as dependent jobs, then its table beside ours: on a SLURM cluster, or here. The same command
again goes on where it stopped. --scale makes a rehearsal of it, in minutes on a CPU. --help lists every flag."""

import shlex
import sys
from collections.abc import Sequence
from dataclasses import replace

from barlow import cli
from barlow.data import order
from barlow.data.shards import read_index
from barlow.engine.run import folder_of, prepare, refuse_other_config
from barlow.errors import UserError, one_line_errors
from barlow.papers import barlowmatch
from barlow.papers.barlowmatch import Part
from barlow.recipes import REPRODUCE
from slurm.chain import Chain, Link
from slurm.cluster import Cluster, resolve
from start import ROOT, absolute, elsewhere, found


def main(argv: Sequence[str]) -> int:
    name, asked, cluster, swept = cli.parse(argv, REPRODUCE, Cluster, "launchers/reproduce.py", __doc__ or "")
    if swept.sweep:
        raise UserError("--sweep is for single runs: the chain of a paper is one of its kind")
    asked = replace(asked, run=asked.run or name, answered=tuple(map(absolute, asked.answered)))
    kind = asked.data.source.partition(":")[0] or "nyu"
    asked = replace(asked, data=replace(asked.data, dir=absolute(asked.data.dir or f"data/{kind}")))
    if not found(asked.data, cluster.dry_run):
        raise UserError(f"--dry-run: {asked.data.dir} has no shards yet: write them first (launchers/shards.py)")
    parts = [placed(part, cluster) for part in barlowmatch.parts(asked, read_index(asked.data.dir))]
    chain = Chain(folder_of(asked), [link(part, cluster) for part in parts])
    chain.check(cluster)
    for part in parts:
        with cli.named(part.config.run):
            refuse_other_config(part.config)
            for batch in batches(part):
                order.share(batch, resolve(cluster).ranks)
    if not cluster.dry_run:
        left = [each.name for each in chain.left()]
        for part in parts:
            if part.name in left:
                prepare(part.config, shlex.join(["python", "launchers/reproduce.py", *argv]), ROOT)
    code = chain.launch(cluster)
    if chain.finished():
        print((folder_of(parts[-1].config) / "table.md").read_text(), end="")
    return code


def placed(part: Part, cluster: Cluster) -> Part:
    return replace(part, config=elsewhere(part.config, cluster))


def link(part: Part, cluster: Cluster) -> Link:
    alone = replace(cluster, nodes=1, gpus_per_node=min(1, resolve(cluster).gpus_per_node or 0), ranks_per_node=1)
    return Link(
        part.name, f"barlow.stages.{part.stage}", folder_of(part.config), alone if part.alone else cluster, part.needs
    )


def batches(part: Part) -> list[int]:
    """What is shared among ranks at each step."""
    batch = getattr(part.config, "batch_size", 0)
    return [batch, batch * getattr(part.config, "mu", 1)] if batch else []


if __name__ == "__main__":
    with one_line_errors():
        raise SystemExit(main(sys.argv[1:]))
