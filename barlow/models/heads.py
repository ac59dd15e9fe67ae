"""The heads that stand on a backbone."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn


def projector(n_in: int, widths: Sequence[int]) -> nn.Sequential:
    """Barlow Twins' projector [n, n_in] -> [n, widths[-1]]: linear, batch norm, ReLU a layer; the last is linear alone.

    No layer has a bias: batch norm, or the standardisation in the loss, would take it away again. One width makes a
    linear map; no width at all, the identity.
    """
    layers: list[nn.Module] = []
    for width in widths[:-1]:
        layers += [nn.Linear(n_in, width, bias=False), nn.BatchNorm1d(width), nn.ReLU(inplace=True)]
        n_in = width
    layers += [nn.Linear(n_in, width, bias=False) for width in widths[-1:]]
    return nn.Sequential(*layers)
