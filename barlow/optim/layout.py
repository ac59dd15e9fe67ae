"""Whether tensors can be walked through together as plain runs of memory, whatever the order of their dimensions."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def dense(tensor: Tensor) -> bool:
    """Whether its elements fill a run of memory, each once: then torch keeps its strides for tensors made like it."""
    return same_layout(tensor.shape, tensor.stride(), torch.empty_like(tensor, device="meta").stride())


def same_layout(shape: Sequence[int], strides: Sequence[int], others: Sequence[int]) -> bool:
    """Whether elements of this shape lie in the same order; how a dimension of one element is strided says nothing."""
    return all(n == 1 or a == b for n, a, b in zip(shape, strides, others, strict=True)) or 0 in shape


def laid_out_as(p: Tensor, tensor: Tensor) -> Tensor:
    """The same numbers in the layout of `p`, which is dense: `tensor` itself where it has it."""
    if same_layout(p.shape, p.stride(), tensor.stride()):
        return tensor
    return torch.empty_like(p, dtype=tensor.dtype).copy_(tensor)
