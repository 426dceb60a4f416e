"""Every fault of the campaign: name -> a function that strikes, starts again, compares, and returns the epochs lost."""

from __future__ import annotations

import errno
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from faulty import (
    STEPS,
    Fault,
    Stage,
    assert_one_sentence,
    assert_same,
    lost,
    steps_of,
    temporary,
)
from jupyter_client.manager import start_new_kernel

from frlkit import checkpoint
from frlkit.__main__ import main as frlkit

NOBODY = 65534
Case = Callable[[Stage, str, Path], int]


def call_of(stage: Stage, name: str, call: str, file: str, occurrence: int) -> int:
    """The number of the call about a file of this name, such as the second rename to checkpoint.pt; -1 is the last."""
    if stage.shim is None:
        pytest.skip("needs a C compiler, on Linux")
    stage.straight(name)
    pattern = re.compile(rf"{call} (.*/)?{re.escape(file)}(\.[0-9a-f]{{8}}\.tmp)?")
    return [number for number, event in enumerate(stage.events[name]) if pattern.fullmatch(event)][occurrence]


def after_the_second_checkpoint(stage: Stage, name: str, kind: str = "SIGKILL") -> Fault:
    """The call after the rename; a retraining run's start has one checkpoint, its own come after it."""
    second = 2 if name == "algorithm1_both" else 1
    return Fault(kind, f"file:{call_of(stage, name, 'rename', 'checkpoint.pt', second) + 1}")


def in_the_middle(name: str, kind: str = "SIGKILL") -> Fault:
    """In the last epoch, when the weights (and multipliers) have changed since the checkpoint: before the last step."""
    return Fault(kind, f"step:{STEPS[name] - 1}")


def folder_of(name: str, runs: Path) -> Path:
    (place,) = (path for path in runs.glob(f"digits/{name}*/seed0") if path.is_dir())
    return place


def stopped(stage: Stage, name: str, runs: Path) -> Path:
    """A run that was killed directly after the second checkpoint; returns the checkpoint."""
    outcome = stage.start(name, runs, after_the_second_checkpoint(stage, name))
    assert outcome.code == -signal.SIGKILL, outcome.said
    return folder_of(name, runs) / "checkpoint.pt"


class Stranger:
    """Unpickled without care, this creates a folder."""

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
    else:
        state = checkpoint.read(path)
        if how == "a weights file":  # what the kit wrote, for another purpose
            state = {"config": state["config"], "num_classes": 10, "model": state["model"]}
        else:  # "NaN weights", whole and of the right make
            state["model"]["fc1.bias"][3] = torch.nan
        checkpoint.save(path.with_name("spoilt"), state)  # as `path` the generation before it would be this one
        os.replace(path.with_name("spoilt"), path)


def damaged(stage: Stage, name: str, runs: Path, *, how: str, both: bool = False) -> int:
    path = stopped(stage, name, runs)
    for file in (path, checkpoint.previous(path)) if both else (path,):
        spoil(file, how)
    outcome = stage.start(name, runs)
    assert outcome.code == 0, outcome.said
    assert "going on from the generation before it" in outcome.said
    assert not path.with_name("ran").exists()
    assert_same(stage.straight(name), runs, but=r".*\.damaged")
    return lost(name, runs)


def other_configuration(stage: Stage, name: str, runs: Path) -> int:
    """It is refused, nothing is touched, and the right configuration goes on."""
    path = stopped(stage, name, runs)
    before = {file: file.read_bytes() for file in path.parent.iterdir() if file.suffix == ".pt"}
    outcome = stage.start(name, runs, words=("--epochs", "4"))
    assert outcome.code == 1, outcome.said
    assert_one_sentence(outcome.said)
    assert "epochs is 3 there and 4 here" in outcome.said
    assert before == {file: file.read_bytes() for file in path.parent.iterdir() if file.suffix == ".pt"}
    return stage.finish(name, runs)


@contextmanager
def small_disk(options: str) -> Iterator[tuple[Path, Callable[[str], None]]]:
    """A folder that is a disk of its own, and what changes its size; skips where mounting is not permitted."""
    place = temporary() / "runs"
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(place)]
    if os.geteuid() != 0 or subprocess.run(command, capture_output=True).returncode:
        shutil.rmtree(place.parent)
        pytest.skip("needs the right to mount a tmpfs")
    try:
        yield place, lambda size: void(subprocess.run(["mount", "-o", f"remount,{size}", place], check=True))
    finally:
        subprocess.run(["umount", "--lazy", place], check=True)
        shutil.rmtree(place.parent)


def void(_: Any) -> None:
    return


def full_disk(stage: Stage, name: str, runs: Path, *, options: str) -> int:
    """A real one, of so many bytes or files: refused in one sentence, or enough; then there is room."""
    with small_disk(options) as (disk, resize):  # instead of `runs`
        outcome = stage.start(name, disk)
        assert not re.search(r"Traceback|Errno|os error", outcome.said), outcome.said
        if outcome.code != 0:
            assert outcome.code == 1, outcome.said
            assert_one_sentence(outcome.said)
            assert os.strerror(errno.ENOSPC) in outcome.said
        resize("size=64m,nr_inodes=1000")
        return stage.finish(name, disk)


KERNEL = """
from faulty import Fault, carry_out, prepare, signal
prepare({root!r}, {steps!r}, Fault("sleep", {moment!r}), {{}})
"""
CELL = "carry_out({name!r}, {root!r}, {runs!r})"


def interrupted_kernel(stage: Stage, name: str, runs: Path) -> int:
    """The stop button of a notebook in the last epoch, then the same cell again in the same kernel."""
    stage.straight(name)
    manager, client = start_new_kernel(startup_timeout=600, kernel_name="python3", stderr=subprocess.DEVNULL)

    said = ""

    def execute(code: str) -> dict[str, Any]:
        def shown(message: dict[str, Any]) -> None:
            nonlocal said
            said += message["content"].get("text", "")
            if "in the middle" in message["content"].get("text", ""):
                manager.interrupt_kernel()

        return client.execute_interactive(code, output_hook=shown, user_expressions={"code": "code"}, timeout=600)

    def code_of(reply: dict[str, Any]) -> str:
        assert reply["content"]["status"] == "ok", reply["content"]
        return reply["content"]["user_expressions"]["code"]["data"]["text/plain"]

    try:
        runs.parent.mkdir(parents=True, exist_ok=True)
        moment = in_the_middle(name).moment
        execute(KERNEL.format(root=str(stage.root), steps=str(steps_of(runs)), moment=moment))
        cell = "code = " + CELL.format(name=name, root=str(stage.root), runs=str(runs))
        assert code_of(execute(cell)) in ("130", "1"), said
        assert code_of(execute(cell)) == "0", said
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)
    assert_same(stage.straight(name), runs)
    return lost(name, runs)


def wait_for(condition: Callable[[], bool], seconds: float = 600) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it never came"
        time.sleep(0.02)


def two_at_once(stage: Stage, name: str, runs: Path, *, kill: bool = False) -> int:
    """The second waits while the first is in the middle of an epoch; then the first finishes, or dies."""
    paused = runs.with_name(f"{runs.name}.paused")
    first = stage.launch(name, runs, in_the_middle(name, "pause"), paused=str(paused))
    wait_for(paused.exists)
    second = stage.launch(name, runs)
    wait_for(lambda: second.output.exists() and "another process works on" in second.output.read_text(encoding="utf-8"))
    before = steps_of(runs).read_text(encoding="utf-8")
    time.sleep(0.3)
    assert steps_of(runs).read_text(encoding="utf-8") == before, "the second did not wait"
    os.kill(first.pid, signal.SIGKILL if kill else signal.SIGUSR1)
    assert stage.wait(first).code == (-signal.SIGKILL if kill else 0)
    outcome = stage.wait(second)
    assert outcome.code == 0, outcome.said
    assert_same(stage.straight(name), runs)
    return lost(name, runs)


def read_only(stage: Stage, name: str, runs: Path) -> int:
    """Refused while the folder cannot be written; for root, whom no permission binds, as another user."""
    stopped(stage, name, runs)
    user = {"user": NOBODY} if os.geteuid() == 0 else {}
    visible = temporary()
    place = visible / "runs"
    stage.root.chmod(0o755)
    shutil.copytree(runs, place)
    shutil.copyfile(steps_of(runs), steps_of(place))
    steps_of(place).chmod(0o666)
    folder = folder_of(name, place)
    folder.chmod(0o555)
    before = sorted(os.listdir(folder))
    outcome = stage.start(name, place, **user)
    assert outcome.code == 1, outcome.said
    assert_one_sentence(outcome.said)
    assert "cannot be written (Permission denied)" in outcome.said
    assert sorted(os.listdir(folder)) == before
    folder.chmod(0o755)
    epochs = stage.finish(name, place)
    shutil.rmtree(visible)
    return epochs


def drive(stage: Stage, name: str, runs: Path, *, trouble: str) -> int:
    """A session with Google Drive is killed and its disk gone; the next one has what reached Drive."""
    remote = runs.with_name(f"{runs.name}.remote")
    afterwards = trouble in ("vanishes", "truncated", "empty")  # what the cloud does to a copy that read back well
    if afterwards:
        call_of(stage, name, "create", "history.json", -1)  # the moment is counted anew: copies call about files, too
        survey = {"survey": f"{remote}.survey", "lines": False}
        probe = stage.start(name, runs.with_name("probe"), remote=f"{remote}.probe", trouble="", **survey)
        assert probe.code == 0, probe.said
        calls = Path(f"{remote}.survey.files").read_text(encoding="utf-8").splitlines()
        number = [n for n, call in enumerate(calls) if re.match(r"create .*history\.json", call)][-1]
        fault = Fault("SIGKILL", f"file:{number}")
    else:
        fault = Fault("SIGKILL", f"step:{STEPS[name] - (2 if trouble == 'is gone' else 1)}")
    outcome = stage.start(name, runs, fault, remote=str(remote), trouble=trouble)
    assert outcome.code == -signal.SIGKILL, outcome.said
    if afterwards:
        newest = folder_of(name, remote) / "checkpoint.pt"
        if trouble == "vanishes":
            newest.unlink()
        else:
            spoil(newest, trouble)
    shutil.rmtree(runs)
    epochs = stage.finish(name, runs, remote=str(remote), trouble="")
    assert_same(stage.straight(name), remote)
    return epochs


def sweep_command(stage: Stage, *words: str | Path) -> list[str | Path]:
    """`frlkit sweep` on a small grid; the digits are whole here, for its workers are not forked."""
    file = stage.root / "sweep.yaml"
    file.write_text(SWEEP, encoding="utf-8")
    return [sys.executable, "-m", "frlkit", "sweep", file, "--device", "cpu", *words]


def finish_sweep(stage: Stage, runs: Path, *words: str) -> int:
    """The same command again; equal to the sweep that nothing struck."""
    straight = stage.root / "straight_sweep"
    if not straight.exists():
        frlkit(list(map(str, sweep_command(stage, "--jobs", "1", "--runs", straight)[3:])), standalone_mode=False)
    done = subprocess.run(sweep_command(stage, *words, "--runs", runs), **QUIET, timeout=600)
    assert done.returncode == 0, done.stdout
    assert_same(straight, runs)
    return 0


def killed_driver(stage: Stage, name: str, runs: Path, *, kind: str, number: int) -> int:
    """A sweep on two processes, struck when so many files are there; then the same command again."""
    command = sweep_command(stage, "--jobs", "2", "--runs", runs)
    with subprocess.Popen(command, **QUIET) as driver:
        wait_for(lambda: len(list(runs.glob("digits/*/seed0/*"))) >= number or driver.poll() is not None, 600)
        driver.send_signal(signal.Signals[kind])
        try:
            said = driver.communicate(timeout=300)[0]
        except subprocess.TimeoutExpired:
            driver.kill()
            raise AssertionError(f"the driver hangs after {kind}: {driver.communicate()[0]}") from None
    assert "Traceback" not in said, said
    return finish_sweep(stage, runs, "--jobs", "2")


@contextmanager
def real_cluster(backend: str, place: Path) -> Iterator[tuple[str, list[psutil.Process]]]:
    """A Ray or Dask cluster of two workers on this machine: its address, and for Dask its workers."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    address = f"tcp://127.0.0.1:{port}" if backend == "dask" else f"127.0.0.1:{port}"
    dask, quiet = [sys.executable, "-m", "dask"], ["--no-dashboard"]
    worker = [*dask, "worker", address, "--no-nanny", "--nthreads", "1", *quiet]
    ray = [Path(sys.executable).with_name("ray"), "start", "--head", "--block", "--port", port, "--num-cpus", "2"]
    ray += ["--node-ip-address", "127.0.0.1", "--include-dashboard=false", "--object-store-memory", str(10**8)]
    commands = {"dask": [[*dask, "scheduler", "--host", address, *quiet], worker, worker], "ray": [ray]}[backend]
    # Ray's workers are "nice" to everyone else, and so never get to run on a busy machine.
    settings = {"RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0", "RAY_worker_niceness": "0"}
    settings = {**os.environ, **settings, "XDG_CACHE_HOME": str(place)}
    log = place / "log"
    with log.open("wb") as file:
        started = [psutil.Popen(command, env=settings, stdout=file, stderr=file, cwd=place) for command in commands]
        try:
            if backend == "ray":
                wait_for(lambda: b"Ray runtime started" in log.read_bytes(), 300)
            yield address, started
        finally:
            family = [child for one in started if one.is_running() for child in one.children(recursive=True)]
            for one in [*started, *family]:
                with suppress(psutil.NoSuchProcess):
                    one.terminate()
            for left in psutil.wait_procs([*started, *family], timeout=10)[1]:
                left.kill()


def struck_cluster(stage: Stage, name: str, runs: Path, *, backend: str, whom: str) -> int:
    """A sweep on a real cluster, whose worker or driver is killed while a run is at work there."""
    pytest.importorskip({"ray": "ray", "dask": "distributed"}[backend])
    place = temporary()
    with real_cluster(backend, place) as (address, started):
        words = ("--backend", backend, "--address", address)
        with subprocess.Popen(sweep_command(stage, *words, "--runs", runs), **QUIET) as driver:
            wait_for(lambda: list(place.rglob("checkpoint.pt")) or driver.poll() is not None, 600)
            assert driver.poll() is None, driver.communicate()[0]
            if whom == "driver":
                driver.kill()
            elif backend == "dask":
                started[1].kill()
            else:
                family = started[0].children(recursive=True)
                next(child for child in family if "ray::away" in " ".join(child.cmdline())).kill()
            said = driver.communicate(timeout=600)[0]
            assert whom == "driver" or driver.returncode == 0, said
        finish_sweep(stage, runs, *words)
    shutil.rmtree(place)
    return 0


QUIET: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "encoding": "utf-8"}
SWEEP = "dataset: digits\nvalues: {epochs: 2, batch_size: 500}\ngrid: [{recipe: [natural, pgd_at]}]\n"
CASES: dict[str, Case] = {
    **{
        f"{kind} in the middle of an epoch": lambda stage, name, runs, kind=kind: stage.survive(
            name, runs, in_the_middle(name, kind)
        )
        for kind in ("SIGKILL", "SIGTERM", "SIGINT")
    },
    "SIGINT in a notebook kernel": interrupted_kernel,
    "file size limit": lambda stage, name, runs: stage.survive(name, runs, in_the_middle(name, "limit")),
    **{
        f"disk of {size} KB": partial(full_disk, options=f"size={size}k")
        for size in (4, 16, 40, *range(100, 3600, 250))
    },
    **{f"disk of {count} files": partial(full_disk, options=f"nr_inodes={count}") for count in range(2, 16)},
    **{f"checkpoint {how}": partial(damaged, how=how) for how in ("truncated", "empty", "bit-flipped")},
    **{
        f"checkpoint replaced by {how}": partial(damaged, how=how)
        for how in ("somebody's code", "somebody's tensors", "a weights file", "NaN weights")
    },
    "both checkpoints truncated": partial(damaged, how="truncated", both=True),
    "checkpoint of another configuration": other_configuration,
    "two processes": two_at_once,
    "two processes, the first killed": partial(two_at_once, kill=True),
    "read-only folder": read_only,
    **{
        f"Drive {trouble}": partial(drive, trouble=trouble)
        for trouble in ("fails", "lags", "drops", "is gone", "vanishes", "truncated", "empty")
    },
}
#: Of commands that train nothing.
SWEEPS: dict[str, Case] = {
    f"{kind} of a sweep's driver at file {number}": partial(killed_driver, kind=kind, number=number)
    for kind in ("SIGKILL", "SIGTERM", "SIGINT")
    for number in (1, 6)
} | {
    f"{whom} of a {backend.title()} cluster killed": partial(struck_cluster, backend=backend, whom=whom)
    for backend in ("dask", "ray")
    for whom in ("worker", "driver")
}
# Epochs; one for all others. What had not reached Drive yet is lost, besides the epoch that was killed.
MOST_LOST = {"both checkpoints truncated": 2, "Drive fails": 2, "Drive drops": 2, "Drive is gone": 4}
