"""The projector against the reference's shape, at any depth."""

from __future__ import annotations

import torch
from torch import nn

from barlow.models import heads


def test_layers_as_in_the_reference() -> None:
    kinds = [type(layer) for layer in heads.projector(5, (8, 7, 6))]
    assert kinds == [nn.Linear, nn.BatchNorm1d, nn.ReLU, nn.Linear, nn.BatchNorm1d, nn.ReLU, nn.Linear]


def test_any_depth() -> None:
    x = torch.randn(4, 5)
    for widths in [(6,), (6, 3), (3, 6, 2), (2, 2, 2, 2)]:
        head = heads.projector(5, widths)
        assert head(x).shape == (4, widths[-1])
        linear = [layer for layer in head if isinstance(layer, nn.Linear)]
        assert [tuple(layer.weight.shape) for layer in linear] == list(zip(widths, (5, *widths[:-1]), strict=True))
        assert all(layer.bias is None for layer in linear)
        assert isinstance(head[-1], nn.Linear)
    assert heads.projector(5, ())(x) is x
