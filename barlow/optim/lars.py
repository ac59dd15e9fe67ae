"""LARS (You et al. 2017, arXiv 1708.03888) in the variant that Barlow Twins' reference implementation defines."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import chain
from typing import Any

import torch
from torch import Tensor


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
    plain number a group, to be set before each step.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float = 0.0,
        weight_decay: float = 0.0,
        momentum: float = 0.9,
        eta: float = 0.001,
        clip: bool = False,
        adapt: bool = True,
    ) -> None:
        defaults = {"lr": lr, "weight_decay": weight_decay, "momentum": momentum}
        super().__init__(params, defaults | {"eta": eta, "clip": clip, "adapt": adapt})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            wide = [p for p in params if p.dtype not in HALF]
            if wide:
                foreach_step(wide, [_grad(p) for p in wide], [self._momentum(p) for p in wide], group)
            half = [p for p in params if p.dtype in HALF]
            if half:
                twins = [p.float() for p in half]
                foreach_step(twins, [_grad(p).float() for p in half], [self._momentum(p) for p in half], group)
                torch._foreach_copy_(half, twins)
        return loss

    def _momentum(self, p: Tensor) -> Tensor:
        state = self.state[p]
        if "momentum" not in state:
            state["momentum"] = torch.zeros_like(p, dtype=torch.float32 if p.dtype in HALF else p.dtype)
        momentum: Tensor = state["momentum"]
        return momentum

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's, which casts the state to the dtype of its parameter: a float32 momentum is kept here."""
        super().load_state_dict(state_dict)
        ids = chain.from_iterable(group["params"] for group in state_dict["param_groups"])
        params = chain.from_iterable(group["params"] for group in self.param_groups)
        for key, p in zip(ids, params, strict=True):
            if p.dtype in HALF and key in state_dict["state"]:
                self.state[p]["momentum"] = state_dict["state"][key]["momentum"].to(p.device, copy=True)


HALF = (torch.bfloat16, torch.float16)


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
        grads = list(torch._foreach_mul(grads, list(q.unbind())))
    torch._foreach_mul_(momenta, group["momentum"])
    torch._foreach_add_(momenta, grads)
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
