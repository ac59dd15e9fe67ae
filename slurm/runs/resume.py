"""Start a run again from its folder alone: with the code it was begun with, on the cluster it was given then."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

from barlow.errors import UserError
from barlow.files import read_json
from slurm.launch import submit
from slurm.launch.cluster import Cluster
from slurm.runs.standing import Run, look


def resume(run: Run, nodes: int | None) -> int:
    """Submit it, or run it here; returns the command's exit code. One that has finished, waits or runs stays alone."""
    if run.state == "finished":
        print(f"run {run.name} has finished its {run.status.get('steps', run.status.get('step'))} steps")
        return 0
    if run.alive:
        raise UserError(f"run {run.name} is {run}{f', job {run.job}' if run.job else ''}: nothing to resume")
    stored = read_json(run.folder / "cluster.json")
    if not stored or not (run.folder / "code").is_dir():
        raise UserError(f"run {run.name} was never started: give its command again ({run.folder / 'command.txt'})")
    cluster = as_before(stored["cluster"])
    if nodes is not None:
        cluster = replace(cluster, nodes=nodes)
    if run.job and cluster.cluster == "auto":
        cluster = replace(cluster, cluster="slurm")  # where SLURM is silent: not here instead
    for need in look(run.folder.parent / name for name in run.status.get("needs", ()))[0]:
        if need.state != "finished":
            raise UserError(f"run {run.name} needs {need.name}, which is {need}: resume that, or the chain of both")
    ranks = submit.check(cluster, run.folder)
    batch = read_json(run.folder / "config.json").get("batch_size", 0)
    if batch % ranks:  # as barlow.data.order.share says it; but a run's batch is what it is
        raise UserError(
            f"run {run.name} has batches of {batch}, which {ranks} ranks cannot share: give another --nodes"
        )
    return submit.launch(str(stored["module"]), run.folder, cluster)


def as_before(stored: dict[str, Any]) -> Cluster:
    """The flags that the run was started with; those that there are no more are left out."""
    known = {field.name for field in fields(Cluster)} - {"dry_run", "follow"}
    values: dict[str, Any] = {}
    for key in known & stored.keys():
        values[key] = tuple(stored[key]) if isinstance(stored[key], list) else stored[key]
    return Cluster(**values)
