"""LARS by the multi-tensor functors of NVIDIA's apex (its module amp_C), where that is installed from source.

apex has no LARS of its own; these four make it. The package that PyPI calls apex is another project, and has no amp_C.

    multi_tensor_axpby(chunk, flag, [x, y, out], a, b, -1)     out = a x + b y
    multi_tensor_scale(chunk, flag, [x, out], a)               out = a x
    multi_tensor_l2norm(chunk, flag, [x], True)                -> (norm of all, norms [tensors])
    multi_tensor_lamb_stage2_cuda(chunk, flag, [p, u], p_norms, u_norms, lr, 0.0, True)
                                                               p = p - lr * (p_norm / u_norm, or 1 if either is 0) * u

They take dense float32 tensors on a GPU, and write to `flag` that a number was not finite: none of these reads it."""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor

from barlow.optim.layout import same_layout

CHUNK = 65536  # elements of a block's work, as apex's own optimizers have it
NEEDED = ("multi_tensor_axpby", "multi_tensor_scale", "multi_tensor_l2norm", "multi_tensor_lamb_stage2_cuda")


def load() -> Any:
    """amp_C, or None where it is not, or not whole."""
    try:
        functors = importlib.import_module("amp_C")
    except (ImportError, OSError):  # built for another torch: a symbol is missing
        return None
    return functors if all(hasattr(functors, name) for name in NEEDED) else None


def takes(p: Tensor, g: Tensor, momentum: Tensor) -> bool:
    """Whether the functors can walk through the three together. They count in 32 bits, and do not launch what comes
    before an empty tensor at the end of a list."""
    if not (p.dtype == g.dtype == momentum.dtype == torch.float32 and 0 < p.numel() < 2**31):
        return False
    known = p.is_contiguous() or (p.ndim == 4 and p.is_contiguous(memory_format=torch.channels_last))
    return known and all(same_layout(p.shape, p.stride(), other.stride()) for other in (g, momentum))


def apex_step(functors: Any, params: list[Tensor], grads: list[Tensor], momenta: list[Tensor], group: Any) -> None:
    """One step of one group, in place; equal to `reference_step`. A rate on the GPU makes the host wait for it."""
    flag = torch.zeros(1, dtype=torch.int32, device=params[0].device)
    lr = float(group["lr"])
    if group["weight_decay"] != 0:
        decayed = [torch.empty_like(g) for g in grads]
        functors.multi_tensor_axpby(CHUNK, flag, [grads, params, decayed], 1.0, group["weight_decay"], -1)
        grads = decayed
    functors.multi_tensor_scale(CHUNK, flag, [momenta, momenta], group["momentum"])
    if group["adapt"]:
        p_norms = group["eta"] * above_zero(functors.multi_tensor_l2norm(CHUNK, flag, [params], True)[1])
        g_norms = above_zero(functors.multi_tensor_l2norm(CHUNK, flag, [grads], True)[1])
        if group["clip"]:  # min(a / (lr b), 1) = a / max(lr b, a), and 1 where a norm is zero
            g_norms = torch.where(g_norms > 0, torch.maximum(lr * g_norms, p_norms), 0)
        functors.multi_tensor_lamb_stage2_cuda(CHUNK, flag, [momenta, grads], p_norms, g_norms, -1.0, 0.0, True)
    else:
        functors.multi_tensor_axpby(CHUNK, flag, [momenta, grads, momenta], 1.0, 1.0, -1)
    functors.multi_tensor_axpby(CHUNK, flag, [params, momenta, params], 1.0, -lr, -1)


def above_zero(norms: Tensor) -> Tensor:
    """A norm that is NaN counts as 0, as in the definition."""
    return torch.where(norms > 0, norms, 0)
