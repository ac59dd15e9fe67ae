"""What no run can be asked to do: each rule tells the knob, what it is, and what to give instead."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import fields
from math import inf
from operator import attrgetter
from typing import Any

from barlow.config.parts import View
from barlow.errors import UserError

Rule = tuple[str, bool, str]  # a knob's dotted name, whether it is right, what to give


def refuse(c: Any, rules: Iterable[Rule]) -> None:
    for name, ok, give in rules:
        if not ok:
            raise UserError(f"--{name.replace('_', '-')} is {attrgetter(name)(c)!r}: give {give}")


def at_least_1(c: Any, names: Sequence[str]) -> list[Rule]:
    return [(name, attrgetter(name)(c) >= 1, "1 or more") for name in names]


def not_negative(c: Any, names: Sequence[str]) -> list[Rule]:
    return [(name, 0 <= attrgetter(name)(c) < inf, "0 or more") for name in names]


def above_0(c: Any, names: Sequence[str]) -> list[Rule]:
    return [(name, 0 < attrgetter(name)(c) < inf, "a number above 0") for name in names]


def probabilities(c: Any, names: Sequence[str], give: str = "0 to 1") -> list[Rule]:
    return [(name, 0 <= attrgetter(name)(c) <= 1, give) for name in names]


def below_1(c: Any, names: Sequence[str]) -> list[Rule]:
    return [(name, 0 <= attrgetter(name)(c) < 1, "0 or more, and less than 1") for name in names]


def of_run(c: Any) -> list[Rule]:
    """What every run must keep to."""
    rules = not_negative(c, ("data.workers", "preflight.clock", "preflight.bandwidth"))
    rules += above_0(c, ("watch.seconds", "watch.start"))
    three = [("data.mean", c.data.mean), ("data.std", c.data.std)]
    rules += [(name, len(given) in (0, 3), "three numbers, as in 0.485 0.456 0.406") for name, given in three]
    rules += [("data.std", min(c.data.std, default=1) > 0, "numbers above 0")]
    plain = "/" not in c.run and not c.run.startswith(".")
    return [*rules, ("run", plain, "a plain name; --runs-dir says where its folder goes")]


def of_training(c: Any) -> list[Rule]:
    """And one that trains."""
    rules = at_least_1(c, ("epochs", "log_every", "checkpoint.every_steps", "checkpoint.keep"))
    rules += not_negative(c, ("checkpoint.every_minutes", "checkpoint.keep_every"))
    rules += [("batch_size", c.batch_size >= 2, "2 or more, for a batch is standardised over its images")]
    return rules + of_run(c)


def of_splits(c: Any, name: str, example: str) -> list[Rule]:
    given = attrgetter(name)(c)
    return [(name, 0 < len(given) == len(set(given)), f"at least one split, each once, as in {example}")]


def of_labels(c: Any) -> list[Rule]:
    return of_splits(c, "labelled.splits", "train") + not_negative(c, ("labelled.per_class",))


def of_classifier(c: Any) -> list[Rule]:
    """And one that trains a classifier."""
    rules = not_negative(c, ("model.width", "size", "evaluate_every", "val_limit"))
    rules += probabilities(c, ("view.flip",)) + below_1(c, ("head.dropout",))
    rules += [("head.widths", min(c.head.widths, default=1) >= 1, "the widths of its layers, as in 8192 8192 8192")]
    return of_training(c) + of_labels(c) + rules + share_of_image(c, "view.scale", c.view.scale)


def share_of_image(c: Any, name: str, scale: tuple[float, float]) -> list[Rule]:
    return [(name, 0 < scale[0] <= scale[1] <= 1, "two shares of the image, as in 0.08 1.0")]


def of_views(c: Any) -> list[Rule]:
    """What a pair of views can be drawn with."""
    ratio, sigma = c.views.ratio, c.views.sigma
    rules = share_of_image(c, "views.scale", c.views.scale)
    rules += [
        ("views.ratio", 0 < ratio[0] <= ratio[1] < inf, "two widths over height, the lesser first, as in 0.75 1.33")
    ]
    told = "two numbers of pixels up to 2, the lesser first, as in 0.1 2.0"
    rules += [("views.sigma", 0 <= sigma[0] <= sigma[1] <= 2, told)]
    rules += [("views.hue", 0 <= c.views.hue <= 0.5, "0 to 0.5, which is half the circle to either side")]
    rules += not_negative(c, ("views.brightness", "views.contrast", "views.saturation"))
    each = [f"views.{view}.{knob.name}" for view in ("a", "b") for knob in fields(View)]
    return rules + probabilities(c, each, "a probability, 0 to 1")
