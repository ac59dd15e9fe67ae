"""A copy of the training state in host memory, to be written while training goes on.

The loop stands still while it is taken, so it is quick: the host memory is kept from one snapshot to the next (fresh
memory costs a page fault every 4 KB, more than the copy itself), two threads share the copying, and what lies on a GPU
is only cloned there; `settle`, for the thread that writes, brings it to the host beside the training."""

from __future__ import annotations

import ctypes
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import Executor
from typing import Any, NamedTuple

import torch
from torch import Tensor

Place = tuple[Any, ...]  # where in the state a tensor lies: the keys that lead to it
Pieces = deque[tuple[int, int, int]]  # plain memory to copy: to, from, bytes
MARGIN = 1 << 29  # bytes that a GPU keeps free beside a clone: an allocator rounds up
PIECE = 1 << 22  # bytes that a thread copies at a time: a fifth of a millisecond


class Host(NamedTuple):
    """Memory for the copy of one tensor."""

    kind: tuple[Any, ...]  # of tensor: shape, strides, type, device
    memory: Tensor
    address: int
    plain: bool  # the tensor's own memory is laid out the same, byte by byte


class Snapshot:
    def __init__(self, beside: Executor) -> None:
        """`beside`: a thread that is idle when a snapshot is taken."""
        self._beside = beside
        self._host: dict[Place, Host] = {}  # kept from one to the next
        self._taken: Any = None
        self._ready: dict[torch.device, torch.cuda.Event] = {}  # when the clones on a GPU are whole

    def make_room(self, state: Mapping[str, Any]) -> None:
        """Touch the host memory that such a state will need, so that the first snapshot is as quick as the others."""
        _map(state, lambda tensor, place: self._memory(tensor, _kind(tensor), place).memory.zero_())

    def take(self, state: Mapping[str, Any]) -> None:
        """The state as it is now. A tensor that it holds in two places is copied once, and shared in the copy too."""
        self._ready = {device: torch.cuda.Event() for device in _roomy(state)}
        seen: dict[Any, Tensor] = {}
        pieces: Pieces = deque()

        def copy(tensor: Tensor, place: Place) -> Tensor:
            address, kind = tensor.data_ptr(), _kind(tensor)
            known = seen.get((address, kind))
            if known is None:
                known = self._copy(tensor, address, kind, place, pieces)
                seen[address, kind] = known
            return known

        self._taken = _map(state, copy)
        for device, ready in self._ready.items():
            ready.record(torch.cuda.current_stream(device))
        other = self._beside.submit(_copy, pieces)
        _copy(pieces)
        if not other.cancel():
            other.result()

    def settle(self) -> Any:
        """The copy, all of it on the host: good until the next `take`. Waits for the GPU, on a stream of its own."""
        streams = {device: torch.cuda.Stream(device) for device in self._ready}
        for device, ready in self._ready.items():
            streams[device].wait_event(ready)
        seen: dict[int, Tensor] = {}

        def bring(tensor: Tensor, place: Place) -> Tensor:
            if tensor.device not in streams:
                return tensor
            if id(tensor) not in seen:  # the tensor itself lives in `taken`: its id is its own
                with torch.cuda.stream(streams[tensor.device]):
                    host = self._memory(tensor, _kind(tensor), place).memory.copy_(tensor, non_blocking=True)
                seen[id(tensor)] = host
            return seen[id(tensor)]

        taken, self._taken = self._taken, None
        settled = _map(taken, bring)
        for stream in streams.values():
            stream.synchronize()
        return settled  # and the clones go: only now may the GPU use their memory again

    def _copy(self, tensor: Tensor, address: int, kind: tuple[Any, ...], place: Place, pieces: Pieces) -> Tensor:
        """A clone on the GPU, or memory on the host that is filled once `pieces` are copied."""
        if tensor.device in self._ready:
            return tensor.detach().clone()
        host = self._memory(tensor, kind, place)
        if not host.plain:
            return host.memory.copy_(tensor.detach())
        for at in range(0, tensor.nbytes, PIECE):
            pieces.append((host.address + at, address + at, min(PIECE, tensor.nbytes - at)))
        return host.memory

    def _memory(self, tensor: Tensor, kind: tuple[Any, ...], place: Place) -> Host:
        host = self._host.get(place)
        if host is None or host.kind != kind:
            on_gpu = tensor.device.type == "cuda"
            memory = torch.empty_like(tensor, device="cpu", pin_memory=on_gpu, requires_grad=False)
            plain = tensor.device.type == "cpu" and memory.stride() == tensor.stride()
            host = self._host[place] = Host(kind, memory, memory.data_ptr(), plain)
        return host


def _kind(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.shape, tensor.stride(), tensor.dtype, tensor.device


def _copy(pieces: Pieces) -> None:
    """Until none is left. In plain memory, for which no thread waits but at the end: torch shares out each tensor over
    all its threads and waits for each of them each time, up to 20 times as long where something else uses the cores."""
    while True:
        try:
            to, origin, count = pieces.popleft()
        except IndexError:
            return
        ctypes.memmove(to, origin, count)


def _roomy(state: Mapping[str, Any]) -> set[torch.device]:
    """The GPUs with room for a clone of all that the state has on them; elsewhere the loop waits for the host."""
    needed: dict[torch.device, int] = {}

    def add(tensor: Tensor, _: Place) -> None:
        if tensor.device.type == "cuda":
            needed[tensor.device] = needed.get(tensor.device, 0) + tensor.nbytes

    if torch.cuda.is_initialized():
        _map(state, add)
    return {device for device, size in needed.items() if _free(device) > 1.1 * size + MARGIN}


def _free(device: torch.device) -> int:
    """What the driver has left. What torch holds unused besides may be a CUDA graph's, which no clone can have."""
    return torch.cuda.mem_get_info(device)[0]


def _map(value: Any, function: Callable[[Tensor, Place], Any], place: Place = ()) -> Any:
    """The same tree of dicts and lists, with function(tensor, place) for every tensor."""
    if isinstance(value, Tensor):
        return function(value, place)
    if isinstance(value, Mapping):
        return {key: _map(item, function, (*place, key)) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_map(item, function, (*place, at)) for at, item in enumerate(value)]
    return value
