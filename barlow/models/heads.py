"""The heads that stand on a backbone."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from barlow import config


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


def classifier(n_in: int, knobs: config.Head, classes: int) -> nn.Sequential:
    """Features [n, n_in] -> logits [n, classes]: linear, batch norm, ReLU, dropout a layer; the last is linear alone.

    No width at all makes a linear classifier. Layers before a batch norm have no bias."""
    layers: list[nn.Module] = [nn.BatchNorm1d(n_in)] if knobs.norm_input else []
    for width in knobs.widths:
        layers += [nn.Linear(n_in, width, bias=False), nn.BatchNorm1d(width), nn.ReLU(inplace=True)]
        layers += [nn.Dropout(knobs.dropout)] if knobs.dropout else []
        n_in = width
    return nn.Sequential(*layers, nn.Linear(n_in, classes))
