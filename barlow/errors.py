"""The one error a user can cause: a line that says what, where and what to do instead; exit code 2, no traceback."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager


class UserError(Exception):
    """Raised for what a user can get wrong, before anything expensive starts. Its message is one line."""


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Around a launcher's body: a UserError becomes its line on stderr and exit code 2; Ctrl-C becomes 130."""
    try:
        yield
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None


class Preempted(Exception):  # noqa: N818  (an event, not an error)
    """The run was told to stop: it has saved after `step` steps and can go on from there."""

    def __init__(self, signal: str, step: int) -> None:
        super().__init__(f"{signal or 'another rank was told to stop'}; saved at step {step}")
        self.step = step
