"""What is asked of the machines: command line over site file, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from barlow.errors import UserError
from slurm.launch.cluster import SITES, Cluster, minutes, read_site, resolve


def site(tmp_path: Path, text: str) -> str:
    path = tmp_path / "mine.toml"
    path.write_text(text)
    return str(path)


def test_command_line_wins_over_site(tmp_path: Path) -> None:
    text = 'partition = "gpu"\ngpus_per_node = 8\ntime = "2:00:00"\nexclusive = true\nsetup = ["module load x"]'
    mine = site(tmp_path, text)
    got = resolve(Cluster(nodes=2, site=mine))
    assert (got.partition, got.gpus_per_node, got.time, got.exclusive) == ("gpu", 8, "2:00:00", True)
    assert (got.setup, got.ranks) == (("module load x",), 16)
    got = resolve(Cluster(nodes=2, site=mine, gpus_per_node=0, ranks_per_node=3, exclusive=False, partition="cpu"))
    assert (got.gpus_per_node, got.ranks, got.exclusive, got.partition) == (0, 6, False, "cpu")


def test_site_from_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BARLOW_SITE", site(tmp_path, 'account = "theirs"'))
    assert resolve(Cluster()).account == "theirs"
    assert resolve(Cluster(site="default")).account == ""


def test_shipped_sites_are_valid() -> None:
    names = {path.stem for path in SITES.glob("*.toml")}
    assert {"default", "devcluster", "gpu-example"} <= names
    assert read_site("default") == {}
    assert resolve(Cluster(nodes=2, site="gpu-example")).ranks == 16
    assert resolve(Cluster(nodes=4, site="devcluster")).ranks == 4


def test_every_key_of_the_default_site_exists(tmp_path: Path) -> None:
    text = (SITES / "default.toml").read_text()
    lines = [line[2:] for line in text.splitlines() if line.startswith("# ") and " = " in line]
    values = read_site(site(tmp_path, "\n".join(lines)))
    assert len(values) == len(lines) == 15


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('partitoin = "gpu"', "unknown key 'partitoin': did you mean partition?"),
        ("follow = true", "unknown key 'follow'"),
        ('gpus_per_node = "8"', "gpus_per_node = '8' must be a whole number"),
        ("cpus_per_rank = true", "cpus_per_rank = True must be a whole number"),
        ('setup = "module load x"', "setup = 'module load x' must be a list of strings"),
        ("partition = gpu", "is not TOML"),
        ('time = "a day"', "--time a day"),
        ("gpus_per_node = -1", "--gpus-per-node -1: must be at least 0"),
        ("gpus_per_node = 2\nranks_per_node = 8", "--gpus-per-node 2 with --ranks-per-node 8: each GPU is one rank"),
    ],
)
def test_bad_site_is_one_line(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(UserError) as error:
        resolve(Cluster(site=site(tmp_path, text)))
    assert said in str(error.value)
    assert "\n" not in str(error.value)


def test_unknown_site_names_those_there_are() -> None:
    with pytest.raises(UserError, match=r"no site file 'gpu_example': .* one of default, devcluster, gpu-example"):
        resolve(Cluster(site="gpu_example"))


@pytest.mark.parametrize("nodes", [0, -2])
def test_nodes_must_be_positive(nodes: int) -> None:
    with pytest.raises(UserError, match=f"--nodes {nodes}: must be at least 1"):
        resolve(Cluster(nodes=nodes))


@pytest.mark.parametrize(
    ("time", "expected"),
    [("90", 90), ("0:30", 1), ("10:30", 11), ("2:00:00", 120), ("1-0", 1440), ("1-2:30", 1590), ("7-00:00:01", 10081)],
)
def test_minutes(time: str, expected: int) -> None:
    assert minutes(time) == expected


@pytest.mark.parametrize("time", ["", "1h", "1:2:3:4", "-5", "0"])
def test_not_a_time(time: str) -> None:
    with pytest.raises(UserError, match="--time"):
        minutes(time)
