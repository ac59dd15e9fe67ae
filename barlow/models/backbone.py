"""The backbone: ResNets and Wide-ResNets, with stems that leave something of a small image.

The plain ones are our own (`resnet`), the others timm's, which is imported only for them: it takes seconds."""

from __future__ import annotations

import difflib
from typing import Any

import torch
from torch import nn

from barlow import config
from barlow.errors import UserError
from barlow.models.resnet import NETWORKS, ResNet, times

FAMILY = ("resnet", "res2net", "resnest", "sknet")  # timm's modules whose models are instances of ResNet


def build(config: config.Model) -> nn.Module:
    """The untrained backbone [n, 3, h, w] -> [n, num_features]: features after global pooling, no classifier.

    The stem `imagenet` is the model's own, be it the 7x7 or a deep one of three 3x3. The others put one 3x3 convolution
    in its place, and `cifar` takes the pool away as well. At 96 px the four leave 3x3, 3x3, 6x6 and 12x12 positions of
    the last stage, at 32 px 1x1, 1x1, 2x2 and 4x4.
    """
    if not config.width > 0:
        raise UserError(f"--model.width {config.width}: must be above 0: 1.0 is the model as it is published")
    if network := NETWORKS.get(config.backbone):
        return ResNet(network, config.stem, config.width, config.zero_init_residual)
    return _of_timm(config)


def _of_timm(config: config.Model) -> nn.Module:
    import timm

    _check(config.backbone)
    options = {} if config.width == 1 else _widened(config.backbone, config.width)
    options["zero_init_last"] = config.zero_init_residual
    model: Any = timm.create_model(config.backbone, num_classes=0, **options)
    n_out = model.bn1.num_features
    if config.stem != "imagenet":
        model.conv1 = _convolution(n_out, kernel=3, stride=2 if config.stem == "small" else 1)
    elif "stem_type" in options:
        model.conv1 = _convolution(n_out, kernel=7, stride=2)
    if config.stem == "cifar":
        model.maxpool = nn.Identity()
    assert isinstance(model, nn.Module)
    return model


def _check(name: str) -> None:
    import timm

    listed = [name for module in FAMILY for name in timm.list_models(module=module)]
    names = [name for name in listed if not name.endswith(("_pruned", "_gn"))]  # _gn: group norms, no batch norms
    if name not in names:
        close = difflib.get_close_matches(name, names, n=4, cutoff=0.5) or ["resnet18", "resnet50"]
        kind = f"not a ResNet with batch norms of timm {timm.__version__}"
        raise UserError(f"--model.backbone {name}: {kind}: try {', '.join(close)}")


def _widened(name: str, width: float) -> dict[str, Any]:
    """timm's arguments for `name` with the channels of stem and stages multiplied, to the nearest multiple of 8.

    timm's plain stem is always 64 wide; a deep one follows `stem_width`. So a plain model is built with a deep stem of
    the wanted width, which `build` then replaces by one convolution.
    """
    import timm

    with torch.device("meta"):  # shapes without memory, and without a draw from the random numbers
        plain: Any = timm.create_model(name, num_classes=0)
    stages = [plain.layer1, plain.layer2, plain.layer3, plain.layer4]
    outputs = [info["num_chs"] for info in plain.feature_info[1:]]
    channels = [n // stage[0].expansion for n, stage in zip(outputs, stages, strict=True)]
    options: dict[str, Any] = {"channels": tuple(times(n, width) for n in channels)}
    deep = [layer.out_channels for layer in plain.conv1.modules() if isinstance(layer, nn.Conv2d)]
    if len(deep) == 3:
        return options | {"stem_width": times(deep[1], width)}
    return options | {"stem_type": "deep", "stem_width": times(plain.bn1.num_features, width) // 2}


def _convolution(n_out: int, kernel: int, stride: int) -> nn.Conv2d:
    convolution = nn.Conv2d(3, n_out, kernel, stride, padding=kernel // 2, bias=False)
    nn.init.kaiming_normal_(convolution.weight, mode="fan_out", nonlinearity="relu")
    return convolution
