"""Many runs from one command: an array of jobs, an element a run; without SLURM, one run after another here.

Each is a run like any other: it is requeued, followed, cancelled and resumed alone. What an element is, its number
alone says; so each submission has a folder RUNS_DIR/.sweeps/NAME/N whose links, 0, 1, ..., lead to the run folders."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from submitit.core.utils import DelayedSubmission

from barlow.errors import UserError
from barlow.files import write_json
from slurm.job.rank import Job
from slurm.launch import local, submit
from slurm.launch.cluster import Cluster
from slurm.runs.standing import look


@dataclass(frozen=True)
class Runs:
    name: str
    folders: Sequence[Path]  # of the runs, which lie in one folder
    several: bool = True  # False: the one run there is, as a job of its own
    at_once: int | None = None  # as many may run at a time; None: all

    def check(self, cluster: Cluster) -> int:
        """Refuse what cannot run, before anything is created; returns the number of ranks a run will have."""
        if not self.several:
            return submit.check(cluster, None if cluster.dry_run else self.folders[0])
        ranks = submit.check(cluster)
        if submit.settled(cluster).cluster == "local":
            return ranks
        if cluster.follow:
            raise UserError("--follow shows one run: leave it out, and then: python launchers/jobs.py logs RUN -f")
        most = re.search(r"MaxArraySize\s*=\s*(\d+)", "\n".join(submit.ask_scontrol("config")))
        if most and len(self.folders) > int(most.group(1)):
            many = f"{len(self.folders)} runs: SLURM here takes {most.group(1)} in one array"
            raise UserError(f"the sweep has {many}; sweep fewer values at a time")
        return ranks

    def left(self, cluster: Cluster) -> Runs:
        """Without those that have finished or are under way; of these it is told."""
        if not self.several and cluster.dry_run:
            return self
        gone = done(self.folders, alive=self.several)  # `check` has refused a single one that is
        return replace(self, folders=[folder for folder in self.folders if folder not in gone])

    def launch(self, module: str, cluster: Cluster) -> int:
        """Run MODULE.main(folder) on every rank of every run; returns the command's exit code.

        The run folders must be there, with their snapshots of the code, but for a dry run, which creates nothing."""
        if not self.folders:
            return 0
        if not self.several:
            return submit.launch(module, self.folders[0], cluster)
        given = {"module": module, "cluster": asdict(cluster)}
        cluster = submit.settled(cluster)
        if cluster.dry_run:
            print(plan(module, self, cluster))
            return 0
        if cluster.cluster == "local":
            return one_after_another(module, self.folders, cluster.ranks, given)
        for folder in self.folders:
            write_json(folder / "cluster.json", given)
        job = hand_in(module, self, cluster)
        many = "1 run" if len(self.folders) == 1 else f"{len(self.folders)} runs"
        each = f"{cluster.nodes} {'node' if cluster.nodes == 1 else 'nodes'} of {cluster.partition}"
        each += f" and {local.ranks_in_words(cluster.ranks)} each"
        print(f"submitted array {job}: {many} of sweep {self.name}, {each}")
        for what in (f"table {self.name}", f"list '{self.name},*'", f"cancel '{self.name},*'"):
            print(f"  python launchers/jobs.py {what}{submit.where(self.folders[0])}", flush=True)
        return 0


def done(folders: Sequence[Path], alive: bool = True) -> list[Path]:
    """Those that have finished and, if asked for, those that wait or run; each told in a line."""
    runs, _ = look(folder for folder in folders if (folder / "status.json").exists())
    for run in runs:
        if run.state == "finished":
            print(f"run {run.name} has finished its {run.status.get('steps')} steps: {run.folder / 'results.json'}")
        elif alive and run.alive:
            print(f"run {run.name} is {run}" + (f", job {run.job}" if run.job else ""))
    return [run.folder for run in runs if run.state == "finished" or (alive and run.alive)]


def one_after_another(module: str, folders: Sequence[Path], ranks: int, given: Mapping[str, Any]) -> int:
    """A run that fails does not keep the others from running; one that a user's error or a signal ends, does."""
    codes = []
    for number, folder in enumerate(folders):
        if done([folder]):  # it runs elsewhere since
            continue
        print(f"run {folder.name} ({number + 1} of {len(folders)})", flush=True)
        codes.append(local.run(module, folder, ranks, given))
        if codes[-1] not in (0, 1):
            return codes[-1]
    return max(codes, default=0)


def array(runs: Runs, links: Path, cluster: Cluster) -> submit.Executor:
    """All that is asked of SLURM."""
    made = submit.executor(links / "%a", cluster)
    made.runs = runs.folders
    many = len(runs.folders)
    made.parameters |= {"job_name": runs.name, "map_count": many, "array_parallelism": runs.at_once or many}
    return made


def links_of(runs: Runs) -> Path:
    """The folder of links for the next submission."""
    known = runs.folders[0].parent / ".sweeps" / runs.name
    taken = [int(path.name) for path in known.glob("*") if path.name.isdigit()]
    return known / str(max(taken, default=0) + 1)


def hand_in(module: str, runs: Runs, cluster: Cluster) -> str:
    """The array to SLURM; returns its id."""
    links = links_of(runs)
    made = array(runs, links, cluster)
    try:
        made.folder.mkdir(parents=True)
        for number, folder in enumerate(runs.folders):
            (folder / "logs" / "submitit").mkdir(parents=True, exist_ok=True)
            (links / str(number)).symlink_to(Path("../../..", folder.name))
            DelayedSubmission(Job(module, str(folder), os.getcwd())).dump(made.folder / f"{number}.pkl")
    except OSError as error:
        raise UserError(f"cannot write the sweep's folder {links}: {error.strerror}") from None
    with submit.refusals(cluster):
        job = str(made._submit_command(made._submitit_command_str).job_id)
        for number in range(len(runs.folders)):  # ranks wait for it
            (made.folder / f"{number}.pkl").rename(made.folder / f"{job}_{number}_submitted.pkl")
    return job


def plan(module: str, runs: Runs, cluster: Cluster) -> str:
    """What a dry run prints: the array's script, and below it which run each element is."""
    if cluster.cluster == "local":
        return "\n".join(submit.plan(module, folder, cluster) for folder in runs.folders)
    made = array(runs, links_of(runs), cluster)
    text = made._make_submission_file_text(made._submitit_command_str, "")
    called = f"# each of the {local.ranks_in_words(cluster.ranks)} of an element calls {module}.main, through submitit:"
    return "\n".join([text, called, *(f"# {number}: {folder}" for number, folder in enumerate(runs.folders))])
