"""Values that cannot work are refused where they are given, in one line that names the flag; the limits pass."""

from __future__ import annotations

from math import inf, nan
from typing import Any

import pytest

from barlow.config import Data, Knn, Lars, Model, Pretrain, View, Views
from barlow.errors import UserError


@pytest.mark.parametrize(
    ("views", "told"),
    [
        ({"scale": (0.5, 0.2)}, "--views.scale is (0.5, 0.2): give two shares of the image, as in 0.08 1.0"),
        ({"ratio": (0.0, 1.0)}, "--views.ratio is (0.0, 1.0): give two widths over height, the lesser first"),
        ({"ratio": (1.5, 0.5)}, "--views.ratio is (1.5, 0.5): give two widths over height"),
        ({"ratio": (0.5, inf)}, "--views.ratio is (0.5, inf): give"),
        ({"sigma": (-0.1, 2.0)}, "--views.sigma is (-0.1, 2.0): give two numbers of pixels up to 2, the lesser first"),
        ({"sigma": (2.0, 0.1)}, "--views.sigma is (2.0, 0.1): give two numbers of pixels"),
        ({"hue": 0.6}, "--views.hue is 0.6: give 0 to 0.5"),
        ({"hue": -0.1}, "--views.hue is -0.1: give 0 to 0.5"),
        ({"brightness": -0.4}, "--views.brightness is -0.4: give 0 or more"),
        ({"contrast": -0.4}, "--views.contrast is -0.4: give 0 or more"),
        ({"saturation": nan}, "--views.saturation is nan: give 0 or more"),
        ({"a": View(flip=1.5)}, "--views.a.flip is 1.5: give a probability, 0 to 1"),
        ({"a": View(jitter=-0.5)}, "--views.a.jitter is -0.5: give a probability"),
        ({"b": View(gray=nan)}, "--views.b.gray is nan: give a probability"),
        ({"b": View(blur=80)}, "--views.b.blur is 80: give a probability"),
        ({"b": View(solarize=20)}, "--views.b.solarize is 20: give a probability"),
    ],
)
def test_views_that_cannot_be_drawn_are_refused(views: dict[str, Any], told: str) -> None:
    with pytest.raises(UserError) as error:
        Pretrain(views=Views(**views))
    assert str(error.value).startswith(told)
    assert "\n" not in str(error.value)


def test_the_limits_of_views_are_allowed() -> None:
    never, always = View(0, 0, 0, 0, 0), View(1, 1, 1, 1, 1)
    still = Views(scale=(1, 1), ratio=(1, 1), brightness=0, contrast=0, saturation=0, hue=0, sigma=(0, 0), a=never)
    for views in (Views(), still, Views(brightness=3, contrast=3, saturation=3, hue=0.5, a=always, b=never)):
        assert Pretrain(views=views).views == views


@pytest.mark.parametrize(
    ("knobs", "told"),
    [
        ({"epochs": 0}, "--epochs is 0: give 1 or more"),
        ({"batch_size": 1}, "--batch-size is 1: give 2 or more"),
        ({"data": Data(workers=-1)}, "--data.workers is -1: give 0 or more"),
        ({"data": Data(splits=())}, "--data.splits is (): give at least one split"),
        ({"optim": Lars(lr=float("nan"))}, "--optim.lr is nan: give 0 or more"),
        ({"optim": Lars(warmup_epochs=-1)}, "--optim.warmup-epochs is -1: give 0 or more"),
        ({"model": Model(width=0)}, "--model.width is 0: give a number above 0"),
        ({"model": Model(projector=())}, "--model.projector is (): give the widths"),
        ({"knn": Knn(temperature=0)}, "--knn.temperature is 0: give a number above 0"),
        ({"run": "../elsewhere"}, "--run is '../elsewhere': give a plain name"),
    ],
)
def test_values_no_run_can_have_are_refused(knobs: dict[str, Any], told: str) -> None:
    with pytest.raises(UserError) as error:
        Pretrain(**knobs)
    assert str(error.value).startswith(told)
