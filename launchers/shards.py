"""Write images as FFCV shards, or check them.

  python launchers/shards.py SOURCE OUT [--size N] [--jpeg-quality 95 | --raw] [--shards N] [--workers N] [--splits a,b]
  python launchers/shards.py --verify OUT

SOURCE is shapes, folder:DIR, cifar10:DIR, stl10:DIR or nyu:DIR; OUT is the folder to write.
Interrupted, the same command goes on from the shards that are whole.
"""

from __future__ import annotations

import argparse
import difflib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from barlow.errors import UserError, one_line_errors


class Parser(argparse.ArgumentParser):
    """Errors in one line."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (see --help)")


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("source", nargs="?", metavar="SOURCE")
    parser.add_argument("out", nargs="?", metavar="OUT", type=Path)
    parser.add_argument("--size", type=int, metavar="N", help="side in pixels (default: as the images are)")
    parser.add_argument("--jpeg-quality", type=int, metavar="Q", help="1 to 100 (default: 95)")
    parser.add_argument("--raw", action="store_true", help="pixels as they are: about six times the space, no decoding")
    parser.add_argument("--shards", type=int, default=1, metavar="N", help="files a split (default: 1)")
    parser.add_argument("--workers", type=int, default=0, metavar="N", help="processes (default: all cores)")
    parser.add_argument("--splits", default="", metavar="a,b", help="only these (default: all that SOURCE has)")
    parser.add_argument("--verify", type=Path, metavar="OUT", help="read every shard in OUT, compare with index.json")
    options, unknown = parser.parse_known_args(arguments)
    flags = [word.split("=")[0] for word in unknown if word.startswith("-")]
    if flags:
        close = difflib.get_close_matches(flags[0], parser._option_string_actions, n=1)
        raise UserError(f"unknown flag {flags[0]}: " + (f"did you mean {close[0]}?" if close else "see --help"))
    if unknown:
        raise UserError(f"{unknown[0]!r} is one word too many: give SOURCE and OUT")
    if options.verify is not None:
        if options.source is not None:
            raise UserError(f"--verify takes its folder alone, without {options.source!r}")
    elif options.out is None:
        raise UserError("give SOURCE and OUT, e.g. launchers/shards.py shapes data/shapes (see --help)")
    if options.raw and options.jpeg_quality is not None:
        raise UserError("--raw and --jpeg-quality exclude each other")
    return options


def verify(folder: Path) -> None:
    from barlow.data.shards import verify

    bad = []
    for name, problem in verify(folder):
        print(f"{name}: {problem or 'ok'}", flush=True)
        bad += [name] * bool(problem)
    if bad:
        raise UserError(f"{folder}: bad: {', '.join(bad)}: delete and run the command that wrote the folder again")


def main(arguments: Sequence[str]) -> None:
    options = parse(arguments)
    if options.verify is not None:
        return verify(options.verify)
    from barlow.data.writing.plan import Request
    from barlow.data.writing.write import write

    quality = None if options.raw else 95 if options.jpeg_quality is None else options.jpeg_quality
    splits = tuple(name.strip() for name in options.splits.split(",") if name.strip())
    write(Request(options.source, options.out, options.size, quality, options.shards, options.workers, splits))


if __name__ == "__main__":
    with one_line_errors():
        main(sys.argv[1:])
