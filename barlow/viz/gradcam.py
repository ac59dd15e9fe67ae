"""Where a classifier looks: Grad-CAM (Selvaraju et al. 2016), guided backpropagation (Springenberg et al. 2014), and
guided Grad-CAM, their product.

`model` is any classifier [n, 3, h, w] -> logits [n, classes]. Every image is asked about a class of its own. The model
runs in eval mode and is afterwards what it was, whatever happens: weights, gradients, modes, hooks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

RELUS = {F.relu, torch.relu, torch.relu_, Tensor.relu, Tensor.relu_}


def grad_cam(model: nn.Module, stage: nn.Module, images: Tensor, classes: Tensor) -> Tensor:
    """How much each place speaks for the image's class [n, h, w], zero where it does not.

    relu(sum_k a_k A_k), A being what `stage` (a part of `model`) puts out and a_k the mean over its places of the
    gradient of the class's logit with respect to A_k; then bilinear to the size of the images.
    """
    with _undisturbed(model), _kept_output(stage) as kept:
        score = _score(model, images.detach().requires_grad_(), classes)
        (features,) = kept  # [n, k, h', w']
        (gradient,) = torch.autograd.grad(score, features)
    weights = gradient.mean((2, 3), keepdim=True)
    cam = (weights * features.detach()).sum(1, keepdim=True).relu()
    return F.interpolate(cam, images.shape[-2:], mode="bilinear", align_corners=False).squeeze(1)


def guided_backprop(model: nn.Module, images: Tensor, classes: Tensor) -> Tensor:
    """The gradient of the image's class's logit with respect to the pixels [n, 3, h, w], every ReLU on the way back
    passing what is positive alone. Where a model has other activations, theirs is the plain gradient."""
    images = images.detach().requires_grad_()
    with _undisturbed(model), _Guided():
        (gradient,) = torch.autograd.grad(_score(model, images, classes), images)
    return gradient


def guided_grad_cam(cam: Tensor, guided: Tensor) -> Tensor:
    """Details of guided backpropagation [n, 3, h, w] where Grad-CAM [n, h, w] says that they matter."""
    return cam.unsqueeze(1) * guided


def last_stage(backbone: nn.Module) -> nn.Module:
    """The last convolutional stage: the last part of the backbone that has a convolution in it."""
    parts = [part for part in backbone.children() if any(isinstance(layer, nn.Conv2d) for layer in part.modules())]
    assert parts, f"no convolution in {type(backbone).__name__}"
    return parts[-1]


def _score(model: nn.Module, images: Tensor, classes: Tensor) -> Tensor:
    """Each image's logit of its class, summed: in eval mode no image has a part in another's logits."""
    logits: Tensor = model(images)
    return logits.gather(1, classes.unsqueeze(1)).sum()


class _Guided(TorchFunctionMode):
    """While it lasts, what comes back to a ReLU is stopped where it is negative.

    The gradient is cut at the tensor that a ReLU puts out, in the graph of this one pass. That serves ReLUs that work
    in place, are called as functions, or called twice, and the model has no part in it.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        if func in RELUS and out.requires_grad:
            out.register_hook(lambda gradient: gradient.clamp(min=0))
        return out


@contextmanager
def _undisturbed(model: nn.Module) -> Iterator[None]:
    """Eval mode and gradients, whatever the caller has; each module's own mode comes back."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.enable_grad():
            yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def _kept_output(stage: nn.Module) -> Iterator[list[Tensor]]:
    """What `stage` puts out in a forward pass. The layers after it get a copy: one of them may work in place."""
    kept: list[Tensor] = []

    def keep(_module: nn.Module, _inputs: Any, output: Tensor) -> Tensor:
        kept.append(output)
        return output.clone()

    handle = stage.register_forward_hook(keep)
    try:
        yield kept
    finally:
        handle.remove()
