"""Preflight: what is wrong with a node is found, named, and known to every rank; what is right costs little."""

from __future__ import annotations

import os
import re
import socket
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed

import barlow.engine.preflight
from barlow import dist
from barlow.config import Preflight
from barlow.data import staging
from barlow.data.shards import read_index
from barlow.engine import memory
from barlow.engine.preflight import Found, clock_offsets, preflight, taken, together, wrong_clocks
from barlow.errors import BadNode, UserError

Ranks = Callable[..., list[Any]]
CPU = torch.device("cpu")
MIB = 1 << 20


def nothing(fault: str = "", refused: str = "") -> Generator[None, None, str]:
    """A node's data that is there, or ends so."""
    yield
    if refused:
        raise UserError(refused)
    return fault


@contextmanager
def wrong(mine: dict[str, Any]) -> Iterator[None]:
    """Within, this rank has what is wrong: its clock, its products, what it adds to sums, how fast it sends."""
    now, product = time.time, torch.matmul
    reduce, send = torch.distributed.all_reduce, torch.distributed.send

    def wrong_sum(x: torch.Tensor, *args: Any) -> None:
        if x.dim():
            x[123] += 1
        reduce(x, *args)

    def slow_send(*args: Any) -> None:
        time.sleep(0.2)
        send(*args)

    with pytest.MonkeyPatch.context() as patch:
        if "clock" in mine:
            patch.setattr(time, "time", lambda: now() + mine["clock"])
        if "product" in mine:
            patch.setattr(torch, "matmul", lambda a, b: product(a, b) + torch.eye(len(a)) * mine["product"])
        if "sum" in mine:
            patch.setattr(torch.distributed, "all_reduce", wrong_sum)
        if "send" in mine:
            patch.setattr(torch.distributed, "send", slow_send)
        yield


def flight(folder: str, nodes: int, bad: dict[int, dict[str, Any]], knobs: Preflight) -> tuple[str, list[str], float]:
    """Preflight on `nodes` nodes; `bad`: what is wrong, by rank. -> error, lines, seconds"""
    rank, world = dist.rank(), dist.world_size()
    if nodes > 1:
        os.environ["SLURMD_NODENAME"] = f"n{rank * nodes // world}"
        os.environ["LOCAL_RANK"] = str(rank % (world // nodes))
    mine = bad.get(rank, {})
    data = nothing(*mine.get("data", ("", "")))
    began, error, told = time.perf_counter(), "", []
    try:
        with wrong(mine):
            told = preflight(knobs, Path(folder), mine.get("memory", 0), mine.get("disk", 0), data, CPU)
    except (BadNode, UserError, RuntimeError) as caught:
        error = f"{type(caught).__name__}: {caught}"
    return error, told, time.perf_counter() - began


def flights(folder: str, nodes: int, cases: list[tuple[dict[int, dict[str, Any]], Preflight]]) -> list[str]:
    """The errors of several in a row, with small all-reduces."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(barlow.engine.preflight, "payload", lambda _: MIB)
        return [flight(folder, nodes, bad, knobs)[0] for bad, knobs in cases]


@pytest.mark.parametrize(("world", "nodes"), [(1, 1), (2, 1), (4, 2)])
def test_good_nodes_are_told_in_a_line_and_soon(on_ranks: Ranks, tmp_path: Path, world: int, nodes: int) -> None:
    answers = on_ranks(world, flight, str(tmp_path), nodes, {}, Preflight())
    for error, told, _ in answers:
        assert not error
        (line,) = told
        speed = re.search(r"all-reduce at ([\d.]+) GB/s", line)
        assert (speed is None) == (world == 1)
        assert speed is None or 0.01 < float(speed[1]) < 100
        assert nodes == 1 or f"clocks of {nodes} nodes within 0.00 s" in line
        free = re.search(r"([\d.]+) GiB of memory and ([\d.]+) GiB of disk free", line)
        assert free
        assert min(map(float, free.groups())) > 0
    assert max(seconds for *_, seconds in answers) < (0.5 if world == 1 else 3)  # idle: 0.01 s and under 1 s


BANDWIDTH = Preflight(bandwidth=1e6)
CASES: dict[str, tuple[dict[int, dict[str, Any]], Preflight, str]] = {
    "a clock": ({2: {"clock": 45.0}}, Preflight(), "BadNode: node n2: its clock is 45 s off the first node's"),
    "a clock within what is allowed": ({2: {"clock": 45.0}}, Preflight(clock=60.0), ""),
    "nothing is looked at": ({2: {"clock": 45.0, "memory": 1 << 50}}, Preflight(skip=True), ""),
    "memory": ({3: {"memory": 1 << 50}}, Preflight(), "BadNode: node n3: .* its 1 ranks need 1048576.0 GiB more"),
    "products": ({1: {"product": 0.5}}, Preflight(), "BadNode: node n1: a product of matrices on cpu of rank 1"),
    "no numbers": ({1: {"product": float("nan")}}, Preflight(), "BadNode: node n1: a product of matrices"),
    "a sum": ({2: {"sum": True}}, Preflight(), "RuntimeError: between nodes n0, n1, n2, n3: .* a wrong sum"),
    "a way": ({1: {"send": True}, 2: {"send": True}}, BANDWIDTH, "BadNode: node n2: .* of the 1e[+]06 that"),
    "a disk": ({3: {"data": ("its disk fails", "")}}, Preflight(skip=True), "BadNode: node n3: its disk fails"),
    "shards, seen by one node": ({1: {"data": ("", "x: cut")}}, Preflight(), "BadNode: node n1: x: cut"),
    "shards": ({rank: {"data": ("", "x: cut")} for rank in range(4)}, Preflight(), "UserError: x: cut"),
    "two nodes": (
        {1: {"product": 0.5}, 3: {"product": 0.5}},
        Preflight(),
        r"BadNode: node n1: a product .* exclude it \(nor are fit: n3\)",
    ),
}


def test_all_ranks_name_the_same_bad_node(on_ranks: Ranks, tmp_path: Path) -> None:
    answers = on_ranks(4, flights, str(tmp_path), 4, [(bad, knobs) for bad, knobs, _ in CASES.values()])
    for name, *errors in zip(CASES, *answers, strict=True):
        assert len(set(errors)) == 1, (name, errors)
        assert re.match(f"{CASES[name][2]}{'' if CASES[name][2] else '$'}", errors[0]), (name, errors[0])


def test_two_ranks_of_a_node_are_one_node(on_ranks: Ranks, tmp_path: Path) -> None:
    cases = [
        ({0: {"sum": True}}, Preflight()),
        ({}, BANDWIDTH),
        ({0: {"memory": 1 << 49}, 1: {"memory": 1 << 49}}, Preflight()),
    ]
    host = socket.gethostname()
    for summed, slow, short in on_ranks(2, flights, str(tmp_path), 1, cases):
        assert summed.startswith(f"BadNode: node {host}: an all-reduce between its ranks gives a wrong sum")
        assert slow.startswith(f"BadNode: node {host}: an all-reduce moves ")
        assert "its 2 ranks need 1048576.0 GiB more" in short


def test_of_two_nodes_nobody_can_tell_which_is_slow(on_ranks: Ranks, tmp_path: Path) -> None:
    for (slow,) in on_ranks(2, flights, str(tmp_path), 2, [({}, BANDWIDTH)]):
        assert re.match("RuntimeError: between nodes n0, n1: .* that --preflight.bandwidth asks for", slow)


def waiting(folder: str) -> tuple[int, int, float]:
    """Rank 0's data takes longer than the group waits for a rank."""
    group = torch.distributed.group.WORLD
    assert group is not None
    group._get_backend(CPU)._set_default_timeout(timedelta(seconds=2))
    barlow.engine.preflight.TURN = 0.2
    os.environ["LOCAL_RANK"] = "0"
    pieces, beats = 0, 0

    def data() -> Generator[None, None, str]:
        nonlocal pieces
        for _ in range(250 if dist.rank() == 0 else 3):
            time.sleep(0.01)
            pieces += 1
            yield
        return ""

    def beat() -> None:
        nonlocal beats
        beats += 1

    began = time.perf_counter()
    preflight(Preflight(skip=True), Path(folder), 0, 0, data(), CPU, beat)
    return pieces, beats, time.perf_counter() - began


def test_data_may_take_longer_than_a_collective(on_ranks: Ranks, tmp_path: Path) -> None:
    for rank, (pieces, beats, seconds) in enumerate(on_ranks(2, waiting, str(tmp_path))):
        assert pieces == (250 if rank == 0 else 3)
        assert seconds > 2.5
        assert beats >= 5


def staging_on_two_nodes(shards: str, folder: Path) -> tuple[str, list[str]]:
    """One node's disk is named wrongly, then both are right: the error, and the folders that the ranks then read."""
    os.environ |= {"SLURMD_NODENAME": f"n{dist.rank()}", "LOCAL_RANK": "0"}
    index, splits, error, read = read_index(shards), ("unlabeled",), "", []
    for wrongly in (True, False):
        os.environ["DISK"] = str(folder / ("file" if wrongly and dist.rank() == 1 else f"disk{dist.rank()}"))
        work = staging.ready(index, splits, "$DISK/barlow", hashes=True)
        try:
            preflight(Preflight(), folder, 0, 0, work, CPU)
            read.append(str(staging.staged(index, splits, "$DISK/barlow").folder.parent))
        except BadNode as caught:
            error = str(caught)
    return error, read


def test_each_node_stages_to_its_own_disk(on_ranks: Ranks, tmp_path: Path, tiny_data: Path) -> None:
    (tmp_path / "file").touch()
    for rank, (error, read) in enumerate(on_ranks(2, staging_on_two_nodes, str(tiny_data), tmp_path)):
        assert re.match(f"node n1: --data.stage {tmp_path}/file/barlow: not a directory: give a folder on each", error)
        assert read == [f"{tmp_path}/disk{rank}/barlow"]


def reading_on_two_nodes(good: str, bad: str, damaged: list[int]) -> str:
    os.environ["SLURMD_NODENAME"] = f"n{dist.rank()}"
    try:
        together(lambda: read_index(bad if dist.rank() in damaged else good))
    except (BadNode, UserError) as caught:
        return f"{type(caught).__name__}: {caught}"
    return ""


@pytest.mark.parametrize("damaged", [[], [1], [0, 1]])
def test_data_that_only_some_nodes_miss_is_their_fault(
    on_ranks: Ranks, tmp_path: Path, tiny_data: Path, damaged: list[int]
) -> None:
    told = f"no index.json in {tmp_path}: write it with"
    expected = ["", f"BadNode: node n1: {told}", f"UserError: {told}"][len(damaged)]
    for answer in on_ranks(2, reading_on_two_nodes, str(tiny_data), str(tmp_path), damaged):
        assert answer.startswith(expected)
        assert bool(answer) == bool(damaged)


def test_a_disk_without_room_is_a_warning(tmp_path: Path) -> None:
    _, warning = preflight(Preflight(), tmp_path, 0, 1 << 50, nothing(), CPU)
    assert re.fullmatch(f"warning: {tmp_path} has room for .* its checkpoints take 1048576.00 GiB: .*", warning)


def test_another_process_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """What torch says of a GPU's memory is made up: no GPU is needed to judge it."""
    gib = 1 << 30
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 2 * gib)
    device = torch.device("cuda", 3)
    for free, fault in (
        (76, ""),
        (70, ""),
        (60, "its GPU 3 has 17 GiB taken by another process: end that, or exclude it"),
    ):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device, free=free: (free * gib, 80 * gib))
        assert taken(device) == fault
    assert taken(CPU) == ""


def found(node: str, *clocks: float) -> Found:
    return Found(node, clocks, "", True, ())


def test_the_least_difference_of_clocks_counts() -> None:
    offsets = clock_offsets([found("a", 10, 20, 30), found("a", 10, 20, 30), found("b", 10.2, 19.9, 75)])
    assert offsets == {"a": 0.0, "b": pytest.approx(-0.1)}


@pytest.mark.parametrize(
    ("offsets", "bad"),
    [
        ({"a": 0.0, "b": 29.0, "c": -29.0}, []),
        ({"a": 0.0, "b": 45.0}, ["b"]),
        ({"a": 0.0, "b": -45.0, "c": 0.1, "d": 90.0}, ["b", "d"]),
        ({"a": 0.0, "b": 45.0, "c": 45.1}, ["a"]),  # it is the first one's that is off
    ],
)
def test_whose_clock_is_off(offsets: dict[str, float], bad: list[str]) -> None:
    assert [node for node, _ in wrong_clocks(offsets, 30.0)] == bad


MOUNTS = """\
31 23 0:28 / /sys/fs/cgroup rw,relatime - tmpfs tmpfs rw,mode=755
35 31 0:32 {root} /sys/fs/cgroup/memory rw,relatime - cgroup cgroup rw,memory
32 31 0:29 / /sys/fs/cgroup/cpu rw,relatime - cgroup cgroup rw,cpu
41 31 0:38 {root} /sys/fs/cgroup/unified rw,relatime - cgroup2 cgroup2 rw
"""
V1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_")
V2 = ("memory.max", "memory.current", "")


def machine(root: Path, mount: str, group: str, limits: dict[str, tuple[str | int, int, int]]) -> Path:
    """A made-up /proc and /sys: `limits` has for each group of `mount` its limit, usage, and of that cached files."""
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/meminfo").write_text("MemTotal: 16384 kB\nMemAvailable:    8192 kB\nCached: 0 kB\n")
    (root / "proc/self/cgroup").write_text(f"8:pids:/\n4:cpu,memory:{group}\n1:cpu:/\n0::{group}\n")
    (root / "proc/self/mountinfo").write_text(MOUNTS.format(root="/"))
    limit_name, usage_name, prefix = V1 if mount == "memory" else V2
    for name, (limit, usage, cached) in limits.items():
        folder = root / "sys/fs/cgroup" / mount / name
        folder.mkdir(parents=True, exist_ok=True)
        (folder / limit_name).write_text(f"{limit}\n")
        (folder / usage_name).write_text(f"{usage}\n")
        stat = f"anon 77\n{prefix}inactive_file {cached - 1}\n{prefix}active_file 1\nother 5\n"
        (folder / "memory.stat").write_text(stat)
    return root


@pytest.mark.parametrize("mount", ["memory", "unified"])
def test_memory_under_the_limits_of_control_groups(tmp_path: Path, mount: str) -> None:
    none: str | int = 9223372036854771712 if mount == "memory" else "max"
    deep = {"slurm/job_7": (none, 9 * MIB, 1), "slurm": (6 * MIB, 5 * MIB, 2 * MIB), ".": (none, 1 << 40, 1)}
    assert memory.left(machine(tmp_path / "a", mount, "/slurm/job_7", deep)) == 3 * MIB
    assert memory.left(machine(tmp_path / "b", mount, "/", {".": (4 * MIB, MIB, 1)})) == 3 * MIB + 1
    assert memory.left(machine(tmp_path / "c", mount, "/gone", {".": (MIB, 2 * MIB, 1)})) == 0  # a container's view
    assert memory.left(machine(tmp_path / "d", mount, "/slurm", {"slurm": (none, MIB, 1)})) == 8 * MIB


def test_memory_of_this_machine() -> None:
    assert 1 << 20 < memory.left() < 1 << 50
