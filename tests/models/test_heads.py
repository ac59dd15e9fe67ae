"""The projector against the reference's shape, the classifier's head against the paper's, at any depth."""

from __future__ import annotations

import torch
from torch import nn

from barlow import config
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


def test_a_classifier_s_layers_are_the_paper_s() -> None:
    """BarlowMatch 3.2.1: four linear layers; each but the last with batch norm, ReLU and dropout."""
    head = heads.classifier(6, config.Head(widths=(8, 7, 9), dropout=0.1), 5)
    block = [nn.Linear, nn.BatchNorm1d, nn.ReLU, nn.Dropout]
    assert [type(layer) for layer in head] == [*block * 3, nn.Linear]
    linear = [layer for layer in head if isinstance(layer, nn.Linear)]
    assert [tuple(layer.weight.shape) for layer in linear] == [(8, 6), (7, 8), (9, 7), (5, 9)]
    assert [layer.bias is None for layer in linear] == [True, True, True, False]  # norms would take it away
    assert {layer.p for layer in head if isinstance(layer, nn.Dropout)} == {0.1}
    assert head(torch.randn(4, 6)).shape == (4, 5)


def test_a_classifier_of_one_layer_is_linear_and_may_have_its_input_normed() -> None:
    (only,) = heads.classifier(6, config.Head(widths=(), dropout=0.1), 5)
    assert isinstance(only, nn.Linear)
    assert only.bias is not None
    norm, last = heads.classifier(6, config.Head(widths=(), norm_input=True), 5)
    assert isinstance(norm, nn.BatchNorm1d)
    assert norm.num_features == last.in_features == 6
    assert not [layer for layer in heads.classifier(6, config.Head(dropout=0.0), 5) if isinstance(layer, nn.Dropout)]
