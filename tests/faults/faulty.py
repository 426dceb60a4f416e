"""The kit's own commands on tiny data, each in a process of its own, in which one thing goes wrong at an exact moment.

A moment is one of three: the n-th call that the process makes about files in the runs' folder (``file:41``, counted
before libc by ``shim.c``), a line of the kit and how often it ran before (``line:checkpoint.py:98#2``), or the n-th
step of the optimiser (``step:5``). It is the same in every start of the same command, so a failure can be repeated
(``campaign.py --repeat``). Processes are forked from a server that has imported everything, so each costs little more
than its training.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import itertools
import json
import multiprocessing
import os
import pickle
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from multiprocessing import forkserver
from pathlib import Path
from types import FrameType
from typing import Any

import nbformat
import safetensors
import torch

from frlkit import PROJECT, attacks, checkpoint, data, drive, kernels, models
from frlkit import runs as kit
from frlkit.data import Dataset

HERE = Path(__file__).resolve().parent
KIT = str(PROJECT / "frlkit")
_TRAIN = ("--dataset", "digits", "--batch-size", "25", "--epochs", "3", "--device", "cpu", "--runs", "{runs}")
_EVALUATE = ("--dataset", "digits", "--device", "cpu", "--json", "{runs}/errors.json")
#: What is struck: the words of a command line; {runs} is its folder, {root} the stage's.
COMMANDS: dict[str, tuple[str, ...]] = {
    "pgd_at": ("train", "pgd_at", *_TRAIN),
    # from a start of one epoch; no tolerance: on so few images the multipliers would not move otherwise
    "algorithm1_both": ("train", "algorithm1_both,start_epochs=1,tau_nat=0.0,tau_bdy=0.0", *_TRAIN),
    "evaluate": ("evaluate", "{root}/weights.safetensors", *_EVALUATE),
    "ladder": ("ladder", "{root}/weights.safetensors", "{runs}/ladder.json"),  # no command of the kit's: see `_climb`
    "reproduce": ("reproduce", "--dataset", "digits", "--output", "{runs}"),  # of two small notebooks
}
STEPS = {"pgd_at": 6, "algorithm1_both": 8}  # of the optimiser, two an epoch
TITLES = {"pgd_at": "train pgd_at", "algorithm1_both": "train algorithm1_both"}
SIGNALS = {"SIGKILL": {-signal.SIGKILL}, "SIGTERM": {-signal.SIGTERM}, "SIGINT": {130, 1, 0}}  # how the process ends
CHANGES = {"create", "write", "fsync", "rename", "remove", "lock", "unlock", "mkdir", "rmdir", "chmod"}


@dataclass(frozen=True)
class Fault:
    """What happens (a signal, or what fails) and when."""

    kind: str
    moment: str

    def __str__(self) -> str:
        return f"{self.kind}@{self.moment}"

    @classmethod
    def parse(cls, text: str) -> Fault:
        return cls(*text.split("@"))

    def at(self, sort: str) -> str:
        """The moment, where it is of this sort; else nothing."""
        found, _, rest = self.moment.partition(":")
        return rest if found == sort else ""


@dataclass
class Outcome:
    """How a process ended, and what it printed."""

    code: int | None
    said: str


# ---- In the child ---------------------------------------------------------------------------------------------------


def child(root: str, name: str, runs: str, fault: Fault | None, options: dict[str, Any]) -> None:
    """Carry out a command, with this fault and, where ``again``, a second time without; the exit status says how."""
    output = os.open(options["output"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1), os.dup2(output, 2)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    prepare(root, options["steps"], fault, options)
    if options.get("user"):
        os.setgid(options["user"])
        os.setuid(options["user"])
    if "remote" in options:
        _unreliable(Path(options["remote"]), options["trouble"])
        drive.mirror(Path(runs), Path(options["remote"]))
    with _armed(fault, runs, options):
        code = carry_out(name, root, runs, options.get("words", ()))
    print(f"\nended with {code}", flush=True)
    if options.get("again"):
        code = carry_out(name, root, runs)
    sys.stdout.flush()
    os._exit(code)


def carry_out(name: str, root: str, runs: str, more: tuple[str, ...] = ()) -> int:
    """A command line's exit status."""
    from frlkit.__main__ import main

    words = [word.format(root=root, runs=runs) for word in (*COMMANDS[name], *more)]
    command = _climb if words[0] == "ladder" else main
    if words[0] == "reproduce":
        _small_project(Path(root))
    try:
        command(words[1:] if command is _climb else words, prog_name="frlkit")
    except SystemExit as end:
        return int(end.code or 0)
    except KeyboardInterrupt:
        return 130
    return 0


def _climb(words: list[str], prog_name: str) -> None:
    """The ladder from a command line: a radius at which PGD fools every image, five images between two writes."""
    import click

    from frlkit import KitError
    from frlkit.audit import ladder
    from frlkit.audit.weights import find, fit

    model, ladder.CHUNK = models.build("lenet5"), 5
    try:
        fit(model, find(Path(words[0])))
        ladder.climb(model, ladder.subset(data.load("digits").test, 20, 10), 128.0, Path(words[1]))
    except KitError as error:
        click.echo(f"Error: {error}", err=True)
        sys.exit(1)


def _small_project(root: Path) -> None:
    """Two notebooks that need no kernel, in place of the kit's; what is published tells no time and no place."""
    from papermill.engines import Engine, papermill_engines

    from frlkit import reproduce
    from frlkit.report import pages

    class NoKernel(Engine):
        @classmethod
        def execute_managed_notebook(cls, nb_man: Any, kernel_name: str, **_: Any) -> None:
            for index, cell in enumerate(nb_man.nb.cells):
                nb_man.cell_start(cell, index)
                if cell.cell_type == "code":
                    cell.outputs = [nbformat.v4.new_output("stream", name="stdout", text="four\n")]
                nb_man.cell_complete(cell, cell_index=index)

    papermill_engines.register(None, NoKernel)
    reproduce.PROJECT, reproduce.NOTEBOOKS = root, root / "notebooks"
    reproduce.took = pages.took = lambda _: "no time"
    reproduce._shown = lambda path: path.name
    pages._now, pages.commit = lambda: "now", lambda: "none"
    nbformat.v4.nbbase.random_cell_id = lambda: "injected"


def write_notebooks(folder: Path) -> None:
    """One that has a data set, and one that has none."""
    (folder / "profiles").mkdir(parents=True)
    (folder / "profiles" / "digits.yaml").write_text("DATASET: digits\n", encoding="utf-8")
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    for stem, first in (("01_small", 'DATASET = "digits"\n'), ("02_theory", "")):
        parameters = nbformat.v4.new_code_cell(
            f'{first}FIGURES = ""', id="parameters", metadata={"tags": ["parameters"]}
        )
        cells = [nbformat.v4.new_markdown_cell(f"# {stem}", id="heading"), parameters]
        cells.append(nbformat.v4.new_code_cell("2 + 2", id="sum"))
        nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=kernel), folder / f"{stem}.ipynb")


def prepare(root: str, steps: str, fault: Fault | None, options: dict[str, Any]) -> None:
    """Tiny data in place of the digits, and an eye on the optimiser; also used inside a notebook's kernel."""
    from torch.optim.optimizer import register_optimizer_step_pre_hook
    from tqdm import tqdm

    torch.set_num_threads(1)
    tqdm.set_lock(threading.RLock())  # its own lock is a semaphore, which a killed process leaves behind
    tiny = pickle.loads(Path(root, "data.pickle").read_bytes())
    data.load = lambda *_, **__: tiny
    # loaded now, while the cache of the native path can still be read
    attacks.logits(models.build("lenet5", seed=0), torch.zeros(1, 1, 32, 32))
    kernels.available(models.build("lenet5", seed=0))
    taken = 0

    def step(*_: Any) -> None:
        nonlocal taken
        with open(steps, "a", encoding="utf-8") as file:
            file.write(".")
        taken += 1
        if fault and fault.at("step") == str(taken - 1):
            print("FAULT", flush=True)
            strike(fault.kind, options)

    register_optimizer_step_pre_hook(step)


def strike(kind: str, options: dict[str, Any]) -> None:
    """What happens at a line or a step."""
    if kind in SIGNALS:
        os.kill(os.getpid(), signal.Signals[kind])
    elif kind == "limit":  # no file may be longer than this, a real error from the kernel
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
    elif kind == "sleep":
        print("in the middle", flush=True)
        time.sleep(600)
    else:  # until the parent wakes it
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})  # one that comes before it waits counts, too
        Path(options["paused"]).touch()
        signal.sigwait({signal.SIGUSR1})


@contextlib.contextmanager
def _armed(fault: Fault | None, runs: str, options: dict[str, Any]) -> Iterator[None]:
    library, log = ctypes.CDLL(None), options.get("survey", "")
    if fault and (number := fault.at("file")):
        how = {"torn": 3, "EIO": 2, "ENOSPC": 2, "gone": 4}.get(fault.kind, 1)
        value = {"torn": signal.SIGKILL, "EIO": errno.EIO, "ENOSPC": errno.ENOSPC, "gone": errno.ENOTCONN}
        struck = value.get(fault.kind) or signal.Signals[fault.kind]
        library.frlkit_fault(runs.encode(), b"", how, ctypes.c_long(int(number)), struck)
    elif log and hasattr(library, "frlkit_fault"):
        library.frlkit_fault(runs.encode(), f"{log}.files".encode(), 0, ctypes.c_long(0), 0)
    counts: Counter[str] = Counter()

    def line(frame: FrameType, event: str, _: Any) -> Any:
        if event == "line":
            place = f"{frame.f_code.co_filename[len(KIT) + 1 :]}:{frame.f_lineno}"
            if fault and fault.at("line") == f"{place}#{counts[place]}":
                print("FAULT", flush=True)
                strike(fault.kind, options)
            counts[place] += 1
        return line

    def call(frame: FrameType, *_: Any) -> Any:
        return line if frame.f_code.co_filename.startswith(KIT) else None

    if (log and options["lines"]) or (fault and fault.at("line")):
        sys.settrace(call)
    try:
        yield
    finally:
        sys.settrace(None)
        if hasattr(library, "frlkit_fault"):
            library.frlkit_fault(b"", b"", 0, ctypes.c_long(0), 0)
    if log:
        Path(f"{log}.lines").write_text(json.dumps(counts), encoding="utf-8")


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
    drive.time.sleep = lambda _: None


# ---- In the parent --------------------------------------------------------------------------------------------------


def build_shim(folder: Path) -> Path | None:
    """The library that stands before libc; None where there is no C compiler, or no libc that it can stand before."""
    compiler, library = shutil.which("cc") or shutil.which("gcc"), folder / "shim.so"
    if compiler is None or not sys.platform.startswith("linux"):
        return None
    subprocess.run([compiler, "-shared", "-fPIC", "-O1", "-o", library, HERE / "shim.c", "-ldl"], check=True)
    return library


@dataclass
class Stage:
    """Tiny data, the undisturbed runs, and the processes that run on them."""

    root: Path
    surveys: dict[str, dict[str, int]] = field(default_factory=dict)  # lines of the kit, and how often each runs
    events: dict[str, list[str]] = field(default_factory=dict)  # calls about files, in order
    started: Iterator[int] = field(default_factory=itertools.count)

    def __post_init__(self) -> None:
        # The server reads the environment, and neither sys.path nor what pytest has changed.
        path = os.pathsep.join([str(PROJECT), str(HERE)])
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [path, os.environ.get("PYTHONPATH", "")]))
        self.shim = build_shim(self.root)
        self.context = multiprocessing.get_context("forkserver")
        loaded = ["cases", "hypothesis", "nbconvert", "papermill", "torchvision"]
        self.context.set_forkserver_preload([*loaded, "frlkit.__main__", "frlkit.reproduce", "frlkit.runs"])
        before = os.environ.get("LD_PRELOAD")
        if self.shim:
            os.environ["LD_PRELOAD"] = " ".join(filter(None, [str(self.shim), before]))
        forkserver.ensure_running()  # now, so that nothing else has the library before libc
        os.environ.pop("LD_PRELOAD", None)
        if before is not None:
            os.environ["LD_PRELOAD"] = before

    def write_data(self, tiny: Dataset) -> None:
        (self.root / "data.pickle").write_bytes(pickle.dumps(tiny))
        state = models.build("lenet5", seed=0).state_dict()
        kit.write_weights(self.root / "weights.safetensors", state, {"model": "lenet5"}, 10)  # says itself what it is
        write_notebooks(self.root / "notebooks")

    def launch(self, name: str, runs: Path, fault: Fault | None = None, **options: Any) -> Any:
        """Start a process; its output and the optimiser's steps are kept beside `runs`."""
        number = next(self.started)
        runs.parent.mkdir(parents=True, exist_ok=True)
        options |= {"steps": str(steps_of(runs)), "output": str(runs.parent / f"{runs.name}.{number}.out")}
        process = self.context.Process(target=child, args=(str(self.root), name, str(runs), fault, options))
        process.start()
        process.output = Path(options["output"])
        return process

    def wait(self, process: Any) -> Outcome:
        process.join(600)  # others may be busy here
        if process.exitcode is None:
            process.kill()
            raise AssertionError(f"it hangs: {process.output.read_text(encoding='utf-8')}")
        return Outcome(process.exitcode, process.output.read_text(encoding="utf-8"))

    def start(self, name: str, runs: Path, fault: Fault | None = None, **options: Any) -> Outcome:
        return self.wait(self.launch(name, runs, fault, **options))

    def straight(self, name: str) -> Path:
        """The undisturbed command's folder; made, and its moments counted, on the first call."""
        runs = self.root / f"straight_{name}"
        if name not in self.surveys:
            survey = self.root / f"{name}.survey"
            outcome = self.start(name, runs, survey=str(survey), lines=name in STEPS)
            assert outcome.code == 0, outcome.said
            self.surveys[name] = json.loads(Path(f"{survey}.lines").read_text(encoding="utf-8"))
            files = Path(f"{survey}.files")
            self.events[name] = files.read_text(encoding="utf-8").splitlines() if files.exists() else []
        return runs

    def moments(self, name: str, kind: str = "SIGKILL", seed: int = 0) -> Iterator[Fault]:
        """Random lines of the kit, each once: first a line that the command passes, then which time it passes."""
        self.straight(name)
        survey, chance = self.surveys[name], random.Random(f"{name} {kind} {seed}")
        seen = set()
        while len(seen) < sum(survey.values()):
            place = chance.choice(sorted(survey))
            fault = Fault(kind, f"line:{place}#{chance.randrange(survey[place])}")
            if fault not in seen:
                seen.add(fault)
                yield fault

    def file_events(self, name: str, kind: str) -> list[Fault]:
        """This fault at every file event: signals where a file changes, half writes at each write, errors at all."""
        self.straight(name)
        wanted = {"torn": {"write"}, "ENOSPC": {"create", "write", "fsync", "mkdir"}}.get(kind)
        if wanted is None and kind in SIGNALS:
            wanted = CHANGES
        calls = enumerate(event.split()[0] for event in self.events[name])
        return [Fault(kind, f"file:{number}") for number, call in calls if wanted is None or call in wanted]

    def finish(self, name: str, runs: Path, but: str = "", **options: Any) -> int:
        """The next start: it must end well and equal the undisturbed one; returns the epochs that were lost."""
        outcome = self.start(name, runs, **options)
        assert outcome.code == 0, outcome.said
        assert_same(self.straight(name), runs, but)
        return lost(name, runs)

    def survive(self, name: str, runs: Path, fault: Fault) -> int:
        """Strike once, start again: the epochs that were lost."""
        if fault.kind in ("EIO", "ENOSPC", "gone"):
            return self.survive_error(name, runs, fault)
        outcome = self.start(name, runs, fault)
        if not fault.at("file"):
            assert "FAULT" in outcome.said, f"{fault} never came: {outcome.said}"
        expected = {-signal.SIGKILL} if fault.kind == "torn" else SIGNALS.get(fault.kind, {1})
        assert outcome.code in expected, f"{fault} ended with {outcome.code}: {outcome.said}"
        if fault.kind == "limit":
            assert_one_sentence(outcome.said)
        return self.finish(name, runs)

    def survive_error(self, name: str, runs: Path, fault: Fault) -> int:
        """The file system answers with an error; then the same command again, in the same process."""
        outcome = self.start(name, runs, fault, again=True)
        assert outcome.code == 0, f"{fault}, again: {outcome.said}"
        assert not re.search(r"Traceback|Errno|Deadlock|os error", outcome.said), outcome.said
        if "\nended with 0" not in outcome.said:
            assert_one_sentence(outcome.said)
        assert_same(self.straight(name), runs)
        return lost(name, runs)


def assert_one_sentence(said: str) -> None:
    said = said.partition("\nended with ")[0]
    assert "Traceback" not in said, said
    assert said.strip().splitlines()[-1].startswith("Error: "), said


def steps_of(runs: Path) -> Path:
    return runs.with_name(f"{runs.name}.steps")


def lost(name: str, runs: Path) -> int:
    """Epochs, begun or whole, that were trained again."""
    if name not in STEPS:
        return 0
    again = len(steps_of(runs).read_text(encoding="utf-8")) - STEPS[name]
    assert again >= 0
    return -(-again // 2)


def assert_same(straight: Path, runs: Path, but: str = "") -> None:
    """The same files: JSON but for the seconds it took, checkpoints by their content, all else byte by byte.

    `but` is a pattern of names of files that may be there too.
    """
    found, wanted = (
        {path.relative_to(top): path for path in top.rglob("*") if path.is_file()} for top in (runs, straight)
    )
    extra = {str(name) for name in found if not (but and re.fullmatch(but, name.name))} ^ set(map(str, wanted))
    assert wanted, straight
    assert not extra, sorted(extra)
    for name, path in wanted.items():
        contents = [_content(file) for file in (path, found[name])]
        assert contents[0] == contents[1], name


def _content(path: Path) -> Any:
    if path.suffix == ".pt":
        return checkpoint.digest(checkpoint.read(path))
    if path.suffix == ".safetensors":  # which writes its header in any order
        with safetensors.safe_open(path, framework="pt") as file:
            return file.metadata(), checkpoint.digest({name: file.get_tensor(name) for name in sorted(file.keys())})
    return _timeless(json.loads(path.read_bytes())) if path.suffix in (".json", ".ipynb") else path.read_bytes()


def _timeless(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _timeless(item) for key, item in value.items() if key not in TIMES}
    return [_timeless(item) for item in value] if isinstance(value, list) else value


TIMES = ("seconds", "cpu_seconds", "duration", "start_time", "end_time", "input_path", "output_path")


def temporary(prefix: str = "faults-") -> Path:
    """A folder that every user can enter."""
    place = Path(tempfile.mkdtemp(prefix=prefix))
    place.chmod(0o755)
    return place
