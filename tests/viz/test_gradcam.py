"""Where a classifier looks, against the definitions: by finite differences, by a network whose ReLUs are replaced, by
captum where it is installed; and on a network that was taught what to look at."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from barlow.config import Model
from barlow.models import backbone as backbones
from barlow.models.fused_norm import FusedNorm
from barlow.models.resnet import Network, ResNet, fuse
from barlow.viz.gradcam import grad_cam, guided_backprop, guided_grad_cam, last_stage

CLASSES = torch.tensor([4, 0, 4])


def classifier(backbone: nn.Module) -> nn.Sequential:
    """With a head that has ReLUs of its own, and running statistics that are not all 0 and 1."""
    torch.manual_seed(1)
    n = backbone.num_features
    assert isinstance(n, int)
    head = nn.Sequential(nn.Linear(n, 16), nn.BatchNorm1d(16), nn.ReLU(inplace=True), nn.Dropout(0.1), nn.Linear(16, 5))
    model = nn.Sequential(backbone, head).double()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            assert module.running_mean is not None
            assert module.running_var is not None
            module.running_mean.normal_(std=0.1)
            module.running_var.uniform_(0.5, 1.5)
            nn.init.uniform_(module.weight, 0.5, 1.5)
    return model


def small() -> nn.Sequential:
    torch.manual_seed(0)
    return classifier(ResNet(Network((1, 1, 1, 1), bottleneck=False), "cifar", 0.125, zero_init=False))


def images(n: int = 3, side: int = 24) -> Tensor:
    return torch.randn(n, 3, side, side, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


class GuidedRelu(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = _GuidedRelu.apply(x)
        return y


class _GuidedRelu(torch.autograd.Function):
    """The rule as Springenberg et al. write it: R = 1[f > 0] 1[R_above > 0] R_above."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.clamp(min=0)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return torch.where((x > 0) & (grad > 0), grad, 0)


def replaced(model: nn.Module) -> nn.Module:
    """A copy whose ReLU modules follow the rule by themselves."""
    twin = copy.deepcopy(model)
    for parent in list(twin.modules()):
        for name, child in parent.named_children():
            if isinstance(child, nn.ReLU):
                setattr(parent, name, GuidedRelu())
    return twin


def bilinear(small: np.ndarray, side: int) -> Tensor:
    """[h, w] -> [side, side], pixel by pixel: a pixel's centre lies between those of four places."""
    h, w = small.shape
    big = np.zeros((side, side))
    for i in range(side):
        for j in range(side):
            y, x = max((i + 0.5) * h / side - 0.5, 0), max((j + 0.5) * w / side - 0.5, 0)
            top, left = int(y), int(x)
            below, right = min(top + 1, h - 1), min(left + 1, w - 1)
            a, b = y - top, x - left
            upper = (1 - b) * small[top, left] + b * small[top, right]
            big[i, j] = (1 - a) * upper + a * ((1 - b) * small[below, left] + b * small[below, right])
    return torch.from_numpy(big)


def test_grad_cam_is_its_definition_by_finite_differences() -> None:
    """With a head that treats the places of the last stage differently, as a pooling one does not."""
    torch.manual_seed(0)
    stage = nn.Sequential(nn.Conv2d(3, 6, 5, stride=4), nn.ReLU(), nn.Conv2d(6, 8, 3, padding=1), nn.ReLU(inplace=True))
    head = nn.Sequential(nn.Flatten(), nn.Linear(8 * 25, 32), nn.ReLU(inplace=True), nn.Linear(32, 5))
    model, x = nn.Sequential(stage, head).double(), images()
    found = grad_cam(model, stage, x, CLASSES)
    assert found.shape == (3, 24, 24)
    with torch.no_grad():
        features = stage(x)  # [3, 8, 5, 5]
        for n, wanted in enumerate(CLASSES):
            steps = 1e-5 * torch.eye(200, dtype=torch.float64).view(200, 8, 5, 5)
            above, below = (head(features[n] + change)[:, wanted] for change in (steps, -steps))
            slopes = ((above - below) / 2e-5).view(8, 25)
            assert (slopes.std(1) > 0.1 * slopes.abs().mean()).all()
            cam = (slopes.mean(1)[:, None, None] * features[n]).sum(0).relu()
            torch.testing.assert_close(found[n], bilinear(cam.numpy(), 24), rtol=1e-6, atol=1e-9)
    assert (found > 0).any((1, 2)).all()
    assert (found == 0).any()


def test_guided_backpropagation_by_hand() -> None:
    torch.manual_seed(0)
    first, second = nn.Conv2d(3, 6, 3).double(), nn.Conv2d(6, 4, 3, stride=2).double()
    last = nn.Linear(4, 5).double()
    model = nn.Sequential(first, nn.ReLU(True), second, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), last)
    x = images(side=9)
    with torch.no_grad():
        a = first(x)
        b = second(a.relu())  # [3, 4, 3, 3]
        back = last.weight[CLASSES][:, :, None, None].expand_as(b) / 9
        back = back.clamp(min=0) * (b > 0)
        back = F.conv_transpose2d(back, second.weight, stride=2)
        back = back.clamp(min=0) * (a > 0)
        back = F.conv_transpose2d(back, first.weight)
    torch.testing.assert_close(guided_backprop(model, x, CLASSES), back)


BACKBONES = [
    Model("resnet18", "cifar", 0.125),
    Model("resnet50d", "small", 0.125),
    pytest.param(Model("seresnet18", "dense", 0.125), marks=pytest.mark.slow),  # timm's: seconds to import
    pytest.param(Model("res2net50_26w_4s", "small"), marks=pytest.mark.slow),
]


@pytest.mark.parametrize("config", BACKBONES, ids=lambda config: config.backbone)
def test_guided_backpropagation_is_the_plain_gradient_of_a_network_with_such_relus(config: Model) -> None:
    model = classifier(backbones.build(config))
    x, twin = images(), replaced(model).eval()
    pixels = x.clone().requires_grad_()
    (wanted,) = torch.autograd.grad(twin(pixels).gather(1, CLASSES[:, None]).sum(), pixels)
    found = guided_backprop(model, x, CLASSES)
    assert torch.equal(found, wanted)
    (plain,) = torch.autograd.grad(model.eval()(pixels).gather(1, CLASSES[:, None]).sum(), pixels)
    assert not torch.allclose(found, plain, rtol=0.1)
    backbone = model[0]
    assert last_stage(backbone) is backbone.get_submodule("layer4")


RELUS: list[Callable[[Tensor], Tensor]] = [
    F.relu,
    torch.relu,
    Tensor.relu,
    Tensor.relu_,
    lambda x: F.relu(x, inplace=True),
    lambda x: F.relu_(x),
    lambda x: x.relu(),
]


@pytest.mark.parametrize("relu", RELUS)
def test_a_relu_may_be_called_by_any_name(relu: Callable[[Tensor], Tensor]) -> None:
    class Called(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return relu(x * 1)

    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    model = nn.Sequential(*layers, nn.Linear(8, 5)).double()
    called = copy.deepcopy(model)
    called[1] = called[3] = Called()
    found = guided_backprop(called, images(), CLASSES)
    torch.testing.assert_close(found, guided_backprop(model, images(), CLASSES))


def test_a_relu_may_be_part_of_a_norm() -> None:
    model, x = small(), images()
    fused = fuse(copy.deepcopy(model))
    assert sum(isinstance(module, FusedNorm) for module in fused.modules()) > 8
    torch.testing.assert_close(guided_backprop(fused, x, CLASSES), guided_backprop(model, x, CLASSES))
    cams = [grad_cam(each, each.get_submodule("0.layer4"), x, CLASSES) for each in (fused, model)]
    torch.testing.assert_close(*cams)


def test_a_layer_after_the_stage_may_work_in_place() -> None:
    torch.manual_seed(0)
    stage, rest = nn.Conv2d(3, 6, 3, stride=4), [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 5)]
    in_place, apart = (nn.Sequential(stage, nn.ReLU(inplace), *rest).double() for inplace in (True, False))
    found = grad_cam(in_place, stage, images(), CLASSES)
    assert found.any()
    assert torch.equal(found, grad_cam(apart, stage, images(), CLASSES))


def test_each_image_of_a_batch_is_asked_alone() -> None:
    model, x = small(), images()
    stage = last_stage(model[0])
    cams, guided = grad_cam(model, stage, x, CLASSES), guided_backprop(model, x, CLASSES)
    product = guided_grad_cam(cams, guided)
    for n, wanted in enumerate(CLASSES):
        one, asked = x[n : n + 1], wanted[None]
        torch.testing.assert_close(cams[n : n + 1], grad_cam(model, stage, one, asked))
        torch.testing.assert_close(guided[n : n + 1], guided_backprop(model, one, asked))
        assert torch.equal(product[n], torch.stack([cams[n] * guided[n, colour] for colour in range(3)]))
    other = grad_cam(model, stage, x, (CLASSES + 1) % 5)
    assert not torch.allclose(cams, other, rtol=0.1)


@pytest.mark.parametrize("wrong", [False, True])
def test_the_model_is_left_as_it_was(wrong: bool) -> None:
    model, x = small(), images()
    model.train()
    model[0].get_submodule("bn1").eval()  # modes of all kinds, some weights frozen, some with a gradient
    for parameter in model[0].parameters():
        parameter.requires_grad = False
    weight = model.get_parameter("1.0.weight")
    weight.grad = torch.ones_like(weight)
    modes = [module.training for module in model.modules()]
    state = copy.deepcopy(model.state_dict())
    classes = torch.tensor([4, 0, 99]) if wrong else CLASSES

    def ask() -> None:
        with torch.no_grad():
            grad_cam(model, last_stage(model[0]), x, classes)
        with torch.no_grad():
            guided_backprop(model, x, classes)

    def ask_in_vain() -> None:
        for look in (
            lambda: grad_cam(model, last_stage(model[0]), x, classes),
            lambda: guided_backprop(model, x, classes),
        ):
            with pytest.raises((IndexError, RuntimeError), match="out of bounds"):
                look()

    ask_in_vain() if wrong else ask()
    assert [module.training for module in model.modules()] == modes
    assert not any(module._forward_hooks or module._backward_hooks for module in model.modules())
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())
    assert not any(parameter.requires_grad or parameter.grad is not None for parameter in model[0].parameters())
    assert torch.equal(weight.grad, torch.ones_like(weight))
    assert all(parameter.requires_grad for parameter in model[1].parameters())
    assert not x.requires_grad
    y = torch.tensor([-1.0, 1.0], requires_grad=True)  # a ReLU is a ReLU again
    (gradient,) = torch.autograd.grad(-y.relu().sum(), y)
    assert gradient.tolist() == [0, -1]


def test_captum_says_the_same() -> None:
    captum = pytest.importorskip("captum.attr")
    model, x = small().eval(), images()
    stage = last_stage(model[0])
    cam = captum.LayerGradCam(model, stage).attribute(x, target=CLASSES, relu_attributions=True)
    cam = captum.LayerAttribution.interpolate(cam, (24, 24), "bilinear")[:, 0]
    both = captum.GuidedGradCam(model, stage).attribute(x.clone(), target=CLASSES, interpolate_mode="bilinear")
    ours, guided = grad_cam(model, stage, x, CLASSES), guided_backprop(model, x, CLASSES)
    torch.testing.assert_close(ours, cam)
    torch.testing.assert_close(guided, captum.GuidedBackprop(model).attribute(x.clone(), target=CLASSES))
    torch.testing.assert_close(guided_grad_cam(ours, guided), both)


SIDE, PATCH = 32, 8
STRIPES = (torch.arange(PATCH) // 2 % 2).float().expand(PATCH, PATCH)  # class 1: upright; class 0: lying


def patched(images: Tensor, classes: Tensor, at: Tensor) -> Tensor:
    """Paint each image's patch, in place; where it lies [n, SIDE, SIDE]."""
    where = torch.zeros(len(images), SIDE, SIDE)
    for n, (row, column) in enumerate(at.tolist()):
        rows, columns = slice(row, row + PATCH), slice(column, column + PATCH)
        images[n, :, rows, columns] = STRIPES if classes[n] else STRIPES.T
        where[n, rows, columns] = 1
    return where


def noise(n: int, generator: torch.Generator) -> Tensor:
    return torch.rand(n, 3, SIDE, SIDE, generator=generator)


def one_patch(n: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    x, classes = noise(n, generator), torch.randint(0, 2, (n,), generator=generator)
    where = patched(x, classes, torch.randint(0, SIDE - PATCH + 1, (n, 2), generator=generator))
    return x, classes, where


@pytest.fixture(scope="module")
def taught() -> nn.Sequential:
    """A network that has learned which way a patch of stripes lies, wherever in the noise it is."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    backbone = ResNet(Network((1, 1, 1, 1), bottleneck=False), "cifar", 0.25, zero_init=False)
    head = [nn.Linear(backbone.num_features, 32), nn.BatchNorm1d(32), nn.ReLU(inplace=True), nn.Linear(32, 2)]
    model = nn.Sequential(backbone, *head)
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    for _ in range(40):
        x, classes, _ = one_patch(32, generator)
        optimizer.zero_grad()
        F.cross_entropy(model(x - 0.5), classes).backward()
        optimizer.step()
    return model.eval()


def share(where: Tensor, shown: Tensor) -> float:
    """Of all that is shown, what lies there."""
    return ((shown * where).sum((1, 2)) / shown.sum((1, 2))).mean().item()


def test_it_shows_the_place_that_a_network_was_taught_to_look_at(taught: nn.Sequential) -> None:
    x, classes, where = one_patch(64, torch.Generator().manual_seed(1))
    cam = grad_cam(taught, last_stage(taught[0]), x - 0.5, classes)
    guided = guided_backprop(taught, x - 0.5, classes)
    chance = PATCH**2 / SIDE**2
    assert share(where, cam) > 2.5 * chance
    assert share(where, guided.abs().sum(1)) > 4 * chance
    assert share(where, guided_grad_cam(cam, guided).abs().sum(1)) > 6 * chance


def test_the_place_is_that_of_the_class_it_was_asked_for(taught: nn.Sequential) -> None:
    generator = torch.Generator().manual_seed(2)
    x, rows = noise(32, generator), torch.randint(0, SIDE - PATCH + 1, (2, 32), generator=generator)
    left = torch.randint(0, 2, (32,), generator=generator).bool()
    columns = torch.where(left, 2, SIDE - PATCH - 2)  # of class 0; that of class 1 lies on the other side
    lying = patched(x, torch.zeros(32), torch.stack([rows[0], columns], 1))
    upright = patched(x, torch.ones(32), torch.stack([rows[1], SIDE - PATCH - columns], 1))
    for wanted, here, there in ((0, lying, upright), (1, upright, lying)):
        cam = grad_cam(taught, last_stage(taught[0]), x - 0.5, torch.full((32,), wanted))
        assert ((cam * here).sum((1, 2)) > 4 * (cam * there).sum((1, 2))).float().mean() > 0.9


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_a_gpu_says_the_same() -> None:
    model, x = small(), images()
    stage = last_stage(model[0])
    expected = grad_cam(model, stage, x, CLASSES), guided_backprop(model, x, CLASSES)
    model.cuda()
    found = grad_cam(model, stage, x.cuda(), CLASSES.cuda()), guided_backprop(model, x.cuda(), CLASSES.cuda())
    for ours, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(ours.cpu(), wanted)
