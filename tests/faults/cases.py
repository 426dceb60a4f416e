"""Every fault of the campaign: name -> a function that strikes, starts again, compares, and returns the epochs lost."""

from __future__ import annotations

import errno
import os
import random
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from faulty import (
    EPOCHS,
    REFUSED,
    Fault,
    Stage,
    assert_one_sentence,
    assert_same,
    epochs_of,
    line_of,
    lost,
)
from jupyter_client.manager import start_new_kernel

from frlkit import checkpoint

NOBODY = 65534
SWAP = "os.replace(temporary, path)"
MOMENTS = {  # in `checkpoint.write_atomically`, in their order
    "before": "descriptor, temporary = tempfile.mkstemp(",
    "empty": "file.write(content)",
    "unsynced": "os.fsync(file.fileno())",
    "synced": "os.chmod(temporary, 0o644)",
    "half renamed": SWAP,  # the old file has its new name already
    "renamed": "_copy_to_mirror(path)",
}
FILES = ("checkpoint", "second checkpoint", "third checkpoint", "history", "weights", "record", "whole record")
WRITES = {  # each file a run writes, in order; algorithm1_both trains the run it starts from first
    "pgd_at": FILES,
    "algorithm1_both": (*(f"start's {name}" for name in FILES if " checkpoint" not in name), *FILES),
}
Case = Callable[[Stage, str, Path], int]


def stop(stage: Stage, recipe: str, runs: Path, *, kind: str, text: str, write: str) -> int:
    return stage.survive(recipe, runs, Fault(kind, line_of("checkpoint.py", text), WRITES[recipe].index(write)))


def after_the_second_checkpoint(recipe: str, kind: str = "SIGKILL") -> Fault:
    return Fault(kind, line_of("checkpoint.py", MOMENTS["renamed"]), WRITES[recipe].index("second checkpoint"))


def in_the_middle(recipe: str, kind: str = "SIGKILL") -> Fault:
    """In the last epoch, when the weights (and multipliers) have changed since the checkpoint: before the last step."""
    batches = 2 * EPOCHS[recipe]
    return Fault(kind, line_of("training.py", "optimizer.step()"), batches - 1)


def stopped(stage: Stage, recipe: str, runs: Path, fault: Fault | None = None) -> Path:
    """A run that was killed, by default directly after the second checkpoint; returns the checkpoint."""
    outcome = stage.start(recipe, runs, fault or after_the_second_checkpoint(recipe))
    assert outcome.code == -signal.SIGKILL, outcome.said
    return runs / "digits" / recipe / "seed0" / "checkpoint.pt"


class Stranger:
    """Unpickled without care, this creates a file."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, (self.path,))


def spoil(path: Path, how: str) -> None:
    """Damage a checkpoint, or put something else in its place."""
    content = path.read_bytes()
    if how == "truncated":
        path.write_bytes(content[: 2 * len(content) // 3])
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "bit-flipped":
        chance = random.Random(0)
        weight = checkpoint.read(path)["model"]["fc1.weight"].numpy().tobytes()
        damaged = bytearray(content)
        damaged[content.index(weight) + chance.randrange(len(weight))] ^= 1 << chance.randrange(8)
        path.write_bytes(damaged)
    elif how == "somebody's code":
        torch.save({"model": Stranger(str(path.with_name("ran")))}, path)
    elif how == "somebody's tensors":
        torch.save({"model": {"w": torch.ones(3)}}, path)
    else:  # what the kit wrote, for another purpose
        state = checkpoint.read(path)
        checkpoint.save(path, {"config": state["config"], "num_classes": 10, "model": state["model"]})


def damaged(stage: Stage, recipe: str, runs: Path, *, how: str, both: bool = False) -> int:
    path = stopped(stage, recipe, runs)
    for file in (path, checkpoint.previous(path)) if both else (path,):
        spoil(file, how)
    outcome = stage.start(recipe, runs)
    assert outcome.code == 0, outcome.said
    assert "going on from the generation before it" in outcome.said
    assert not path.with_name("ran").exists()
    assert_same(stage.straight(recipe), runs, but=r".*\.damaged")
    return lost(recipe, runs)


def other_configuration(stage: Stage, recipe: str, runs: Path) -> int:
    """It is refused, nothing is touched, and the right configuration goes on."""
    path = stopped(stage, recipe, runs)
    before = {file: file.read_bytes() for file in path.parent.iterdir() if file.suffix == ".pt"}
    outcome = stage.start(recipe, runs, values={"lr": 0.002})
    assert outcome.code == REFUSED, outcome.said
    assert_one_sentence(outcome)
    assert "lr is 0.001 there and 0.002 here" in outcome.said
    assert before == {file: file.read_bytes() for file in path.parent.iterdir() if file.suffix == ".pt"}
    return stage.finish(recipe, runs)


def no_room(stage: Stage, recipe: str, runs: Path, *, kind: str, write: str = "second checkpoint") -> int:
    """The disk is full from a write on; after the refusal there is room again."""
    return stop(stage, recipe, runs, kind=kind, text=MOMENTS["before"], write=write)


@contextmanager
def small_disk(size: str) -> Iterator[Path]:
    """A disk of its own; skips where mounting is not permitted."""
    place = Path(tempfile.mkdtemp())
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", place], capture_output=True)
    if mounted.returncode:
        place.rmdir()
        pytest.skip("needs the right to mount a tmpfs")
    try:
        yield place
    finally:
        subprocess.run(["umount", place], check=True)
        place.rmdir()


def full_disk(stage: Stage, recipe: str, runs: Path) -> int:
    """A real one."""
    with small_disk("16m") as disk:
        place = line_of("checkpoint.py", MOMENTS["before"])
        fault = Fault("fill", place, WRITES[recipe].index("second checkpoint"))
        outcome = stage.start(recipe, disk / runs.name, fault, fill=str(disk))
        assert outcome.code == REFUSED, outcome.said
        assert_one_sentence(outcome)
        assert os.strerror(errno.ENOSPC) in outcome.said
        (disk / "ballast").unlink()
        return stage.finish(recipe, disk / runs.name)


KERNEL = """
import time
from frlkit import training
from faulty import prepare
everything, straight, batches = prepare({root!r}, {recipe!r}, {runs!r}, {log!r}), losses.loss, []

def loss(*rest):
    batches.append(None)
    if len(batches) == {batch}:
        print("in the middle", flush=True)
        time.sleep(60)
    return straight(*rest)

losses.loss = loss
"""


def interrupted_kernel(stage: Stage, recipe: str, runs: Path) -> int:
    """The stop button of a notebook in the last epoch, then the same cell again in the same kernel."""
    stage.straight(recipe)
    manager, client = start_new_kernel(kernel_name="python3", stderr=subprocess.DEVNULL)

    def execute(code: str) -> dict[str, Any]:
        def shown(message: dict[str, Any]) -> None:
            if "in the middle" in message["content"].get("text", ""):
                manager.interrupt_kernel()

        return client.execute_interactive(code, output_hook=shown, timeout=60)["content"]

    try:
        runs.parent.mkdir(parents=True, exist_ok=True)
        names = {"root": str(stage.root), "recipe": recipe, "runs": str(runs), "log": str(epochs_of(runs))}
        assert execute(KERNEL.format(**names, batch=2 * EPOCHS[recipe]))["status"] == "ok"
        stopped = execute("runs.run(*everything)")
        assert stopped.get("ename") == "KeyboardInterrupt", stopped
        again = execute("runs.run(*everything)")
        assert again["status"] == "ok", again
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)
    assert_same(stage.straight(recipe), runs)
    return lost(recipe, runs)


def wait_for(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end, "it never came"
        time.sleep(0.02)


def two_at_once(stage: Stage, recipe: str, runs: Path, *, kill: bool = False) -> int:
    """The second waits while the first is in the middle of an epoch; then the first finishes, or dies."""
    paused = runs.with_name(f"{runs.name}.paused")
    first = stage.launch(recipe, runs, in_the_middle(recipe, "pause"), paused=str(paused))
    wait_for(paused.exists)
    second = stage.launch(recipe, runs)
    wait_for(lambda: second.output.exists() and "another process works on" in second.output.read_text())
    begun = epochs_of(runs).read_text()
    time.sleep(0.3)
    assert epochs_of(runs).read_text() == begun, "the second did not wait"
    os.kill(first.pid, signal.SIGKILL if kill else signal.SIGUSR1)
    assert stage.wait(first).code == (-signal.SIGKILL if kill else 0)
    outcome = stage.wait(second)
    assert outcome.code == 0, outcome.said
    assert_same(stage.straight(recipe), runs)
    return lost(recipe, runs)


def read_only(stage: Stage, recipe: str, runs: Path) -> int:
    """Refused while the folder cannot be written; for root, whom no permission binds, as another user."""
    stopped(stage, recipe, runs)
    with tempfile.TemporaryDirectory() as visible:
        os.chmod(visible, 0o755)
        user = {"user": NOBODY} if os.geteuid() == 0 else {}
        place = Path(visible) / "runs"
        shutil.copytree(runs, place)
        (Path(visible) / "runs.epochs").write_text(epochs_of(runs).read_text())
        folder = place / "digits" / recipe / "seed0"
        folder.chmod(0o555)
        before = sorted(os.listdir(folder))
        outcome = stage.start(recipe, place, **user)
        assert outcome.code == REFUSED, outcome.said
        assert_one_sentence(outcome)
        assert "cannot be written (Permission denied)" in outcome.said
        assert sorted(os.listdir(folder)) == before
        folder.chmod(0o755)
        return stage.finish(recipe, place)


def drive(stage: Stage, recipe: str, runs: Path, *, trouble: str) -> int:
    """A session with Google Drive is killed and its disk gone; the next one has what reached Drive."""
    remote = runs.with_name(f"{runs.name}.remote")
    afterwards = trouble in ("vanishes", "truncated", "empty")  # what the cloud does to a copy that read back well
    if afterwards:
        finishing = 'checkpoint.write_json(folder / "history.json"'
        occurrence = sum("history" in name for name in WRITES[recipe]) - 1
        fault = Fault("SIGKILL", line_of("training.py", finishing), occurrence)
    else:
        fault = after_the_second_checkpoint(recipe) if trouble == "is gone" else in_the_middle(recipe)
    outcome = stage.start(recipe, runs, fault, remote=str(remote), trouble=trouble)
    assert outcome.code == -signal.SIGKILL, outcome.said
    newest = remote / "digits" / recipe / "seed0" / "checkpoint.pt"
    if trouble == "vanishes":
        newest.unlink()
    elif afterwards:
        spoil(newest, trouble)
    shutil.rmtree(runs)
    epochs = stage.finish(recipe, runs, remote=str(remote), trouble="")
    assert_same(stage.straight(recipe), remote)
    return epochs


CASES: dict[str, Case] = {
    **{
        f"{kind} in the middle of an epoch": lambda stage, recipe, runs, kind=kind: stage.survive(
            recipe, runs, in_the_middle(recipe, kind)
        )
        for kind in ("SIGKILL", "SIGTERM", "SIGINT")
    },
    **{
        f"SIGKILL, {write} {moment}": partial(stop, kind="SIGKILL", text=text, write=write)
        for write in FILES
        for moment, text in MOMENTS.items()
    },
    **{
        f"SIGKILL, {write} half written": partial(stop, kind="torn", text=MOMENTS["before"], write=write)
        for write in FILES
    },
    **{
        f"SIGINT, second checkpoint {moment}": partial(stop, kind="SIGINT", text=text, write="second checkpoint")
        for moment, text in MOMENTS.items()
    },
    **{f"disk full at {write}": partial(no_room, kind="full", write=write) for write in FILES},
    **{f"disk full, {kind} fails": partial(no_room, kind=kind) for kind in ("fsync", "replace", "chmod")},
    "file size limit": partial(no_room, kind="limit"),
    "disk full, a real one": full_disk,
    **{f"checkpoint {how}": partial(damaged, how=how) for how in ("truncated", "empty", "bit-flipped")},
    **{
        f"checkpoint replaced by {how}": partial(damaged, how=how)
        for how in ("somebody's code", "somebody's tensors", "a weights file")
    },
    "both checkpoints truncated": partial(damaged, how="truncated", both=True),
    "SIGINT in a notebook kernel": interrupted_kernel,
    "checkpoint of another configuration": other_configuration,
    "two processes": two_at_once,
    "two processes, the first killed": partial(two_at_once, kill=True),
    "read-only folder": read_only,
    **{
        f"Drive {trouble}": partial(drive, trouble=trouble)
        for trouble in ("fails", "lags", "drops", "is gone", "vanishes", "truncated", "empty")
    },
}
# Epochs; one for all others. What had not reached Drive yet is lost, besides the epoch that was killed.
MOST_LOST = {"both checkpoints truncated": 2, "Drive fails": 2, "Drive drops": 2, "Drive is gone": 3}
