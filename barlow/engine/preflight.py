"""What each node must have before training starts: the right time, devices that compute, ranks that hear each other,
its data, and memory.

Every rank looks at its own; then all learn what each has found, and raise the same BadNode. So a bad node costs seconds
and a line with its name, not hours and wrong numbers."""

from __future__ import annotations

import shutil
import statistics
import time
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed

from barlow import dist
from barlow.config import Preflight
from barlow.engine import memory
from barlow.errors import BadNode, UserError

T = TypeVar("T")
Faults = list[tuple[str, str]]  # node and what is wrong with it, in the order of ranks

TURN = 1.0  # seconds that a rank works on its data between two words to the others
ROUNDS = 3  # of what is measured
MIB = 1 << 20
GIB = 1 << 30


@dataclass(frozen=True)
class Found:
    """By one rank, of its node and of the way to the others."""

    node: str
    clocks: tuple[float, ...]  # right after a barrier, each
    device: str  # what is wrong with it
    sums: bool  # all-reduces of known numbers gave what they must
    seconds: tuple[float, ...]  # that each of them took


@dataclass(frozen=True)
class Ready:
    """By one rank, when the data of all nodes is ready."""

    node: str
    refused: str  # what a user may have got wrong about the data
    fault: str  # what is wrong with the node
    left: int  # bytes of memory
    needed: int


def preflight(
    knobs: Preflight,
    run_folder: Path,
    need_memory: int,
    need_disk: int,
    data: Generator[None, None, str],
    device: torch.device,
    beat: Callable[[], object] = lambda: None,
) -> list[str]:
    """Called by every rank before it opens its data: lines for the log, or the same BadNode or UserError on all ranks.

    `need_memory`: bytes of host memory that this rank is yet to take. `need_disk`: bytes of all checkpoints to keep.
    `data` makes the node's data ready. The first rank of each node runs it, from yield to yield, so that it may take
    longer than any collective; it returns what is wrong with the node, and runs with `knobs.skip` too. `beat` is called
    every second meanwhile."""
    node = dist.node()
    measured = [] if knobs.skip else check_ranks(knobs, node, device)
    began = time.perf_counter()
    refused, fault = run_together(data, beat)
    seconds = time.perf_counter() - began
    everyone = gather(Ready(node, refused, fault, memory.left(), need_memory))
    refuse_user([(each.node, each.refused) for each in everyone])
    refuse([(each.node, each.fault) for each in everyone])
    if knobs.skip:
        return []
    refuse(short_of_memory(everyone))
    disk, host = shutil.disk_usage(run_folder).free, min(each.left for each in everyone)
    free = f"{host / GIB:.1f} GiB of memory and {disk / GIB:.1f} GiB of disk free"
    told = [f"preflight: {', '.join([*measured, f'data ready in {seconds:.1f} s', free])}"]
    if disk < need_disk:
        room = f"{run_folder} has room for {disk / GIB:.2f} GiB, its checkpoints take {need_disk / GIB:.2f} GiB"
        told.append(f"warning: {room}: make room; training goes on, but what does not fit is not saved")
    return told


def check_ranks(knobs: Preflight, node: str, device: torch.device) -> list[str]:
    """What takes no time to find: the clocks, the devices, the way between the ranks."""
    device_fault = taken(device) or miscounts(device)
    everyone = gather(Found(node, clocks(), device_fault, *all_reduces(device)))
    nodes = [each.node for each in everyone]
    refuse([(each.node, each.device) for each in everyone])
    offsets = clock_offsets(everyone)
    refuse(wrong_clocks(offsets, knobs.clock))
    if not all(each.sums for each in everyone):
        refuse_together(nodes, "an all-reduce between its ranks gives a wrong sum: have its network and memory checked")
    if len(nodes) == 1:
        return []
    speed = bandwidth(everyone, payload(device))
    if speed < knobs.bandwidth:
        what = f"an all-reduce moves {speed:.2f} GB/s of the {knobs.bandwidth:g} that --preflight.bandwidth asks for"
        slow = slow_node(nodes, device)
        refuse([(slow, f"{what}, and the way to this node is the slow one")] if slow else [])
        refuse_together(nodes, what)
    spread = max(offsets.values()) - min(offsets.values())
    told = [f"clocks of {len(offsets)} nodes within {spread:.2f} s"] if len(offsets) > 1 else []
    return [*told, f"all-reduce at {speed:.2f} GB/s"]


def together(work: Callable[[], T]) -> T:
    """What every rank does by itself; a UserError of one of them becomes the same error on all."""
    refused = ""
    try:
        done = work()
    except UserError as error:
        refused = str(error)
    refuse_user(gather((dist.node(), refused)))
    return done


def refuse_user(refused: Faults) -> None:
    """What all nodes refuse is the user's error; what only some do is theirs: they do not see what the others do."""
    if {node for node, what in refused if what} == {node for node, _ in refused}:
        raise UserError(next(what for _, what in refused if what))
    refuse(refused)


def refuse(faults: Faults) -> None:
    """The first node that has one; the others are named."""
    bad = [(node, what) for node, what in faults if what]
    if bad:
        first, what = bad[0]
        others = [node for node in dict.fromkeys(node for node, _ in bad) if node != first]
        raise BadNode(first, what + (f" (nor are fit: {', '.join(others)})" if others else ""))


def refuse_together(nodes: Sequence[str], what: str) -> None:
    """A fault of which nobody can tell whose it is: no node shall be avoided for it, unless there is but one."""
    names = list(dict.fromkeys(nodes))
    if len(names) == 1:
        raise BadNode(names[0], what)
    raise RuntimeError(f"between nodes {', '.join(names)}: {what}")


def run_together(data: Generator[None, None, str], beat: Callable[[], object]) -> tuple[str, str]:
    """Run `data` on one rank of each node; all ranks return when the last is done. -> (UserError, fault of the node)"""
    working = dist.local_rank() == 0
    refused = fault = ""
    while True:
        until = time.perf_counter() + TURN
        while working and time.perf_counter() < until:
            try:
                next(data)
            except StopIteration as end:
                working, fault = False, end.value or ""
            except UserError as error:
                working, refused = False, str(error)
        if not dist.highest(int(working)):
            return refused, fault
        beat()


def gather(value: T) -> list[T]:
    """Every rank's, in rank order."""
    everyone = [value] * dist.world_size()
    if len(everyone) > 1:
        torch.distributed.all_gather_object(everyone, value)
    return everyone


def clocks() -> tuple[float, ...]:
    read = []
    for _ in range(ROUNDS):
        dist.barrier()
        read.append(time.time())
    return tuple(read)


def clock_offsets(everyone: Sequence[Found]) -> dict[str, float]:
    """Seconds from the first node's clock to each node's. Of the rounds the least: a rank may leave a barrier late."""
    offsets: dict[str, float] = {}
    for each in everyone:
        rounds = (own - first for own, first in zip(each.clocks, everyone[0].clocks, strict=True))
        offsets.setdefault(each.node, min(rounds, key=abs))
    return offsets


def wrong_clocks(offsets: dict[str, float], allowed: float) -> Faults:
    """Those off the first node's; or the first one, if most others are off."""
    off = {node: offset for node, offset in offsets.items() if abs(offset) > allowed}
    whose = "the first node's"
    if len(off) > len(offsets) / 2:
        off, whose = {next(iter(offsets)): statistics.median(off.values())}, "the other nodes'"
    instead = "set its time, or exclude it"
    return [(node, f"its clock is {abs(offset):.0f} s off {whose}: {instead}") for node, offset in off.items()]


def taken(device: torch.device) -> str:
    """Whether another process has a good part of this GPU's memory."""
    if device.type != "cuda":
        return ""
    free, total = torch.cuda.mem_get_info(device)
    others = total - free - torch.cuda.memory_reserved(device) - GIB  # what CUDA and NCCL themselves take is less
    if others <= total / 10:
        return ""
    return f"its GPU {device.index or 0} has {others / GIB:.0f} GiB taken by another process: end that, or exclude it"


def miscounts(device: torch.device) -> str:
    """Whether a product of small integers, which has no rounding, comes out otherwise than in float64 on the CPU."""
    numbers = torch.arange(256 * 256, dtype=torch.float32).reshape(256, 256)
    a, b = numbers % 17 - 8, numbers % 13 - 6
    tiles = 8 if device.type == "cuda" else 1  # work for the whole GPU
    right = (a.double() @ b.double()).repeat(tiles, tiles)
    found = torch.matmul(a.to(device).repeat(tiles, 1), b.to(device).repeat(1, tiles))
    if torch.equal(found.double().cpu(), right):
        return ""
    return f"a product of matrices on {device} of rank {dist.rank()} comes out wrong: have it checked, or exclude it"


def payload(device: torch.device) -> int:
    """Bytes of a measured all-reduce."""
    return (256 if device.type == "cuda" else 16) * MIB


def all_reduces(device: torch.device) -> tuple[bool, tuple[float, ...]]:
    """Of integers whose sum is known: whether all are right, and the seconds of each but the first, which connects."""
    world = dist.world_size()
    if world == 1:
        return True, ()
    numbers = torch.arange(payload(device) // 4, dtype=torch.int32, device=device) & 1023
    total = numbers * (world * (world + 1) // 2)
    mine = torch.empty_like(numbers)
    right, seconds = True, []
    for _ in range(1 + ROUNDS):
        torch.mul(numbers, dist.rank() + 1, out=mine)
        seconds.append(timed(device, partial(torch.distributed.all_reduce, mine)))
        right &= torch.equal(mine, total)
    return right, tuple(seconds[1:])


def bandwidth(everyone: Sequence[Found], size: int) -> float:
    """GB/s through the slowest link of a ring, as NCCL's tests count it, in the best round."""
    world = len(everyone)
    best = min(map(max, zip(*(each.seconds for each in everyone), strict=True)))
    return size / best * 2 * (world - 1) / world / 1e9


def slow_node(nodes: Sequence[str], device: torch.device) -> str:
    """The node to and from which a message takes long. Nodes in a ring send one another 8 MiB, one at a time; between
    two nodes, or where none stands out, empty."""
    firsts = [nodes.index(node) for node in dict.fromkeys(nodes)]
    links = list(zip(firsts, firsts[1:] + firsts[:1], strict=True))
    if len(links) < 3:
        return ""
    block = torch.zeros(8 * MIB, dtype=torch.uint8, device=device)

    def pass_on(sender: int, receiver: int) -> None:
        if dist.rank() == sender:
            torch.distributed.send(block, receiver)
        elif dist.rank() == receiver:
            torch.distributed.recv(block, sender)

    took = [min(timed(device, partial(pass_on, *link)) for _ in range(ROUNDS)) for link in links]
    slowest = [max(link) for link in zip(*gather(took), strict=True)]  # of those on it; the others did nothing
    best = {nodes[first]: min(slowest[i - 1], slowest[i]) for i, first in enumerate(firsts)}
    node = max(best, key=lambda node: best[node])
    return node if best[node] > 2 * statistics.median(best.values()) else ""


def timed(device: torch.device, do: Callable[[], object]) -> float:
    """Seconds from a barrier to the end of it, on the device too."""
    dist.barrier()
    began = time.perf_counter()
    do()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - began


def short_of_memory(everyone: Sequence[Ready]) -> Faults:
    """What the ranks of a node need, they need together."""
    faults = []
    for node in dict.fromkeys(each.node for each in everyone):
        ranks = [each for each in everyone if each.node == node]
        left, needed = min(each.left for each in ranks), sum(each.needed for each in ranks)
        if needed > left:
            has = f"{left / GIB:.1f} GiB of memory left, its {len(ranks)} ranks need {needed / GIB:.1f} GiB more"
            faults.append((node, f"it has {has}: ask for more (--mem), or exclude it"))
    return faults
