"""Every benchmark of this folder, one after the other; then the plots of what they found.

    python benchmarks [--quick] [NAME ...]        (make bench; make bench QUICK=1)

Half an hour on two CPU cores, not timed on a GPU yet; --quick: two minutes, and writes no file. One that fails does not
keep the others from running; the exit code is then 1.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time

from measure import ROOT, asked

NAMES = (
    "lars", "views", "norms", "loader", "loss", "step", "end_to_end", "scaling", "startup", "memory", "interruption",
)  # fmt: skip


def main() -> int:
    parser = asked(__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"only these of {', '.join(NAMES)}")
    arguments = parser.parse_args()
    unknown = [name for name in arguments.names if name not in NAMES]
    if unknown:
        parser.error(f"no benchmark {unknown[0]!r}: choose of {', '.join(NAMES)}")
    waiting = os.environ | {"OMP_WAIT_POLICY": "passive"}  # threads that spin on busy cores make all of it slower
    failed = []
    for name in arguments.names or NAMES:
        began = time.perf_counter()
        print(f"\n{name}", flush=True)
        command = [sys.executable, str(ROOT / "benchmarks" / f"{name}.py"), *(["--quick"] if arguments.quick else [])]
        if subprocess.run(command, cwd=ROOT, env=waiting).returncode != 0:
            failed.append(name)
        print(f"{name}: {time.perf_counter() - began:.0f} s", flush=True)
    if not arguments.quick:
        subprocess.run([sys.executable, str(ROOT / "benchmarks" / "plots.py")], check=True, cwd=ROOT)
    if failed:
        print(f"error: failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
