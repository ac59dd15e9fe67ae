"""Barlow Twins (Zbontar et al. 2021, arXiv 2103.03230): turn two views' cross-correlation into the identity.

`barlow_twins_loss` is the loss of the global batch, on every rank; `BarlowTwins` puts backbone and projector before it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from barlow import config, dist
from barlow.models import heads
from barlow.models.norm import moments

Form = Literal["auto", "dxd", "nxn"]


class BarlowTwins(nn.Module):
    """Two views of a batch -> loss and metrics. The backbone is what one keeps; the projector serves the training."""

    def __init__(self, backbone: nn.Module, config: config.BarlowTwins, projector: Sequence[int]) -> None:
        super().__init__()
        n_features = backbone.num_features
        assert isinstance(n_features, int)
        self.config = config
        self.backbone = backbone
        self.projector = heads.projector(n_features, projector)

    def forward(self, views: Sequence[Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        # One view after the other, as the paper does: batch norm takes its statistics of each view alone.
        z_a, z_b = (self.projector(self.backbone(view)) for view in views)  # [n, 3, h, w] -> [n, d]
        return barlow_twins_loss(z_a, z_b, self.config.lambd, self.config.scale, self.config.form)


def barlow_twins_loss(
    z_a: Tensor, z_b: Tensor, lambd: float = 0.0051, scale: float = 1.0, form: Form = "auto"
) -> tuple[Tensor, dict[str, Tensor]]:
    """scale * (sum_i (1 - C_ii)^2 + lambd * sum_{i != j} C_ij^2) with C = Z_a^T Z_b / N over the global batch.

    z_a, z_b [n, D] are this rank's part, n the same on all ranks. Z is z standardised by `standardise`. The two matrix
    forms give the same loss: `dxd` makes C, `nxn` the two Gram matrices (`_off_diagonal_nxn`); `auto` takes the one
    with fewer operations and less traffic. Matrix products run in the dtype in which z arrives (bfloat16 under
    autocast), all else in float32 at least. Metrics: both terms before their weights.
    """
    products = z_a.dtype
    n, d = z_a.shape
    total = n * dist.world_size()
    if form == "auto":
        form = "nxn" if 2 * total <= d else "dxd"
    with torch.autocast(z_a.device.type, enabled=False):
        a, b = standardise(torch.cat([z_a, z_b], dim=1)).split(d, dim=1)
        diagonal = dist.replicated_sum((a * b).sum(0)) / total  # [D]
        on_diagonal = (1 - diagonal).square().sum()
        if form == "dxd":
            off_diagonal = _off_diagonal_dxd(a, b, total, products)
        else:
            off_diagonal = _off_diagonal_nxn(a, b, total, products, diagonal)
        loss = scale * (on_diagonal + lambd * off_diagonal)
    return loss, {"on_diagonal": on_diagonal.detach(), "off_diagonal": off_diagonal.detach()}


def standardise(z: Tensor, eps: float = 1e-5) -> Tensor:
    """z [n, D] -> mean 0 and variance 1 a dimension over the global batch, in float32 at least.

    As the reference implementation has it: batch norm without affine, so the biased variance plus eps under the root
    (a dimension that has collapsed gives 0, not NaN). The paper divides by the norm of the centred column: the same
    without eps. Other code bases differ: some take the unbiased deviation, which multiplies C by 1 - 1/N.
    """
    z = z.float() if z.dtype in (torch.bfloat16, torch.float16) else z
    if dist.world_size() == 1:
        return F.batch_norm(z, None, None, training=True, eps=eps)
    mean, variance, _ = moments(z, [0])
    return (z - mean) * (variance + eps).rsqrt()


def _off_diagonal_dxd(a: Tensor, b: Tensor, total: int, products: torch.dtype) -> Tensor:
    """Through C itself [D, D]: D^2 numbers to sum over the ranks."""
    c = dist.replicated_sum((a.to(products).T @ b.to(products)).to(a.dtype)) / total
    return c.square().sum() - c.diagonal().square().sum()


def _off_diagonal_nxn(a: Tensor, b: Tensor, total: int, products: torch.dtype, diagonal: Tensor) -> Tensor:
    """Without C, through the Gram matrices [N, N] of both views: ||A^T B||^2 = sum((A A^T) o (B B^T)).

    Each rank makes its own rows of both Gram matrices, from everyone's Z. They are symmetric, so the gradient through
    the columns equals that through the rows: everyone's Z is gathered without a gradient, the rows' gradient counts
    twice, and backward needs half the products and no communication of Z.

    Subtracting the diagonal from ||C||^2 costs hardly a digit where this form is the cheaper one: C has rank N at most,
    so ||C||^2 >= (sum C_ii)^2 / N, which is D / N >= 2 times what is subtracted once the diagonal is near 1.
    """
    sums, a, b = a.dtype, a.to(products), b.to(products)
    all_a, all_b = dist.gather(torch.cat([a, b], dim=1).detach()).split(a.shape[1], dim=1)  # [N, D] each
    gram_a, gram_b = (a @ all_a.T).to(sums), (b @ all_b.T).to(sums)  # [n, N]
    half = (gram_a * gram_b).sum() / total**2
    return dist.replicated_sum(2 * half - half.detach()) - diagonal.square().sum()
