"""failure.json: the first failure of an attempt wins; and what squeue says."""

from __future__ import annotations

import multiprocessing
from pathlib import Path

import pytest

from barlow.files import read_status
from slurm.states import State, read_failure, record_failure


def fail_as(folder: Path, rank: int, gate: multiprocessing.synchronize.Barrier) -> None:
    gate.wait()
    won = record_failure(folder, "7.0", rank, f"error of {rank}", "trace", 1)
    (folder / f"won_{rank}").write_text(str(won))


def test_one_of_many_simultaneous_failures_wins(tmp_path: Path) -> None:
    gate = multiprocessing.get_context("fork").Barrier(6)
    ranks = [multiprocessing.get_context("fork").Process(target=fail_as, args=(tmp_path, r, gate)) for r in range(6)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(20)
    winners = [r for r in range(6) if (tmp_path / f"won_{r}").read_text() == "True"]
    assert len(winners) == 1
    assert read_failure(tmp_path, "7.0")["error"] == f"error of {winners[0]}"
    assert f"error of {winners[0]}" in read_status(tmp_path)["why"]


def test_a_new_attempt_replaces_the_failure(tmp_path: Path) -> None:
    assert record_failure(tmp_path, "7.0", 1, "old", "", 1)
    assert read_failure(tmp_path, "7.1") == {}
    assert record_failure(tmp_path, "7.1", 3, "new", "", 2)
    assert not record_failure(tmp_path, "7.1", 0, "follows from it", "", 1)
    assert (read_failure(tmp_path, "7.")["rank"], read_failure(tmp_path, "7.1")["exit_code"]) == (3, 2)
    assert read_failure(tmp_path, "77.") == {}


@pytest.mark.parametrize(
    ("state", "alive", "text"),
    [
        (State("PENDING", "Resources"), True, "pending: Resources"),
        (State("PENDING", "None"), True, "pending"),
        (State("RUNNING", "None", "n[1-4]"), True, "running on n[1-4]"),
        (State("COMPLETED", "None", "n1"), False, "completed on n1"),
        (State("OUT_OF_MEMORY", "None", "n1"), False, "out_of_memory on n1"),
        (State(), False, ""),
    ],
)
def test_states(state: State, alive: bool, text: str) -> None:
    assert (state.alive, str(state)) == (alive, text)
