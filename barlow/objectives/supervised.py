"""Cross-entropy of a classifier on labelled images, over the global batch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from barlow import dist


class Supervised(nn.Module):
    def __init__(self, classifier: nn.Module) -> None:
        super().__init__()
        self.classifier = classifier

    def forward(self, given: Sequence[Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Images [n, 3, h, w] and their labels [n] -> the mean over all ranks' images; metrics: top-1 in per cent."""
        images, labels = given
        return supervised_loss(self.classifier(images), labels)


def supervised_loss(logits: Tensor, labels: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """H(p, q) of this rank's logits [n, classes], n the same on all ranks, averaged over all of them."""
    total = len(labels) * dist.world_size()
    logits = logits if logits.dtype == torch.float64 else logits.float()
    entropy = F.cross_entropy(logits, labels, reduction="sum")
    hits = (logits.detach().argmax(1) == labels).sum().to(entropy.dtype)
    loss, right = dist.replicated_sum(torch.stack([entropy, hits])) / total
    return loss, {"top1": 100 * right.detach()}
