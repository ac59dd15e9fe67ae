"""All ranks of a run on this machine, without SLURM: a process each, which live and die together."""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from barlow import history
from barlow.errors import UserError
from barlow.files import read_status, write_json, write_status
from barlow.stop import STOPPED
from slurm.states import BY_WATCHDOG, read_failure, record_killed

GRACE = 5.0  # seconds between asking a rank to end and killing it, after another has failed
LEAVING = 30.0  # the same after this process was told to end: ranks save first
AGAIN = 0.5  # seconds within which a second signal is still the first one: `timeout` and terminals send two
ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
KILLED = {-signal.SIGKILL, -signal.SIGSEGV, -signal.SIGBUS, -signal.SIGILL, -signal.SIGFPE}
SAVING = 600.0  # seconds ranks may still save after the first of them has stopped as told


@dataclass(frozen=True)
class Ended:
    """How a rank ended: its exit code, or minus the number of the signal that killed it."""

    rank: int
    code: int


class Told(KeyboardInterrupt):
    """This process got a signal that ends it; its argument is the signal's number."""


def run(module: str, folder: Path, ranks: int, given: Mapping[str, Any] | None = None) -> int:
    """Run `ranks` ranks of MODULE.main(folder) until all have ended; returns the exit code of the run.

    0: finished. 2: a user's error, told in one line. 128 + signal: this process was told to end. 1: anything else."""
    attempt = f"{socket.gethostname()}-{os.getpid()}-{int(time.time())}"
    started: list[subprocess.Popen[bytes]] = []
    with only_run(folder), signals_raise(), guarded() as guard:
        try:
            write_json(folder / "cluster.json", given or {})
            write_status(folder, job="")  # of an earlier start, in SLURM
            for rank, environment in enumerate(environments(folder, ranks, attempt)):
                started.append(start(module, folder, rank, environment))
                os.write(guard, f"{started[-1].pid}\n".encode())
            ended = wait(started)
        except Told as told:
            number = signal.Signals(told.args[0])
            print(f"{number.name}: ending {ranks_in_words(ranks)}; a second one kills", file=sys.stderr)
            with contextlib.suppress(Told):
                end_all(started, LEAVING)
            end_all(started, grace=0.0)
            with contextlib.suppress(OSError):
                if read_status(folder).get("state") in ("pending", "running"):
                    write_status(folder, state="cancelled", why=number.name)
            return 128 + number
        finally:
            end_all(started, grace=0.0)
    return report(folder, attempt, ended)


def ranks_in_words(ranks: int) -> str:
    return "1 rank" if ranks == 1 else f"{ranks} ranks"


def command(module: str, folder: Path) -> list[str]:
    """What each rank runs. Its working folder is the snapshot, so that code found there wins over any installed."""
    return [sys.executable, "-u", "-m", "slurm.job.rank", module, str(folder), os.getcwd()]


def code_of(folder: Path) -> Path:
    """The snapshot that runs; a run folder without one runs what is here."""
    return folder / "code" if (folder / "code").is_dir() else Path(__file__).resolve().parents[2]


def environments(folder: Path, ranks: int, attempt: str) -> Iterator[dict[str, str]]:
    """Each rank's own variables, laid over this process's environment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    for rank in range(ranks):
        own = {"RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(ranks)}
        own |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        own |= {"BARLOW_ATTEMPT": attempt, "BARLOW_LAUNCHER": str(os.getpid())}
        own["PYTHONPATH"] = os.pathsep.join(filter(None, [str(code_of(folder)), os.environ.get("PYTHONPATH", "")]))
        if ranks > 1:
            threads = max(1, len(os.sched_getaffinity(0)) // ranks)
            own["OMP_NUM_THREADS"] = os.environ.get("OMP_NUM_THREADS", str(threads))
            own["GLOO_SOCKET_IFNAME"] = os.environ.get("GLOO_SOCKET_IFNAME", "lo")
        yield own


def start(module: str, folder: Path, rank: int, environment: Mapping[str, str]) -> subprocess.Popen[bytes]:
    """Rank 0 talks to this terminal, the others to their log. Each is the head of its own process group."""
    with contextlib.ExitStack() as stack:
        log = stack.enter_context(open(folder / "logs" / f"rank_{rank}.log", "ab")) if rank else None
        return subprocess.Popen(
            command(module, folder),
            cwd=code_of(folder),
            env={**os.environ, **environment},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )


def wait(started: Sequence[subprocess.Popen[bytes]]) -> list[Ended]:
    """How ranks ended, earliest first. After a bad end the others are ended; after a stop they may finish saving."""
    ended: list[Ended] = []
    deadline = float("inf")
    while len(ended) < len(started):
        codes = {rank: exit_code(process) for rank, process in enumerate(started)}
        known = {end.rank for end in ended}
        now = [Ended(rank, code) for rank, code in codes.items() if code is not None and rank not in known]
        ended += sorted(now, key=lambda end: end.code not in KILLED)  # a killed rank takes its peers along, not they it
        if any(end.code not in (0, STOPPED) for end in ended):
            break
        if any(end.code == STOPPED for end in now):
            deadline = min(deadline, time.monotonic() + SAVING)
        if time.monotonic() > deadline:
            break
        time.sleep(0.02)
    end_all(started)
    return ended


def exit_code(process: subprocess.Popen[bytes]) -> int | None:
    """As Popen.poll, but leaves the process a zombie, so that its group's number cannot pass to another."""
    found = os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    if found is None:
        return None
    return found.si_status if found.si_code == os.CLD_EXITED else -found.si_status


def end_all(started: Sequence[subprocess.Popen[bytes]], grace: float = GRACE) -> None:
    """Ask all ranks to end, wait a little, then kill what is left of their process groups."""
    running = [process for process in started if process.returncode is None]
    if grace:
        for process in running:
            os.kill(process.pid, signal.SIGTERM)  # Popen's own would reap it
        deadline = time.monotonic() + grace
        while any(exit_code(process) is None for process in running) and time.monotonic() < deadline:
            time.sleep(0.02)
    for process in running:
        kill_group(process.pid)
        process.wait()


def kill_group(group: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, signal.SIGKILL)


@contextlib.contextmanager
def guarded() -> Iterator[int]:
    """Beside the body runs a process that, should this one die without a word, kills the process groups of the ranks.

    It reads their numbers from the pipe whose writing end is given to the body."""
    reading, writing = os.pipe()
    guard = os.fork()
    if guard == 0:
        os.setsid()
        os.close(writing)
        for number in ENDING:
            signal.signal(number, signal.SIG_IGN)
        with open(reading) as pipe:
            words = pipe.read().split()  # until the last writer is gone
        for group in words if "done" not in words else ():
            kill_group(int(group))
        os._exit(0)
    os.close(reading)
    try:
        yield writing
        os.write(writing, b"done\n")
    finally:
        os.close(writing)
        os.waitpid(guard, 0)


@contextlib.contextmanager
def signals_raise() -> Iterator[None]:
    """Ctrl-C, SIGTERM and a closed terminal raise Told here, twice at most: further ones are ignored."""
    told: list[float] = []

    def tell(number: int, _: FrameType | None) -> None:
        now = time.monotonic()
        if told and (now - told[0] < AGAIN or number == signal.SIGHUP):
            return
        told.append(now)
        if len(told) == 2:
            for each in before:
                signal.signal(each, signal.SIG_IGN)
        raise Told(number)

    # What is ignored already stays so: nohup means it.
    before = {number: signal.getsignal(number) for number in ENDING if signal.getsignal(number) != signal.SIG_IGN}
    for each in before:
        signal.signal(each, tell)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def only_run(folder: Path) -> Iterator[None]:
    """Two launchers on one run folder would overwrite each other's checkpoints: the second is refused."""
    (folder / "logs").mkdir(parents=True, exist_ok=True)
    with open(folder / "logs" / "launcher.lock", "a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"run {folder.name} runs here already: end it first, or choose another --run") from None
        lock.truncate(0)
        with contextlib.suppress(OSError):  # a full disk; this only says whom to tell that the run is to end
            os.write(lock.fileno(), f"{socket.gethostname()} {os.getpid()}\n".encode())
        yield


def refuse_second(folder: Path) -> None:
    if (folder / "logs" / "launcher.lock").exists():
        with only_run(folder):
            pass


def report(folder: Path, attempt: str, ended: Sequence[Ended]) -> int:
    """Say what ended the run, the cause and not what followed from it, and give its exit code."""
    code, event = outcome(folder, attempt, ended)
    with contextlib.suppress(OSError):
        if event:
            status = read_status(folder)
            history.note(folder, event, attempt=attempt, why=status.get("why", ""), step=status.get("step", 0))
    return code


def outcome(folder: Path, attempt: str, ended: Sequence[Ended]) -> tuple[int, str]:
    """The exit code, and what history calls this end."""
    bad = [end for end in ended if end.code not in (0, STOPPED)]
    failure = read_failure(folder, attempt)
    if failure and bad and (failure["kind"] in BY_WATCHDOG or bad[0].code not in KILLED):
        return show_failure(failure), "failed"
    if bad:
        rank, code = bad[0].rank, bad[0].code
        why = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        with contextlib.suppress(OSError):  # without space left there is nothing to leave
            record_killed(folder, attempt, rank, socket.gethostname(), why)
        log = f"; its log: {folder / 'logs' / f'rank_{rank}.log'}" if rank else ""
        print(f"rank {rank} {why}{log}", file=sys.stderr)
        return 2 if code == 2 else 1, "failed"
    if ended[-1].code == STOPPED:
        print("stopped as told, and saved: the same command goes on from there", file=sys.stderr)
        return 1, "stopped"
    return 0, ""


def show_failure(failure: Mapping[str, object]) -> int:
    """The first failing rank's one line or traceback; the run's exit code."""
    if failure["exit_code"] == 2:
        print(f"error: {failure['error']}", file=sys.stderr)
        return 2
    print(f"rank {failure['rank']} on {failure['host']} failed first:\n{failure['traceback']}", end="", file=sys.stderr)
    return 1
