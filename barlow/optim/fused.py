"""LARS in two launches for all tensors together: the host side of kernels/lars.cu.

The kernels read where everything is from a table on the GPU. It is written when something has moved, by a launch that
carries the addresses with it; the rates of a step travel with its two launches. So the host never waits, owns no buffer
that a copy might still read, and a step can be captured in a CUDA graph: the graph has a table of its own. What a graph
cannot do is make the momentum: a step must have been made before."""

from __future__ import annotations

import ctypes
import operator
from array import array
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from barlow.optim.layout import dense, laid_out_as, same_layout
from barlow.optim.momentum import State, has_momentum, momentum_of

DTYPES = (torch.float32, torch.bfloat16)
THREADS, GROUPS, POINTERS = 256, 64, 480  # as in lars.cu
Group = dict[str, Any]


class Kernels(Protocol):
    """barlow.kernels.launch.Kernels, or what stands in for it on a CPU."""

    device: torch.device

    def launch(self, name: str, grid: int, block: int, shared: int, *arguments: Any) -> None: ...


class Rule(ctypes.Structure):
    _fields_ = [
        ("weight_decay", ctypes.c_float),
        ("momentum", ctypes.c_float),
        ("eta", ctypes.c_float),
        ("lr", ctypes.c_float),
        ("lr_on_device", ctypes.c_void_p),
        ("clip", ctypes.c_int),
        ("adapt", ctypes.c_int),
    ]


class Rules(ctypes.Structure):
    _fields_ = [("of", Rule * GROUPS)]


class Pointers(ctypes.Structure):
    _fields_ = [("at", ctypes.c_longlong * POINTERS)]


class Fused:
    """Makes the steps of those parameters that the kernels can take, and says which it leaves."""

    def __init__(self, kernels: Kernels, chunk: int = 0) -> None:
        self.kernels, self.chunk = kernels, chunk  # 0: by the size of the set
        self.plan: Plan | None = None
        self.in_graphs: list[tuple[Plan, Tensor]] = []  # what captured steps use, as long as there may be replays

    def step(self, groups: Sequence[Group], state: State, zero_grads: bool = False) -> Sequence[Sequence[Tensor]]:
        """One step. Returns for each group the parameters that have not been touched."""
        capturing = self.kernels.device.type == "cuda" and torch.cuda.is_current_stream_capturing()
        plan = self.plan
        if plan is None or plan.outdated(groups, state):
            if capturing:
                raise RuntimeError("LARS must have made a step with these parameters before one is captured in a graph")
            plan = self.plan = Plan(self.kernels, groups, state, self.chunk)
        if not plan.chunks:
            return plan.left
        gradients, strays = plan.gradients()
        if capturing:
            table = plan.new_table(gradients)
            self.in_graphs.append((plan, table))
        else:
            table = plan.current_table(gradients)
        plan.launch(table, groups, zero_grads)
        if zero_grads and strays:
            torch._foreach_zero_([original for original, _ in strays])
        return plan.left


class Plan:
    """What stays from step to step: which tensors, cut into which chunks; and where they were last."""

    def __init__(self, kernels: Kernels, groups: Sequence[Group], state: State, chunk: int) -> None:
        self.kernels, self.state, self.groups = kernels, state, len(groups)
        self.params: list[Tensor] = []
        self.states: list[dict[str, Tensor]] = []
        self.waiting: list[Tensor] = []  # for their first gradient
        self.left = [[p for p in group["params"] if not self.takes(p, at)] for at, group in enumerate(groups)]
        group_of = []
        for at, group in enumerate(groups):
            for p in group["params"]:
                if not self.takes(p, at):
                    continue
                if p.grad is None and not has_momentum(state, p):
                    self.waiting.append(p)
                    continue
                state[p]["momentum"] = laid_out_as(p, momentum_of(state, p))
                self.params.append(p)
                self.states.append(state[p])
                group_of.append(at)
        self.expected = [(p, p.dtype, {p.stride()}) for p in self.params]
        self.momenta = [each["momentum"] for each in self.states]
        self.places = [p.data_ptr() for p in self.params]
        self.fixed = [*self.places, *(mu.data_ptr() for mu in self.momenta)]
        self.size = chunk or chunk_size(sum(p.numel() for p in self.params))
        self.chunks = self.cut(group_of)
        self.written: list[int] = []
        self.table = torch.empty(3 * len(self.params), dtype=torch.int64, device=kernels.device)

    def takes(self, p: Tensor, group: int) -> bool:
        return p.dtype in DTYPES and p.device == self.kernels.device and group < GROUPS and dense(p)

    def cut(self, group_of: Sequence[int]) -> int:
        """Tell the GPU which tensors there are, and whose a chunk is; the number of chunks."""
        tensors: list[list[int]] = []
        owner: list[int] = []
        for at, (p, group) in enumerate(zip(self.params, group_of, strict=True)):
            tensors.append([p.numel(), len(owner), group, p.dtype == torch.bfloat16])
            owner += [at] * -(-p.numel() // self.size)
        device = self.kernels.device
        self.tensors = torch.tensor(tensors, dtype=torch.int64).to(device)
        self.owner = torch.tensor(owner, dtype=torch.int32).to(device)
        self.partial = torch.empty(len(owner), 2, device=device)
        return len(owner)

    def outdated(self, groups: Sequence[Group], state: State) -> bool:
        """Whether there are others: a group more, a state that was loaded, a tensor exchanged, one's first gradient."""
        return (
            state is not self.state
            or len(groups) != self.groups
            or [p.data_ptr() for p in self.params] != self.places
            or not all(map(operator.is_, [each["momentum"] for each in self.states], self.momenta))
            or any(p.grad is not None for p in self.waiting)
        )

    def gradients(self) -> tuple[list[int], list[tuple[Tensor, Tensor]]]:
        """Their addresses, 0 where there is none; and those in another layout than the parameter's, with a copy that
        has it. Autograd makes them as it should be: the copy is for gradients that somebody else has set."""
        found, strays = [], []
        for p, dtype, layouts in self.expected:
            g = p.grad
            if g is None:
                found.append(0)
                continue
            if g.stride() not in layouts or g.dtype is not dtype:
                if g.dtype is dtype and same_layout(p.shape, p.stride(), g.stride()):
                    layouts.add(g.stride())
                else:
                    strays.append((g, laid_out_as(p, g.to(dtype))))
                    g = strays[-1][1]
            found.append(g.data_ptr())
        return found, strays

    def current_table(self, gradients: list[int]) -> Tensor:
        wanted = gradients + self.fixed
        if wanted != self.written:
            self.write(self.table, wanted, self.written)
            self.written = wanted
        return self.table

    def new_table(self, gradients: list[int]) -> Tensor:
        table = torch.empty_like(self.table)
        self.write(table, gradients + self.fixed, [])
        return table

    def write(self, table: Tensor, wanted: list[int], known: list[int]) -> None:
        for first in range(0, len(wanted), POINTERS):
            part = wanted[first : first + POINTERS]
            if part != known[first : first + POINTERS]:
                count = ctypes.c_int(len(part))
                pointers = Pointers.from_buffer(array("q", part + [0] * (POINTERS - len(part))))
                self.kernels.launch("lars_point", 1, THREADS, 0, table, ctypes.c_int(first), count, pointers)

    def launch(self, table: Tensor, groups: Sequence[Group], zero_grads: bool) -> None:
        rules, rates = rules_of(groups, self.kernels.device)
        count, size = ctypes.c_int(len(self.params)), ctypes.c_int(self.size)
        shared = (self.owner, self.tensors, table, count, size, self.partial)
        self.kernels.launch("lars_norms", self.chunks, THREADS, 0, *shared, rules)
        self.kernels.launch("lars_update", self.chunks, THREADS, 0, *shared, ctypes.c_int(zero_grads), rules)
        torch.autograd.graph.increment_version(self.params)  # autograd would not see that they have changed
        del rates  # the launches are made: what memory they read is reused after them


def chunk_size(total: int) -> int:
    """Elements of a block's work. Many small ones keep all of the GPU busy to the end; of a large set, fewer large ones
    leave little to add up. It depends on nothing but the parameters, for the bits of the sums depend on it."""
    return 8192 if total < 2**26 else 32768


def rules_of(groups: Sequence[Group], device: torch.device) -> tuple[Rules, list[Tensor]]:
    """What the launches carry of the groups; and the rates that are on the GPU, of which they carry the address."""
    rules, rates = Rules(), []
    for rule, group in zip(rules.of, groups, strict=False):
        rule.weight_decay, rule.momentum, rule.eta = group["weight_decay"], group["momentum"], group["eta"]
        rule.clip, rule.adapt = group["clip"], group["adapt"]
        lr = group["lr"]
        if isinstance(lr, Tensor) and lr.device == device:
            rates.append(lr.float())
            rule.lr_on_device = rates[-1].data_ptr()
        else:
            rule.lr = float(lr)
    return rules, rates
