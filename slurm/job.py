"""python -m slurm.job MODULE RUN_FOLDER [WORKING_FOLDER]: one rank of a run.

Gives the process its place among the ranks (RANK, WORLD_SIZE, MASTER_ADDR, ...), then calls MODULE.main(RUN_FOLDER) in
the main thread. The local launcher starts this file; under SLURM, submitit calls `Job`. A rank that fails says why in
logs/failure.json and leaves at once, so that its launcher ends the others."""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import NoReturn

from barlow.errors import Preempted, UserError
from barlow.files import read_status, write_status
from slurm.states import record_failure

TOLD = (signal.SIGTERM, signal.SIGUSR2)  # how SLURM says that a job is to stop
EARLY = "told to stop before it began"
STOPPED = 75  # exit code of a rank that was told to stop and has saved (EX_TEMPFAIL: try again)
WAIT = 300.0  # seconds for SLURM to end a rank that cannot ask for it; more than any grace time is likely to be
FIRST_PORT, PORTS = 20000, 12000  # below the range from which the kernel hands out ports
PR_SET_PDEATHSIG = 1


@dataclass(frozen=True)
class Job:
    """What submitit pickles: strings only, so that no code travels but the snapshot in the run folder."""

    module: str
    folder: str
    working_folder: str

    def __call__(self) -> None:
        heed_signals_until_the_stage_does(Path(self.folder))
        os.environ.update(slurm_ranks(os.environ))
        run(self.module, self.folder, self.working_folder)


def heed_signals_until_the_stage_does(folder: Path) -> None:
    """Told to stop while the stage still imports, or waits for other ranks: see `stop_early`.

    A thread sees to it, for the main one may be deep in C for minutes, and a handler would wait for it. These handlers
    replace submitit's."""
    told: list[int] = []

    def note(number: int, _: FrameType | None) -> None:
        told.append(number)

    def watch() -> None:
        while number := os.read(reading, 1)[0]:
            if told or signal.getsignal(number) is note:  # else the stage has set its own handler
                stop_early(folder, number)

    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    signal.set_wakeup_fd(writing)  # gets each signal's number at once
    for each in TOLD:
        signal.signal(each, note)
    signal.signal(signal.SIGCONT, signal.SIG_DFL)
    threading.Thread(target=watch, daemon=True).start()


def stop_early(folder: Path, number: int) -> None:
    """Preempted, or near the time limit: rank 0 sends the job back to the queue, the others go on till SLURM ends them.

    Would they leave, a rank 0 that saves already could take that for a failure. Where a peer has failed, srun asks with
    the same SIGTERM: then all leave at once."""
    shown = show_job()
    if preempted(shown) or number == signal.SIGUSR2:
        if os.environ["SLURM_PROCID"] == "0":
            leave(folder, EARLY)
    elif running(shown):
        exit_now(128 + number)
    else:
        leave(folder, EARLY)


def run(module: str, folder: str, working_folder: str) -> None:
    """MODULE.main(folder). Whatever it raises ends this process: 2 for a UserError, 1 for a crash."""
    os.chdir(working_folder)
    try:
        importlib.import_module(module).main(folder)
    except Preempted as stopped:
        leave(Path(folder), str(stopped))
    except UserError as error:
        fail(Path(folder), str(error), "", 2)
    except SystemExit as stop:
        if stop.code:
            fail(Path(folder), f"SystemExit: {stop.code}", trace(stop), 1)
    except BaseException as error:
        fail(Path(folder), f"{type(error).__name__}: {error}", trace(error), 1)


def trace(error: BaseException) -> str:
    """The traceback, from the module's main on."""
    inner = error.__traceback__.tb_next if error.__traceback__ else None
    return "".join(traceback.format_exception(type(error), error, inner))


def fail(folder: Path, error: str, told: str, exit_code: int) -> NoReturn:
    """Record the failure, say it in this rank's log, and leave without waiting for any thread or peer."""
    rank = int(os.environ.get("RANK", "0"))
    with contextlib.suppress(OSError):  # a full disk must not hide the error itself
        record_failure(folder, attempt(os.environ), rank, error, told, exit_code)
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


def leave(folder: Path, why: str) -> NoReturn:
    """Saved, and told to stop. Under SLURM rank 0 sends the job back to the queue, unless it was ended for good.

    The other ranks leave with 0: a bad exit would end rank 0 before it has asked."""
    if launched_here():
        exit_now(STOPPED)
    if os.environ["SLURM_PROCID"] == "0":
        shown = show_job()
        if not shown:
            # A preempted job goes back by itself if SLURM has to end it, but not if its ranks have left before.
            print(f"stopped: {why}; without scontrol this rank waits for SLURM to end it", flush=True)
            time.sleep(WAIT)
        elif not requeue(folder, shown, why) and cancelled(shown):
            print(f"stopped: {why}; the job was cancelled", flush=True)
            with contextlib.suppress(OSError):
                write_status(folder, state="cancelled", why=f"job {os.environ['SLURM_JOB_ID']} was cancelled: {why}")
        exit_now(STOPPED)
    exit_now(0)


def requeue(folder: Path, shown: str, why: str) -> bool:
    """Send the job back to the queue, if SLURM does not end it already and it may be; `shown`: what scontrol says."""
    if not running(shown) or " Requeue=1 " not in shown:
        return False
    job = os.environ["SLURM_JOB_ID"]
    print(f"stopped: {why}; job {job} goes back to the queue", flush=True)
    with contextlib.suppress(OSError):
        if read_status(folder).get("state") != "preempted":  # the stage has said so, and at which step
            write_status(folder, state="pending", why=why)
    ask("scontrol", "requeue", job)
    return True


def show_job() -> str:
    return ask("scontrol", "--oneliner", "show", "job", os.environ["SLURM_JOB_ID"])


def running(shown: str) -> bool:
    """Also SIGNALING: what a running job is while a signal is under way to it."""
    return bool(re.search(r"\bJobState=(RUNNING|SIGNALING)\b", shown))


def preempted(shown: str) -> bool:
    """Whether SLURM has asked this start of the job to make room."""
    times = dict(re.findall(r"\b(PreemptTime|StartTime)=(\d\S+)", shown))
    return "PreemptTime" in times and times["PreemptTime"] >= times.get("StartTime", "")


def cancelled(shown: str) -> bool:
    """Whether SLURM ends the job for good, and not for its time limit: one that it puts back has a restart more."""
    ends = re.search(r"\bJobState=(CANCELLED|COMPLETING)\b", shown) and "Reason=TimeLimit" not in shown
    return bool(ends) and f" Restarts={os.environ.get('SLURM_RESTART_COUNT', '0')} " in shown


def ask(*command: str) -> str:
    try:
        return subprocess.run(command, check=True, capture_output=True, text=True, timeout=60).stdout
    except (OSError, subprocess.SubprocessError) as error:  # no scontrol on this node, say: the job ends, as failed
        print(f"{' '.join(command)}: {error}", file=sys.stderr)
        return ""


def exit_now(code: int) -> NoReturn:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def launched_here() -> bool:
    return "BARLOW_ATTEMPT" in os.environ


def attempt(environment: Mapping[str, str]) -> str:
    """Names this start of the run: JOBID.RESTARTS under SLURM, what the launcher says here."""
    slurm = f"{environment.get('SLURM_JOB_ID', 'none')}.{environment.get('SLURM_RESTART_COUNT', '0')}"
    return environment.get("BARLOW_ATTEMPT", slurm)


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
    if "OMP_NUM_THREADS" not in environment:
        cores = int(environment.get("SLURM_CPUS_ON_NODE", "1")) // local_world
        ranks["OMP_NUM_THREADS"] = environment.get("SLURM_CPUS_PER_TASK") or str(max(1, cores))
    return ranks


def port(job: int, restarts: int) -> int:
    """Every rank works it out alone; a job that starts again does not meet what is left of its former self."""
    return FIRST_PORT + (7 * job + restarts) % PORTS


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
