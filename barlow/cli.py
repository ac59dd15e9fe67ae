"""argv -> recipe, config, cluster. Torch-free, so --help and submitting answer at once."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import io
import re
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, TypeVar

import tyro

from barlow.errors import UserError

Config = TypeVar("Config")
Cluster = TypeVar("Cluster")


def parse(
    argv: Sequence[str], recipes: Mapping[str, Config], cluster: type[Cluster], prog: str, about: str = ""
) -> tuple[str, Config, Cluster]:
    """The recipe named first in argv (default: the first one), with the flags that follow laid over it."""
    words = list(argv)
    name = next(iter(recipes))
    if words and not words[0].startswith("-"):
        name = words.pop(0)
    if name not in recipes:
        raise UserError(f"no recipe {name!r}{_meant(name, recipes)}: the recipes are {', '.join(recipes)}")
    recipe = recipes[name]
    flat = tyro.conf.arg(name="")
    command = dataclasses.make_dataclass(
        "Command", [("config", Annotated[type(recipe), flat]), ("cluster", Annotated[cluster, flat])], frozen=True
    )
    description = f"{about}\n\nRECIPE: {', '.join(recipes)} (default: the first). Defaults below are those of {name!r}."
    parsed: Any = _tyro(command, command(recipe, cluster()), words, prog, description)
    return name, parsed.config, parsed.cluster


def _tyro(command: type, default: Any, words: list[str], prog: str, description: str) -> Any:
    """tyro's parse, its boxed errors folded into one line."""
    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint):
            return tyro.cli(
                command,
                args=words,
                default=default,
                prog=f"{prog} [RECIPE]",
                description=description,
                config=(tyro.conf.AvoidSubcommands,),
            )
    except SystemExit as stop:
        if not stop.code:
            raise
        raise UserError(_one_line(complaint.getvalue(), prog)) from None


def _one_line(box: str, prog: str) -> str:
    lines = [line.strip("│╭╮╰╯ ") for line in box.splitlines()]
    lines = [line for line in lines[1:] if line]  # the first line is the box's title
    rules = [i for i, line in enumerate(lines) if set(line) <= {"─"}]
    message = " ".join(lines[: rules[0]] if rules else lines)
    message = re.sub(r"^Unrecognized options: ([^\s,]+).*", r"unknown flag \1", message)
    message = message[:1].lower() + message[1:].rstrip(".")
    meant = re.search(r"Perhaps you meant:\s*(--[^\s,]+)", " ".join(lines))
    if meant:
        message += f": did you mean {meant.group(1)}?"
    elif message.startswith("unknown flag") and not message.startswith("unknown flag --"):
        message = message.replace("unknown flag", "unknown word") + ": flags begin with --, a recipe's name comes first"
    return f"{message} ({prog} --help lists all)"


def _meant(word: str, known: Mapping[str, Any]) -> str:
    close = difflib.get_close_matches(word, list(known), n=1)
    return f" (did you mean {close[0]}?)" if close else ""
