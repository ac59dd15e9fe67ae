"""Faults of a cluster, made on purpose: each does what it says, and no more."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from barlow.errors import UserError
from slurm import devcluster, devfaults
from slurm.devfaults import Job, look, tell, until

pytestmark = pytest.mark.slurm


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Path]:
    if os.environ.get("BARLOW_NO_SLURM") == "1":
        pytest.skip("BARLOW_NO_SLURM=1")
    devcluster.up(tmp_path / ".cluster", nodes=2, lost=2)
    yield tmp_path / ".cluster"
    devcluster.down(tmp_path / ".cluster", quiet=True)


def sleeping(cluster: Path) -> str:
    """A job of two nodes whose tasks sleep."""
    options = ["--parsable", "--requeue", "--nodes=2", "--output=/dev/null", "--wrap=srun sleep 600"]
    job = tell(cluster, "sbatch", *options)
    until(lambda: list(devcluster.processes(cluster).values()).count("sleep") == 2, 20, "the job does not run")
    return job


def test_daemons_end_and_come_back_and_the_job_lives_on(cluster: Path) -> None:
    job = sleeping(cluster)
    devfaults.wait_until_saved(cluster)
    for daemon in ("slurmctld", "n2"):
        before = devfaults.process_of(cluster, daemon)
        devfaults.end(cluster, daemon)
        assert devfaults.process_of(cluster, daemon) == 0
        devfaults.start(cluster, daemon)
        assert devfaults.process_of(cluster, daemon) not in (0, before)
    now = look(cluster, job)
    assert (now.state, now.restarts) == ("RUNNING", 0)
    assert look(cluster, "999999999") == Job()

    put_back = devfaults.limit(cluster, job)
    assert tell(cluster, "squeue", "--noheader", "--format=%l") == "1:00"
    put_back()
    assert tell(cluster, "squeue", "--noheader", "--format=%l") != "1:00"
    with pytest.raises(UserError, match="scontrol requeue 999999999: "):
        tell(cluster, "scontrol", "requeue", "999999999")


@pytest.mark.slow
def test_a_lost_node_takes_all_with_it_and_its_job_is_put_back(cluster: Path) -> None:
    job = sleeping(cluster)
    n1, n2 = devfaults.on_node(cluster, "n1"), devfaults.on_node(cluster, "n2")
    assert sorted(map(devfaults.name_of, n2)) == ["sleep", "slurmstepd"]
    assert not set(n1) & set(n2)
    devfaults.lose_node(cluster, "n2")
    assert not devfaults.on_node(cluster, "n2")
    assert devfaults.process_of(cluster, "n2") == 0
    assert [pid for pid in n1 if devfaults.name_of(pid)]
    until(lambda: devfaults.is_down(cluster, "n2"), 60, "n2 is not down")
    until(lambda: look(cluster, job).restarts == 1, 20, "not put back")
    until(lambda: not devfaults.on_node(cluster, "n1"), 20, "its tasks live on")
