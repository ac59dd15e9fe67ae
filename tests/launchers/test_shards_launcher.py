"""launchers/shards.py as a user runs it: errors in one line, and no way of ending it early costs more than a shard."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from types import ModuleType

import numpy as np
import psutil
import pytest
from PIL import Image

from barlow.errors import one_line_errors

ROOT = Path(__file__).resolve().parents[2]
LAUNCHER = ROOT / "launchers" / "shards.py"
WAIT = 60.0


@pytest.fixture(scope="module")
def launcher() -> ModuleType:
    spec = importlib.util.spec_from_file_location("shards_launcher", LAUNCHER)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


STARTED: list[subprocess.Popen[str]] = []


@pytest.fixture(autouse=True)
def nothing_lives_on() -> Iterator[None]:
    """Whatever a failing test has left running."""
    yield
    while STARTED:
        process = STARTED.pop()
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def start(*arguments: str | Path, limit: Callable[[], None] | None = None) -> subprocess.Popen[str]:
    command = [sys.executable, str(LAUNCHER), *map(str, arguments)]
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=limit,
    )
    STARTED.append(process)
    return process


def end(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=WAIT)
    return process.returncode, out, err


def hashes(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.glob("*.beton"))}


def until(condition: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + WAIT
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.003)


# --- what a user can get wrong ---


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("folders")
    (root / "empty").mkdir()
    (root / "noimages" / "ant").mkdir(parents=True)
    (root / "noimages" / "ant" / "notes.txt").write_text("no image")
    for name, content in (("good", None), ("broken", b"\x89PNG no more")):
        (root / name / "ant").mkdir(parents=True)
        for i in range(3):
            Image.fromarray(np.full((16, 16, 3), 60 * i, np.uint8)).save(root / name / "ant" / f"{i}.png")
        if content:
            (root / name / "ant" / "1.png").write_bytes(content)
    return root


@pytest.mark.parametrize(
    ("command", "parts"),
    [
        ("", ("give SOURCE and OUT",)),
        ("shapes", ("give SOURCE and OUT",)),
        ("shapes OUT more", ("'more'", "too many")),
        ("shapes OUT --xyz 80", ("unknown flag --xyz", "see --help")),
        ("shapes OUT --jpeg-qualty 80", ("unknown flag --jpeg-qualty", "did you mean --jpeg-quality?")),
        ("shapes OUT --shard=2", ("unknown flag --shard", "did you mean --shards?")),
        ("shapes OUT --size big", ("--size", "'big'")),
        ("shapes OUT --size", ("--size",)),
        ("shapes OUT --raw --jpeg-quality 90", ("exclude",)),
        ("shapes OUT --jpeg-quality 0", ("quality 0",)),
        ("shapes OUT --shards 0", ("0 shards",)),
        ("shapes OUT --splits test", ("no split 'test'", "unlabeled, train, val")),
        ("shape OUT", ("unknown source 'shape'", "did you mean shapes?")),
        ("folder:DIR/missing OUT", ("DIR/missing: no such directory",)),
        ("folder:DIR/empty OUT", ("DIR/empty: the directory is empty",)),
        ("folder:DIR/noimages OUT", ("no images in DIR/noimages",)),
        ("folder:DIR/broken OUT", ("cannot read image DIR/broken/ant/1.png",)),
        ("folder:DIR/broken OUT --size 16", ("cannot read image DIR/broken/ant/1.png",)),
        ("folder:DIR/good OUT --shards 4", ("4 shards", "split train has 3 images")),
        ("stl10:DIR/good OUT", ("class_names.txt: no such file",)),
        ("cifar10:DIR/good OUT", ("not CIFAR-10",)),
        ("nyu:DIR/good OUT", ("no images",)),
        ("shapes DIR/good/ant/0.png", ("cannot make the folder DIR/good/ant/0.png",)),
        ("--verify DIR/missing", ("DIR/missing: no such folder of shards",)),
        ("--verify DIR/empty", ("no index.json in DIR/empty",)),
        ("--verify", ("--verify",)),
        ("shapes --verify DIR/empty", ("'shapes'",)),
    ],
)
def test_mistakes_get_one_line_and_exit_code_2(
    command: str,
    parts: tuple[str, ...],
    folders: Path,
    tmp_path: Path,
    launcher: ModuleType,
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = command.replace("DIR", str(folders)).replace("OUT", str(tmp_path / "out")).split()
    with pytest.raises(SystemExit) as ended, one_line_errors():
        launcher.main(words)
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    for part in parts:
        assert part.replace("DIR", str(folders)) in error
    assert not (tmp_path / "out").exists()


def test_neither_help_nor_writing_imports_torch(folders: Path, tmp_path: Path) -> None:
    code = f"""
import runpy, sys
sys.argv = ["shards.py", *sys.argv[1:]]
try:
    runpy.run_path({str(LAUNCHER)!r}, run_name="__main__")
except SystemExit as ended:
    assert ended.code == 0
loaded = [name for name in ("torch", "ffcv", "cv2", "numpy") if name in sys.modules]
print("loaded:", loaded)
"""
    for words, loaded in ((["--help"], []), ([f"folder:{folders}/good", str(tmp_path / "out")], ["cv2", "numpy"])):
        done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, timeout=WAIT)
        assert done.returncode == 0, done.stderr
        assert done.stdout.splitlines()[-1] == f"loaded: {loaded}"
    assert json.loads((tmp_path / "out" / "index.json").read_text())["splits"]["train"]["count"] == 3


# --- ending it early ---

SLOW = ("shapes", "--splits", "train,val", "--shards", "15", "--workers", "2")
COUNT = 30


def test_interrupted_and_killed_it_ends_with_the_same_bytes(tmp_path: Path) -> None:
    out = tmp_path / "out"

    def shards() -> int:
        return len(list(out.glob("*.beton")))

    first = start(*SLOW[:1], out, *SLOW[1:])
    until(lambda: shards() >= 1, first)
    os.killpg(first.pid, signal.SIGINT)  # as a terminal does on Ctrl-C: to the workers too
    code, _, error = end(first)
    assert code == 130
    assert error.startswith("interrupted: ")
    assert "shards are whole, the same command goes on" in error
    assert error.count("\n") == 1
    assert 1 <= shards() < COUNT
    assert not [path for path in out.iterdir() if path.name.startswith(".")]
    assert not (out / "index.json").exists()

    had = shards()
    times = {path: path.stat().st_mtime_ns for path in out.glob("*.beton")}
    second = start(*SLOW[:1], out, *SLOW[1:])
    until(lambda: shards() >= had + 2, second)
    workers = psutil.Process(second.pid).children(recursive=True)
    second.kill()
    end(second)
    assert len(workers) >= 3
    assert psutil.wait_procs(workers, timeout=10)[1] == []  # nothing lives on
    assert had + 2 <= shards() < COUNT
    assert not (out / "index.json").exists()

    code, text, error = end(start(*SLOW[:1], out, *SLOW[1:]))
    assert (code, error) == (0, "")
    assert f"of {COUNT} shards are whole already" in text
    assert all(path.stat().st_mtime_ns == time for path, time in times.items())
    assert not [path for path in out.iterdir() if path.name.startswith(".")]
    end(start(*SLOW[:1], tmp_path / "undisturbed", *SLOW[1:]))
    assert hashes(out) == hashes(tmp_path / "undisturbed")
    assert (out / "index.json").read_text() == (tmp_path / "undisturbed" / "index.json").read_text()


def test_a_killed_worker_ends_it_with_one_line(tmp_path: Path) -> None:
    out = tmp_path / "out"
    process = start(*SLOW[:1], out, *SLOW[1:])
    until(lambda: any(out.glob("*.beton")), process)
    parent = psutil.Process(process.pid)
    workers = set(parent.children(recursive=True)) - set(parent.children())
    workers.pop().kill()
    code, _, error = end(process)
    assert code == 2
    assert "a worker process was killed" in error
    assert error.count("\n") == 1
    assert not [path for path in out.iterdir() if path.name.startswith(".")]
    assert not (out / "index.json").exists()


def test_a_file_that_may_not_grow(tmp_path: Path) -> None:
    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (8 << 20, 8 << 20))

    code, _, error = end(start("shapes", tmp_path / "out", "--raw", "--splits", "val", "--workers", "1", limit=limit))
    assert code == 2
    assert error.count("\n") == 1
    assert "no space left; 0 of 1 shards are whole" in error
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["progress.json"]


@pytest.mark.skipif(os.getuid() != 0 or not shutil.which("unshare"), reason="mounts a small file system, as root")
def test_a_disk_that_is_full(tmp_path: Path) -> None:
    """A real file system of 16 MB: refused beforehand, and, with the estimate switched off, ended in the middle."""
    blind = f"""
import runpy, sys
from barlow.data.writing import plan
plan.check_space = lambda *_: None
sys.argv = ["shards.py", *sys.argv[1:]]
runpy.run_path({str(LAUNCHER)!r}, run_name="__main__")
"""
    (tmp_path / "blind.py").write_text(blind)
    script = """
mount -t tmpfs -o size=16m tmpfs "$1" || exit 77
"$2" "$3" shapes "$1/out" --raw --splits val --shards 3 --workers 1
echo "exit $?"
ls -A "$1/out"
"""
    (tmp_path / "disk").mkdir()

    def run(program: Path) -> subprocess.CompletedProcess[str]:
        words = ["unshare", "--mount", "sh", "-c", script, "sh", str(tmp_path / "disk"), sys.executable, str(program)]
        done = subprocess.run(words, capture_output=True, text=True, timeout=WAIT)
        if done.returncode == 77 or "unshare" in done.stderr:
            pytest.skip("mounting is not allowed here")
        return done

    refused = run(LAUNCHER)
    assert "exit 2\n" in refused.stdout
    assert "no space for" in refused.stderr.splitlines()[0]
    assert "17 MB free" in refused.stderr.splitlines()[0]
    ended = run(tmp_path / "blind.py")
    assert ended.stdout.endswith("exit 2\nprogress.json\nval-0000-of-0003.beton\n")
    assert ended.stderr.count("\n") == 1
    assert "no space left; 1 of 3 shards are whole" in ended.stderr


# --- verifying ---


def test_verify_prints_a_line_a_file(
    folders: Path, tmp_path: Path, launcher: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    launcher.main([f"folder:{folders}/good", str(out), "--shards", "2", "--workers", "1"])
    capsys.readouterr()
    launcher.main(["--verify", str(out)])
    names = ["train.names.txt", "train-0000-of-0002.beton", "train-0001-of-0002.beton"]
    assert capsys.readouterr().out.splitlines() == [f"{name}: ok" for name in names]

    content = bytearray((out / names[2]).read_bytes())
    content[len(content) // 2] ^= 128
    (out / names[2]).write_bytes(content)
    with pytest.raises(SystemExit) as ended, one_line_errors():
        launcher.main(["--verify", str(out)])
    assert ended.value.code == 2
    text, error = capsys.readouterr()
    assert text.splitlines()[:2] == [f"{name}: ok" for name in names[:2]]
    assert text.splitlines()[2].startswith(f"{names[2]}: its bytes have changed")
    assert error.count("\n") == 1
    assert names[2] in error

    (out / names[2]).unlink()  # what the error says to do
    launcher.main([f"folder:{folders}/good", str(out), "--shards", "2", "--workers", "1"])
    launcher.main(["--verify", str(out)])
