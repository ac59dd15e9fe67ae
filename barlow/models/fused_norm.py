"""Batch norm, what is added to it, and ReLU in one: as few passes over memory as the statistics allow.

Where torch has five operations for the end of a residual block and as many gradients, `FusedNorm` has the operators of
norm_ops.py, which on a GPU are kernels of ours. It is a batch norm like any other: the same parameters and buffers, the
statistics those of the global batch, and in eval mode the plain operations. What differs is rounding: in bfloat16 the
result is rounded once, not after each operation.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from barlow import dist, kernels
from barlow.errors import UserError
from barlow.models.norm import GlobalBatchNorm, twin
from barlow.models.norm_ops import split

By = Literal["auto", "fused", "reference"]  # as Speed.norms; auto is the reference until a GPU has shown what is faster
ops: Any = torch.ops.barlow


class FusedNorm(GlobalBatchNorm):
    """norm(x) [+ added], and ReLU if `relu`. In training x must not be changed in place afterwards."""

    relu = False

    def forward(self, x: Tensor, added: Tensor | None = None) -> Tensor:
        if not self.training:
            y = super().forward(x)
            if added is not None:
                y += added
            return y.relu_() if self.relu else y
        with torch.no_grad():
            moments = ops.norm_moments(x)
            if dist.world_size() > 1:
                moments = ops.norm_merge(dist.gather(moments[None]))
            self._track(*split(moments))
        normalised: Tensor = _Normalise.apply(x, added, self.weight, self.bias, moments, self.eps, self.relu)
        return normalised


class _Normalise(torch.autograd.Function):
    """Differentiated through the statistics, with one small collective. Besides what other layers keep anyway, x and y,
    only the moments are stored."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        added: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        moments: Tensor,
        eps: float,
        relu: bool,
    ) -> Tensor:
        y: Tensor = ops.norm_apply(x, added, moments, weight, bias, eps, relu)
        ctx.added, ctx.eps, ctx.relu = added is not None, eps, relu
        ctx.save_for_backward(x, weight, bias, moments, y if relu and added is not None else None)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, weight, bias, moments, y = ctx.saved_tensors
        relu = ctx.relu and y is None  # what ReLU has cut off is still in the gradient
        if y is None:
            sums = ops.norm_sums(grad, x, moments, weight, bias, ctx.eps, relu)
        else:
            sums, grad = ops.norm_masked_sums(grad, x, y, moments, ctx.eps)
        everyone = dist.all_reduce_sum(sums)
        x_grad = ops.norm_gradient(grad, x, moments, everyone, weight, bias, ctx.eps, relu)
        weight_grad, bias_grad = (None if p is None else s for p, s in zip((weight, bias), sums, strict=True))
        return x_grad, grad if ctx.added else None, weight_grad, bias_grad, None, None, None


def fused(norm: _BatchNorm, relu: bool) -> FusedNorm:
    """Its twin, with the same parameters and buffers, and ReLU in it if asked for."""
    made = twin(norm, FusedNorm)
    made.relu = relu
    return made


def way(device: torch.device, by: By) -> str:
    """How batch norms are made here, for the log; a UserError if it is asked for what cannot be had."""
    if by != "fused":
        return "batch norms by torch's operations" + (" (as asked)" if by == "reference" else "")
    if why := kernels.why_not("norm", device):
        raise UserError(f"--speed.norms fused: there is no kernel here ({why}); give auto or reference")
    return "batch norms by our CUDA kernel"
