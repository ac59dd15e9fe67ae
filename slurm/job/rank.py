"""python -m slurm.job.rank MODULE RUN_FOLDER [WORKING_FOLDER]: one rank of a run.

Gives the process its place among the ranks (RANK, WORLD_SIZE, MASTER_ADDR, ...), then calls MODULE.main(RUN_FOLDER) in
the main thread, a watchdog beside it. The local launcher starts this file; under SLURM, submitit calls `Job`. A rank
that fails says why in logs/failure.json and leaves at once, so that its launcher ends the others. Whether a job goes
back to the queue is not decided here, but once, by the job's script, when all ranks have left: see slurm.job.settle."""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from barlow import stop
from barlow.errors import BadNode, Preempted, UserError
from barlow.files import read_json, read_status
from slurm.job import watchdog
from slurm.states import in_vain, record_failure, tell_others

FIRST_PORT, PORTS = 20000, 12000  # below the range from which the kernel hands out ports
STRIDE = 7417  # of ports between two jobs: neighbours, such as an array's, stay apart over many restarts
HURRY = 5.0  # seconds for a rank that leaves to say so
PR_SET_PDEATHSIG = 1
PATIENCE = 60.0  # seconds in which a node learns what another one has written: as long as NFS remembers a folder


@dataclass(frozen=True)
class Job:
    """What submitit pickles: strings only, so that no code travels but the snapshot in the run folder."""

    module: str
    folder: str
    working_folder: str

    def __call__(self) -> None:
        os.environ.update(slurm_ranks(os.environ))
        run(self.module, self.folder, self.working_folder)


def run(module: str, run_folder: str, working_folder: str) -> None:
    """MODULE.main(run_folder). Whatever it raises ends this process: 2 for a UserError, 1 for a crash."""
    folder = Path(run_folder)
    os.environ["BARLOW_ATTEMPT"] = attempt(os.environ)
    if within := read_json(folder / "config.json").get("watch", {}).get("start"):
        os.environ.setdefault("BARLOW_START_WITHIN", str(within))
    watchdog.start(folder, os.environ["BARLOW_ATTEMPT"])
    stop.listen(lambda why: leave(folder, why))
    os.chdir(working_folder)
    try:
        await_needs(folder)
        importlib.import_module(module).main(run_folder)
    except Preempted:  # all ranks leave after the same step; a bad exit of another one would end rank 0, which saves
        exit_now(stop.STOPPED if launched_here() or os.environ["RANK"] == "0" else 0)
    except UserError as error:
        fail(folder, str(error), "", 2)
    except BadNode as error:
        fail(folder, str(error), "", 1, host=error.host, kind="node")
    except SystemExit as ending:
        if ending.code:
            fail(folder, f"SystemExit: {ending.code}", trace(ending), 1)
    except BaseException as error:
        if stop.told():  # and so were its peers: that one of them is gone is no failure
            leave(folder, f"{stop.told()}; then {type(error).__name__}")
        fail(folder, f"{type(error).__name__}: {error}", trace(error), 1)


def await_needs(folder: Path) -> None:
    """A link of a chain begins when the runs that it needs have finished, by their own word.

    SLURM's is not enough: it starts a job whose dependency it has forgotten, however that one ended."""
    for need in read_status(folder).get("needs", ()):
        end = time.monotonic() + PATIENCE
        while (status := read_status(folder.parent / need)).get("state") != "finished":
            if time.monotonic() > end:
                raise UserError(in_vain(need, status.get("state", "gone"), status.get("why", "")))
            time.sleep(0.5)


def leave(folder: Path, why: str) -> NoReturn:
    """Told to stop where there is nothing to save, or no way to: this rank leaves, and its launcher ends the others.

    Whatever state the disk is in: it says so if it can."""
    hurry = threading.Timer(HURRY, os._exit, [stop.STOPPED])
    hurry.daemon = True
    hurry.start()
    with contextlib.suppress(Exception):
        tell_others(folder, attempt(os.environ), why)
        print(f"stopped: {why}", flush=True)
    exit_now(stop.STOPPED)


def trace(error: BaseException) -> str:
    """The traceback, from the module's main on."""
    inner = error.__traceback__.tb_next if error.__traceback__ else None
    return "".join(traceback.format_exception(type(error), error, inner))


def fail(folder: Path, error: str, told: str, exit_code: int, host: str = "", kind: str = "crash") -> NoReturn:
    """Record the failure, say it in this rank's log, and leave without waiting for any thread or peer."""
    rank = int(os.environ.get("RANK", "0"))
    with contextlib.suppress(OSError):  # a full disk must not hide the error itself
        record_failure(folder, attempt(os.environ), rank, error, told, exit_code, host, kind)
    said = told or f"error: {error}\n"
    try:
        if launched_here() and rank == 0:  # its stderr is the terminal, where the launcher shows the first failure
            with open(folder / "logs" / "rank_0.log", "a") as log:
                log.write(said)
            said = ""
    except OSError:
        pass
    with contextlib.suppress(OSError):
        sys.stderr.write(said)
        exit_now(exit_code)
    os._exit(exit_code)


def exit_now(code: int) -> NoReturn:
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):  # a full disk
            stream.flush()
    os._exit(code)


def launched_here() -> bool:
    return "BARLOW_LAUNCHER" in os.environ


def attempt(environment: Mapping[str, str]) -> str:
    """Names this start of the run: JOB.RESTARTS under SLURM, what the launcher says here."""
    slurm = f"{job_name(environment)}.{environment.get('SLURM_RESTART_COUNT', '0')}"
    return environment.get("BARLOW_ATTEMPT", slurm)


def job_name(environment: Mapping[str, str]) -> str:
    """As squeue names it: 123, or 123_4 in an array."""
    array, task = environment.get("SLURM_ARRAY_JOB_ID"), environment.get("SLURM_ARRAY_TASK_ID")
    return f"{array}_{task}" if array else environment.get("SLURM_JOB_ID", "none")


def slurm_ranks(environment: Mapping[str, str]) -> dict[str, str]:
    """The variables that torch's env:// rendezvous reads, from those that srun sets."""
    from submitit.slurm.slurm import SlurmJobEnvironment

    world = int(environment.get("SLURM_STEP_NUM_TASKS") or environment["SLURM_NTASKS"])
    nodes = int(environment.get("SLURM_STEP_NUM_NODES") or environment["SLURM_JOB_NUM_NODES"])
    local_world = world // nodes
    hosts = SlurmJobEnvironment().hostnames
    ranks = {"RANK": environment["SLURM_PROCID"], "WORLD_SIZE": str(world)}
    ranks |= {"LOCAL_RANK": environment["SLURM_LOCALID"], "LOCAL_WORLD_SIZE": str(local_world)}
    ranks["MASTER_ADDR"] = reachable(hosts[0], environment)
    ranks["MASTER_PORT"] = str(port(int(environment["SLURM_JOB_ID"]), int(environment.get("SLURM_RESTART_COUNT", "0"))))
    share = max(1, int(environment.get("SLURM_CPUS_ON_NODE", "1")) // local_world)
    cores = environment.get("SLURM_CPUS_PER_TASK") or str(share)
    ranks["BARLOW_CORES"] = cores  # for the threads that decode, whatever torch was told of its own
    if "OMP_NUM_THREADS" not in environment:
        ranks["OMP_NUM_THREADS"] = cores
    return ranks


def port(job: int, restarts: int) -> int:
    """Every rank works it out alone; a job that starts again does not meet what is left of its former self."""
    return FIRST_PORT + (STRIDE * job + restarts) % PORTS


def reachable(host: str, environment: Mapping[str, str]) -> str:
    """The host, or where its name is unknown the address of the node that runs srun, which is the job's first."""
    try:
        socket.getaddrinfo(host, None)
    except socket.gaierror:
        return environment.get("SLURM_LAUNCH_NODE_IPADDR", host)
    return host


def die_with(launcher: int) -> None:
    """Ask the kernel to end this process when its launcher dies, however that happens."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != launcher:  # it died before we asked
        exit_now(1)


def main(argv: Sequence[str]) -> None:
    if len(argv) not in (2, 3):
        raise SystemExit(__doc__)
    if launcher := os.environ.get("BARLOW_LAUNCHER"):
        die_with(int(launcher))
    run(argv[0], str(Path(argv[1]).absolute()), argv[2] if len(argv) == 3 else os.getcwd())


if __name__ == "__main__":
    main(sys.argv[1:])
