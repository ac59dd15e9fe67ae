"""Which parameters are weights and which are biases and norms, and which belong to the head: optimizers treat them
differently."""

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


def head_and_backbone(classifier: nn.Module) -> list[dict[str, Any]]:
    """A group of the head's parameters, then one of the backbone's, if it learns. All are decayed."""
    groups = [{"params": [p for p in part.parameters() if p.requires_grad]} for part in _parts(classifier)]
    return [group for group in groups if group["params"]]


def weights_and_biases_apart(classifier: nn.Module) -> list[dict[str, Any]]:
    """Four groups, the head's weights and the rest of it, then the backbone's: the rest is not decayed."""
    groups: list[dict[str, Any]] = []
    for part in _parts(classifier):
        for group in weights_and_biases(part):
            group.pop("adapt", None)
            groups.append(group)
    return groups


def _parts(classifier: nn.Module) -> tuple[nn.Module, nn.Module]:
    return classifier.get_submodule("head"), classifier.get_submodule("backbone")
