"""Sources become machine code without a GPU, a source once; why that cannot be is one line."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from barlow import kernels
from barlow.kernels import build

NAMES = sorted(path.stem for path in build.FOLDER.glob("*.cu"))
GPUS = [(8, 0), (9, 0), (10, 0)]  # A100, H200, B200


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("BARLOW_CACHE", str(tmp_path))
    try:
        build.nvrtc()
    except build.UnavailableError as why:
        pytest.skip(str(why))
    return tmp_path / "kernels"


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("capability", GPUS, ids=lambda gpu: f"sm_{gpu[0]}{gpu[1]}")
def test_a_source_becomes_machine_code(name: str, capability: tuple[int, int], cache: Path) -> None:
    made = build.image(name, capability)
    assert made.startswith(b"\x7fELF")
    (kept,) = cache.iterdir()
    assert kept.read_bytes() == made


def test_machine_code_is_made_once(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = build.image(NAMES[0], (9, 0))
    monkeypatch.setattr(build, "compile_source", lambda *_: pytest.fail("compiled again"))
    assert build.image(NAMES[0], (9, 0)) == made


def test_a_home_that_cannot_be_written_keeps_nobody(cache: Path) -> None:
    cache.parent.joinpath("kernels").write_text("a file, where a folder is wanted")
    assert build.image(NAMES[0], (9, 0)).startswith(b"\x7fELF")


def test_a_gpu_newer_than_the_compiler_gets_ptx(cache: Path) -> None:
    assert build.architecture((99, 0)).startswith("compute_")
    assert b".visible .entry" in build.image(NAMES[0], (99, 0))


def test_what_is_wrong_with_a_source_is_said(cache: Path) -> None:
    with pytest.raises(
        build.UnavailableError, match=r"broken.cu does not compile for sm_90:[\s\S]*broken.cu\(1\): error"
    ):
        build.compile_source('#line 1 "broken.cu"\nnonsense', "broken", "sm_90")


def test_on_a_cpu_there_are_none() -> None:
    assert kernels.load(NAMES[0], torch.device("cpu")) is None
    assert kernels.why_not(NAMES[0], torch.device("cpu")) == "not on a GPU"


@pytest.mark.gpu
@pytest.mark.parametrize("name", NAMES)
def test_on_a_gpu_they_load(name: str) -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    assert kernels.load(name, torch.device("cuda")) is not None, kernels.why_not(name, torch.device("cuda"))


@pytest.mark.parametrize("name", NAMES)
def test_nothing_spills_to_slow_memory(name: str, tmp_path: Path) -> None:
    """By nvcc, where there is one, for it says so."""
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("nvcc, which reports registers, is not installed")
    (tmp_path / "a.cu").write_text(build.source(name))
    command = [nvcc, "-arch=sm_90", "-std=c++17", "-cubin", "-Xptxas", "-v", "a.cu", "-o", "a.cubin"]
    told = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert told.returncode == 0, told.stderr
    spills = [line for line in told.stderr.splitlines() if "spill" in line]
    assert spills
    assert all("0 bytes spill stores, 0 bytes spill loads" in line for line in spills), told.stderr
