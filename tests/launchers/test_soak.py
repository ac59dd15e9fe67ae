"""The soak's short form: five disturbances of different kinds, and a run that ends as if nothing had happened."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
KINDS = ["kill-rank", "usr2-rank", "damage", "slurmctld", "pause-rank"]


@pytest.mark.slow
@pytest.mark.slurm
@pytest.mark.timeout(900)
def test_a_run_disturbed_five_times_ends_bit_identical() -> None:
    if os.environ.get("BARLOW_NO_SLURM") == "1":
        pytest.skip("BARLOW_NO_SLURM=1")
    command = [
        sys.executable,
        "-m",
        "tests.soak",
        "--seed",
        "47",
        "--disturbances",
        "5",
        "--steps",
        "120",
        "--only",
        *KINDS,
    ]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, cwd=ROOT, stdout=pipe, stderr=subprocess.STDOUT, text=True) as soak:
        try:
            told, _ = soak.communicate(timeout=800)
        except BaseException:
            soak.send_signal(signal.SIGTERM)  # so that it takes its cluster down
            soak.wait(60)
            raise
    assert soak.returncode == 0, told
    assert "129 of 129 tensors bit-identical" in told
