"""argv -> recipe, config, cluster, and a sweep's many configs. Torch-free, so --help and submitting answer at once."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import io
import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, TypeVar, get_origin, get_type_hints

import tyro

from barlow.errors import UserError

Config = TypeVar("Config")
Cluster = TypeVar("Cluster")


@dataclass(frozen=True)
class Sweep:
    sweep: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """KNOB=VALUE,VALUE,...: a run for each value of a knob, as in optim.lr=0.1,0.2; for each combination of
    values where given several times. Parts of a value stand apart: 'model.projector=256 256,512 512'."""
    at_once: int | None = None
    """As many runs of a sweep as SLURM may have running at a time; default: all."""


def parse(
    argv: Sequence[str], recipes: Mapping[str, Config], cluster: type[Cluster], prog: str, about: str = ""
) -> tuple[str, Config, Cluster, Sweep]:
    """The recipe named first in argv (default: the first one), with the flags that follow laid over it."""
    words = [re.sub(r"^--from(?=$|=)", "--from-run", word) for word in argv]
    name = next(iter(recipes))
    if words and not words[0].startswith("-"):
        name = words.pop(0)
    if name not in recipes:
        raise UserError(f"no recipe {name!r}{_meant(name, recipes)}: the recipes are {', '.join(recipes)}")
    recipe = recipes[name]
    flat = tyro.conf.arg(name="")
    parts = {"config": type(recipe), "cluster": cluster, "sweep": Sweep}
    fields = [(part, Annotated[kind, flat]) for part, kind in parts.items()]
    command = dataclasses.make_dataclass("Command", fields, frozen=True)
    description = f"{about}\n\nRECIPE: {', '.join(recipes)} (default: the first). Defaults below are those of {name!r}."
    parsed: Any = _tyro(command, command(recipe, cluster(), Sweep()), words, prog, description)
    _check(parsed.sweep, words)
    return name, parsed.config, parsed.cluster, parsed.sweep


def combinations(config: Config, sweeps: Sequence[str]) -> list[Config]:
    """The config with each combination of the swept values laid over it; itself alone if nothing is swept.

    Runs are named by their values, knobs in alphabetical order: NAME,KNOB=VALUE,KNOB=VALUE. So a sweep that gets one
    value more later finds those again that it has."""
    kinds = dict(_kinds(type(config)))
    swept = dict(_values(text, kinds) for text in sweeps)
    found: dict[str, Config] = {}
    for values in itertools.product(*swept.values()):
        chosen = dict(zip(swept, values, strict=True))
        run = ",".join([config.run, *(f"{knob}={_word(chosen[knob])}" for knob in sorted(chosen))])  # type: ignore[attr-defined]
        if run in found:
            raise UserError(f"two runs of the sweep would be named {run}: values must differ in letters or digits")
        with named(run if swept else ""):
            found[run] = _laid(config, chosen | {"run": run})
    return list(found.values())


@contextlib.contextmanager
def named(run: str) -> Iterator[None]:
    """What is wrong with one of many runs is told with its name; `run` is empty where there is only one."""
    try:
        yield
    except UserError as error:
        raise UserError(f"run {run}: {error}" if run else str(error)) from None


def _check(sweep: Sweep, words: Sequence[str]) -> None:
    """Refuse what a sweep's flags say of each other, and of other flags."""
    given = {_knob(word.replace(".no-", ".")) for word in words if word.startswith("--")}
    knobs = [_knob(text) for text in sweep.sweep]
    for knob in knobs:
        if knobs.count(knob) > 1:
            raise UserError(f"--sweep {knob}= is given twice: give all values in one, as in {knob}=1,2,3")
        if knob in given:
            raise UserError(f"--{knob.replace('_', '-')} is given, and swept: leave one of them out")
    if sweep.at_once is not None and not knobs:
        raise UserError(f"--at-once {sweep.at_once}: there is one run; it is for --sweep")
    if sweep.at_once is not None and sweep.at_once < 1:
        raise UserError(f"--at-once {sweep.at_once}: must be at least 1")


def _knob(text: str) -> str:
    """As people write them too: --optim.lr-biases=..."""
    return text.partition("=")[0].strip().lstrip("-").replace("-", "_")


def _kinds(config: type) -> Iterator[tuple[str, Any]]:
    """Every knob of a config by its dotted name, with the type of its values."""
    for name, kind in get_type_hints(config).items():
        if dataclasses.is_dataclass(kind):
            yield from ((f"{name}.{inner}", its) for inner, its in _kinds(kind))  # type: ignore[arg-type]
        elif name not in ("run", "runs_dir"):  # runs of a sweep lie together, named by their values
            yield name, kind


def _values(text: str, kinds: Mapping[str, Any]) -> tuple[str, list[Any]]:
    """Of KNOB=VALUE,VALUE: the knob, and its values as its type has them."""
    knob, words = _knob(text), text.partition("=")[2].split(",")
    if knob not in kinds:
        raise UserError(f"--sweep {text}: no knob {knob!r} to sweep{_meant(knob, kinds)}: see --help")
    if not all(word.strip() for word in words):
        raise UserError(f"--sweep {text}: a value is empty: write {knob}=VALUE,VALUE,...")
    values: list[Any] = []
    for word in words:
        parts = word.split() if get_origin(kinds[knob]) is tuple else [word.strip()]
        parts = [part.capitalize() for part in parts] if kinds[knob] is bool else parts
        try:
            value = _tyro(kinds[knob], tyro.MISSING, parts, "", "")
        except UserError as error:
            raise UserError(f"--sweep {text}: {word.strip()!r} is no value of {knob}: {error}") from None
        if value in values:
            raise UserError(f"--sweep {text}: {word.strip()} is there twice")
        values.append(value)
    return knob, values


def _word(value: Any) -> str:
    """A value in a run's name: nothing that a shell or a file system takes for its own."""
    if isinstance(value, tuple):
        return "+".join(map(_word, value))
    text = str(value).lower() if isinstance(value, bool) else str(value)
    return re.sub(r"[^\w.+-]+", "_", text.removesuffix(".0") if isinstance(value, float) else text)


def _laid(config: Any, values: Mapping[str, Any]) -> Any:
    """`values`, by dotted names, laid over a config; all at once, for its rules may concern several."""
    own = {name: value for name, value in values.items() if "." not in name}
    for part in {name.partition(".")[0] for name in values.keys() - own.keys()}:
        inner = {name.partition(".")[2]: values[name] for name in values if name.startswith(f"{part}.")}
        own[part] = _laid(getattr(config, part), inner)
    return dataclasses.replace(config, **own)


def _tyro(command: Any, default: Any, words: list[str], prog: str, description: str) -> Any:
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
    lines = [line.strip("│╭╮╰╯ ") for line in box.splitlines()[1:]]  # the first line is the box's title
    rule = re.compile("[─-]+")  # of dashes where stdout is not UTF-8
    lines = list(itertools.dropwhile(rule.fullmatch, filter(None, lines)))
    message = " ".join(itertools.takewhile(lambda line: not rule.fullmatch(line), lines))
    message = re.sub(r"^Unrecognized options: ([^\s,]+).*", r"unknown flag \1", message)
    message = message[:1].lower() + message[1:].rstrip(".")
    meant = re.search(r"Perhaps you meant:\s*(--[^\s,]+)", " ".join(lines))
    if meant:
        message += f": did you mean {meant.group(1)}?"
    elif message.startswith("unknown flag") and not message.startswith("unknown flag --"):
        message = message.replace("unknown flag", "unknown word") + ": flags begin with --, a recipe's name comes first"
    return f"{message} ({prog} --help lists all)" if prog else message


def _meant(word: str, known: Mapping[str, Any]) -> str:
    close = difflib.get_close_matches(word, list(known), n=1)
    return f" (did you mean {close[0]}?)" if close else ""
