"""The SLURM of four nodes on one machine: quick to come, and gone without a trace."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from barlow.errors import UserError
from slurm import devcluster
from slurm.devcluster import HOSTS, down, export_line, is_up, main, node_states, processes, up

needs_slurm = pytest.mark.slurm


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    if os.environ.get("BARLOW_NO_SLURM") == "1":
        pytest.skip("BARLOW_NO_SLURM=1")
    yield tmp_path / ".cluster"
    down(tmp_path / ".cluster", quiet=True)


def slurm(folder: Path, *command: str) -> str:
    environment = {**os.environ, "SLURM_CONF": str(folder / "slurm.conf")}
    return subprocess.run(command, env=environment, check=True, capture_output=True, text=True, cwd=folder).stdout


def stubborn_job(folder: Path) -> None:
    """A job whose tasks ignore SIGTERM and start processes that nobody could recognise by their environment."""
    task = "trap '' TERM; env -i setsid sleep 600 & env -i sleep 600"
    slurm(folder, "sbatch", "--nodes=2", "--output=/dev/null", f'--wrap=srun bash -c "{task}"')
    deadline = time.monotonic() + 20
    while list(processes(folder).values()).count("sleep") < 4:
        assert time.monotonic() < deadline, processes(folder)
        time.sleep(0.1)


@needs_slurm
def test_up_and_down_leave_no_trace(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hosts = HOSTS.read_bytes()
    assert main(["up", "--folder", str(folder), "--nodes", "2"]) == 0
    assert node_states(folder) == {"n1": "idle", "n2": "idle"}
    assert export_line(folder) in capsys.readouterr().out
    assert slurm(folder, "sinfo", "--noheader", "--format=%P %D %p").split("\n")[:2] == ["main* 2 1", "urgent 2 2"]
    stubborn_job(folder)
    began = time.monotonic()
    assert main(["up", "--folder", str(folder)]) == 0
    assert time.monotonic() - began < 3
    assert "is up" in capsys.readouterr().out
    seen = processes(folder)
    assert {"munged", "slurmctld", "slurmd", "slurmstepd", "srun", "sleep"} <= set(seen.values())
    assert main(["down", "--folder", str(folder)]) == 0
    assert not processes(folder)
    assert not [pid for pid in seen if Path(f"/proc/{pid}/exe").exists()]  # a zombie has none
    assert not folder.exists()
    assert HOSTS.read_bytes() == hosts
    assert main(["down", "--folder", str(folder)]) == 0
    assert capsys.readouterr().out.endswith(f"no cluster in {folder}\n")


@needs_slurm
def test_up_recovers_from_what_a_crash_has_left(folder: Path) -> None:
    hosts = HOSTS.read_bytes()
    up(folder, nodes=2)
    stubborn_job(folder)
    for pid, name in processes(folder).items():
        if name in ("munged", "slurmctld", "slurmd"):
            os.kill(pid, signal.SIGKILL)
    time.sleep(0.2)
    assert not is_up(folder)
    assert main(["status", "--folder", str(folder)]) == 1
    left = set(processes(folder))
    assert left
    up(folder, nodes=2)
    assert is_up(folder)
    assert not left & set(processes(folder))
    down(folder)
    assert HOSTS.read_bytes() == hosts


@needs_slurm
def test_two_at_once_in_a_folder_too_deep_for_sockets(folder: Path, tmp_path: Path) -> None:
    hosts = HOSTS.read_bytes()
    deep = tmp_path / ("deep" * 20) / ".cluster"
    up(folder, nodes=1)
    up(deep, nodes=1)
    try:
        assert slurm(folder, "srun", "--nodes=1", "hostname")
        assert slurm(deep, "srun", "--nodes=1", "hostname")
        down(folder)
        assert is_up(deep)
        sockets = next(line for line in (deep / "slurm.conf").read_text().splitlines() if "SlurmdSpoolDir" in line)
        place = Path(sockets.partition("=")[2]).parent
        assert place.exists()
    finally:
        down(deep)
    assert not place.exists()
    assert HOSTS.read_bytes() == hosts


def test_names_resolve_and_the_last_line_stays_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hosts = tmp_path / "hosts"
    monkeypatch.setattr(devcluster, "HOSTS", hosts)
    monkeypatch.setattr(devcluster, "resolves", lambda name: False)
    for text in ("127.0.0.1 localhost\n", "127.0.0.1 localhost\n127.0.0.1 me", ""):
        hosts.write_text(text)
        devcluster.edit_hosts(tmp_path / "a", nodes=2)
        devcluster.edit_hosts(tmp_path / "b", nodes=3)
        lines = hosts.read_text().splitlines()
        assert [line.split() for line in lines if " # " in line] == [
            ["127.0.0.1", *names, *f"# barlow development cluster {tmp_path / which}".split()]
            for which, names in (("a", ["n1", "n2"]), ("b", ["n1", "n2", "n3"]))
        ]
        assert [line for line in lines if " # " not in line] == text.splitlines()
        devcluster.edit_hosts(tmp_path / "a", nodes=0)
        devcluster.edit_hosts(tmp_path / "b", nodes=0)
        assert hosts.read_text() == text


def test_what_cannot_work_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine.txt").touch()
    with pytest.raises(UserError, match="holds something else"):
        up(tmp_path)
    with pytest.raises(UserError, match="1 to 32 nodes"):
        up(tmp_path / "a", nodes=0)
    with pytest.raises(UserError, match="cannot hold a path"):
        up(tmp_path / "a b")
    monkeypatch.setattr(devcluster, "search_path", lambda: str(tmp_path))
    with pytest.raises(UserError, match="slurmd, sinfo not found: apt-get install -y slurm-wlm munge"):
        up(tmp_path / "a")
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


@needs_slurm
def test_a_daemon_that_does_not_start_shows_its_words(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devcluster, "SLURM_CONF", devcluster.SLURM_CONF + "NoSuchKey=1\n")
    with pytest.raises(UserError, match=r"slurmctld did not start: .* \(more in .*boot.log\)$") as caught:
        up(folder, nodes=1)
    assert "\n" not in str(caught.value)
    assert "NoSuchKey" in (folder / "boot.log").read_text()
    assert not processes(folder)
    down(folder)
    assert not folder.exists()


@needs_slurm
def test_down_leaves_alone_what_is_not_its_own(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    up(folder, nodes=1)
    seen = processes(folder)
    down(folder.parent)  # holds the cluster, its logs and sockets, but is none
    (folder / "cluster.json").rename(folder / "hidden")
    down(folder)
    assert capsys.readouterr().out.endswith(f"no cluster in {folder.parent}\nno cluster in {folder}\n")
    assert processes(folder) == seen
    shutil.rmtree(folder)
    down(folder)
    assert not processes(folder)
