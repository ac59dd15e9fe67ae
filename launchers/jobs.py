"""python launchers/jobs.py [list|table|show|logs|cancel|resume] [RUN] [--runs-dir runs]: runs, and what became of them.

  list [RUN ...] [--json]                  how each stands, the newest first
  table SWEEP|RUN ... [--json]             where they differ and what they came to, the best first
  show RUN [--json]                        all that is known of one
  logs RUN [-f] [--rank R] [--lines N]     the end of a rank's log; -f: and what follows, until the run has ended
  cancel RUN ... [--yes]                   end it for good, also while it waits
  resume RUN [--nodes N]                   start it again from its folder, on the cluster and with the code it had

A chain's name stands for its links: `show` and `list` tell of them in order, `cancel` ends all, `resume` goes on from
the broken one. Patterns do for `list`, `table` and `cancel`: 'sweep-*'."""

import argparse
import difflib
import json
import signal
import sys
from pathlib import Path
from typing import NoReturn

from barlow.errors import UserError, one_line_errors
from slurm.many import chain
from slurm.runs import facts, logs, results, standing, table
from slurm.runs.cancel import cancel
from slurm.runs.resume import resume

COMMANDS = ("list", "table", "show", "logs", "cancel", "resume")


class Parser(argparse.ArgumentParser):
    """Errors in one line."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (see --help)")


def parse(argv: list[str]) -> argparse.Namespace:
    if not argv or (argv[0].startswith("-") and argv[0] not in ("-h", "--help")):
        argv = ["list", *argv]
    if argv[0] not in COMMANDS and argv[0][0] != "-":
        close = difflib.get_close_matches(argv[0], COMMANDS, n=1)
        meant = f"did you mean {close[0]}?" if close else f"give one of {', '.join(COMMANDS)}"
        raise UserError(f"no command {argv[0]!r}: {meant}")
    raw = argparse.RawDescriptionHelpFormatter
    parser = Parser(description=__doc__, formatter_class=raw, usage=argparse.SUPPRESS)
    commands = parser.add_subparsers(dest="command", metavar="")
    flags = {}
    for name in COMMANDS:
        several = {"list": "*", "table": "+", "cancel": "+"}.get(name)
        flags[name] = add = commands.add_parser(name, allow_abbrev=False, prog=f"launchers/jobs.py {name}").add_argument
        add("run", nargs=several, metavar="RUN")
        add("--runs-dir", type=Path, default=Path("runs"), metavar="DIR", help="where runs are (default: runs)")
    for name in ("list", "table", "show"):
        flags[name]("--json", action="store_true", help="plain values; times in seconds")
    flags["logs"]("-f", "--follow", action="store_true", help="stay until the run has ended; Ctrl-C leaves it alone")
    flags["logs"]("--rank", type=int, default=0, metavar="R", help="whose log (default: 0)")
    flags["logs"]("-n", "--lines", type=int, default=20, metavar="N", help="how many last lines (default: 20)")
    flags["cancel"]("--yes", action="store_true", help="without asking first")
    flags["resume"]("--nodes", type=int, metavar="N", help="as many nodes (default: as before)")
    given, unknown = parser.parse_known_args(argv)
    if unknown:
        close = difflib.get_close_matches(unknown[0], commands.choices[given.command]._option_string_actions, n=1)
        what = "unknown flag" if unknown[0].startswith("-") else "one word too many"
        raise UserError(f"{what}: {unknown[0]}: " + (f"did you mean {close[0]}?" if close else "see --help"))
    return given


def main(argv: list[str]) -> int:
    given = parse(argv)
    words = given.run if isinstance(given.run, list) else [given.run]
    linked = given.runs_dir / standing.named(given.runs_dir, words[0]) if len(words) == 1 else given.runs_dir
    find = results.find if given.command == "table" else standing.find
    found, silence = standing.look(find(given.runs_dir, words))
    if silence:
        print(f"note: {silence}: a state with ? is the last one known", file=sys.stderr)
    if given.command in ("show", "cancel", "resume") and standing.links(linked):
        return of_chain(linked, found, given)
    if given.command == "cancel":
        return cancel(found, given.yes)
    if given.command == "list":
        rows = [facts.row(run) for run in found]
        print(json.dumps(rows, indent=1) if given.json else table.listing(rows))
        return 0
    if given.command == "table":
        rows = results.rows(found)
        print(json.dumps(rows, indent=1) if given.json else results.text(rows))
        return 0
    if len(found) > 1:
        raise UserError(f"{given.command} takes one run, and {given.run!r} means {len(found)}: give a whole name")
    if given.command == "show":
        told = facts.everything(found[0])
        print(json.dumps(told, indent=1) if given.json else table.page(told))
        return 0
    if given.command == "logs":
        return logs.show(found[0], given.rank, given.lines, given.follow)
    return resume(found[0], given.nodes)


def of_chain(folder: Path, links: list[standing.Run], given: argparse.Namespace) -> int:
    """All of its links at once."""
    if given.command == "cancel":
        return chain.cancel_all(chain.read(folder), given.yes)
    if given.command == "resume":
        if given.nodes is not None:
            raise UserError(f"--nodes is for one run: resume a link of it, such as {links[0].name}")
        return chain.resume(chain.read(folder))
    rows = [facts.row(link) for link in links]
    if given.json:
        print(json.dumps({"chain": str(folder.absolute()), "links": rows}, indent=1))
        return 0
    ended = sum(row["state"] == "finished" for row in rows)
    print(f"chain {folder.name}: {ended} of {len(rows)} links have finished\n{table.listing(rows)}")
    return 0


if __name__ == "__main__":
    if sys.argv[1:2] != ["resume"]:
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `jobs.py list | head` ends quietly
    with one_line_errors():
        raise SystemExit(main(sys.argv[1:]))
