"""Runs that are killed, starved of disk and fed damaged files: the next start equals the undisturbed run, bit for bit.

The whole campaign is ``make faults``; here are faults of each kind, and random moments.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import cases
import pytest
import torch
from cases import CASES, MOST_LOST
from conftest import tiny_dataset
from faulty import VALUES, Fault, Stage, assert_same, epochs_of, line_of

from frlkit import checkpoint
from frlkit.data import Dataset

QUICK = {
    "pgd_at": [
        "SIGTERM in the middle of an epoch",
        "SIGINT in the middle of an epoch",
        "SIGINT in a notebook kernel",
        "SIGKILL, second checkpoint half written",
        "SIGKILL, third checkpoint half renamed",
        "SIGKILL, weights unsynced",
        "SIGKILL, record renamed",
        "SIGKILL, whole record half written",
        "disk full, fsync fails",
        "disk full, a real one",
        "checkpoint truncated",
        "checkpoint empty",
        "checkpoint replaced by somebody's code",
        "two processes",
        "read-only folder",
        "Drive lags",
        "Drive drops",
        "Drive vanishes",
    ],
    "algorithm1_both": [
        "SIGKILL in the middle of an epoch",
        "SIGKILL, second checkpoint half renamed",
        "file size limit",
        "checkpoint bit-flipped",
        "checkpoint replaced by a weights file",
        "checkpoint of another configuration",
        "two processes, the first killed",
        "Drive fails",
        "Drive is gone",
    ],
}


@pytest.fixture(scope="module")
def stage(digits: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    stage = Stage(tmp_path_factory.mktemp("stage"))
    stage.write_data(tiny_dataset(digits, 5, 1, 2))
    return stage


@pytest.mark.parametrize(("recipe", "name"), [(recipe, name) for recipe, names in QUICK.items() for name in names])
def test_fault(stage: Stage, tmp_path: Path, recipe: str, name: str) -> None:
    assert CASES[name](stage, recipe, tmp_path / "runs") <= MOST_LOST.get(name, 1)


@pytest.mark.parametrize("recipe", VALUES)
@pytest.mark.parametrize("number", range(2))
def test_random_moment(stage: Stage, tmp_path: Path, recipe: str, number: int) -> None:
    (fault,) = islice(stage.moments(recipe), number, number + 1)
    assert stage.survive(recipe, tmp_path / "runs", fault) <= 1


def test_a_moment_can_be_named_again() -> None:
    fault = Fault("SIGINT", line_of("checkpoint.py", cases.MOMENTS["synced"]), 12)
    assert Fault.parse(str(fault)) == fault


def test_a_fault_that_never_comes_is_noticed(stage: Stage, tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="never came"):
        stage.survive("pgd_at", tmp_path / "runs", Fault("SIGKILL", "training.py:1"))


def test_what_the_comparison_sees(stage: Stage, tmp_path: Path) -> None:
    """One bit of one weight; a file too many; an epoch too many."""
    straight = stage.straight("pgd_at")
    stage.start("pgd_at", tmp_path / "runs")
    assert_same(straight, tmp_path / "runs")
    folder = tmp_path / "runs" / "digits" / "pgd_at" / "seed0"
    (folder / "run.lock").touch()
    with pytest.raises(AssertionError, match=r"run\.lock"):
        assert_same(straight, tmp_path / "runs")
    (folder / "run.lock").unlink()
    weights = checkpoint.read(folder / "weights.pt")
    weights["model"]["fc2.bias"].view(-1).view(torch.int32)[3] ^= 1
    checkpoint.save(folder / "weights.pt", weights)
    with pytest.raises(AssertionError):
        assert_same(straight, tmp_path / "runs")
    begun = epochs_of(tmp_path / "runs")
    begun.write_text(begun.read_text() + begun.read_text().splitlines()[0] + "\n")
    assert cases.lost("pgd_at", tmp_path / "runs") == 1
