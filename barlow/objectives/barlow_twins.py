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
from barlow.models.norm import moments, standardised

Form = Literal["auto", "dxd", "nxn"]
EPS = 1e-5


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
        """Each view alone, as the paper does, for the statistics of batch norm; but both backbones before a projector.

        So backward ends with the projector, which has most of the parameters, before it begins with a backbone, and the
        projector's gradients are reduced meanwhile. Embeddings of the first view travel while the second's are made.
        """
        feature_a, feature_b = [self.backbone(view) for view in views]  # [n, 3, h, w] -> [n, features]
        z_a = self.projector(feature_a)  # [n, d]
        everyone = gathering(z_a, self.config.form)
        z_b = self.projector(feature_b)
        return barlow_twins_loss(z_a, z_b, self.config.lambd, self.config.scale, self.config.form, everyone)


def barlow_twins_loss(
    z_a: Tensor,
    z_b: Tensor,
    lambd: float = 0.0051,
    scale: float = 1.0,
    form: Form = "auto",
    everyone_a: dist.Gathering | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """scale * (sum_i (1 - C_ii)^2 + lambd * sum_{i != j} C_ij^2) with C = Z_a^T Z_b / N over the global batch.

    z_a, z_b [n, D] are this rank's part, n the same on all ranks. Z is z standardised by `standardise`. The two matrix
    forms give the same loss: `dxd` makes C, `nxn` the two Gram matrices; `auto` takes the `cheaper` one. Products run
    in the dtype in which z arrives (bfloat16 under autocast), all else in float32 at least. everyone_a: what
    `gathering` has begun for z_a. Metrics: both terms before their weights.
    """
    d = z_a.shape[1]
    total = z_a.shape[0] * dist.world_size()
    with torch.autocast(z_a.device.type, enabled=False):
        if chosen(form, total, d) == "dxd":
            diagonal, off_diagonal = _dxd(z_a, z_b, total)
        else:
            diagonal, off_diagonal = _nxn(z_a, z_b, total, everyone_a)
        on_diagonal = (1 - diagonal).square().sum()
        loss = scale * (on_diagonal + lambd * off_diagonal)
    return loss, {"on_diagonal": on_diagonal.detach(), "off_diagonal": off_diagonal.detach()}


def cheaper(total: int, d: int) -> Form:
    """The form with less to do, for a global batch of N = total.

    In products C takes 3 N D^2 multiply-adds, the Gram matrices 4 N^2 D: alone, N <= 3/4 D. Among ranks what is sent
    counts as well: C takes 8 D^2 bytes of each rank and D^2 sums that no rank is spared, the two gathers 4 N D bytes in
    bfloat16. At N = D that is half the bytes for 4/3 of the products, which the ranks share.
    """
    return "nxn" if (4 * total <= 3 * d if dist.world_size() == 1 else total <= d) else "dxd"


def chosen(form: Form, total: int, d: int) -> Form:
    return cheaper(total, d) if form == "auto" else form


def gathering(z: Tensor, form: Form) -> dist.Gathering | None:
    """Begin to gather z [n, D], if the loss in this form will ask for everyone's."""
    total, d = z.shape[0] * dist.world_size(), z.shape[1]
    if dist.world_size() == 1 or chosen(form, total, d) == "dxd":
        return None
    return dist.Gathering(z)


def standardise(z_a: Tensor, z_b: Tensor) -> tuple[Tensor, Tensor]:
    """Each [n, D] -> mean 0 and variance 1 a dimension over the global batch, in float32 at least.

    As the reference implementation has it: batch norm without affine, so the biased variance plus eps under the root
    (a dimension that has collapsed gives 0, not NaN). The paper divides by the norm of the centred column: the same
    without eps. Other code bases differ: some take the unbiased deviation, which multiplies C by 1 - 1/N.
    """
    if dist.world_size() == 1:
        a, b = (F.batch_norm(_wide(z), None, None, training=True, eps=EPS) for z in (z_a, z_b))
        return a, b
    z = _wide(torch.cat([z_a, z_b], dim=1))  # both at once, for one collective each way
    mean, variance, _ = moments(z.detach(), [0])
    a, b = standardised(z, mean, (variance + EPS).rsqrt(), z.shape[0] * dist.world_size()).chunk(2, dim=1)
    return a, b


def _dxd(z_a: Tensor, z_b: Tensor, total: int) -> tuple[Tensor, Tensor]:
    """Diagonal of C [D] and sum of squares off it, from C itself [D, D]: D^2 numbers to sum over the ranks."""
    a, b = standardise(z_a, z_b)
    diagonal = dist.replicated_sum((a * b).sum(0)) / total
    c = dist.replicated_sum((a.to(z_a.dtype).T @ b.to(z_b.dtype)).to(a.dtype))
    return diagonal, c.fill_diagonal_(0).square().sum() / total**2


def _nxn(z_a: Tensor, z_b: Tensor, total: int, everyone_a: dist.Gathering | None) -> tuple[Tensor, Tensor]:
    """The same without C, from the Gram matrices [N, N] of both views: ||A^T B||^2 = sum((A A^T) o (B B^T)).

    Each rank makes its own rows of both Gram matrices, from everyone's Z. They are symmetric, so the gradient through
    the columns equals that through the rows: everyone's Z comes without a gradient, the rows' gradient counts twice,
    and backward needs half the products and no communication of Z.

    Subtracting the diagonal from ||C||^2 costs hardly a digit where this form is the cheaper one: unrelated dimensions
    still correlate by chance, 1/N in square, so D^2 - D of them are about D/N times the diagonal's D squares.
    """
    a, b, all_a, all_b = _own_and_everyone_s(z_a, z_b, everyone_a)
    gram_a, gram_b = ((own.to(z_a.dtype) @ rows.T).to(a.dtype) for own, rows in ((a, all_a), (b, all_b)))  # [n, N]
    half = (gram_a * gram_b).sum() / total**2
    parts = torch.cat([(a * b).sum(0) / total, (2 * half - half.detach())[None]])
    diagonal, square = dist.replicated_sum(parts).split([a.shape[1], 1])
    return diagonal, square.squeeze() - diagonal.square().sum()


def _own_and_everyone_s(z_a: Tensor, z_b: Tensor, everyone_a: dist.Gathering | None) -> tuple[Tensor, ...]:
    """Both views standardised: own rows [n, D], wide and differentiable; all rows [N, D] in the dtype of z, without.

    z travels as it is, so that it can leave as soon as it is made; each rank then finds everyone's statistics itself.
    """
    if dist.world_size() == 1:
        a, b = standardise(z_a, z_b)
        return a, b, a.detach().to(z_a.dtype), b.detach().to(z_b.dtype)
    means, inverses, rows = [], [], []
    for arriving in (everyone_a or dist.Gathering(z_a), dist.Gathering(z_b)):
        y, mean, inverse = torch.native_batch_norm(_wide(arriving.rows()), None, None, None, None, True, 0.0, EPS)
        means.append(mean)
        inverses.append(inverse)  # 1 / deviation
        rows.append(y.to(z_a.dtype))
    z = torch.cat([z_a, z_b], dim=1)
    own = standardised(_wide(z), torch.cat(means), torch.cat(inverses), z.shape[0] * dist.world_size())
    return *own.chunk(2, dim=1), *rows


def _wide(z: Tensor) -> Tensor:
    return z.float() if z.dtype in (torch.bfloat16, torch.float16) else z
