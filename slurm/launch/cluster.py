"""What to ask of the machines: every knob, from the command line or else from a site file. Torch-free values."""

from __future__ import annotations

import dataclasses
import difflib
import os
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args, get_type_hints

from barlow.errors import UserError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

SITES = Path(__file__).parent.with_name("sites")
HERE_ALONE = {"nodes", "cluster", "site", "dry_run", "follow"}  # of one command, never of a site


@dataclass(frozen=True)
class Cluster:
    nodes: int = 1
    """Machines to run on. On this one (--cluster local): that many times the ranks of a node."""
    gpus_per_node: int | None = None
    """GPUs of a node, one rank each; 0: ranks on CPUs."""
    ranks_per_node: int | None = None
    """Ranks of a node where there are no GPUs to count by; default 1."""
    cluster: Literal["auto", "slurm", "local"] = "auto"
    """slurm: submit. local: run here. auto: submit if SLURM answers, else run here."""
    site: str = ""
    """Defaults for all flags below: a file of slurm/sites by name, or a path; else $BARLOW_SITE, else `default`."""
    partition: str = ""
    """SLURM's default partition if empty."""
    account: str = ""
    """Account to charge."""
    qos: str = ""
    """Quality of service."""
    constraint: str = ""
    """Features a node must have, such as a100|h100."""
    time: str = ""
    """Limit: minutes, HH:MM:SS or D-HH:MM:SS. Empty: the partition's, at most a day."""
    mem: str = ""
    """Memory of a node, such as 64G."""
    cpus_per_rank: int | None = None
    """CPU cores of a rank, its decoding threads included."""
    exclude: str = ""
    """Nodes to stay away from, such as n[3-4]."""
    exclusive: bool | None = None
    """Share nodes with no other job."""
    mail_user: str = ""
    """Address SLURM writes to."""
    mail_type: str = ""
    """When it writes, such as END,FAIL."""
    sbatch: tuple[str, ...] = ()
    """Further options of sbatch, such as reservation=course."""
    setup: tuple[str, ...] = ()
    """Shell lines to run on the first node before the ranks start, such as `module load cuda`."""
    max_failures: int | None = None
    """Starts that may fail without a newer checkpoint before the job is given up, default 3; preemptions do not
    count."""
    dry_run: bool = False
    """Print what would be submitted and run; create nothing."""
    follow: bool = False
    """Stay, show rank 0's log and the job's states, and leave with its exit code."""

    @property
    def ranks_of_a_node(self) -> int:
        return self.gpus_per_node or self.ranks_per_node or 1

    @property
    def ranks(self) -> int:
        return self.nodes * self.ranks_of_a_node


def resolve(cluster: Cluster) -> Cluster:
    """The same cluster with what the command line left open taken from its site file, and checked."""
    site = cluster.site or os.environ.get("BARLOW_SITE", "") or "default"
    known = read_site(site)
    given = {key for key, value in dataclasses.asdict(cluster).items() if value not in (None, "", ())}
    full = dataclasses.replace(cluster, site=site, **{key: value for key, value in known.items() if key not in given})
    leasts = {"nodes": 1, "gpus_per_node": 0, "ranks_per_node": 1, "cpus_per_rank": 1, "max_failures": 1}
    for name, least in leasts.items():
        value = getattr(full, name)
        if value is not None and value < least:
            raise UserError(f"--{name.replace('_', '-')} {value}: must be at least {least}")
    if full.gpus_per_node and full.ranks_per_node not in (None, full.gpus_per_node):
        asked = f"--gpus-per-node {full.gpus_per_node} with --ranks-per-node {full.ranks_per_node}"
        raise UserError(f"{asked}: each GPU is one rank: leave one out, or give --gpus-per-node 0 for ranks on CPUs")
    if full.time:
        minutes(full.time)
    return full


def read_site(site: str) -> dict[str, Any]:
    """The values of a site file, by name or path; every key and type checked against Cluster."""
    path = SITES / f"{site}.toml"
    if not path.exists():
        path = Path(site).expanduser()
    if not path.is_file():
        names = ", ".join(sorted(file.stem for file in SITES.glob("*.toml")))
        raise UserError(f"no site file {site!r}: give a path, or one of {names} (--site, or $BARLOW_SITE)")
    try:
        values = tomllib.loads(path.read_text())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"site file {path} is not TOML: {error}") from None
    hints = {key: hint for key, hint in get_type_hints(Cluster).items() if key not in HERE_ALONE}
    for key, value in values.items():
        if key not in hints:
            close = difflib.get_close_matches(key, hints, n=1)
            meant = f"did you mean {close[0]}?" if close else f"known are {', '.join(hints)}"
            raise UserError(f"site file {path}: unknown key {key!r}: {meant}")
        values[key] = tuple(value) if isinstance(value, list) else value
        if not fits(values[key], hints[key]):
            raise UserError(f"site file {path}: {key} = {value!r} must be {wanted(hints[key])}")
    return values


def fits(value: Any, hint: Any) -> bool:
    if hint == tuple[str, ...]:
        return isinstance(value, tuple) and all(isinstance(item, str) for item in value)
    return type(value) in (get_args(hint) or (hint,))  # exact: True is no number of CPUs


def wanted(hint: Any) -> str:
    if hint == tuple[str, ...]:
        return "a list of strings"
    return {str: "a string", int: "a whole number", bool: "true or false"}[(get_args(hint) or (hint,))[0]]


def minutes(time: str) -> int:
    """SLURM's notations of a time limit as whole minutes, rounded up."""
    days, dash, rest = time.rpartition("-")
    fields = rest.split(":")
    if not re.fullmatch(r"(\d+-)?\d+(:\d+){0,2}", time):
        raise UserError(f"--time {time}: write minutes, HH:MM:SS or D-HH:MM:SS")
    if dash:  # D-HH, D-HH:MM, D-HH:MM:SS
        hours, mins, secs = [*map(int, fields), 0, 0][:3]
    elif len(fields) == 3:
        hours, mins, secs = map(int, fields)
    else:  # M, M:SS
        hours, (mins, secs) = 0, [*map(int, fields), 0][:2]
    total = ((int(days or 0) * 24 + hours) * 60 + mins) * 60 + secs
    if total == 0:
        raise UserError(f"--time {time}: must be positive")
    return -(-total // 60)
