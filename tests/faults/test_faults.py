"""Commands that are killed, starved of disk and fed damaged files: the next start ends as if nothing had happened.

The whole campaign is ``make faults``; here are faults of each kind, some file events, and random moments.
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
from faulty import COMMANDS, STEPS, Fault, Stage, assert_same, lost, steps_of

from frlkit import checkpoint
from frlkit.data import Dataset

QUICK = {
    "pgd_at": [
        "SIGTERM in the middle of an epoch",
        "SIGINT in the middle of an epoch",
        "SIGINT in a notebook kernel",
        "disk of 1600 KB",
        "disk of 9 files",
        "checkpoint truncated",
        "checkpoint empty",
        "checkpoint replaced by somebody's code",
        "checkpoint replaced by NaN weights",
        "two processes",
        "read-only folder",
        "Drive lags",
        "Drive drops",
        "Drive vanishes",
    ],
    "algorithm1_both": [
        "SIGKILL in the middle of an epoch",
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


@pytest.mark.parametrize("kind", ["SIGKILL", "SIGTERM", "SIGINT", "torn", "EIO", "ENOSPC", "gone"])
@pytest.mark.parametrize("command", COMMANDS)
def test_file_events(stage: Stage, tmp_path: Path, command: str, kind: str) -> None:
    """One or two of each kind, other ones for each command."""
    if stage.shim is None:
        pytest.skip("needs a C compiler, on Linux")
    events = stage.file_events(command, kind)
    assert events or kind == "torn"
    for fault in events[len(command) * 7 % len(events) :: 97]:
        assert stage.survive(command, tmp_path / fault.moment / "runs", fault) <= 1


@pytest.mark.parametrize("recipe", STEPS)
@pytest.mark.parametrize("number", range(2))
def test_random_moment(stage: Stage, tmp_path: Path, recipe: str, number: int) -> None:
    (fault,) = islice(stage.moments(recipe), number, number + 1)
    assert stage.survive(recipe, tmp_path / "runs", fault) <= 1


def test_a_moment_can_be_named_again() -> None:
    for moment in ("file:41", "line:kernels/native.py:12#3", "step:5"):
        fault = Fault("SIGINT", moment)
        assert Fault.parse(str(fault)) == fault
        sort, _, rest = moment.partition(":")
        assert fault.at(sort) == rest
        assert not fault.at("no such sort")


def test_a_fault_that_never_comes_is_noticed(stage: Stage, tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="never came"):
        stage.survive("pgd_at", tmp_path / "runs", Fault("SIGKILL", "line:training.py:1#0"))
    with pytest.raises(AssertionError, match="ended with 0"):
        stage.survive("pgd_at", tmp_path / "runs", Fault("SIGKILL", "file:100000"))


def test_every_event_of_a_run_is_seen(stage: Stage) -> None:
    """Of each file that a finished run leaves, and of its checkpoints: made, locked, written, flushed and renamed."""
    if stage.shim is None:
        pytest.skip("needs a C compiler, on Linux")
    files = {path.name for path in stage.straight("pgd_at").rglob("seed0/*")} | {"checkpoint.pt"}
    for call in ("create", "lock", "write", "fsync", "rename"):
        for file in files:
            assert cases.call_of(stage, "pgd_at", call, file, 0) > 0
    assert cases.call_of(stage, "pgd_at", "remove", "run.lock", -1) > 0


def test_what_the_comparison_sees(stage: Stage, tmp_path: Path) -> None:
    """One bit of one weight; a file too many; an epoch too many."""
    straight, runs = stage.straight("pgd_at"), tmp_path / "runs"
    stage.start("pgd_at", runs)
    assert_same(straight, runs)
    assert lost("pgd_at", runs) == 0
    folder = cases.folder_of("pgd_at", runs)
    (folder / "run.lock").touch()
    with pytest.raises(AssertionError, match=r"run\.lock"):
        assert_same(straight, runs)
    (folder / "run.lock").unlink()
    weights = next(path for path in folder.iterdir() if path.name.startswith("weights."))
    content = bytearray(weights.read_bytes())
    content[-2] ^= 1  # of a number
    weights.write_bytes(content)
    with pytest.raises(AssertionError, match="weights"):
        assert_same(straight, runs)
    steps_of(runs).write_text(steps_of(runs).read_text(encoding="utf-8") + "...", encoding="utf-8")
    assert lost("pgd_at", runs) == 2  # a whole one, and another's half
    for folder, value in ((tmp_path / "a", 1.0), (tmp_path / "b", 2.0)):
        checkpoint.save(folder / "x.pt", {"model": {"w": torch.tensor([value])}})
        checkpoint.write_json(folder / "x.json", {"seconds": value})
    with pytest.raises(AssertionError, match=r"x\.pt"):
        assert_same(tmp_path / "a", tmp_path / "b")
    for folder in (tmp_path / "a", tmp_path / "b"):
        (folder / "x.pt").unlink()
    assert_same(tmp_path / "a", tmp_path / "b")
