"""FixMatch (Sohn et al. 2020): what a classifier is sure of in a weak view, it has to find in a strong one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from barlow import dist
from barlow.models.norm import forgetful


class Alignment(nn.Module):
    """Distribution alignment (ReMixMatch, Berthelot et al. 2020): answers are weighed so that on the whole each class
    comes as often as among the labels. Without it a class that is easily told may take the others' images over."""

    prior: Tensor
    mean: Tensor

    def __init__(self, labels: Tensor, classes: int, decay: float) -> None:
        """`labels` [n]; the mean answer is one over some 1 / (1 - decay) steps."""
        super().__init__()
        self.decay = decay
        self.register_buffer("prior", torch.bincount(labels, minlength=classes) / len(labels))
        self.register_buffer("mean", self.prior.clone())

    def forward(self, q: Tensor) -> Tensor:
        """Answers [m, classes] of this rank -> the same, aligned by those of all ranks up to now."""
        mean = dist.replicated_sum(q.sum(0)) / (len(q) * dist.world_size())
        self.mean.lerp_(mean.to(self.mean.dtype), 1 - self.decay)
        aligned = q * (self.prior / self.mean.clamp(min=1e-6))
        return aligned / aligned.sum(1, keepdim=True).clamp(min=1e-6)  # 0: of classes without a label


class FixMatch(nn.Module):
    def __init__(
        self,
        classifier: nn.Module,
        threshold: float,
        lambda_u: float,
        temperature: float,
        batches: Literal["one", "two"] = "one",
        alignment: Alignment | None = None,
    ) -> None:
        super().__init__()
        self.classifier, self.batches, self.alignment = classifier, batches, alignment
        self.threshold, self.lambda_u, self.temperature = threshold, lambda_u, temperature

    def forward(self, given: Sequence[Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Labelled images [n, 3, h, w] with labels [n]; weak and strong views of the same m unlabelled ones, with the
        labels [m] that they truly have (-1: unknown), which are only counted.

        All go through the network at once, for batch norms to see one batch, as the paper's code has it; or the strong
        ones by themselves, and batch norms do not remember them."""
        images, labels, weak, strong, truth = given
        n, m = len(labels), len(weak)
        if self.batches == "one":
            of_images, of_weak, of_strong = self.classifier(joined(images, weak, strong)).split([n, m, m])
        else:
            of_images, of_weak = self.classifier(joined(images, weak)).split([n, m])
            with forgetful(self.classifier):
                of_strong = self.classifier(strong)
        q = answers(of_weak, self.temperature)
        q = self.alignment(q) if self.alignment else q
        return fixmatch_loss(of_images, q, of_strong, labels, truth, self.threshold, self.lambda_u)


def joined(*views: Tensor) -> Tensor:
    return torch.cat(views).contiguous(memory_format=torch.channels_last)


def answers(logits: Tensor, temperature: float = 1.0) -> Tensor:
    """What the network says of weak views, as a target: softmax(logits / temperature), without gradient."""
    return torch.softmax(summable(logits.detach()) / temperature, dim=1)


def summable(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def fixmatch_loss(
    logits: Tensor,
    q: Tensor,
    strong: Tensor,
    labels: Tensor,
    truth: Tensor,
    threshold: float,
    lambda_u: float = 1.0,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Equations 3 to 5 of BarlowMatch, over the batches of all ranks: l_l + lambda_u l_u, with

    l_l = mean over labelled images of H(label, p(logits)),
    l_u = mean over unlabelled ones of 1(max q >= threshold) H(argmax q, p(strong)), q the `answers` to weak views.

    Logits and answers are [n, classes], [m, classes] and [m, classes] on each rank. Metrics: both losses; in per cent
    the labelled images that are right, the unlabelled ones that count (mask), and of those whose true label is known,
    the ones whose pseudo-label is right (NaN while there are none).
    """
    n, m = len(labels), len(q)
    world = dist.world_size()
    entropy = F.cross_entropy(summable(logits), labels, reduction="sum")
    sure, guess = q.max(dim=1)  # [m] each
    mask = sure >= threshold
    consistency = (F.cross_entropy(summable(strong), guess, reduction="none") * mask).sum()

    known = mask & (truth >= 0)
    counted = [logits.detach().argmax(1) == labels, mask, known, known & (guess == truth)]
    counts = [each.sum().to(entropy.dtype) for each in counted]
    sums = dist.replicated_sum(torch.stack([entropy, consistency, *counts]))
    loss_l, loss_u = sums[0] / (n * world), sums[1] / (m * world)
    right, masked, checked, agreed = sums[2:].detach()
    metrics = {
        "loss_labelled": loss_l.detach(),
        "loss_unlabelled": loss_u.detach(),
        "top1": 100 * right / (n * world),
        "mask": 100 * masked / (m * world),
        "pseudo_top1": 100 * agreed / checked,
    }
    return loss_l + lambda_u * loss_u, metrics
