"""Host memory that this process may still take: what the machine has, and what its control groups allow."""

from __future__ import annotations

import contextlib
import os
import re
from pathlib import Path


def left(root: Path = Path("/")) -> int:
    """Bytes that this process may still take: of the machine, and of each control group that it is in.

    Cached files count as free, for the kernel drops them when it must."""
    available = re.search(r"^MemAvailable:\s+(\d+) kB", (root / "proc/meminfo").read_text(), re.M)
    found = [int(available[1]) * 1024] if available else []
    groups: dict[int, str] = {}  # by version: 2 is one tree for all, 1 has one for memory
    for line in (root / "proc/self/cgroup").read_text().splitlines():
        _, kinds, group = line.split(":", 2)
        groups |= {2: group} if not kinds else {1: group} if "memory" in kinds.split(",") else {}
    for line in (root / "proc/self/mountinfo").read_text().splitlines():
        before, after = (part.split() for part in line.split(" - ", 1))
        version = 2 if after[0] == "cgroup2" else 1 if after[0] == "cgroup" and "memory" in after[2].split(",") else 0
        if version in groups:
            found += under_limits(root / before[4].lstrip("/"), os.path.relpath(groups[version], before[3]), version)
    return max(0, min(found, default=0))


def under_limits(mount: Path, group: str, version: int) -> list[int]:
    """Bytes under the limit of a control group and of each above it; nothing of those without."""
    limit, usage = (
        ("memory.limit_in_bytes", "memory.usage_in_bytes") if version == 1 else ("memory.max", "memory.current")
    )
    folder = mount / group if (mount / group).is_dir() and not group.startswith("..") else mount
    found = []
    while folder.is_relative_to(mount):
        with contextlib.suppress(OSError, ValueError):  # no limit: no such file, or "max"
            room = int((folder / limit).read_text()) - int((folder / usage).read_text())
            counted = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
            prefix = "total_" if version == 1 else ""  # with the groups below
            found.append(room + sum(int(counted.get(f"{prefix}{kind}_file", 0)) for kind in ("active", "inactive")))
        folder = folder.parent
    return found
