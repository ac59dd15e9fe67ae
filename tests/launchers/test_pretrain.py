"""The command people run, for real: ranks as processes, killed and started again, and each bad input's one line."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from barlow import history
from tests.scripts import Answer, run_all

ROOT = Path(__file__).resolve().parents[2]
TINY = "--epochs 4 --batch-size 32 --log-every 1 --checkpoint.every-steps 3 --knn.every-epochs 0 --knn.no-baselines"
TINY += " --data.source= --data.workers 1 --views.size 32 --model.width 0.125 --model.projector 32 32"
TINY += " --optim.warmup-epochs 1 --optim.lr 0.2 --optim.eta 0.001 --optim.no-clip --optim.lr-biases 0.0005"


def command(data: Path, runs: Path, *flags: str) -> list[str]:
    words = [
        sys.executable,
        "launchers/pretrain.py",
        "shapes",
        *TINY.split(),
        "--data.dir",
        str(data),
        "--runs-dir",
        str(runs),
    ]
    return [*words, "--device", "cpu", *flags]


def pretrain(data: Path, runs: Path, *flags: str, fine: bool = True) -> subprocess.CompletedProcess:
    """The command to its end; only `--cluster slurm` sees the cluster that another test may have brought up."""
    hidden = () if "slurm" in flags else ("SLURM_CONF",)
    environment = {key: value for key, value in os.environ.items() if key not in hidden}
    words = command(data, runs, *flags)
    done = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240)
    assert not fine or done.returncode == 0, done.stdout + done.stderr
    return done


def losses(folder: Path) -> list[float]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, len(rows) + 1))
    return [row["loss"] for row in rows]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    latest = json.loads((folder / "checkpoints" / "latest.json").read_text())
    checkpoint = torch.load(folder / "checkpoints" / latest["file"], weights_only=True)
    assert set(checkpoint) == {"model", "optimizer", "step", "config", "data", "mean", "std"}
    return checkpoint["model"] | {f"momentum.{k}": v["momentum"] for k, v in checkpoint["optimizer"]["state"].items()}


def identical(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def ranks_of(folder: Path, watchdogs: bool = False) -> dict[int, int]:
    """The run's ranks, or their watchdogs, that live on this machine, started here or by SLURM: rank -> process."""
    status = json.loads((folder / "status.json").read_text())
    job, found = str(status.get("job") or "").encode(), {}
    for process in Path("/proc").glob("[0-9]*"):
        try:
            words = (process / "cmdline").read_bytes().split(b"\0")
            entries = (process / "environ").read_bytes().split(b"\0")
            if ((process / "comm").read_text() == "watchdog\n") != watchdogs:
                continue
        except OSError:
            continue
        environment = dict(entry.split(b"=", 1) for entry in entries if b"=" in entry)
        if b"slurm.job.rank" in words and str(folder).encode() in words:
            found[int(environment[b"RANK"])] = int(process.name)
        elif b"submitit.core._submit" in words and job and environment.get(b"SLURM_JOB_ID") == job:
            found[int(environment[b"SLURM_PROCID"])] = int(process.name)
    return found


def nobody_left(folder: Path) -> None:
    deadline = time.monotonic() + 5
    while left := {**ranks_of(folder), **ranks_of(folder, watchdogs=True)}:
        assert time.monotonic() < deadline, left
        time.sleep(0.05)


def signal_rank_after(rank: int, step: int, number: int, folder: Path, started: subprocess.Popen) -> None:
    """Send the signal when metrics.jsonl has this many steps; the rank is looked up before, for steps are short."""
    metrics, deadline, process = folder / "metrics.jsonl", time.monotonic() + 120, 0
    while not metrics.exists() or len(metrics.read_text().splitlines()) < step:
        assert started.poll() is None, started.communicate()
        assert time.monotonic() < deadline
        process = process or (ranks_of(folder).get(rank, 0) if metrics.exists() else 0)
        time.sleep(0.005)
    os.kill(process, number)


@pytest.fixture(scope="module")
def undisturbed(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of four ranks that nothing happens to."""
    runs = tmp_path_factory.mktemp("undisturbed")
    pretrain(tiny_data, runs, "--run", "four", "--cluster", "local", "--nodes", "4")
    return runs / "four"


@pytest.fixture(scope="module")
def alone(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run on one rank."""
    runs = tmp_path_factory.mktemp("alone")
    pretrain(tiny_data, runs, "--run", "one", "--cluster", "local")
    return runs / "one"


def same_curve(a: Path, b: Path) -> bool:
    ours, theirs = losses(a), losses(b)
    assert len(ours) == len(theirs) == 12
    return max(abs(x - y) / y for x, y in zip(ours, theirs, strict=True)) < 1e-4


@pytest.mark.slow
def test_one_rank_has_the_loss_curve_of_four(alone: Path, undisturbed: Path) -> None:
    assert same_curve(alone, undisturbed)


@pytest.mark.slurm
@pytest.mark.slow
def test_four_slurm_nodes_of_which_one_is_killed_end_bit_identical_by_themselves(
    tiny_data: Path, tmp_path: Path, undisturbed: Path, alone: Path, real_slurm: Path
) -> None:
    flags = ("--run", "nodes", "--cluster", "slurm", "--nodes", "4", "--follow")
    folder = tmp_path / "nodes"
    started = subprocess.Popen(
        command(tiny_data, tmp_path, *flags), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    signal_rank_after(2, 5, signal.SIGKILL, folder, started)
    told, _ = started.communicate(timeout=150)
    assert started.returncode == 0, told
    nobody_left(folder)
    events = [(event["event"], event.get("rank")) for event in history.read(folder)]
    assert [event for event, _ in events].count("start") == 2
    assert ("failed", 2) in events

    assert identical(weights(folder), weights(undisturbed))
    assert losses(folder) == losses(undisturbed)
    assert same_curve(folder, alone)


@pytest.mark.slow
def test_a_rank_that_is_killed_or_stands_still_ends_all_and_the_same_command_ends_bit_identical(
    tiny_data: Path, tmp_path: Path, undisturbed: Path
) -> None:
    flags = ("--run", "hit", "--cluster", "local", "--nodes", "4")
    folder = tmp_path / "hit"

    def hit(number: int, step: int, *more: str) -> str:
        words, pipe = command(tiny_data, tmp_path, *flags, *more), subprocess.PIPE
        started = subprocess.Popen(words, cwd=ROOT, stdout=pipe, stderr=subprocess.STDOUT, text=True)
        signal_rank_after(2, step, number, folder, started)
        told, _ = started.communicate(timeout=60)
        assert started.returncode == 1, told
        nobody_left(folder)
        assert len(losses(folder)) < 12
        return told

    told = hit(signal.SIGSTOP, 4, "--watch.seconds", "3")
    assert "rank 2 on " in told
    assert "process stopped" in told
    assert "rank 2 on " in next(event["why"] for event in history.read(folder) if event["event"] == "failed")
    assert "rank 2 was killed by SIGKILL" in hit(signal.SIGKILL, len(losses(folder)) + 2)

    pretrain(tiny_data, tmp_path, *flags)
    assert identical(weights(folder), weights(undisturbed))
    assert losses(folder) == losses(undisturbed)
    status = json.loads((folder / "status.json").read_text())
    assert (status["state"], status["step"], status["attempts"]) == ("finished", 12, 3)


@pytest.mark.slow
def test_told_to_stop_it_saves_and_goes_on_with_other_numbers_of_ranks(
    tiny_data: Path, tmp_path: Path, undisturbed: Path
) -> None:
    """4, 2, 1 and again 4 ranks, each told in mid-epoch."""
    flags = ("--run", "told", "--cluster", "local", "--checkpoint.every-steps", "100")
    folder = tmp_path / "told"
    for ranks, step in ((4, 1), (2, 4), (1, 7)):
        words = command(tiny_data, tmp_path, *flags, "--nodes", str(ranks))
        started = subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE)
        signal_rank_after(ranks - 1, step, signal.SIGUSR2, folder, started)
        started.communicate(timeout=60)
        status = json.loads((folder / "status.json").read_text())
        assert status["state"] == "preempted", status
        assert step <= status["step"] < 12

    pretrain(tiny_data, tmp_path, *flags, "--nodes", "4")
    assert same_curve(folder, undisturbed)
    assert [event["ranks"] for event in history.read(folder) if event["event"] == "start"] == [4, 2, 1, 4]


@pytest.mark.slow
def test_knn_and_its_baselines_end_in_results(tiny_data: Path, tmp_path: Path) -> None:
    flags = ("--epochs", "2", "--knn.every-epochs", "1", "--knn.baselines", "--run", "knn", "--cluster", "local")
    pretrain(tiny_data, tmp_path, *flags)
    results = json.loads((tmp_path / "knn" / "results.json").read_text())
    assert {"knn_top1", "knn_top1_pixels", "knn_top1_untrained"} <= set(results)
    assert all(0 <= results[name] <= 100 for name in results if name.startswith("knn"))
    rows = [json.loads(line) for line in (tmp_path / "knn" / "metrics.jsonl").read_text().splitlines()]
    assert ["knn_top1" in row for row in rows] == [False, False, True, False, False, False]
    assert list((tmp_path / "knn" / "tensorboard").iterdir())
    again = pretrain(tiny_data, tmp_path, *flags)
    assert again.stdout.startswith("run knn has finished its 6 steps")
    assert json.loads((tmp_path / "knn" / "results.json").read_text()) == results


def one_line(done: subprocess.CompletedProcess, told: str) -> None:
    assert done.returncode == 2, done.stdout + done.stderr
    lines = [line for line in done.stderr.splitlines() if line]
    assert len(lines) == 1, done.stderr
    assert told in lines[0]
    assert "Traceback" not in done.stdout + done.stderr


MISTAKES = [
    ("--data.dir nowhere", "no such folder"),
    ("--data.splits train test", "no split 'test'"),
    (
        "--batch-size 30 --nodes 4 --cluster local",
        "batch size 30 is not divisible by 4 ranks: give --batch-size 28 or 32",
    ),
    ("--batch-size 4096", "batch size 4096 is larger than the data"),
    ("--epoch 3", "unknown flag --epoch: did you mean --epochs?"),
    ("--optim.lr fast", "--optim.lr"),
    ("--batch-size 30 --nodes 4 --cluster local --dry-run", "batch size 30 is not divisible by 4 ranks"),
    ("--nodes 4", "--cluster local runs 4 ranks here"),
    ("--model.init nothing.pt", "--model.init: no checkpoint "),
]


@pytest.fixture(scope="module")
def mistakes(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Answer], Path]:
    """What each is told, and where nothing should have been created."""
    runs = tmp_path_factory.mktemp("mistakes") / "runs"
    return run_all([command(tiny_data, runs, *flags.split())[1:] for flags, _ in MISTAKES]), runs


@pytest.mark.parametrize("number", range(len(MISTAKES)), ids=[flags for flags, _ in MISTAKES])
def test_bad_input_is_one_line_before_anything_starts(mistakes: tuple[list[Answer], Path], number: int) -> None:
    answer = mistakes[0][number]
    assert answer.code == 2, answer.out + answer.told
    assert len(answer.told.splitlines()) == 1, answer.told
    assert MISTAKES[number][1] in answer.told
    assert not mistakes[1].exists()
    assert not answer.torch


def test_an_unknown_recipe(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "launchers/pretrain.py", "shape"], cwd=ROOT, capture_output=True, text=True)
    one_line(done, "no recipe 'shape' (did you mean shapes?)")


def test_a_shard_cut_short_is_named(tiny_data: Path, tmp_path: Path) -> None:
    import shutil

    cut = tmp_path / "cut"
    shutil.copytree(tiny_data, cut)
    shard = next(cut.glob("unlabeled*.beton"))
    shard.write_bytes(shard.read_bytes()[:-100])
    one_line(pretrain(cut, tmp_path, fine=False), shard.name)


@pytest.mark.slow
def test_another_config_or_architecture_is_refused(tiny_data: Path, tmp_path: Path, undisturbed: Path) -> None:
    done = pretrain(tiny_data, undisturbed.parent, "--run", "four", "--optim.lr", "0.9", fine=False)
    one_line(done, "run 'four' exists with another config (optim.lr ")
    done = pretrain(tiny_data, tmp_path, "--model.init", str(undisturbed), "--model.backbone", "resnet34", fine=False)
    one_line(done, "is of another architecture (backbone.")


@pytest.mark.slow
def test_a_loss_that_is_not_finite_ends_the_run_and_keeps_the_last_good_checkpoint(
    tiny_data: Path, tmp_path: Path
) -> None:
    flags = ("--run", "nan", "--cluster", "local", "--optim.lr-biases", "1e30", "--checkpoint.every-steps", "1")
    done = pretrain(tiny_data, tmp_path, *flags, fine=False)
    assert done.returncode == 1
    assert "FloatingPointError" in done.stderr
    status = json.loads((tmp_path / "nan" / "status.json").read_text())
    assert status["state"] == "failed"
    assert "step" in status["why"]
    kept = weights(tmp_path / "nan")
    assert all(tensor.isfinite().all() for tensor in kept.values())


@pytest.mark.slow
def test_a_disk_that_is_full_is_told_and_waited_for(tiny_data: Path, tmp_path: Path) -> None:
    """No checkpoint fits, the run goes on; at its end it waits for room, and finishes only when it is on the disk."""
    if os.geteuid() != 0 or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "none", str(tmp_path)]).returncode:
        pytest.skip("mounting a small file system needs root")
    folder = tmp_path / "full"
    try:
        flags = ("--run", "full", "--cluster", "local", "--model.projector", "2048", "256", "--checkpoint.keep", "9")
        environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
        told: list[str] = []
        words, pipe = command(tiny_data, tmp_path, *flags), subprocess.PIPE
        with subprocess.Popen(words, cwd=ROOT, env=environment, stdout=pipe, text=True) as started:
            assert started.stdout is not None
            for line in started.stdout:
                told.append(line)
                if "the end of the run is not on disk yet" in line:
                    break
            assert json.loads((folder / "status.json").read_text())["state"] == "running"
            assert not (folder / "results.json").exists()
            subprocess.run(["mount", "-o", "remount,size=64m", str(tmp_path)], check=True)
            told += started.stdout.readlines()
        assert started.returncode == 0, told
        assert any("No space left on device" in line for line in told), told
        assert json.loads((folder / "status.json").read_text())["state"] == "finished"
        assert len(losses(folder)) == 12
        assert weights(folder)
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)
