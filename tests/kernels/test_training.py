"""A run with our kernels is the run without them: views, loss, gradients and LARS, step after step."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from barlow import config, kernels
from barlow.data import views
from barlow.objectives.barlow_twins import BarlowTwins
from barlow.optim.groups import weights_and_biases
from barlow.optim.lars import Lars
from tests.kernels.emulator import OnCpu

SIZE, STEPS = 24, 6
MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.3, 0.25)


class Small(nn.Module):
    num_features = 16

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 16, 3, stride=2, bias=False), nn.BatchNorm2d(16)
        self.conv2, self.bn2 = nn.Conv2d(16, 16, 3, stride=2, bias=False), nn.BatchNorm2d(16)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn2(self.conv2(self.bn1(self.conv1(x)).relu())).relu().mean((2, 3))


def losses(device: torch.device, by: views.By, backend: str, more: float = 1.0) -> tuple[list[float], list[Tensor]]:
    """Of a short run, and the weights that it ends with; `more`: of the rates."""
    torch.manual_seed(0)
    objective = BarlowTwins(Small(), config.BarlowTwins(), (32, 32)).to(device).to(memory_format=torch.channels_last)
    optimizer = Lars(weights_and_biases(objective), weight_decay=1e-4, eta=0.02, backend=backend)
    images = torch.randint(0, 256, (64, 32, 32, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    found = []
    for step in range(STEPS):
        ids = torch.arange(48) + 48 * (step % 2)
        pair = views.pair(
            images[ids % 64].to(device), ids.to(device), config.Views(size=SIZE), 3, step, MEAN, STD, by=by
        )
        loss, _ = objective(pair)
        loss.backward()
        for group, lr in zip(optimizer.param_groups, (1.0, 1e-3), strict=True):
            group["lr"] = more * lr / (1 + step)
        optimizer.step()
        optimizer.zero_grad()
        found.append(loss.item())
    return found, [p.detach().cpu() for p in objective.parameters()]


def compare(fast: tuple[list[float], list[Tensor]], slow: tuple[list[float], list[Tensor]]) -> None:
    torch.testing.assert_close(fast[0], slow[0], rtol=1e-4, atol=0)
    for a, b in zip(fast[1], slow[1], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


def test_a_run_with_our_kernels_is_the_run_without(
    emulated: Callable[..., OnCpu], monkeypatch: pytest.MonkeyPatch
) -> None:
    slow = losses(torch.device("cpu"), "reference", "foreach")
    made = {name: emulated(name, "shuffled") for name in ("views", "lars")}
    monkeypatch.setattr(kernels, "load", lambda name, device: made[name])
    fast = losses(torch.device("cpu"), "fused", "fused")
    assert made["views"].launches == ["views_draw", "views_apply"] * STEPS
    assert [name for name in made["lars"].launches if name != "lars_point"] == ["lars_norms", "lars_update"] * STEPS
    compare(fast, slow)
    with pytest.raises(AssertionError):
        compare(losses(torch.device("cpu"), "reference", "foreach", more=1.01), slow)


@pytest.mark.gpu
def test_on_a_gpu_too() -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    gpu = torch.device("cuda")
    with torch.backends.cudnn.flags(allow_tf32=False, deterministic=True, benchmark=False):  # TF32 rounds at 1e-3
        compare(losses(gpu, "fused", "fused"), losses(gpu, "reference", "foreach"))
