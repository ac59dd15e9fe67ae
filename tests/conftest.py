"""What tests of several files share: one thread for torch, functions on W ranks in real processes, tiny shards, a real
SLURM and run folders for it."""

from __future__ import annotations

import json
import multiprocessing
import multiprocessing.connection
import os
import pickle
import shutil
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest

from slurm import devcluster

pytest_plugins = ["tests.beside", "tests.kernels.emulator"]

ROOT = Path(__file__).parents[1]
SLURM_TESTS = ROOT / "tests" / "slurm"
Launch = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """Torch computes in one thread: on small tensors and a busy machine, several mostly wait for one another.

    Set anew for every test, for FFCV changes it, and only where torch is imported already: not every test needs it.
    """
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(1)


@pytest.fixture(scope="session")
def on_ranks() -> Callable[..., list[Any]]:
    """`on_ranks(W, function, *args, timeout=60)` -> what function(*args) returned on each rank, in rank order.

    The function stands at the top of a test module; it finds the group already joined through barlow.dist. The first
    rank that fails ends the others, and its traceback is the failure that the test shows. The ranks are forked from a
    server that has imported torch once, so that a group of four takes about a second.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch.nn.parallel", "timm", "barlow.dist"])
    return _run


def _run(world_size: int, function: Callable[..., Any], *args: Any, timeout: float = 60.0) -> list[Any]:
    context = multiprocessing.get_context("forkserver")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes: list[BaseProcess] = []
    pipes: list[Connection] = []
    for rank in range(world_size):
        ours, theirs = context.Pipe(duplex=False)
        job = (theirs, rank, world_size, port, function, args)
        processes.append(context.Process(target=_rank, args=job, daemon=True))
        processes[-1].start()
        theirs.close()
        pipes.append(ours)
    try:
        return _collect(pipes, time.monotonic() + timeout)
    finally:
        for process in processes:
            process.kill()
        for process in processes:
            process.join()


def _collect(pipes: list[Connection], deadline: float) -> list[Any]:
    results: dict[int, Any] = {}
    while len(results) < len(pipes):
        waiting = [pipe for rank, pipe in enumerate(pipes) if rank not in results]
        ready = multiprocessing.connection.wait(waiting, timeout=max(0.0, deadline - time.monotonic()))
        if not ready:
            pytest.fail(f"ranks {sorted(set(range(len(pipes))) - set(results))} did not answer in time", pytrace=False)
        rank = min(pipes.index(pipe) for pipe in ready if isinstance(pipe, Connection))
        try:
            failed, payload = pickle.loads(pipes[rank].recv_bytes())
        except EOFError:
            pytest.fail(f"rank {rank} died without a word", pytrace=False)
        if failed:
            pytest.fail(f"rank {rank}:\n{payload}", pytrace=False)
        results[rank] = payload
    return [results[rank] for rank in range(len(pipes))]


def _rank(pipe: Connection, rank: int, world_size: int, port: int, function: Callable[..., Any], args: Any) -> None:
    import torch

    from barlow import dist

    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world_size), "LOCAL_RANK": str(rank)}
    os.environ |= {"LOCAL_WORLD_SIZE": str(world_size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    try:
        dist.init(torch.device("cpu"), timeout=30.0)
        answer = (False, function(*args))
    except BaseException:
        answer = (True, traceback.format_exc())
    pipe.send_bytes(pickle.dumps(answer))
    pipe.close()
    if not answer[0]:
        dist.shutdown()


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of shards small enough to pretrain on in a test: 96 unlabeled, 48 train and 48 val shapes of 32 px."""
    from PIL import Image

    from barlow.data.shapes import CLASSES, render
    from barlow.data.writing.plan import Request
    from barlow.data.writing.write import write

    root = tmp_path_factory.mktemp("tiny")
    for split, first, count in (("unlabeled", 0, 96), ("train", 96, 48), ("val", 144, 48)):
        for i in range(first, first + count):
            pixels, label = render(i, 0, 32)
            folder = root / "images" / split / ("" if split == "unlabeled" else CLASSES[label])
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(folder / f"{i}.png")
    write(Request(f"folder:{root / 'images'}", root / "shards", None, None, 2, 1, ()))
    return root / "shards"


@pytest.fixture(scope="session")
def real_slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder of a development cluster that is up: the one SLURM_CONF names, or one for this session."""
    if os.environ.get("BARLOW_NO_SLURM") == "1":
        pytest.skip("BARLOW_NO_SLURM=1")
    before = os.environ.get("SLURM_CONF")
    if before and (Path(before).parent / "cluster.json").exists() and devcluster.is_up(Path(before).parent):
        yield Path(before).parent
        return
    folder = tmp_path_factory.mktemp("slurm") / ".cluster"
    devcluster.up(folder)
    os.environ["SLURM_CONF"] = str(folder / "slurm.conf")
    yield folder
    devcluster.down(folder)
    os.environ.pop("SLURM_CONF")
    if before:
        os.environ["SLURM_CONF"] = before


@pytest.fixture
def make_run(tmp_path: Path) -> Callable[..., Path]:
    """make_run(name, **config): a run folder as launchers prepare it, its stage told by config what to do."""

    def make(name: str, **config: object) -> Path:
        folder = tmp_path / "runs" / name
        (folder / "logs").mkdir(parents=True)
        (folder / "config.json").write_text(json.dumps(config))
        for part in ("barlow", "slurm"):
            shutil.copytree(ROOT / part, folder / "code" / part, ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(SLURM_TESTS / "fake_stage.py", folder / "code")
        return folder

    return make


@pytest.fixture
def start() -> Iterator[Launch]:
    """start(folder, **cluster): the command of a launcher, as a process; killed if the test leaves it behind."""
    running: list[subprocess.Popen[str]] = []

    def begin(folder: Path, **cluster: object) -> subprocess.Popen[str]:
        command = [sys.executable, str(SLURM_TESTS / "fake_launcher.py"), str(folder), json.dumps(cluster)]
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
        pipe = subprocess.PIPE
        process = subprocess.Popen(command, env=environment, cwd=folder.parent, stdout=pipe, stderr=pipe, text=True)
        running.append(process)
        return process

    yield begin
    for process in running:
        process.kill()
        process.wait()


@pytest.fixture
def run(start: Launch) -> Callable[..., tuple[int, str, str]]:
    """run(folder, **cluster): the same command to its end: exit code, stdout, stderr."""

    def finish(folder: Path, **cluster: object) -> tuple[int, str, str]:
        process = start(folder, **cluster)
        out, err = process.communicate(timeout=100)
        return process.returncode, out, err

    return finish
