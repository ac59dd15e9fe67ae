"""Which parameters are weights and which are biases and norms: LARS treats them differently."""

from __future__ import annotations

from typing import Any

from torch import nn


def weights_and_biases(model: nn.Module) -> list[dict[str, Any]]:
    """Two groups, [weights, biases]: tensors of two dimensions and more, then the rest, in the model's own order.

    The rest (biases, scales and shifts of norms) is neither decayed nor adapted. Frozen parameters are left out.
    """
    parameters = [p for _, p in model.named_parameters() if p.requires_grad]
    return [
        {"params": [p for p in parameters if p.ndim > 1]},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0, "adapt": False},
    ]
