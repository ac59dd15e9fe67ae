"""Batch statistics over all ranks, so that the batch norms of W ranks see what one rank with the global batch sees."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from barlow import dist

Norm = TypeVar("Norm", bound=_BatchNorm)


def synchronise(model: nn.Module, compiled: bool = False) -> nn.Module:
    """`model` with every batch norm reading the global batch; parameters, buffers and their names stay what they were.

    Alone, the model itself, untouched. On a GPU torch's SyncBatchNorm, which refuses CPU tensors; so move the model to
    its device first. Elsewhere, and where the model will be compiled, `GlobalBatchNorm`: with its collectives, but not
    with SyncBatchNorm's, a network is compiled in one piece. Where some norms are fused, these stay,
    and the others become such.
    """
    if dist.world_size() == 1:
        return model
    fused = any(isinstance(module, GlobalBatchNorm) for module in model.modules())  # torch's would take their place
    if not compiled and not fused and any(parameter.is_cuda for parameter in model.parameters()):
        if any(_has_activation(module) for module in model.modules()):
            from timm.layers import convert_sync_batchnorm  # imported already, if its layers are

            return convert_sync_batchnorm(model)
        return nn.SyncBatchNorm.convert_sync_batchnorm(model)
    return _converted(model)


@contextmanager
def forgetful(model: nn.Module) -> Iterator[None]:
    """While it lasts, batch norms in training normalise as ever, but leave their running statistics as they are."""
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 0.0
    try:
        yield
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum


def moments(x: Tensor, dims: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
    """Mean [C], biased variance [C] (both differentiable) and count [] of all ranks' `x` over `dims`, all but one.

    One collective each way. Each rank's own centred variance is merged with the spread of the ranks' means, which loses
    no digits where a mean is large beside its deviation; ranks may hold different numbers of samples.
    """
    mean = x.mean(tuple(dims), keepdim=True)
    variance = (x - mean).square().mean(tuple(dims))  # [C]
    channels = variance.numel()
    count = variance.new_full((1,), x.numel() // channels)
    ranks = dist.gather(torch.cat([mean.flatten(), variance, count])[None])  # [W, 2 C + 1]
    means, variances, counts = ranks.split([channels, channels, 1], dim=1)
    total = counts.detach().sum()
    share = counts.detach() / total  # [W, 1]
    global_mean = (share * means).sum(0)
    global_variance = (share * (variances + (means - global_mean).square())).sum(0)
    return global_mean, global_variance, total


def standardised(x: Tensor, mean: Tensor, inverse: Tensor, count: int) -> Tensor:
    """(x - mean) * inverse for this rank's x [n, C], the statistics being those of all ranks' `count` samples.

    It is differentiated through the statistics too, with one small collective.
    """
    y: Tensor = _Standardise.apply(x, mean, inverse, count)
    return y


class GlobalBatchNorm(_BatchNorm):
    """Batch norm of any number of dimensions over the global batch; in eval mode it is plain batch norm."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        wide = x.float() if x.dtype in (torch.bfloat16, torch.float16) else x
        with torch.no_grad():
            statistics = moments(wide, [d for d in range(x.dim()) if d != 1])
            self._track(*statistics)
        y: Tensor = _Normalise.apply(wide, self.weight, self.bias, statistics, self.eps)
        return y.to(x.dtype)

    def _track(self, mean: Tensor, variance: Tensor, count: Tensor) -> None:
        """Move the running statistics as one rank would: the variance unbiased, with the global count."""
        if self.running_mean is None or self.running_var is None or self.num_batches_tracked is None:
            return
        self.num_batches_tracked += 1
        pace = 1.0 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), pace)
        self.running_var.lerp_((variance * count / (count - 1)).to(self.running_var.dtype), pace)

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() < 2:
            raise ValueError(f"batch norm takes [n, channels, ...], got {list(input.shape)}")


class GlobalBatchNormAct(GlobalBatchNorm):
    """timm's BatchNormAct2d, which has its activation inside, over the global batch."""

    drop: nn.Module
    act: nn.Module

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.act(self.drop(super().forward(x)))
        return y


class _Standardise(torch.autograd.Function):
    """`_Normalise` without its weights, in plain operations: torch's kernel for CUDA insists on weights."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, mean: Tensor, inverse: Tensor, count: int) -> Tensor:
        y = (x - mean) * inverse
        ctx.save_for_backward(y, inverse)
        ctx.count = count
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        y, inverse = ctx.saved_tensors
        along, shift = dist.all_reduce_sum(torch.stack([(grad * y).sum(0), grad.sum(0)])) / ctx.count  # [C] each
        return (grad - y * along - shift) * inverse, None, None, None


class _Normalise(torch.autograd.Function):
    """Normalise by the global statistics and differentiate through them, with torch's fused kernels and one collective.

    With x^ the normalised input and g the incoming gradient times weight / deviation, the gradient of x is
    g - mean(g) - x^ mean(g x^), the means being global ones. The kernel takes this rank's; what they differ by is
    another scale and shift of x^.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, statistics: Sequence[Tensor], eps: float
    ) -> Tensor:
        mean, variance, count = statistics
        ctx.save_for_backward(x, weight, mean, variance, count)
        ctx.eps = eps
        return F.batch_norm(x, mean, variance, weight, bias, training=False, eps=eps)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, weight, mean, variance, count = ctx.saved_tensors
        inverse = (variance + ctx.eps).rsqrt()  # 1 / deviation [C]
        x_grad, weight_grad, bias_grad = torch.ops.aten.native_batch_norm_backward(
            grad, x, weight, None, None, mean, inverse, True, ctx.eps, [True, True, True]
        )
        sums = torch.stack([weight_grad, bias_grad])  # of grad * x^ and of grad over this rank's samples [2, C]
        scale = inverse if weight is None else inverse * weight
        own_count = x.numel() // weight_grad.numel()
        excess, shift = scale * (sums / own_count - dist.all_reduce_sum(sums) / count)
        x_grad += F.batch_norm(x, mean, variance, excess, shift, training=False, eps=ctx.eps)
        return x_grad, *((None, None) if weight is None else (weight_grad, bias_grad)), None, None


def _has_activation(module: nn.Module) -> bool:
    """timm's BatchNormAct2d, without the seconds that its import takes."""
    return isinstance(module, _BatchNorm) and hasattr(module, "act")


def _converted(module: nn.Module) -> nn.Module:
    """`module` with its batch norms replaced, at any depth, but for those that read the global batch already."""
    if isinstance(module, GlobalBatchNorm):
        return module
    if not isinstance(module, _BatchNorm):
        for name, child in module.named_children():
            setattr(module, name, _converted(child))
        return module
    if not _has_activation(module):
        return twin(module, GlobalBatchNorm)
    with_activation = twin(module, GlobalBatchNormAct)
    with_activation.drop, with_activation.act = module.get_submodule("drop"), module.get_submodule("act")
    return with_activation


def twin(norm: _BatchNorm, kind: type[Norm]) -> Norm:
    """A batch norm of this kind with the same parameters, buffers and options."""
    made = kind(norm.num_features, norm.eps, norm.momentum, norm.affine, norm.track_running_stats)
    made.weight, made.bias = norm.weight, norm.bias
    for name, buffer in norm.named_buffers(recurse=False):
        setattr(made, name, buffer)
    return made.train(norm.training)
