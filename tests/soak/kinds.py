"""What can happen to a run, a function each, which returns whom it hit.

`KINDS` says which of them must end the start of the job that they hit, so that SLURM starts it again, and which it must
live through."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass

from slurm import devcluster, devfaults
from slurm.devfaults import until
from tests.soak.run import RANKS, Run, last_step, send


@dataclass(frozen=True)
class Kind:
    strike: Callable[[Run], str]
    ends: bool | None  # None: it may
    meanwhile: float = 0.0  # seconds of training that the run may make before it ends, or while it lasts


def to_one(number: signal.Signals) -> Callable[[Run], str]:
    def strike(run: Run) -> str:
        name, rank = run.any_rank()
        send(rank.process, number)
        return name

    return strike


def kill_all(run: Run) -> str:
    for rank in run.ranks().values():
        send(rank.process, signal.SIGKILL)
    return "all ranks"


def kill_at_end(run: Run) -> str:
    """When only the last save and evaluation are left to be done, if it comes in time."""
    ranks = run.ranks()
    run.wait_until(lambda: last_step(run.folder) >= run.steps, every=0.001)
    time.sleep(run.random.uniform(0, 0.1))
    for rank in ranks.values():
        send(rank.process, signal.SIGKILL)
    return "all ranks, after the last step"


def freeze_rank(run: Run) -> str:
    """With its watchdog, as on a node that hangs: the others must find out."""
    name, rank = run.any_rank()
    for process in filter(None, (rank.watchdog, rank.process)):
        send(process, signal.SIGSTOP)
    return name


def kill_srun(run: Run) -> str:
    """The ranks live on, and nobody waits for them."""
    run.ranks()
    victims = [pid for pid in devfaults.of_job(run.job) if devfaults.name_of(pid) == "srun"]
    for pid in victims:
        send(pid, signal.SIGKILL)
    return "srun"


def pause_rank(run: Run) -> str:
    name, rank = run.any_rank()
    send(rank.process, signal.SIGSTOP)
    time.sleep(3)
    send(rank.process, signal.SIGCONT)
    return f"{name}, 3 s"


def kill_watchdog(run: Run) -> str:
    name, rank = run.any_rank()
    if rank.watchdog:
        send(rank.watchdog, signal.SIGKILL)
    return f"that of {name}" if rank.watchdog else "none"


def usr2_job(run: Run) -> str:
    run.ranks()
    devfaults.tell(run.cluster, "scancel", "--signal=USR2", run.job)
    return "job"


def requeue(run: Run) -> str:
    devfaults.tell(run.cluster, "scontrol", "requeue", run.job)
    return "job"


def time_limit(run: Run) -> str:
    run.later.append(devfaults.limit(run.cluster, run.job))
    return "job"


def preempt(grace: int) -> Callable[[Run], str]:
    def strike(run: Run) -> str:
        seconds = run.random.randint(1, 5)
        devfaults.preempt(run.cluster, seconds, grace)
        return f"job, {seconds} s"

    return strike


def slurmd_blink(run: Run) -> str:
    """SLURM does not miss a daemon that is back within SlurmdTimeout; what it has started lives on without it."""
    node, seconds = run.any_node(), run.random.uniform(1, 6)
    devfaults.end(run.cluster, node)
    time.sleep(seconds)
    devfaults.start(run.cluster, node)
    return f"{node}, {seconds:.0f} s"


def slurmd_restart(run: Run) -> str:
    node = run.any_node()
    devfaults.end(run.cluster, node, signal.SIGTERM)
    devfaults.start(run.cluster, node)
    return node


def slurmd_down(batch: bool) -> Callable[[Run], str]:
    """The node goes down with its ranks alive, and comes back while they, or what has replaced them, run."""

    def strike(run: Run) -> str:
        node = "n1" if batch else run.random.choice(devcluster.names(RANKS)[1:])
        devfaults.end(run.cluster, node)
        back(run, node)
        return node

    return strike


def node_lost(run: Run) -> str:
    node = run.any_node()
    devfaults.lose_node(run.cluster, node)
    if run.random.random() < 0.5:
        back(run, node)
        return f"{node}, back when down"
    devfaults.start(run.cluster, node)
    return f"{node}, back at once"


def back(run: Run, node: str) -> None:
    until(lambda: devfaults.is_down(run.cluster, node), 120, f"{node} is not down")
    time.sleep(run.random.uniform(0, 5))
    devfaults.start(run.cluster, node)


def slurmctld(run: Run) -> str:
    devfaults.wait_until_saved(run.cluster)
    devfaults.end(run.cluster, "slurmctld")
    time.sleep(seconds := run.random.uniform(0, 8))
    devfaults.start(run.cluster, "slurmctld")
    return f"{seconds:.0f} s"


def slurmctld_requeue(run: Run) -> str:
    """Away when ranks end, or when the job waits: their script asks until it is back."""
    if run.random.random() < 0.5:
        ranks = run.ranks()
        devfaults.wait_until_saved(run.cluster)
        devfaults.end(run.cluster, "slurmctld")
        for rank in ranks.values():
            send(rank.process, signal.SIGKILL)
        when = "before it"
    else:
        devfaults.tell(run.cluster, "scontrol", "requeue", run.job)
        devfaults.wait_until_saved(run.cluster)
        devfaults.end(run.cluster, "slurmctld")
        when = "in it"
    time.sleep(seconds := run.random.uniform(0, 8))
    devfaults.start(run.cluster, "slurmctld")
    return f"{when}, {seconds:.0f} s"


def disk_full(run: Run) -> str:
    ballast, seconds = run.folder.parent / "ballast", run.random.uniform(3, 8)
    try:
        with contextlib.suppress(OSError), open(ballast, "wb", buffering=0) as file:
            while True:
                file.write(b"\0" * 4096)
        time.sleep(seconds)
    finally:
        ballast.unlink(missing_ok=True)
    return f"{seconds:.0f} s"


def damage(run: Run) -> str:
    """The newest checkpoint is broken when the next start needs it."""
    newest = max((run.folder / "checkpoints").glob("step-*.pt"), default=None)
    how = run.random.choice(["a bit flipped", "cut", "deleted"])
    if newest is None:
        how = "none there yet"
    elif how == "deleted":
        newest.unlink()
    elif how == "cut":
        os.truncate(newest, run.random.randrange(newest.stat().st_size))
    else:
        with open(newest, "r+b") as file:
            at = file.seek(run.random.randrange(newest.stat().st_size))
            byte = file.read(1)[0]
            file.seek(at)
            file.write(bytes([byte ^ 1 << run.random.randrange(8)]))
    kill_all(run)
    return f"{newest.stem if newest else 'checkpoint'} {how}"


KINDS = {
    "usr2-rank": Kind(to_one(signal.SIGUSR2), ends=True),
    "usr2-job": Kind(usr2_job, ends=True),
    "term-rank": Kind(to_one(signal.SIGTERM), ends=True),
    "kill-rank": Kind(to_one(signal.SIGKILL), ends=True),
    "kill-all": Kind(kill_all, ends=True),
    "stop-rank": Kind(to_one(signal.SIGSTOP), ends=True),  # until the watchdog finds it
    "freeze-rank": Kind(freeze_rank, ends=True),
    "pause-rank": Kind(pause_rank, ends=False, meanwhile=1),
    "kill-watchdog": Kind(kill_watchdog, ends=False),
    "kill-srun": Kind(kill_srun, ends=True),
    "preempt": Kind(preempt(0), ends=True),
    "preempt-grace": Kind(preempt(15), ends=True),
    "requeue": Kind(requeue, ends=True),
    "time-limit": Kind(time_limit, ends=True, meanwhile=60),
    "slurmd-blink": Kind(slurmd_blink, ends=False, meanwhile=7),
    "slurmd-restart": Kind(slurmd_restart, ends=False),
    "slurmd-down": Kind(slurmd_down(batch=False), ends=True, meanwhile=40),
    "slurmd-down-batch": Kind(slurmd_down(batch=True), ends=True, meanwhile=40),
    "node-lost": Kind(node_lost, ends=True, meanwhile=40),
    "slurmctld": Kind(slurmctld, ends=False, meanwhile=15),
    "slurmctld-requeue": Kind(slurmctld_requeue, ends=True, meanwhile=8),
    "disk-full": Kind(disk_full, ends=False, meanwhile=9),
    "damage": Kind(damage, ends=True),
}
END = Kind(kill_at_end, ends=None)
