"""python -m slurm.job MODULE RUN_FOLDER [WORKING_FOLDER]: one rank of a run.

Gives the process its place among the ranks (RANK, WORLD_SIZE, MASTER_ADDR, ...), then calls MODULE.main(RUN_FOLDER) in
the main thread. The local launcher starts this file; under SLURM, submitit calls `Job`. A rank that fails says why in
logs/failure.json and leaves at once, so that its launcher ends the others."""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import importlib
import os
import signal
import socket
import struct
import subprocess
import sys
import time
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from barlow.errors import Preempted, UserError
from slurm.states import record_failure

if TYPE_CHECKING:
    from submitit.helpers import DelayedSubmission

STOPPED = 75  # exit code of a rank that was told to stop and has saved (EX_TEMPFAIL: try again)
WAIT = 300.0  # seconds for SLURM to end a rank that cannot ask for it; more than any grace time is likely to be
FIRST_PORT, PORTS = 20000, 12000  # below the range from which the kernel hands out ports
SIOCGIFADDR = 0x8915
PR_SET_PDEATHSIG = 1


@dataclass(frozen=True)
class Job:
    """What submitit pickles: strings only, so that no code travels but the snapshot in the run folder."""

    module: str
    folder: str
    working_folder: str

    def __call__(self) -> None:
        # submitit ignores SIGTERM, which only delays every end until SLURM's SIGKILL. A stage may set its own handler.
        for number in (signal.SIGTERM, signal.SIGCONT):
            signal.signal(number, signal.SIG_DFL)
        os.environ.update(slurm_ranks(os.environ))
        run(self.module, self.folder, self.working_folder)

    def checkpoint(self) -> DelayedSubmission:
        """What submitit queues again: the same. All state is in the run folder."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self)


def run(module: str, folder: str, working_folder: str) -> None:
    """MODULE.main(folder). Whatever it raises ends this process: 2 for a UserError, 1 for a crash."""
    os.chdir(working_folder)
    try:
        importlib.import_module(module).main(folder)
    except Preempted as stopped:
        leave(str(stopped))
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


def leave(why: str) -> NoReturn:
    """Saved, and told to stop. Under SLURM rank 0 sends the job back to the queue, unless it was ended for good.

    The other ranks leave with 0: a bad exit would end rank 0 before it has asked."""
    if launched_here():
        exit_now(STOPPED)
    if os.environ.get("RANK", "0") == "0":
        job = os.environ["SLURM_JOB_ID"]
        shown = ask("scontrol", "--oneliner", "show", "job", job)
        if "JobState=RUNNING" in shown and "Requeue=1" in shown:
            print(f"stopped: {why}; job {job} goes back to the queue", flush=True)
            ask("scontrol", "requeue", job)
        elif not shown:
            # A preempted job goes back by itself if SLURM has to end it, but not if its ranks have left before.
            print(f"stopped: {why}; without scontrol this rank waits for SLURM to end it", flush=True)
            time.sleep(WAIT)
        exit_now(STOPPED)
    exit_now(0)


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
    if nodes > 1 and "GLOO_SOCKET_IFNAME" not in environment:
        # Seen from its own node a host may be 127.0.1.1, so the first node looks towards the second.
        peer = hosts[1] if environment.get("SLURM_NODEID", "0") == "0" else hosts[0]
        if name := interface_towards(reachable(peer, environment)):
            ranks["GLOO_SOCKET_IFNAME"] = name
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


def interface_towards(host: str) -> str:
    """Name of the network interface through which this machine reaches the host; empty if that cannot be told.

    Connecting a UDP socket sends nothing, but makes the kernel choose the way."""
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((host, 9))
            address = probe.getsockname()[0]
            for _, name in socket.if_nameindex():
                request = struct.pack("256s", name.encode()[:15])
                with contextlib.suppress(OSError):  # an interface without an address
                    found = socket.inet_ntoa(fcntl.ioctl(probe.fileno(), SIOCGIFADDR, request)[20:24])
                    if found == address or (found == "127.0.0.1" and address.startswith("127.")):
                        return name
    except OSError:
        pass
    return ""


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
