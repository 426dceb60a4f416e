"""Real runs on tiny data, each in a process of its own, in which one thing goes wrong at an exact moment.

A moment is a line of the kit and how often it has run before: ``checkpoint.py:98#2``. It is the same in every start
of the same run, so a failure can be repeated (``campaign.py --repeat``). Processes are forked from a server that has
imported everything, so each costs little more than its training.
"""

from __future__ import annotations

import contextlib
import errno
import json
import multiprocessing
import os
import random
import re
import resource
import shutil
import signal
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from frlkit import PROJECT, KitError, checkpoint, evaluation, kernels, models, recipes, records, training
from frlkit.data import Dataset, Split

VALUES = {
    "pgd_at": {"epochs": 3, "batch_size": 25, "steps": 2},
    # no tolerance: on so few images the multipliers would not move otherwise
    "algorithm1_both": {
        **{"epochs": 3, "start_epochs": 1, "batch_size": 25, "steps": 2},
        **{"tau_nat": 0.0, "tau_bdy": 0.0},
    },
}
EPOCHS = {"pgd_at": 3, "algorithm1_both": 4}  # of the run it starts from too
SIGNALS = {"SIGKILL": -signal.SIGKILL, "SIGTERM": -signal.SIGTERM, "SIGINT": 130}  # how the process ends
REFUSED = 3  # the process ended with a KitError
TRACED = {
    str(PROJECT / "frlkit" / f"{name}.py"): f"{name}.py"
    for name in ("attacks", "checkpoint", "evaluation", "fairness", "models", "training")
}
FINISHED = ["history.json", "record.json", "weights.pt"]


@dataclass(frozen=True)
class Fault:
    """What happens (a signal, or what fails from then on) and when: at a line, run so many times before."""

    kind: str
    place: str
    occurrence: int = 0

    def __str__(self) -> str:
        return f"{self.kind}@{self.place}#{self.occurrence}"

    @classmethod
    def parse(cls, text: str) -> Fault:
        kind, place, occurrence = re.split("[@#]", text)
        return cls(kind, place, int(occurrence))


@dataclass
class Outcome:
    """How a process ended, and what it printed."""

    code: int | None
    said: str


def line_of(name: str, text: str) -> str:
    """The place of the one line of a module that has this text."""
    lines = (PROJECT / "frlkit" / name).read_text().splitlines()
    (number,) = (number for number, line in enumerate(lines, 1) if text in line)
    return f"{name}:{number}"


# ---- In the child ---------------------------------------------------------------------------------------------------


def child(
    root: str, recipe: str, runs: str, fault: Fault | None, options: dict[str, Any]
) -> None:  # pragma: no cover, another process
    """Train a recipe into `runs` with this fault; the exit status says how it went."""
    output = os.open(options["output"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1), os.dup2(output, 2)
    everything = prepare(root, recipe, runs, options["log"], **options.get("values", {}))
    if options.get("user"):
        kernels.available(models.build("lenet5", seed=0))  # while its cache can still be read
        os.setgid(options["user"])
        os.setuid(options["user"])
    if "remote" in options:
        _unreliable(Path(options["remote"]), options["trouble"])
        checkpoint.mirror(Path(runs), Path(options["remote"]))
    try:
        with _armed(fault, options):
            runs.run(*everything)
    except KitError as error:
        print(f"KitError: {error}", flush=True)
        os._exit(REFUSED)
    except KeyboardInterrupt:
        os._exit(130)
    sys.stdout.flush()


def prepare(root: str, recipe: str, runs: str, log: str, **values: Any) -> tuple[recipes.Config, Dataset, Path]:
    """What `runs.run` takes, after settings that make it short; also used inside a notebook's kernel."""
    torch.set_num_threads(1)
    quick = tuple(replace(attack, steps=2) for attack in evaluation.STANDARD)
    records.evaluate.__defaults__ = (quick,)
    runs.watched = evaluation.watched = lambda: False
    runs.tqdm.set_lock(threading.RLock())  # its own lock is a semaphore, which a killed process leaves behind
    tensors = torch.load(Path(root) / "data.pt")
    tiny = Dataset("digits", tuple("0123456789"), *(Split(*pair) for pair in tensors))
    config = recipes.configure(recipe, "digits", 0, **{**VALUES[recipe], **values})
    _log_epochs(log)
    return config, tiny, runs.folder(Path(runs), recipe, config)


def _log_epochs(log: str) -> None:
    """Append a line to `log` whenever an epoch begins."""
    straight = training.train_epoch

    def train_epoch(model: Any, optimizer: Any, split: Any, config: Any, epoch: int, *rest: Any) -> Iterator[Any]:
        with open(log, "a", encoding="utf-8") as file:
            file.write(f"{type(config).__name__} {epoch}\n")
        yield from straight(model, optimizer, split, config, epoch, *rest)

    training.train_epoch = train_epoch


@contextlib.contextmanager
def _armed(fault: Fault | None, options: dict[str, Any]) -> Iterator[None]:
    counts: Counter[str] = Counter()

    def line(frame: FrameType, event: str, _: Any) -> Any:
        if event == "line":
            place = f"{TRACED[frame.f_code.co_filename]}:{frame.f_lineno}"
            if fault and (place, counts[place]) == (fault.place, fault.occurrence):
                print("FAULT", flush=True)
                _strike(fault.kind, options)
            counts[place] += 1
        return line

    def call(frame: FrameType, *_: Any) -> Any:
        return line if frame.f_code.co_filename in TRACED else None

    if fault or "survey" in options:
        sys.settrace(call)
    try:
        yield
    finally:
        sys.settrace(None)
    if "survey" in options:
        Path(options["survey"]).write_text(json.dumps(counts), encoding="utf-8")


def _strike(kind: str, options: dict[str, Any]) -> None:
    if kind in SIGNALS:
        os.kill(os.getpid(), signal.Signals[kind])
    elif kind == "torn":  # killed when half of the next file is written
        _half_written(lambda: os.kill(os.getpid(), signal.SIGKILL))
    elif kind == "full":  # half of the next file fits on the disk
        _half_written(_no_space)
    elif kind == "limit":  # no file may be longer than this, a real error from the kernel
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
    elif kind == "fill":  # a real disk, full
        with contextlib.suppress(OSError), open(Path(options["fill"]) / "ballast", "wb", buffering=0) as file:
            while file.write(bytes(4096)):
                pass
    elif kind == "pause":
        signal.signal(signal.SIGUSR1, lambda *_: None)
        Path(options["paused"]).touch()
        signal.pause()
    else:  # a function of os that fails once it is called: fsync, replace, chmod
        setattr(os, kind, lambda *_, **__: _no_space())


def _no_space() -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def _half_written(then: Any) -> None:
    fdopen = os.fdopen

    def half(descriptor: int, *arguments: Any) -> Any:
        file = fdopen(descriptor, *arguments)

        class Half:
            def __enter__(self) -> Half:
                return self

            def __exit__(self, *_: object) -> None:
                file.close()

            def write(self, content: bytes) -> None:
                file.write(content[: len(content) // 2])
                file.flush()
                then()

        return Half()

    os.fdopen = half


def _unreliable(remote: Path, trouble: str) -> None:
    """Make the remote folder behave like Google Drive on a bad day."""
    copyfile, rename, calls = shutil.copyfile, os.replace, Counter[str]()

    def there(*paths: Any) -> bool:
        return any(Path(path).is_relative_to(remote) for path in paths)

    def copy(source: Any, target: Any) -> Any:
        if not there(target):
            return copyfile(source, target)
        calls["copy"] += 1
        if trouble == "fails" and calls["copy"] % 3:
            raise OSError(errno.EIO, "Input/output error")
        if trouble == "drops" and 2 <= calls["copy"] <= 6:  # the second file fails thrice, the third begins to fail
            raise OSError(errno.ENOTCONN, "Transport endpoint is not connected")
        if trouble == "is gone" and calls["copy"] >= 2:
            raise OSError(errno.ENOTCONN, "Transport endpoint is not connected")
        copyfile(source, target)
        if trouble == "lags" and calls["copy"] % 3:  # what can be read back yet is the beginning
            with open(target, "r+b") as file:
                file.truncate(100)
        return target

    def replaced(source: Any, target: Any) -> None:
        if there(target):
            calls["rename"] += 1
            if trouble == "fails" and calls["rename"] % 4 == 1:
                raise OSError(errno.EIO, "Input/output error")
        rename(source, target)

    shutil.copyfile, os.replace = copy, replaced
    checkpoint.time.sleep = lambda _: None


# ---- In the parent --------------------------------------------------------------------------------------------------


@dataclass
class Stage:
    """Tiny data, the undisturbed runs, and the processes that run on them."""

    root: Path
    surveys: dict[str, dict[str, int]] = field(default_factory=dict)
    started: int = 0

    def __post_init__(self) -> None:
        # The server reads PYTHONPATH, and neither sys.path nor what pytest has changed.
        here = os.pathsep.join([str(PROJECT), str(Path(__file__).parent)])
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [here, os.environ.get("PYTHONPATH", "")]))
        self.context = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload(["faulty", "torchvision", "filelock"])

    def write_data(self, tiny: Dataset) -> None:
        splits = (tiny.train, tiny.validation, tiny.test)
        torch.save([(split.images, split.labels) for split in splits], self.root / "data.pt")

    def launch(self, recipe: str, runs: Path, fault: Fault | None = None, **options: Any) -> Any:
        """Start a process; its output and its epochs are kept beside `runs`."""
        self.started += 1
        runs.parent.mkdir(parents=True, exist_ok=True)
        options |= {"log": str(epochs_of(runs)), "output": str(runs.parent / f"{runs.name}.{self.started}.out")}
        process = self.context.Process(target=child, args=(str(self.root), recipe, str(runs), fault, options))
        process.start()
        process.output = Path(options["output"])
        return process

    def wait(self, process: Any) -> Outcome:
        process.join(120)
        assert process.exitcode is not None, "it hangs"
        return Outcome(process.exitcode, process.output.read_text())

    def start(self, recipe: str, runs: Path, fault: Fault | None = None, **options: Any) -> Outcome:
        return self.wait(self.launch(recipe, runs, fault, **options))

    def straight(self, recipe: str) -> Path:
        """The undisturbed run's folder; made, and its moments counted, on the first call."""
        runs = self.root / f"straight_{recipe}"
        if recipe not in self.surveys:
            survey = self.root / f"{recipe}.survey"
            outcome = self.start(recipe, runs, survey=str(survey))
            assert outcome.code == 0, outcome.said
            self.surveys[recipe] = json.loads(survey.read_text())
        return runs

    def moments(self, recipe: str, kind: str = "SIGKILL", seed: int = 0) -> Iterator[Fault]:
        """Random moments, each once: first a line of the kit that the run passes, then which time it passes."""
        self.straight(recipe)
        survey, chance = self.surveys[recipe], random.Random(f"{recipe} {kind} {seed}")
        seen = set()
        while len(seen) < sum(survey.values()):
            place = chance.choice(sorted(survey))
            fault = Fault(kind, place, chance.randrange(survey[place]))
            if fault not in seen:
                seen.add(fault)
                yield fault

    def finish(self, recipe: str, runs: Path, **options: Any) -> int:
        """The next start: it must end well and equal the undisturbed run; returns the epochs that were lost."""
        outcome = self.start(recipe, runs, **options)
        assert outcome.code == 0, outcome.said
        assert_same(self.straight(recipe), runs)
        return lost(recipe, runs)

    def survive(self, recipe: str, runs: Path, fault: Fault) -> int:
        """Strike once, start again: the epochs that were lost."""
        outcome = self.start(recipe, runs, fault)
        assert "FAULT" in outcome.said, f"{fault} never came: {outcome.said}"
        expected = -signal.SIGKILL if fault.kind == "torn" else SIGNALS.get(fault.kind, REFUSED)
        assert outcome.code == expected, f"{fault} ended with {outcome.code}: {outcome.said}"
        if expected == REFUSED:
            assert_one_sentence(outcome)
            assert "cannot be written" in outcome.said
        return self.finish(recipe, runs)


def assert_one_sentence(outcome: Outcome) -> None:
    assert "Traceback" not in outcome.said, outcome.said
    assert outcome.said.splitlines()[-1].startswith("KitError: "), outcome.said


def epochs_of(runs: Path) -> Path:
    return runs.with_name(f"{runs.name}.epochs")


def lost(recipe: str, runs: Path) -> int:
    """Epochs that began more than once."""
    begun = epochs_of(runs).read_text().splitlines()
    assert len(set(begun)) == EPOCHS[recipe], begun
    return len(begun) - EPOCHS[recipe]


def assert_same(straight: Path, runs: Path, but: str = "") -> None:
    """The same finished runs: weights bit for bit, histories but for the time they took, records; no other file.

    `but` is a pattern of file names that may be there too.
    """
    folders = [path.parent.relative_to(straight) for path in straight.rglob("weights.pt")]
    assert folders
    for folder in folders:
        first, second = straight / folder, runs / folder
        names = [name for name in sorted(os.listdir(second)) if not (but and re.fullmatch(but, name))]
        assert names == FINISHED, names
        weights = [checkpoint.read(path / "weights.pt") for path in (first, second)]
        assert checkpoint.digest(weights[0]) == checkpoint.digest(weights[1])
        histories, records = (
            [json.loads((path / name).read_text()) for path in (first, second)]
            for name in ("history.json", "record.json")
        )
        for history in histories:
            for epoch in history["epochs"]:
                del epoch["seconds"]
        assert histories[0] == histories[1]
        assert records[0] == records[1]
