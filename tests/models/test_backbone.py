"""Stems, sizes, widths and names of the backbones."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest
import timm
import torch
import torchvision
from torch import Tensor, nn

from barlow import config
from barlow.errors import UserError
from barlow.models import backbone, resnet

PLAIN = config.Model(backbone="resnet18", stem="imagenet")


def build_empty(model: config.Model) -> Any:
    """The backbone on the meta device: shapes without arithmetic."""
    with torch.device("meta"):
        return backbone.build(model)


def sides(model: Any, size: int) -> list[int]:
    """Side of the feature map after the stem's convolution, its pool, and the four stages, for a [1, 3, size, size]."""
    found: list[int] = []
    model.eval()  # one sample is too few for batch statistics
    for name in ("conv1", "maxpool", "layer1", "layer2", "layer3", "layer4"):
        getattr(model, name).register_forward_hook(lambda _, __, out: found.append(out.shape[-1]))
    assert model(torch.empty(1, 3, size, size, device="meta")).shape == (1, model.num_features)
    return found


def count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(
    ("stem", "at_32", "at_96"),
    [
        ("imagenet", [16, 8, 8, 4, 2, 1], [48, 24, 24, 12, 6, 3]),
        ("small", [16, 8, 8, 4, 2, 1], [48, 24, 24, 12, 6, 3]),
        ("dense", [32, 16, 16, 8, 4, 2], [96, 48, 48, 24, 12, 6]),
        ("cifar", [32, 32, 32, 16, 8, 4], [96, 96, 96, 48, 24, 12]),
    ],
)
@pytest.mark.parametrize(
    "name", ["resnet18", "resnet26d", "resnetaa34d"]
)  # a plain stem of its own, and a deep one; one that timm builds
def test_feature_maps_of_each_stem(name: str, stem: Any, at_32: list[int], at_96: list[int]) -> None:
    assert sides(build_empty(config.Model(backbone=name, stem=stem)), 32) == at_32
    assert sides(build_empty(config.Model(backbone=name, stem=stem)), 96) == at_96


def test_barlowmatch_backbone() -> None:
    """Wide ResNet-50-2 with a 3x3 stride 2 stem: 96 -> 48 -> 24 -> 24/12/6/3, 2048 features."""
    model = build_empty(config.Model(backbone="wide_resnet50_2", stem="small"))
    assert sides(model, 96) == [48, 24, 24, 12, 6, 3]
    assert model.num_features == 2048
    assert model.conv1.weight.shape == (64, 3, 3, 3)


@pytest.mark.parametrize(
    ("name", "parameters"), [("resnet18", 11_176_512), ("resnet50", 23_508_032), ("wide_resnet50_2", 66_834_240)]
)
def test_parameter_counts_are_those_of_torchvision(name: str, parameters: int) -> None:
    model = build_empty(config.Model(backbone=name, stem="imagenet"))
    with torch.device("meta"):
        peer = torchvision.models.get_model(name)
    assert count(model) == count(peer) - count(peer.fc) == parameters
    small = build_empty(config.Model(backbone=name, stem="small"))
    assert count(model) - count(small) == 64 * 3 * (49 - 9)


def test_the_imagenet_stem_is_timm_s_model_number_for_number() -> None:
    torch.manual_seed(3)
    ours = backbone.build(PLAIN).state_dict()
    torch.manual_seed(3)
    theirs = timm.create_model("resnet18", num_classes=0, zero_init_last=False).state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("name", ["resnet10t", "resnet26d", "wide_resnet50_2", "resnext50_32x4d"])
def test_our_networks_are_timm_s_number_for_number(name: str) -> None:
    """Weights, what they make of images, and the state of the random numbers afterwards."""
    torch.manual_seed(3)
    ours, after = backbone.build(replace(PLAIN, backbone=name)), torch.rand(3)
    torch.manual_seed(3)
    theirs: nn.Module = timm.create_model(name, num_classes=0, zero_init_last=False)
    assert torch.equal(torch.rand(3), after)
    assert all(torch.equal(w, theirs.state_dict()[key]) for key, w in ours.state_dict().items())
    images = torch.randn(2, 3, 33, 33)
    assert torch.equal(ours(images), theirs(images))


@pytest.mark.parametrize("name", resnet.NETWORKS)
def test_weights_of_every_network_of_ours_fit_timm_s(name: str) -> None:
    ours = build_empty(replace(PLAIN, backbone=name))
    with torch.device("meta"):
        theirs = timm.create_model(name, num_classes=0)
    assert [(k, w.shape) for k, w in ours.state_dict().items()] == [
        (k, w.shape) for k, w in theirs.state_dict().items()
    ]
    assert ours.num_features == theirs.num_features


def test_a_rank_starts_without_timm_and_without_torch_s_compiler() -> None:
    """They would take longer to import than all the rest."""
    lines = ["import sys", "from barlow import config", "from barlow.models import backbone"]
    lines += ["from barlow.stages import pretrain", "backbone.build(config.Model())"]
    lines += ["print([name for name in ('timm', 'torchvision', 'torch._dynamo') if name in sys.modules])"]
    done = subprocess.run([sys.executable, "-c", "\n".join(lines)], capture_output=True, text=True)
    assert (done.stdout, done.returncode) == ("[]\n", 0), done.stderr


def test_a_deep_stem_stays_deep_and_a_small_one_is_one_convolution() -> None:
    deep = config.Model(backbone="resnet26d", stem="imagenet")
    for name in ("resnet26d", "seresnet50t"):  # ours, timm's
        model = replace(deep, backbone=name)
        assert isinstance(build_empty(model).conv1, nn.Sequential)
        assert isinstance(build_empty(replace(model, stem="small")).conv1, nn.Conv2d)
        assert isinstance(build_empty(replace(model, stem="imagenet", width=0.5)).conv1, nn.Sequential)


def test_zero_init_residual() -> None:
    def last_norms(zero: bool) -> list[Tensor]:
        model: Any = backbone.build(replace(PLAIN, zero_init_residual=zero, width=0.25))
        return [block.bn2.weight for stage in (model.layer1, model.layer4) for block in stage]

    assert all(bool((w == 0).all()) for w in last_norms(True))
    assert all(bool((w == 1).all()) for w in last_norms(False))


@pytest.mark.parametrize("stem", ["imagenet", "small", "dense", "cifar"])
@pytest.mark.parametrize(
    ("name", "features"), [("resnet18", 512), ("resnet50", 2048), ("resnet26d", 2048), ("resnetblur18", 512)]
)
def test_width_multiplies_stem_and_stages(name: str, features: int, stem: Any) -> None:
    for width in (0.5, 2.0):
        model = build_empty(config.Model(backbone=name, stem=stem, width=width))
        plain = build_empty(config.Model(backbone=name, stem=stem))
        assert model.num_features == features * width
        assert model.bn1.num_features == 64 * width
        for wide, narrow in zip(convolutions(model), convolutions(plain), strict=True):
            assert wide.out_channels == narrow.out_channels * width
            assert (wide.kernel_size, wide.stride) == (narrow.kernel_size, narrow.stride)
        assert sides(model, 32) == sides(plain, 32)


def convolutions(model: nn.Module) -> list[nn.Conv2d]:
    return [m for m in model.modules() if isinstance(m, nn.Conv2d)]


def test_new_stems_are_drawn_like_the_rest() -> None:
    torch.manual_seed(0)
    model: Any = backbone.build(config.Model(backbone="resnet18", stem="small", width=4))
    expected = (2 / (256 * 9)) ** 0.5  # He et al., fan out
    assert float(model.conv1.weight.detach().std()) == pytest.approx(expected, rel=0.03)


def test_wrong_names_are_one_line_with_suggestions() -> None:
    for wrong, hint in [("wide_resnet50", "wide_resnet50_2"), ("ResNet-18", "resnet18"), ("resnet18.tv", "resnet18")]:
        with pytest.raises(UserError, match=hint) as caught:
            backbone.build(replace(PLAIN, backbone=wrong))
        assert "\n" not in str(caught.value)
    for name in ("vit_base_patch16_224", "hf-hub:somebody/resnet50", "", "ecaresnet50d_pruned", "resnet50_gn"):
        with pytest.raises(UserError, match="not a ResNet"):
            backbone.build(replace(PLAIN, backbone=name))
    with pytest.raises(UserError, match=r"model\.width"):
        backbone.build(replace(PLAIN, width=0.0))
