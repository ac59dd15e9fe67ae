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
    """The run was told to stop: it has saved after `step` steps, or could not (`lost` says why), and can go on."""

    def __init__(self, signal: str, step: int, lost: str = "") -> None:
        super().__init__(f"{signal or 'another rank was told to stop'}; {lost or f'saved at step {step}'}")
        self.step = step


class BadNode(Exception):  # noqa: N818  (what it names is a machine)
    """A node is not fit for the run: its job goes elsewhere."""

    def __init__(self, host: str, what: str) -> None:
        super().__init__(f"node {host}: {what}")
        self.host, self.what = host, what
