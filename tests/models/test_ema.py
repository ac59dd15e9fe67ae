"""The average of a model's weights against its definition, step by step, and what is counted beside them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import nn

from barlow.models.ema import Average


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 2)).double()


def steps(followed: nn.Module, count: int) -> Iterator[dict[str, torch.Tensor]]:
    """Training, with the model's state after each step."""
    optimizer = torch.optim.SGD(followed.parameters(), lr=0.1, momentum=0.9)
    chance = torch.Generator().manual_seed(1)
    for _ in range(count):
        x = torch.randn(5, 3, 4, 4, dtype=torch.float64, generator=chance)
        followed(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        yield {name: tensor.clone() for name, tensor in followed.state_dict().items()}


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.9, 0.999])
def test_it_is_its_definition_after_every_step(decay: float) -> None:
    followed = model()
    average = Average(followed, decay)
    expected = {name: tensor.clone() for name, tensor in followed.state_dict().items()}
    for state in steps(followed, 4):
        average.follow()
        for name, now in state.items():
            smooth = now.is_floating_point()
            expected[name] = decay * expected[name] + (1 - decay) * now if smooth else now
        found = average.model.state_dict()
        assert found.keys() == expected.keys()
        for name, tensor in expected.items():
            torch.testing.assert_close(found[name], tensor, rtol=1e-12, atol=1e-14)
    assert found["1.num_batches_tracked"] == 4
    different = [name for name in found if not torch.equal(found[name], state[name])]
    assert (different == []) == (decay == 0.0)  # a decay of 0 is the model itself, to the bit


def test_it_neither_learns_nor_disturbs_who_is_followed() -> None:
    alone, followed = model(), model()
    average = Average(followed, 0.9)
    for expected, state in zip(steps(alone, 3), steps(followed, 3), strict=True):
        average.follow()
        assert all(torch.equal(tensor, expected[name]) for name, tensor in state.items())
    assert not any(p.requires_grad or p.grad is not None for p in average.model.parameters())
    assert not any(part.training for part in average.model.modules())
    assert followed.training
    assert all(p.requires_grad for p in followed.parameters())


def test_it_follows_parameters_and_not_a_copy_of_them() -> None:
    """Also where the norms were exchanged for others meanwhile, as among ranks."""
    followed = model()
    average = Average(followed, 0.0)
    norm = followed[1]
    followed[1] = nn.BatchNorm2d(4, momentum=0.3).double()
    followed[1].load_state_dict(norm.state_dict())
    *_, last = steps(followed, 2)
    average.follow()
    assert all(torch.equal(tensor, last[name]) for name, tensor in average.model.state_dict().items())
