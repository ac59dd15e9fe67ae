"""What runs there are, and how each stands: its folder, SLURM and the launcher here, made one answer.

A run's status.json is written by the run, which cannot say that it was killed, lost, or cancelled while it waited.
Where that is certain, status.json is put right; where nobody answers, the state is the last known one, not certain."""

from __future__ import annotations

import contextlib
import difflib
import fcntl
import fnmatch
import os
import socket
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from barlow.errors import UserError
from barlow.files import read_json, read_status, write_status
from slurm.squeue import jobs_in_history, jobs_in_queue
from slurm.states import WAITING, State, in_vain

OPEN = ("pending", "running", "preempted")  # states that something has yet to end
BEATS = 60.0  # seconds for which a heartbeat proves that a rank lives


@dataclass(frozen=True)
class Run:
    folder: Path
    status: Mapping[str, Any]  # what status.json says
    state: str  # pending, running, preempted, failed, cancelled, finished: what is so
    why: str = ""  # it stopped
    detail: str = ""  # not started, requeued; starting, ending, suspended
    job: str = ""  # SLURM's, the last one; empty: none, or it runs here
    queued: State = field(default_factory=State)  # what squeue says of the job
    here: bool = False  # a launcher without SLURM has it
    certain: bool = True

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def alive(self) -> bool:
        """Waits or runs, or may do so for all that is known."""
        return self.here or (self.queued.alive and self.state != "finished") or not self.certain

    def __str__(self) -> str:
        return self.state + ("" if self.certain else "?") + (f" ({self.detail})" if self.detail else "")


def find(runs_dir: Path, words: Sequence[str] = ()) -> list[Path]:
    """Folders of the runs that the words name (patterns such as sweep-* too; no words: all), newest first.

    A chain's name stands for its links; they come first, in their order."""
    if not runs_dir.is_dir():
        raise UserError(f"no folder {runs_dir}: --runs-dir says where your runs are")
    marks = ("config.json", "status.json")
    folders = [path for path in runs_dir.absolute().iterdir() if any((path / mark).exists() for mark in marks)]
    known = {path.name: path for path in sorted(folders, key=begun, reverse=True)}
    chosen, linked = set() if words else set(known), list[str]()
    for word in words:
        name = named(runs_dir, word)
        if chain := links(runs_dir / name):
            linked += [link for link in chain if link in known and link not in linked]
            continue
        hits = [name] if name in known else fnmatch.filter(known, name)
        if not hits:
            close = difflib.get_close_matches(name, known, n=1)
            has = f"did you mean {close[0]}?" if close else f"it has {', '.join(list(known)[:5]) or 'none'}"
            raise UserError(f"no run {word!r} in {runs_dir}: {has}{', ...' * (not close and len(known) > 5)}")
        chosen.update(hits)
    return [known[name] for name in (*linked, *(name for name in known if name in chosen - set(linked)))]


def named(runs_dir: Path, word: str) -> str:
    """The name alone, also where a shell has completed it to RUNS_DIR/NAME."""
    return Path(word).name if Path(word).parent.resolve() == runs_dir.resolve() else word


def links(folder: Path) -> list[str]:
    """Names of the runs of a chain, in order; none if the folder is not a chain's."""
    return [link["run"] for link in read_json(folder / "chain.json").get("links", ())]


def begun(folder: Path) -> float:
    """When a command last began the run, or began it again."""
    files = [folder / name for name in ("config.json", "cluster.json")]
    return max((file.stat().st_mtime for file in files if file.exists()), default=0.0)


def look(folders: Iterable[Path]) -> tuple[list[Run], str]:
    """How runs stand, and why SLURM could not be asked (empty: it answered, or there was nothing to ask)."""
    before = {folder: read_status(folder) for folder in folders}
    asked = {folder: job_of(status) for folder, status in before.items() if status.get("state") != "finished"}
    queue, silence = jobs_in_queue(asked.values())
    here = {folder: held(folder) for folder in before}
    now = {folder: read_status(folder) for folder in before}  # what has ended meanwhile has said so
    lost = [job for folder, job in asked.items() if not queue.get(job) and now[folder].get("state") in OPEN]
    books = {} if silence else jobs_in_history(lost)
    runs = []
    for folder, status in now.items():
        job = job_of(status)
        state = of_run(queue.get(job), job, folder) or of_run(books.get(job), job, folder)
        silent = folder in asked and (bool(silence) or job != asked[folder])
        runs.append(held_up(stands(folder, status, here[folder], None if silent else state or State())))
        put_right(runs[-1])
    return runs, silence


def job_of(status: Mapping[str, Any]) -> str:
    return str(status.get("job") or "")


def of_run(state: State | None, job: str, folder: Path) -> State | None:
    """Another SLURM counts its jobs alike: this run's has its name, but for arrays, which share one."""
    return state if state and (state.run == folder.name or "_" in job) else None


def stands(folder: Path, status: Mapping[str, Any], here: bool, answer: State | None) -> Run:
    """The one answer. `answer` is what SLURM says of the run's job: State() if it knows none, None if it is silent."""
    state = str(status.get("state") or "pending")
    why = "" if state == "finished" else str(status.get("why") or "")
    run = Run(folder, status, state, why, job=job_of(status))
    updated = float(status.get("updated") or 0)
    if here:
        detail = phase(run.state, updated, launcher(folder)[2])
        return replace(run, state="running", detail=detail, job="", here=True)
    if not run.job and run.state != "running":
        return replace(run, detail="not started") if run.state == "pending" else run
    if not run.job:
        away = launcher(folder)[0] not in ("", socket.gethostname())  # locks may not reach from there to here
        return replace(run, certain=False) if away else replace(run, state="failed", why="its launcher is gone")
    if answer is None:
        return replace(run, certain=run.state not in OPEN)
    if answer.alive:
        return in_queue(replace(run, queued=answer), updated)
    if run.state not in OPEN:
        return run
    if answer.name == "COMPLETED" and answer.starts:  # a moment ago: the word that it finished is on its way here
        return replace(run, certain=False)
    if not answer.name and (beats(folder) or not ours(folder)):
        return replace(run, certain=False)  # the job of another cluster; or one whose owner hides it
    state, why = ended(run, answer)
    return replace(run, state=state, why=why)


def in_queue(run: Run, updated: float) -> Run:
    """Of a job that waits or runs: its state is SLURM's, but a run that has finished has."""
    if run.state == "finished":
        return run
    if run.queued.name in WAITING:
        again = run.state != "pending" or run.why
        return replace(run, state="pending", detail="requeued" if again else "")
    if run.queued.name == "PREEMPTED":
        return replace(run, state="preempted")
    if run.queued.name in ("SUSPENDED", "STOPPED"):
        return replace(run, state="running", detail="suspended")
    detail = "ending" if run.queued.name == "COMPLETING" else phase(run.state, updated, seconds_of(run.queued.starts))
    return replace(run, state="running", detail=detail)


def phase(state: str, updated: float, begun: float) -> str:
    """Of what runs since `begun`, and last wrote its state at `updated`."""
    if state == "pending" or updated < begun:
        return "starting"
    return "" if state == "running" else "ending"


def ended(run: Run, end: State) -> tuple[str, str]:
    """State and why of a run whose job has ended, and which has not said so itself."""
    last = f" ({run.why})" if run.why else ""
    if end.name == "CANCELLED":
        return "cancelled", f"job {run.job} was cancelled{last}"
    if end.name == "COMPLETED":
        return "failed", f"job {run.job} completed, but the run did not{last}"
    if end.name:
        return "failed", f"job {run.job} ended: {end}{last}"
    if run.state == "pending":
        return "cancelled", f"job {run.job} was cancelled while it waited, or lost{last}"
    if run.state == "preempted":
        return "failed", f"job {run.job} did not come back to the queue{last}"
    return "failed", f"job {run.job} has left the queue without a word{last}"


def held_up(run: Run) -> Run:
    """The same, or cancelled for a run that it needs: SLURM has taken it from the queue, or nobody has started it."""
    if run.alive or run.status.get("state", "pending") != "pending" or run.state not in ("pending", "cancelled"):
        return run
    for need in look(run.folder.parent / name for name in run.status.get("needs", ()))[0]:
        if not need.alive and need.state in ("failed", "cancelled", "preempted"):
            return replace(run, state="cancelled", detail="", why=in_vain(need.name, need.state, need.why))
    return run


def put_right(run: Run) -> None:
    """Write down what is certain, and what the run could not."""
    written = str(run.status.get("state") or "pending")
    if run.certain and not run.alive and written != run.state:
        with contextlib.suppress(OSError):  # another's folder, or a full disk: then it stays said
            write_status(run.folder, unless=("finished",), state=run.state, why=run.why)


def ours(folder: Path) -> bool:
    return os.geteuid() in (0, folder.stat().st_uid)


def beats(folder: Path) -> bool:
    """Whether some rank has shown a heartbeat of late."""
    files = (folder / "heartbeats").glob("rank_*.json")
    return any(time.time() - file.stat().st_mtime < BEATS for file in files)


def held(folder: Path) -> bool:
    """Whether a launcher runs the run without SLURM: it holds a lock as long as it lives."""
    try:
        with open(folder / "logs" / "launcher.lock") as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # no lock: it never ran so
        pass
    return False


def launcher(folder: Path) -> tuple[str, int, float]:
    """Host and process of the last launcher without SLURM, and when it began; "", 0, 0 if there was none."""
    lock = folder / "logs" / "launcher.lock"
    try:
        host, pid = lock.read_text().split()
        return host, int(pid), lock.stat().st_mtime
    except (OSError, ValueError):
        return "", 0, 0.0


def seconds_of(moment: str) -> float:
    """A time as squeue writes it, in seconds since 1970; 0 if it is none."""
    try:
        return time.mktime(time.strptime(moment, "%Y-%m-%dT%H:%M:%S"))
    except ValueError:
        return 0.0
