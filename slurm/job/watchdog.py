"""A small process beside each rank: notices when the rank stops moving, finds out which of all ranks is to blame, says
so in logs/failure.json, and kills it, so that its launcher ends the others and the job starts again.

The rank promises by when it is heard of next (barlow.pulse); its watchdog, a child that it forks before it imports
anything heavy, looks once a second. It dies with the rank, leaves no file behind but heartbeats/rank_R.json, and holds
none of the rank's open ones. What a suspended job, or a machine that sleeps, has missed is forgiven.

`kill -QUIT PID` has a rank write the stacks of all its threads, and go on: logs/stacks/ATTEMPT.rank_R.txt."""

from __future__ import annotations

import contextlib
import faulthandler
import fcntl
import gc
import os
import re
import signal
import socket
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, NoReturn

from barlow import pulse
from barlow.files import read_status, write_json
from barlow.history import later
from slurm.job import blame
from slurm.states import record_failure

START = 1800.0  # seconds until the first beat, which the stage gives once it is built; or BARLOW_START_WITHIN
TICK = 1.0  # seconds between two looks
EVERY = 10.0  # seconds between two heartbeats of a rank, with up to CROWD ranks; with more, in proportion
CROWD = 64
SETTLE = 2.0  # seconds that other late ranks have to say where they are
SILENT = 3.0  # heartbeats left out after which a rank, or its node, is gone
GIVE_WAY = 10.0  # seconds for the watchdog of the rank to blame to end it, before another does
JUMP = 5.0  # seconds of sleep too many which say that the whole job was suspended
DUMP = 2.0  # seconds for a stack to be written
HUNG = 60  # ticks after which a watchdog that waits for the file system ends a late rank without a word
LAST = 10.0  # seconds to write that the rank has ended
FRAMES = 30  # of a stack, the innermost ones
IGNORED = {signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT}
STACK = re.compile(r"^(Current thread|Thread) 0x\w+([^\n]*)\n((?:  .*\n)*)", re.M)
FRAME = re.compile(r'  File "(.*)", line (\d+) in (.*)')


def start(folder: Path, attempt: str) -> None:
    """Called in the rank, first of all: have it watched from now on."""
    try:
        beats, stacks = unnamed_file(), unnamed_file()
        within = float(os.environ.get("BARLOW_START_WITHIN", START))
        pulse.create(Path(f"/proc/self/fd/{beats}"), within)
        os.environ[pulse.VARIABLE] = f"/proc/{os.getpid()}/fd/{beats}"
        faulthandler.register(signal.SIGQUIT, file=stacks, all_threads=True)
        dog = Watchdog(folder, attempt, os.getpid(), beats, stacks)
        before = signal.pthread_sigmask(signal.SIG_BLOCK, IGNORED)
        try:
            if os.fork() == 0:
                be_watchdog(dog, before)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
    except OSError as error:
        print(f"nobody watches this rank: {error}", file=sys.stderr, flush=True)


def unnamed_file() -> int:
    """A file in memory, or at least on a local disk, that ends with the last process that has it open."""
    with tempfile.TemporaryFile(dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None) as file:
        return fcntl.fcntl(file, fcntl.F_DUPFD_CLOEXEC, 3)


def be_watchdog(dog: Watchdog, mask: Collection[int]) -> NoReturn:
    """The rest of the forked process: the rank's open files, signals and memory are none of its business."""
    try:
        gc.disable()  # its pages stay shared with the rank's
        for number in IGNORED:  # SLURM and terminals signal whole trees of processes
            signal.signal(number, signal.SIG_IGN)
        signal.signal(signal.SIGCONT, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        for name in os.listdir("/proc/self/fd"):
            if int(name) not in (dog.beats, dog.stacks):
                with contextlib.suppress(OSError):
                    os.close(int(name))
        nothing = os.open(os.devnull, os.O_RDWR)  # is 0 now
        os.dup2(nothing, 1)
        os.dup2(nothing, 2)
        with contextlib.suppress(OSError):
            Path("/proc/self/comm").write_text("watchdog")
        guard(dog)
    finally:
        os._exit(0)


def guard(dog: Watchdog) -> None:
    """Beside the thread that does the work, which hangs when the file system does: a late rank ends even then."""
    worker = threading.Thread(target=dog.run, daemon=True)
    worker.start()
    view = View(dog.rank, dog.beats)
    seen, same = 0, 0
    while os.getppid() == dog.rank:
        time.sleep(TICK)
        view.look(TICK)
        same = same + 1 if dog.turns == seen else 0
        seen = dog.turns
        if same >= HUNG and view.late > 0:
            dog.kill()
    worker.join(timeout=LAST)


class View:
    """A rank as seen from beside it."""

    def __init__(self, rank: int, beats: int) -> None:
        self.rank = rank  # its process
        self.file = Path(f"/proc/self/fd/{beats}")
        self.beat = pulse.look(self.file)
        self.seen = self.looked = time.monotonic()
        self.forgiven = 0.0  # seconds that this beat's deadline is put off
        self.late = self.still = 0.0  # seconds past the deadline, and since the beat

    def look(self, expected: float) -> bool:
        """Whether it comes much later than the `expected` seconds after the last one, as in a process that was stopped:
        nor could the rank move meanwhile."""
        now, beat = time.monotonic(), pulse.look(self.file)
        gap, self.looked = now - self.looked - expected, now
        if beat.number != self.beat.number:
            self.beat, self.seen, self.forgiven = beat, now, 0.0
        if gap > JUMP:
            self.forgiven += gap
        self.late = now - beat.deadline - self.forgiven
        self.still = now - self.seen - self.forgiven
        return gap > JUMP

    def process(self) -> str:
        """The letter of the state of the rank's main thread."""
        try:
            return Path(f"/proc/{self.rank}/stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            return blame.ENDED


class Watchdog:
    """What one rank's watchdog knows, and does about it."""

    def __init__(self, folder: Path, attempt: str, rank: int, beats: int, stacks: int) -> None:
        self.folder, self.attempt, self.rank, self.beats, self.stacks = folder, attempt, rank, beats, stacks
        self.number, self.world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
        self.node = os.environ.get("SLURMD_NODENAME") or socket.gethostname()
        self.main_thread = f"0x{threading.main_thread().ident:016x}"
        self.crowd = max(1.0, self.world / CROWD)
        self.turns = 0
        self.view = View(rank, beats)
        self.process = "R"
        self.written = -float("inf")  # when the last heartbeat was tried
        self.heard = False  # whether it went through
        self.copied = 0  # bytes of the stacks
        self.began: float | None = None  # when this rank was found late
        self.first: dict[int, float] = {}  # the heartbeats that were there then
        self.decided: float | None = None  # when it was first clear who is to blame
        self.stack = ""

    def run(self) -> None:
        try:
            while os.getppid() == self.rank:
                self.turns += 1
                self.turn()
                time.sleep(self.pause())
            self.process = blame.ENDED
            self.write()
        except Exception:
            self.tell(f"this rank's watchdog failed:\n{traceback.format_exc()}")

    def pause(self) -> float:
        return TICK * (self.crowd if self.began else 1)

    def turn(self) -> None:
        stopped = self.view.look(self.pause())
        if self.view.late <= 0 or stopped:
            self.began = self.decided = None
        before, self.process = self.process, self.view.process()
        late = self.view.late > 0
        worse = late or (self.process != before and self.process in "TtZ")
        if worse or time.monotonic() - self.written >= EVERY * self.crowd:
            self.write()
            if self.superseded():
                self.kill()
        self.copy_stacks()
        if late:
            self.suspect()

    def heartbeat(self) -> dict[str, Any]:
        beat, view = self.view.beat, self.view
        where = {"attempt": self.attempt, "rank": self.number, "node": self.node, "pid": self.rank}
        what = {"step": beat.step, "phase": beat.phase, "late": round(view.late, 1), "still": round(view.still, 1)}
        return {**where, **what, "process": self.process, "time": round(time.time(), 2)}

    def write(self) -> None:
        self.written, self.heard = time.monotonic(), False
        with contextlib.suppress(OSError):  # a full disk is not this rank's fault
            (self.folder / "heartbeats").mkdir(exist_ok=True)
            write_json(blame.file(self.folder, self.number), self.heartbeat())
            self.heard = True

    def superseded(self) -> bool:
        """Whether a later start of the run has begun: SLURM has lost sight of this node, the job goes on elsewhere."""
        with contextlib.suppress(OSError, ValueError):
            begun = read_status(self.folder).get("attempt")
            return later(str(begun), than=self.attempt)
        return False

    def suspect(self) -> None:
        """The rank is late: who is to blame, and is it for this watchdog to end something?"""
        now = time.monotonic()
        ranks = blame.read_heartbeats(self.folder, self.attempt, self.world) | {self.number: self.heartbeat()}
        if self.began is None:
            self.began, self.first = now, {rank: beat["time"] for rank, beat in ranks.items() if rank != self.number}
            held, self.stack = self.process in "Tt", self.take_stack()
            if held:  # nothing to ask; and for its stack it had to be woken
                return self.end(self.number, ranks, ())
        silent = blame.unheard(ranks, self.first, self.world)
        if not self.heard:  # nor could others be, then: to each its own
            ranks, silent = {self.number: self.heartbeat()}, set()
        if now - self.began < (SILENT * EVERY * self.crowd if silent else SETTLE):
            return
        guilty = blame.guilty(ranks, silent)
        if guilty is None:
            self.decided = None
            return
        self.decided = self.decided or now
        able = [rank for rank in sorted(ranks) if rank not in {guilty, *silent} and blame.is_late(ranks[rank])]
        turn = 0.0 if guilty == self.number else GIVE_WAY if able[0] == self.number else 2 * GIVE_WAY
        if now - self.decided >= (turn - GIVE_WAY if guilty in silent else turn):
            self.end(guilty, ranks, silent)

    def end(self, guilty: int, ranks: Mapping[int, Mapping[str, Any]], silent: Collection[int]) -> None:
        stack = self.stack
        if guilty != self.number:
            stack = "" if guilty in silent else main_thread(read(stacks_file(self.folder, self.attempt, guilty)))
        error = blame.words(guilty, ranks, silent, time.monotonic() - (self.began or 0.0))
        if stack:
            error += f"; main thread: {innermost(stack)}"
        with contextlib.suppress(OSError):
            told = f"{stack}{error}\n"
            node = str(ranks.get(guilty, {}).get("node", "unknown"))
            kind = "hung" if blame.nobody_in_particular(guilty, ranks, silent) else "stuck"
            record_failure(self.folder, self.attempt, guilty, error, told, 1, host=node, kind=kind)
        self.kill()

    def kill(self) -> None:
        if os.getppid() == self.rank:
            os.kill(self.rank, signal.SIGKILL)

    def take_stack(self) -> str:
        """Have the rank write its stacks, which needs no cooperation of Python's; return the main thread's."""
        size = os.fstat(self.stacks).st_size
        os.kill(self.rank, signal.SIGQUIT)
        if self.process in "Tt":
            os.kill(self.rank, signal.SIGCONT)  # a stopped one writes nothing
        end, last = time.monotonic() + DUMP, size
        while time.monotonic() < end:
            time.sleep(0.05)
            last, before = os.fstat(self.stacks).st_size, last
            if last == before > size:
                break
        return main_thread(self.copy_stacks())

    def copy_stacks(self) -> str:
        """What the rank has written of its stacks since, into the run folder."""
        size = os.fstat(self.stacks).st_size
        if size == self.copied:
            return ""
        text = os.pread(self.stacks, size - self.copied, self.copied).decode(errors="replace")
        self.copied = size
        text = text.replace(f"{self.main_thread} ", f"{self.main_thread}, the main thread ")
        self.tell(text)
        return text

    def tell(self, text: str) -> None:
        beat = self.view.beat
        with contextlib.suppress(OSError):
            file = stacks_file(self.folder, self.attempt, self.number)
            file.parent.mkdir(parents=True, exist_ok=True)
            with open(file, "a") as log:
                log.write(f"{time.strftime('%F %T')}, after step {beat.step} (in: {beat.phase})\n{text}\n")


def stacks_file(folder: Path, attempt: str, rank: int) -> Path:
    return folder / "logs" / "stacks" / f"{attempt}.rank_{rank}.txt"


def read(file: Path) -> str:
    try:
        return file.read_text(errors="replace")
    except OSError:
        return ""


def main_thread(dump: str) -> str:
    """The last stack of the main thread in what faulthandler wrote, as Python shows tracebacks: innermost last."""
    found = STACK.findall(dump)
    chosen = [frames for _, told, frames in found if "main thread" in told]
    chosen = chosen or [frames for which, _, frames in found if which.startswith("Current")]
    frames = FRAME.findall(chosen[-1])[:FRAMES] if chosen else []
    lines = [f'  File "{file}", line {line}, in {name}\n' for file, line, name in reversed(frames)]
    return "Main thread (most recent call last):\n" + "".join(lines) if lines else ""


def innermost(stack: str) -> str:
    file, line, name = re.findall(r'File "(.*)", line (\d+), in (.*)', stack)[-1]
    return f"{'/'.join(Path(file).parts[-2:])}:{line} {name}"
