"""Ranks: the process group, and the reductions that autograd understands. Alone there is no group, and no cost.

The convention of the whole project: every rank computes the loss of the *global* batch, the same number everywhere, and
DistributedDataParallel averages the parameters' gradients over the ranks. Through these reductions autograd on each
rank differentiates the sum of all W ranks' (equal) losses, which is W times the loss; the average takes the W away, and
what is left is exactly the gradient that one rank with the whole batch would have had.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
import struct
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed
from torch import Tensor

T = TypeVar("T")

_bulk: Any = None


def init(device: torch.device, timeout: float = 600.0) -> None:
    """Join the group that RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT describe; alone, do nothing.

    nccl for a CUDA device, gloo otherwise. A rank that waits longer than `timeout` seconds for another one, here or in
    a collective, fails.
    """
    global _bulk
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return
    interface = _interface_towards(os.environ["MASTER_ADDR"])
    if interface:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
    if device.type == "cuda":
        device = torch.device("cuda", local_rank() if device.index is None else device.index)
        torch.cuda.set_device(device)
        os.environ.setdefault("NCCL_LAUNCH_ORDER_IMPLICIT", "1")  # two queues on a GPU never wait for each other
        torch.distributed.init_process_group("nccl", timeout=timedelta(seconds=timeout), device_id=device)
    else:
        torch.distributed.init_process_group("gloo", timeout=timedelta(seconds=timeout))
    _bulk = torch.distributed.new_group(timeout=timedelta(seconds=timeout))


def shutdown() -> None:
    """Leave the group, if there is one."""
    global _bulk
    _bulk = None
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def rank() -> int:
    return torch.distributed.get_rank() if torch.distributed.is_initialized() else 0


def world_size() -> int:
    return torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1


def local_rank() -> int:
    """Which of the ranks on this machine this is; known before `init`, since it chooses the device."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def node() -> str:
    """This machine's name, as SLURM knows it."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def host_group() -> Any:
    """A group of all ranks that speaks from host memory, so that no GPU is waited for; None when alone."""
    return torch.distributed.new_group(backend="gloo") if world_size() > 1 else None


def bulk() -> Any:
    """A group of all ranks for what is large and not waited for at once: gradients, embeddings. None when alone.

    To NCCL a group is a queue. In one queue with them, the statistics of the next batch norm, which are waited for at
    once, would come after hundreds of megabytes, and nothing would be hidden behind anything.
    """
    return _bulk


def barrier() -> None:
    if world_size() > 1:
        torch.distributed.barrier()


def highest(value: int) -> int:
    """The largest `value` among the ranks, on all of them: how they agree that one of them is still at work."""
    if world_size() == 1:
        return value
    flag = torch.tensor(value, dtype=torch.int64, device=_group_device())
    torch.distributed.all_reduce(flag, torch.distributed.ReduceOp.MAX)
    return int(flag)


def broadcast(value: T) -> T:
    """Rank 0's small Python object, on every rank."""
    if world_size() == 1:
        return value
    box = [value]
    torch.distributed.broadcast_object_list(box, src=0, device=_group_device())
    return box[0]


def all_reduce_sum(x: Tensor) -> Tensor:
    """Sum of `x` over the ranks. Its gradient is the sum of the ranks' gradients: right whatever each does with it."""
    return x if world_size() == 1 else _AllReduceSum.apply(x)


def replicated_sum(x: Tensor) -> Tensor:
    """Sum of `x` over the ranks, for a result that every rank treats alike: backward needs no communication.

    Valid only when everything computed from the result, up to the loss, is identical on all ranks. Their gradients are
    then equal too, and the sum of them is W times the own one. Where a rank goes on with a part of its own (its rows,
    its samples), use `all_reduce_sum`.
    """
    return x if world_size() == 1 else _ReplicatedSum.apply(x)


def gather(x: Tensor) -> Tensor:
    """The ranks' `x` [n, ...], n the same on all, joined in rank order: [W n, ...]. Gradients are summed over ranks."""
    return x if world_size() == 1 else _Gather.apply(x)


class Gathering:
    """The ranks' `x` [n, ...] on their way here, n the same on all; `rows()` waits: [W n, ...], without gradient."""

    def __init__(self, x: Tensor) -> None:
        self._own = x.detach().contiguous()  # kept until it has been sent
        self._rows = x.new_empty(world_size() * x.shape[0], *x.shape[1:])
        gather = torch.distributed.all_gather_into_tensor
        self._work: Any = gather(self._rows, self._own, group=bulk(), async_op=True)

    def rows(self) -> Tensor:
        self._work.wait()  # on a GPU it is the stream that waits, not the host
        return self._rows


class _AllReduceSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return _summed(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return _summed(grad)


class _ReplicatedSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return _summed(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad * world_size()


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return _joined(x, world_size())

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        n = grad.shape[0] // world_size()
        if torch.distributed.get_backend() == "nccl":
            part = grad.new_empty(n, *grad.shape[1:])
            torch.distributed.reduce_scatter_tensor(part, grad.contiguous())
            return part
        return _summed(grad)[rank() * n : (rank() + 1) * n]


def _summed(x: Tensor) -> Tensor:
    total: Tensor = torch.ops.barlow.summed(x)
    return total


def _joined(x: Tensor, world: int) -> Tensor:
    whole: Tensor = torch.ops.barlow.joined(x, world)
    return whole


def _sum(x: Tensor) -> Tensor:
    total = x.detach().clone(memory_format=torch.contiguous_format)
    torch.distributed.all_reduce(total)
    return total


def _join(x: Tensor, world: int) -> Tensor:
    whole = x.new_empty(world * x.shape[0], *x.shape[1:])
    torch.distributed.all_gather_into_tensor(whole, x.contiguous())
    return whole


def _operators() -> torch.library.Library:
    """The two as operators, which torch.compile takes as they are: what lies around them is compiled in one piece.

    (torch.library.custom_op would say it shorter, and bring torch's compiler along, which takes seconds to import.)"""
    library = torch.library.Library("barlow", "DEF")
    fakes: list[tuple[str, Any, Any]] = [
        ("summed(Tensor x) -> Tensor", _sum, lambda x: torch.empty_like(x, memory_format=torch.contiguous_format)),
        ("joined(Tensor x, int world) -> Tensor", _join, lambda x, world: x.new_empty(world * len(x), *x.shape[1:])),
    ]
    for schema, made, fake in fakes:
        library.define(schema)
        name = schema.split("(")[0]
        library.impl(name, made, "CompositeExplicitAutograd")
        torch.library.register_fake(f"barlow::{name}", fake, lib=library)
    return library


_library = _operators()  # as long as this lives, they do


def _group_device() -> torch.device:
    nccl = torch.distributed.get_backend() == "nccl"
    return torch.device("cuda", torch.cuda.current_device()) if nccl else torch.device("cpu")


def _interface_towards(host: str) -> str | None:
    """The network interface through which this machine reaches `host`.

    Left alone, gloo takes the one that the machine's own name resolves to, and Debian resolves that to 127.0.1.1.
    """
    address = _address_towards(host)
    if address is None:
        return None
    names = _interfaces()
    if address.startswith("127.") and not host.startswith(("127.", "localhost")):
        # This machine by its name: the others come in where this one goes out. Without a way out (192.0.2.1 is nobody's
        # address), by its first interface but the loopback; if that is the only one, all ranks are here.
        address = _address_towards("192.0.2.1") or next((a for a in names if not a.startswith("127.")), address)
    return "lo" if address.startswith("127.") else names.get(address)


def _interfaces() -> dict[str, str]:
    """Names of this machine's network interfaces by their IPv4 addresses."""
    names = {}
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            with contextlib.suppress(OSError):  # an interface without an IPv4 address
                found = fcntl.ioctl(probe.fileno(), 0x8915, struct.pack("256s", name.encode()[:15]))  # SIOCGIFADDR
                names[socket.inet_ntoa(found[20:24])] = name
    return names


def _address_towards(host: str) -> str | None:
    """This machine's IPv4 address on the route to `host`. Connecting a datagram socket sends nothing."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((host, 9))
        except OSError:
            return None
        return str(probe.getsockname()[0])
