"""python launchers/reproduce.py PAPER [--nodes N] [--scale 0.01] [--data.source SOURCE] [--answered requests.csv]
                                [--rules kmeans typical random] [--cluster auto|slurm|local] [--run NAME] [--dry-run]

The whole chain of a paper as dependent jobs, then its table beside ours: on a SLURM cluster, or here. The same command
again goes on where it stopped. --scale makes a rehearsal of it, in minutes on a CPU. --help lists every flag."""

import shlex
import signal
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from barlow import cli
from barlow.config import Classifying, Reproduce, Request, Run, Table
from barlow.data.shards import read_index
from barlow.engine.origin import copies, refuse_other_answers
from barlow.engine.run import folder_of, load_config, prepare, refuse_other_config
from barlow.errors import UserError, one_line_errors
from barlow.files import read_json, write_status
from barlow.papers import barlowmatch
from barlow.papers.barlowmatch import Part
from barlow.recipes import REPRODUCE
from slurm.launch.cluster import Cluster, resolve
from slurm.many.chain import Chain, Link
from start import ROOT, absolute, elsewhere, found, refuse_unfit

SECTIONS = ("pretrain", "finetune", "fixmatch", "request", "visualize")
SHARED = ("seed", "device", "data", "labelled")  # by all runs of a chain
DECIDED = ("run", "runs_dir", "from_run", "labels", "rule", "oracle")  # by the chain


def main(argv: Sequence[str]) -> int:
    name, asked, cluster, swept = cli.parse(argv, REPRODUCE, Cluster, "launchers/reproduce.py", __doc__ or "")
    if swept.sweep:
        raise UserError("--sweep is for single runs: the chain of a paper is one of its kind")
    check_sections(asked, REPRODUCE[name])
    run = asked.run or f"{name}-{'rehearsal' if asked.scale < 1 else 'chain'}"
    asked = replace(asked, run=run, answered=tuple(map(absolute, asked.answered)))
    kind = asked.data.source.partition(":")[0] or "nyu"
    asked = replace(asked, data=replace(asked.data, dir=absolute(asked.data.dir or f"data/{kind}")))
    if not found(asked.data, cluster.dry_run):
        raise UserError(f"--dry-run: {asked.data.dir} has no shards yet: write them first (launchers/shards.py)")
    index = read_index(asked.data.dir)
    parts = [replace(part, config=elsewhere(part.config, cluster)) for part in barlowmatch.parts(asked, index)]
    requests = [f"{folder_of(part.config)}/request.csv" for part in parts if part.stage == "request"]
    copied = [
        str(copy) for p in parts if p.stage == "finetune" for copy in copies(folder_of(p.config), p.config.labels)
    ]
    awaited = [path for path in (*requests, *copied) if not Path(path).exists()]
    for part in parts:
        with cli.named(part.config.run):
            refuse_unfit(without(part.config, awaited), index)
    chain = Chain(folder_of(asked), [link(part, cluster) for part in parts])
    chain.check(cluster)
    runs = chain.runs()
    *others, table = parts
    for part in others:
        refuse_other_config(part.config, waits=runs[part.name].alive)
        if isinstance(part.config, Classifying):
            refuse_other_answers(folder_of(part.config), part.config.labels, resumed=asked.run)
    if runs[table.name].alive:
        refuse_other_config(table.config, waits=True)
    if not cluster.dry_run:
        make_again(table)
        left = [each.name for each in chain.left()]
        for part in parts:
            if part.name in left:
                prepare(part.config, shlex.join(["python", "launchers/reproduce.py", *argv]), ROOT)
    code = chain.launch(cluster)
    if chain.finished():
        print((folder_of(parts[-1].config) / "table.md").read_text(), end="")
    return code


def without(config: Run, awaited: Sequence[str]) -> Run:
    """The same without the labels that another run of the chain is yet to write."""
    if not isinstance(config, Classifying | Request):
        return config
    return replace(config, labels=tuple(path for path in config.labels if path not in awaited))


def check_sections(asked: Reproduce, recipe: Reproduce) -> None:
    """What all runs share, or the chain decides, cannot be said of one of them."""
    for section in SECTIONS:
        for name in (*SHARED, *DECIDED):
            mine, theirs = (getattr(getattr(each, section), name, None) for each in (asked, recipe))
            if mine != theirs:
                instead = f"give --{name}, for all of them" if name in SHARED else "leave it out"
                raise UserError(
                    f"--{section}.{name.replace('_', '-')}: the runs of a chain have that in common: {instead}"
                )


def make_again(table: Part) -> None:
    """A table that was made, or was to be made, before there were all the runs it is asked to show."""
    folder = folder_of(table.config)
    stored = read_json(folder / "config.json")
    if stored and load_config(folder, Table) != table.config:
        write_status(folder, state="pending", step=0, attempts=0, why="")


def link(part: Part, cluster: Cluster) -> Link:
    if part.alone:
        cluster = replace(cluster, nodes=1, gpus_per_node=min(1, resolve(cluster).gpus_per_node or 0), ranks_per_node=1)
    elif fewer := nodes_for(part, cluster):
        print(f"link {part.name}: on {fewer} of {cluster.nodes} nodes, for its batch of {part.config.batch_size}")
        cluster = replace(cluster, nodes=fewer)
    return Link(part.name, f"barlow.stages.{part.stage}", folder_of(part.config), cluster, part.needs)


def nodes_for(part: Part, cluster: Cluster) -> int:
    """The most nodes among whose ranks its batch can be shared, if these are fewer than there are; else 0."""
    batch, ranks = getattr(part.config, "batch_size", 0), resolve(cluster).ranks
    if batch % ranks == 0:
        return 0
    each = ranks // cluster.nodes
    if part.stage == "pretrain" or batch % each:
        raise UserError(
            f"--{part.stage}.batch-size {batch} is not divisible by {each if batch % each else ranks} ranks"
        )
    return max(nodes for nodes in range(1, cluster.nodes) if batch % (nodes * each) == 0)


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `| head`
    with one_line_errors():
        raise SystemExit(main(sys.argv[1:]))
