"""The plain ResNets (He et al. 2016), their Wide (Zagoruyko and Komodakis 2016) and ResNeXt (Xie et al. 2017) forms,
and the deep stems of He et al. 2019: name for name and number for number what timm builds, so that weights fit both.

They are here because of what timm costs before it builds anything: its import takes more than half of the CPU seconds
in which a rank starts, on every rank, after every preemption. What is not in `NETWORKS` is timm's to build."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from barlow.models.fused_norm import By, FusedNorm, fused, way

Stem = Literal["imagenet", "small", "dense", "cifar"]
CHANNELS = (64, 128, 256, 512)  # of the four stages


@dataclass(frozen=True)
class Network:
    """What tells one network from another."""

    layers: tuple[int, ...]  # blocks a stage
    bottleneck: bool = True
    stem: Literal["plain", "deep", "tiered"] = "plain"  # one convolution, or three, the first of them narrower
    groups: int = 1
    group_width: int = 64  # channels a group of the first stage's 3x3


_DEPTHS = {
    "10": Network((1, 1, 1, 1), bottleneck=False),
    "14": Network((1, 1, 1, 1)),
    "18": Network((2, 2, 2, 2), bottleneck=False),
    "26": Network((2, 2, 2, 2)),
    "34": Network((3, 4, 6, 3), bottleneck=False),
    "50": Network((3, 4, 6, 3)),
    "101": Network((3, 4, 23, 3)),
    "152": Network((3, 8, 36, 3)),
    "200": Network((3, 24, 36, 3)),
}
NETWORKS = {f"resnet{depth}": _DEPTHS[depth] for depth in ("18", "26", "34", "50", "101", "152", "200")}
NETWORKS |= {f"{name}d": replace(network, stem="deep") for name, network in NETWORKS.items()}
NETWORKS |= {f"resnet{depth}t": replace(_DEPTHS[depth], stem="tiered") for depth in ("10", "14", "26", "50")}
NETWORKS |= {f"wide_resnet{depth}_2": replace(_DEPTHS[depth], group_width=128) for depth in ("50", "101")}
NETWORKS |= {
    f"resnext{depth}_{groups}x{width}d": replace(_DEPTHS[depth], groups=groups, group_width=width)
    for depth, groups, width in [("50", 32, 4), ("101", 32, 4), ("101", 32, 8), ("101", 64, 4)]
}


class ResNet(nn.Module):
    """[n, 3, h, w] -> [n, num_features]. `width` multiplies the channels of stem and stages."""

    def __init__(self, network: Network, stem: Stem, width: float, zero_init: bool) -> None:
        super().__init__()
        self.conv1 = _stem(network, stem, width)
        *_, last = (layer for layer in self.conv1.modules() if isinstance(layer, nn.Conv2d))
        n = last.out_channels
        self.bn1 = nn.BatchNorm2d(n)
        self.act1 = nn.ReLU(inplace=True)
        self.maxpool = nn.Identity() if stem == "cifar" else nn.MaxPool2d(3, stride=2, padding=1)
        stages: list[nn.Module] = []
        for channels, blocks in zip(CHANNELS, network.layers, strict=True):
            stages.append(_stage(n, times(channels, width), blocks, 2 if stages else 1, network))
            n = times(channels, width) * (4 if network.bottleneck else 1)
        self.layer1, self.layer2, self.layer3, self.layer4 = stages
        self.num_features = n
        for layer in self.modules():
            if isinstance(layer, nn.Conv2d):
                nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
        for layer in self.modules():
            if zero_init and isinstance(layer, Basic | Bottleneck):
                nn.init.zeros_(layer.last_norm.weight)

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(self.act1(self.bn1(self.conv1(x))))
        for stage in (self.layer1, self.layer2, self.layer3, self.layer4):
            x = stage(x)
        return x.mean((2, 3))  # its gradient is channels last as x is, unlike that of a pooling layer


class Basic(nn.Module):
    """Two 3x3 convolutions."""

    def __init__(self, n_in: int, channels: int, stride: int, downsample: nn.Module | None) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(n_in, channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.act1 = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.act2 = nn.ReLU(inplace=True)
        self.downsample = downsample

    @property
    def last_norm(self) -> nn.BatchNorm2d:
        return self.bn2

    def forward(self, x: Tensor) -> Tensor:
        y = self.act1(self.bn1(self.conv1(x)))
        return joined(self.bn2, self.act2, self.conv2(y), x if self.downsample is None else self.downsample(x))


class Bottleneck(nn.Module):
    """1x1 to fewer channels, 3x3, 1x1 to four times `channels`; the 3x3 has the stride."""

    def __init__(
        self, n_in: int, channels: int, stride: int, downsample: nn.Module | None, groups: int, group_width: int
    ) -> None:
        super().__init__()
        width = channels * group_width // 64 * groups
        self.conv1 = nn.Conv2d(n_in, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.act1 = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(width, width, 3, stride, padding=1, groups=groups, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.act2 = nn.ReLU(inplace=True)
        self.conv3 = nn.Conv2d(width, 4 * channels, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(4 * channels)
        self.act3 = nn.ReLU(inplace=True)
        self.downsample = downsample

    @property
    def last_norm(self) -> nn.BatchNorm2d:
        return self.bn3

    def forward(self, x: Tensor) -> Tensor:
        y = self.act1(self.bn1(self.conv1(x)))
        y = self.act2(self.bn2(self.conv2(y)))
        return joined(self.bn3, self.act3, self.conv3(y), x if self.downsample is None else self.downsample(x))


def joined(norm: nn.Module, act: nn.Module, y: Tensor, shortcut: Tensor) -> Tensor:
    """The end of a block."""
    if isinstance(norm, FusedNorm):
        y = norm(y, shortcut)
    else:
        y = norm(y)
        y += shortcut
    y = act(y)
    return y


def fuse(model: nn.Module) -> nn.Module:
    """`model` with the batch norms of its ResNets made one with the ReLU and the sum that follow them.

    Parameters, buffers and their names stay what they were, and so does each result, within rounding. A network of timm
    stays as it is: its blocks put other things between a norm and its activation.
    """
    inside = [part for module in model.modules() if isinstance(module, ResNet) for part in module.modules()]
    for part in inside:
        children = [*part.named_children(), ("", None)]  # in the order in which they are called
        for (name, norm), (after, act) in itertools.pairwise(children):
            if isinstance(norm, _BatchNorm):
                setattr(part, name, fused(norm, relu=isinstance(act, nn.ReLU)))
                if isinstance(act, nn.ReLU):
                    setattr(part, after, nn.Identity())
    return model


def choose_norms(model: nn.Module, device: torch.device, by: By) -> str:
    """Fuse the norms of `model` if that is asked for; how they are made then, for the log. Before anything else happens
    to the model; a UserError if it is asked for what cannot be had."""
    told = way(device, by)
    if by != "fused":
        return told
    fuse(model)
    if not any(isinstance(module, FusedNorm) for module in model.modules()):
        return "batch norms by torch's operations (ours fuse only the ResNets of barlow/models/resnet.py)"
    return told


def times(channels: int, width: float) -> int:
    """To the nearest multiple of 8."""
    return channels if width == 1 else max(8, 8 * round(channels * width / 8))


def _stem(network: Network, stem: Stem, width: float) -> nn.Module:
    """The network's own, 7x7 or three 3x3; or one 3x3 in its place, with stride 2 if `small`."""
    n = times(64, width) if network.stem == "plain" else 2 * times(32, width)
    if stem != "imagenet":
        return nn.Conv2d(3, n, 3, stride=2 if stem == "small" else 1, padding=1, bias=False)
    if network.stem == "plain":
        return nn.Conv2d(3, n, 7, stride=2, padding=3, bias=False)
    half = n // 2
    first = half if network.stem == "deep" else 3 * (half // 4)
    return nn.Sequential(
        nn.Conv2d(3, first, 3, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(first),
        nn.ReLU(inplace=True),
        nn.Conv2d(first, half, 3, padding=1, bias=False),
        nn.BatchNorm2d(half),
        nn.ReLU(inplace=True),
        nn.Conv2d(half, n, 3, padding=1, bias=False),
    )


def _stage(n_in: int, channels: int, blocks: int, stride: int, network: Network) -> nn.Module:
    n_out = channels * (4 if network.bottleneck else 1)
    layers: list[nn.Module] = []
    for at in range(blocks):
        downsample = _downsample(n_in, n_out, stride, network) if at == 0 and (stride > 1 or n_in != n_out) else None
        if network.bottleneck:
            layers.append(Bottleneck(n_in, channels, stride, downsample, network.groups, network.group_width))
        else:
            layers.append(Basic(n_in, channels, stride, downsample))
        n_in, stride = n_out, 1
    return nn.Sequential(*layers)


def _downsample(n_in: int, n_out: int, stride: int, network: Network) -> nn.Module:
    """What the shortcut passes where shapes change; networks with a deep stem average before the 1x1."""
    if network.stem == "plain":
        return nn.Sequential(nn.Conv2d(n_in, n_out, 1, stride, bias=False), nn.BatchNorm2d(n_out))
    pool = nn.Identity() if stride == 1 else nn.AvgPool2d(2, stride, ceil_mode=True, count_include_pad=False)
    return nn.Sequential(pool, nn.Conv2d(n_in, n_out, 1, bias=False), nn.BatchNorm2d(n_out))
