"""Runs that need one another, as one chain: dependent jobs on SLURM, one after another here. Given again, it goes on.

Each link is a run like any other, in a folder CHAIN,LINK: requeued, followed, cancelled and resumed alone. What it
needs is in its status.json. SLURM starts its job when the jobs of those have ended well (afterok: one that goes back to
the queue has not ended) and takes it out of the queue when one has failed; slurm.runs.standing then says which, and
why. The chain's own folder holds chain.json: from it jobs.py shows, cancels and resumes the whole."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from barlow.errors import UserError
from barlow.files import read_json, read_status, write_json, write_status
from slurm.launch import local, submit
from slurm.launch.cluster import Cluster
from slurm.runs.cancel import cancel
from slurm.runs.resume import as_before
from slurm.runs.standing import Run, held, look
from slurm.squeue import end_jobs
from slurm.states import VAIN, WAITING

EVERY = 2.0  # seconds between two looks at all links


@dataclass(frozen=True)
class Link:
    name: str
    module: str  # its stage
    folder: Path  # of its run
    cluster: Cluster  # what it asks for; where it runs, is asked of the chain as a whole
    needs: Sequence[str] = ()  # names of links before it


@dataclass(frozen=True)
class Chain:
    folder: Path
    links: Sequence[Link]  # each after all that it needs

    def __post_init__(self) -> None:
        before: dict[str, Path] = {}
        for link in self.links:
            if wrong := set(link.needs) - before.keys():
                raise ValueError(f"link {link.name} needs {', '.join(sorted(wrong))}, which is none of those before it")
            if link.name in before or link.folder in before.values() or link.folder.parent != self.folder.parent:
                raise ValueError(f"link {link.name}: each has its own name, and its own folder beside {self.folder}")
            before[link.name] = link.folder

    def check(self, cluster: Cluster) -> None:
        """Refuse what cannot run, before anything is created."""
        if (self.folder / "config.json").exists():
            raise UserError(f"{self.folder.name} is a run, not a chain: choose another --run")
        local.refuse_second(self.folder)
        where = submit.settled(cluster).cluster
        for run in self.runs().values():
            if run.alive and (run.here or not run.certain or where == "local"):
                told = f"run {run.name} is {run}" + (f", job {run.job}" if run.job else "")
                raise UserError(f"{told}: end it first, or wait for it (jobs.py show {run.name})")
        for link in self.left():
            try:
                submit.check(asked(link, cluster))
            except UserError as error:
                raise UserError(f"link {link.name}: {error}") from None

    def left(self) -> list[Link]:
        """Those to prepare and to start: neither finished nor under way."""
        return to_start(self.links, self.runs())

    def launch(self, cluster: Cluster) -> int:
        """Run what is left; returns the command's exit code. Each link left must have its run folder prepared, with its
        snapshot of the code, but for a dry run, which creates nothing."""
        where = submit.settled(cluster).cluster
        if cluster.dry_run:
            print(plan(self, cluster))
            return 0
        self.folder.mkdir(parents=True, exist_ok=True)
        with local.only_run(self.folder):
            keep(self, cluster)
            if where == "local":
                return one_after_another(self, cluster)
            hand_in(self, cluster)
        return follow(self) if cluster.follow else 0

    def finished(self) -> bool:
        return all(run.state == "finished" for run in self.runs().values())

    def runs(self) -> dict[str, Run]:
        """How each link stands, by its name."""
        found, _ = look(link.folder for link in self.links)
        return {link.name: run for link, run in zip(self.links, found, strict=True)}


def to_start(links: Sequence[Link], runs: Mapping[str, Run]) -> list[Link]:
    """Without those that are finished or under way; but a job that waits for one that has failed waits in vain."""
    left: dict[str, Link] = {}
    for link in links:
        run = runs[link.name]
        in_vain = run.queued.name in WAITING and any(need in left for need in link.needs)
        if run.state != "finished" and (in_vain or not run.alive):
            left[link.name] = link
    return list(left.values())


def asked(link: Link, cluster: Cluster) -> Cluster:
    """What a link asks for, where the chain is to run."""
    return replace(link.cluster, cluster=cluster.cluster, dry_run=False, follow=False)


def keep(chain: Chain, cluster: Cluster) -> None:
    """All that `read` has to know."""
    links = [
        {"name": link.name, "run": link.folder.name, "needs": link.needs, **given(link, cluster)}
        for link in chain.links
    ]
    write_json(chain.folder / "chain.json", {"cluster": asdict(cluster), "links": links})


def given(link: Link, cluster: Cluster) -> dict[str, Any]:
    return {"module": link.module, "cluster": asdict(asked(link, cluster))}


def begin(chain: Chain, link: Link, cluster: Cluster) -> None:
    """A clean slate for one that is to start."""
    needs = [each.folder.name for each in chain.links if each.name in link.needs]
    write_json(link.folder / "cluster.json", given(link, cluster))
    write_status(link.folder, state="pending", why="", job="", needs=needs)


def read(folder: Path) -> Chain:
    """The chain of a folder, as it was last given."""
    links = read_json(folder / "chain.json")["links"]
    beside = folder.absolute().parent
    return Chain(
        beside / folder.name,
        [Link(link["name"], link["module"], beside / link["run"], as_before(link["cluster"]), tuple(link["needs"]))
         for link in links],
    )  # fmt: skip


def hand_in(chain: Chain, cluster: Cluster) -> None:
    """A job for each link that is left, which starts when the jobs of those that it needs have ended well."""
    runs = chain.runs()
    left = to_start(chain.links, runs)
    jobs = {name: run.job for name, run in runs.items() if run.alive}
    for link in chain.links:
        run = runs[link.name]
        if link not in left:
            print(f"link {link.name}: run {run.name} is {run}" + (f", job {run.job}" if run.alive else ""), flush=True)
            continue
        if run.alive:  # it waits in vain
            end_jobs([run.job])
        begin(chain, link, cluster)
        needed = [need for need in link.needs if need in jobs]
        ready = submit.settled(asked(link, cluster))
        jobs[link.name] = submit.submit(link.module, link.folder, ready, [jobs[need] for need in needed])
        after = f", after {', '.join(needed)}" if needed else ""
        print(f"submitted job {jobs[link.name]}: run {link.folder.name}, {submit.size(ready)}{after}", flush=True)
    for what in ("show", "cancel", "resume") if left else ("show",):
        print(f"  python launchers/jobs.py {what} {chain.folder.name}{submit.where(chain.folder)}", flush=True)


def one_after_another(chain: Chain, cluster: Cluster) -> int:
    """The first that fails, or is told to end, stops the rest."""
    left = chain.left()
    for link in left:
        begin(chain, link, cluster)
    try:
        with local.signals_raise():
            for number, link in enumerate(chain.links, start=1):
                stands = "" if link in left else " has finished"
                print(f"link {link.name} ({number} of {len(chain.links)}): run {link.folder.name}{stands}", flush=True)
                if link in left and (code := run_here(link, cluster)):
                    break
            else:
                return 0
    except local.Told as signal:  # between two of them
        code = 128 + int(signal.args[0])
    for run in chain.runs().values():  # which writes it down, too
        if run.why.startswith(VAIN):
            print(f"run {run.name} {run.why}", file=sys.stderr)
    return code


def run_here(link: Link, cluster: Cluster) -> int:
    ready = submit.settled(asked(link, cluster))
    code = local.run(link.module, link.folder, ready.ranks, given(link, cluster))
    if code == 0 and read_status(link.folder).get("state") != "finished":
        print(f"link {link.name} has ended, but its run has not finished: {link.folder / 'logs'}", file=sys.stderr)
        return 1
    return code


def follow(chain: Chain) -> int:
    """Tell each change of state until all links have ended: 0 if they have finished. Ctrl-C ends the watching only."""
    told: dict[str, str] = {}
    try:
        while True:
            runs = chain.runs()
            for name, run in runs.items():
                now = f"{run}" + (f": {run.why}" if run.why and not run.alive else "")
                if told.get(name) != now:
                    print(f"link {name}: {now}", flush=True)
                told[name] = now
            if not any(run.alive for run in runs.values()):
                return 0 if all(run.state == "finished" for run in runs.values()) else 1
            time.sleep(EVERY)
    except KeyboardInterrupt:
        print(f"\nthe jobs go on: python launchers/jobs.py show {chain.folder.name}", file=sys.stderr)
        return 130


def plan(chain: Chain, cluster: Cluster) -> str:
    """What a dry run prints: each link, what it needs, and its script or its commands."""
    runs = chain.runs()
    text = []
    for number, link in enumerate(chain.links, start=1):
        run, ready = runs[link.name], submit.settled(asked(link, cluster))
        needs = f", needs {', '.join(link.needs)}" if link.needs else ""
        stands = f" is {run}" if run.state == "finished" or run.alive else ""
        text.append(f"# link {number} of {len(chain.links)}: {link.name}{needs}; run {link.folder.name}{stands}")
        if not stands:
            jobs = [runs[need].job if runs[need].alive else f"<job of {need}>" for need in link.needs
                    if runs[need].state != "finished"]  # fmt: skip
            text.append(submit.plan(link.module, link.folder, ready, jobs))
    return "\n".join(text)


def resume(chain: Chain) -> int:
    """Go on from the broken link, as the chain was last given, with the code that its runs have."""
    cluster = as_before(read_json(chain.folder / "chain.json")["cluster"])
    if cluster.cluster == "auto" and any(run.job for run in chain.runs().values()):
        cluster = replace(cluster, cluster="slurm")  # where SLURM is silent: not here instead
    if bare := [link for link in chain.left() if not (link.folder / "code").is_dir()]:
        raise UserError(f"run {bare[0].folder.name} is not prepared: give the chain's command again")
    if not chain.left():
        print(f"chain {chain.folder.name}: nothing to resume: all links have finished or are under way")
        return 0
    chain.check(cluster)
    return chain.launch(cluster)


def cancel_all(chain: Chain, sure: bool) -> int:
    """End all links that wait or run; one that runs here is found though the launcher is just between two of them."""
    runs = list(chain.runs().values())
    while held(chain.folder) and not any(run.alive for run in runs):
        time.sleep(0.1)
        runs = list(chain.runs().values())
    return cancel(runs, sure)
