"""Bytes that a rank sends in a step: counted on paper, and read from the kernel's counters of its connections.

On paper a ring is meant: of the algorithms that send least, the one that gloo uses and NCCL uses for all that is large.
A sum of x bytes sends 2 (W - 1) / W x, a gathering of x from each sends (W - 1) x.
"""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Iterator, Sequence
from contextlib import suppress

BYTES_SENT = 200  # where Linux' tcp_info, asked for by the option below, holds tcpi_bytes_sent (64 bits)
TCP_INFO, SO_MAX_PACING_RATE = 11, 47


def summed(count: float, world_size: int, size: int = 4) -> float:
    """Bytes that a rank sends for the sum of `count` numbers of `size` bytes over all ranks."""
    return 2 * (world_size - 1) / world_size * count * size


def gathered(count: float, world_size: int, size: int = 4) -> float:
    """Bytes that a rank sends so that all have everyone's `count` numbers."""
    return (world_size - 1) * count * size


def of_loss(form: str, n: int, d: int, world_size: int, size: int = 2) -> float:
    """Of the loss of embeddings [n, d] a rank, `size` bytes a number: forward and backward."""
    backward = summed(4 * d, world_size)  # what the gradient needs of both views' statistics
    if form == "nxn":
        return 2 * gathered(n * d, world_size, size) + summed(d + 1, world_size) + backward
    return gathered(4 * d + 1, world_size) + summed(d, world_size) + summed(d * d, world_size) + backward


def of_batch_norms(channels: Sequence[int], world_size: int) -> float:
    """Of both views through all batch norms: mean, variance and count forward, two sums backward."""
    return 2 * sum(gathered(2 * c + 1, world_size) + summed(2 * c, world_size) for c in channels)


def of_gradients(parameters: int, world_size: int) -> float:
    return summed(parameters, world_size)


def sent() -> int:
    """Bytes that this process has sent over TCP since it began, without headers: no other traffic counts."""
    total = 0
    for connection in _connections():
        told = connection.getsockopt(socket.IPPROTO_TCP, TCP_INFO, 256)
        total += struct.unpack_from("Q", told, BYTES_SENT)[0]
    return total


def pace(rate: int) -> None:
    """Let each connection of this process send `rate` bytes a second at most, as if it went over a slow network."""
    for connection in _connections():
        connection.setsockopt(socket.SOL_SOCKET, SO_MAX_PACING_RATE, rate)


def cpu_of_threads(name: str) -> float:
    """CPU seconds of this process' threads whose names have `name` in them."""
    ticks = 0
    for thread in os.listdir("/proc/self/task"):
        with suppress(OSError), open(f"/proc/self/task/{thread}/stat") as file:
            before, _, after = file.read().rpartition(")")
            if name in before:
                ticks += sum(map(int, after.split()[11:13]))  # user and system
    return ticks / os.sysconf("SC_CLK_TCK")


def _connections() -> Iterator[socket.socket]:
    for descriptor in os.listdir("/proc/self/fd"):
        with suppress(OSError):  # it may be closed by now
            if os.readlink(f"/proc/self/fd/{descriptor}").startswith("socket:"):
                with socket.socket(fileno=os.dup(int(descriptor))) as found:
                    if found.type == socket.SOCK_STREAM and found.family != socket.AF_UNIX:
                        yield found
