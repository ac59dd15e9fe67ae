"""LARS (You et al. 2017, arXiv 1708.03888) in the variant that Barlow Twins' reference implementation defines."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from barlow import kernels
from barlow.errors import UserError
from barlow.optim import apex
from barlow.optim.fused import Fused
from barlow.optim.momentum import HALF, momentum_of

Triple = tuple[Tensor, Tensor, Tensor]  # a parameter, its gradient, its momentum


class Lars(torch.optim.Optimizer):
    """Momentum on gradients that are rescaled, tensor by tensor, to `eta` times the size of the weights.

    For each parameter p with gradient g, in this order:

        g  = g + weight_decay * p
        q  = eta * |p| / |g|, or 1 if either norm is zero       (groups with `adapt`)
        q  = min(q / lr, 1), unless a norm is zero              (groups with `adapt` and `clip`)
        mu = momentum * mu + q * g
        p  = p - lr * mu

    `clip` never lets the rate of a tensor, lr * q, exceed lr (recipes for CIFAR use it with eta = 0.02). Biases and
    norms go in a group with weight_decay 0 and adapt False: `groups.weights_and_biases`. A parameter without a gradient
    is left alone. Half-precision parameters have a float32 momentum, and their step is computed in float32. `lr` is a
    number a group, to be set before each step; or a tensor of no dimension on the parameters' device, which a step that
    was captured in a CUDA graph reads anew.

    `backend` is who computes it: our two kernels (`fused`), NVIDIA's `apex`, torch's `foreach`, or the first of these
    that works here (`auto`). It can change from run to run: the state is the same.
    """

    # torch wraps these for its compiler, whose import takes longer than the rest of a start; this is never compiled.
    add_param_group = inspect.unwrap(torch.optim.Optimizer.add_param_group)
    zero_grad = inspect.unwrap(torch.optim.Optimizer.zero_grad)
    state_dict = inspect.unwrap(torch.optim.Optimizer.state_dict)

    backend = "foreach"
    _fused: Fused | None = None
    _functors: Any = None

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float | Tensor = 0.0,
        weight_decay: float = 0.0,
        momentum: float = 0.9,
        eta: float = 0.001,
        clip: bool = False,
        adapt: bool = True,
        backend: str = "auto",
    ) -> None:
        defaults = {"lr": lr, "weight_decay": weight_decay, "momentum": momentum}
        super().__init__(params, defaults | {"eta": eta, "clip": clip, "adapt": adapt})
        params = chain.from_iterable(group["params"] for group in self.param_groups)
        self._choose(backend, next((p.device for p in params), torch.device("cpu")))

    def _choose(self, backend: str, device: torch.device) -> None:
        if backend in ("auto", "fused"):
            if found := kernels.load("lars", device):
                self.backend, self._fused = "fused", Fused(found)
                return
            if backend == "fused":
                raise UserError(f"--optim.backend fused: {kernels.why_not('lars', device)}; auto takes what works here")
        if backend in ("auto", "apex") and device.type == "cuda":
            self._functors = apex.load()
            if self._functors:
                self.backend = "apex"
                return
        if backend == "apex":
            why = "NVIDIA's apex (its amp_C) is not installed" if device.type == "cuda" else "not on a GPU"
            raise UserError(f"--optim.backend apex: {why}; auto takes what works here")

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None, zero_grads: bool = False) -> Any:
        """`zero_grads` leaves zeros in the gradients, for those who keep their memory."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        left: Sequence[Sequence[Tensor]] = [group["params"] for group in self.param_groups]
        if self._fused:
            left = self._fused.step(self.param_groups, self.state, zero_grads)
        for group, params in zip(self.param_groups, left, strict=True):
            present = [p for p in params if p.grad is not None]
            wide = [p for p in present if p.dtype not in HALF]
            self._step(wide, [_grad(p) for p in wide], wide, group)
            half = [p for p in present if p.dtype in HALF]
            if half:
                twins = [p.float() for p in half]
                self._step(twins, [_grad(p).float() for p in half], half, group)
                torch._foreach_copy_(half, twins)
            if zero_grads and present:
                torch._foreach_zero_([_grad(p) for p in present])
        return loss

    def _step(self, params: list[Tensor], grads: list[Tensor], owners: list[Tensor], group: dict[str, Any]) -> None:
        """Of one group, in the precision of `params`; the momenta are those of `owners`. By apex where it is the
        backend, as far as it goes."""
        tensors = list(zip(params, grads, (momentum_of(self.state, p) for p in owners), strict=True))
        theirs = [each for each in tensors if self._functors and apex.takes(*each)]
        if theirs:
            apex.apex_step(self._functors, *_lists(theirs), group)
            tensors = [each for each in tensors if not apex.takes(*each)]
        for together in _batches(tensors):
            foreach_step(*_lists(together), group)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's, which casts the state to the dtype of its parameter: a float32 momentum is kept here."""
        inspect.unwrap(torch.optim.Optimizer.load_state_dict)(self, state_dict)
        ids = chain.from_iterable(group["params"] for group in state_dict["param_groups"])
        params = chain.from_iterable(group["params"] for group in self.param_groups)
        for key, p in zip(ids, params, strict=True):
            if p.dtype in HALF and key in state_dict["state"]:
                self.state[p]["momentum"] = state_dict["state"][key]["momentum"].to(p.device, copy=True)


def foreach_step(params: list[Tensor], grads: list[Tensor], momenta: list[Tensor], group: dict[str, Any]) -> None:
    """One step of one group, in place, in a handful of kernels for all tensors together; nothing waits for the GPU."""
    if group["weight_decay"] != 0:
        grads = list(torch._foreach_add(grads, params, alpha=group["weight_decay"]))
    if group["adapt"]:
        p_norms = torch.stack(torch._foreach_norm(params))  # [tensors]
        g_norms = torch.stack(torch._foreach_norm(grads))
        q = group["eta"] * p_norms / g_norms
        if group["clip"]:
            q = (q / group["lr"]).clamp(max=1)
        q = torch.where((p_norms > 0) & (g_norms > 0), q, 1)
        if group["weight_decay"] != 0:  # they are ours
            torch._foreach_mul_(grads, list(q.unbind()))
        else:
            grads = list(torch._foreach_mul(grads, list(q.unbind())))
    torch._foreach_mul_(momenta, group["momentum"])
    torch._foreach_add_(momenta, grads)
    if isinstance(group["lr"], Tensor):  # as a number it would have to be waited for
        torch._foreach_sub_(params, torch._foreach_mul(momenta, group["lr"]))
    else:
        torch._foreach_add_(params, momenta, alpha=-group["lr"])


def reference_step(params: list[Tensor], grads: list[Tensor], momenta: list[Tensor], group: dict[str, Any]) -> None:
    """The same as plainly as it can be said: the definition that `foreach_step`, and any kernel, must agree with."""
    for p, g, mu in zip(params, grads, momenta, strict=True):
        g = g + group["weight_decay"] * p
        p_norm, g_norm = torch.linalg.vector_norm(p), torch.linalg.vector_norm(g)
        if group["adapt"] and p_norm > 0 and g_norm > 0:
            q = group["eta"] * p_norm / g_norm
            if group["clip"]:
                q = torch.clamp(q / group["lr"], max=1)
            g = q * g
        mu.copy_(group["momentum"] * mu + g)
        p.sub_(group["lr"] * mu)


def _grad(p: Tensor) -> Tensor:
    assert p.grad is not None
    return p.grad


def _batches(tensors: list[Triple]) -> list[list[Triple]]:
    """On a GPU all together, in few launches; on a CPU one by one, for what is made on the way is then in its cache."""
    if not tensors or tensors[0][0].device.type != "cpu":
        return [tensors] if tensors else []
    return [[each] for each in tensors]


def _lists(tensors: list[Triple]) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    params, grads, momenta = zip(*tensors, strict=True)
    return list(params), list(grads), list(momenta)
