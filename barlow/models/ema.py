"""An average of a model's weights over its steps, each step's weighing less than the next one's."""

from __future__ import annotations

import copy

import torch
from torch import nn


class Average:
    """`model`, a copy of the one that is followed, whose floating point numbers (weights and statistics) are averages:
    decay times what they were, plus the rest times what the followed model has now. What it counts is copied."""

    def __init__(self, followed: nn.Module, decay: float) -> None:
        self.followed = followed
        self.decay = decay
        self.model = copy.deepcopy(followed).requires_grad_(False).eval()

    @torch.no_grad()
    def follow(self) -> None:
        """After each step."""
        mine, theirs = self.model.state_dict(), self.followed.state_dict()
        smooth = [name for name, tensor in mine.items() if tensor.is_floating_point()]
        torch._foreach_lerp_([mine[name] for name in smooth], [theirs[name] for name in smooth], 1 - self.decay)
        for name in mine.keys() - set(smooth):
            mine[name].copy_(theirs[name])
