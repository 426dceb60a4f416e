"""``python -m frlkit sweep FILE``: a grid of runs, each the same resumable unit that the notebooks read.

A file has a grid: entries with a recipe and lists of values, whose every combination is a run. What stands beside the
grid is every entry's default::

    dataset: fashion_mnist
    seed: [0, 1, 2]
    grid:
      - recipe: report_reweight
        alpha_nat: [1, 5]
        alpha_bdy: [1, 5]
        values: {epochs: 8}  # fields that do not show in the folder's name, as those that the notebooks set
      - recipe: [natural, pgd_at]
        seed: 0

joblib sends the runs to processes of this machine, one thread each, or to a Ray or Dask cluster. What is finished is
not run again, so the same command goes on after Ctrl-C, a kill or a failure.
"""

from __future__ import annotations

import contextlib
import functools
import io
import itertools
import os
import shutil
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from frlkit import KitError, checkpoint, data, evaluation, training
from frlkit.evaluation import Attack
from frlkit.training import Config, FairConfig

DEFAULTS = {"dataset": "fashion_mnist", "seed": 0, "values": {}}
#: The paper's symbols, which an entry may use for the fields they stand for.
SYMBOLS = {
    "alpha1": ("alpha_nat",),
    "alpha2": ("alpha_bdy",),
    "tau": ("tau_nat", "tau_bdy"),
    "eps": ("eps_255",),
}
BACKENDS = ("local", "ray", "dask")
FILES = ("weights.pt", "history.json", "record.json")  # of a finished run; the record makes it one, so it comes last


@dataclass(frozen=True)
class Run:
    """One run: its recipe with the fields varied, its configuration, its folder."""

    recipe: str
    config: Config
    folder: Path

    @property
    def name(self) -> str:
        return "/".join(self.folder.parts[-3:])  # DATASET/RECIPE/seedN

    @property
    def start(self) -> Run | None:
        """The run that has to be finished before this one."""
        if not isinstance(self.config, FairConfig):
            return None
        return Run(self.config.start, *training.start_of(self.config, self.folder))

    @property
    def done(self) -> bool:
        """Whether it is finished. Raises `KitError` where the folder's record is damaged or another run's."""
        path = self.folder / "record.json"
        if not path.exists() or not (self.folder / "weights.pt").exists():
            return False
        record = evaluation.read_record(path)
        checkpoint.refuse_other(path, record.get("config", {}), training.described(self.config))
        # a kill between two attacks leaves a record with the first
        return {Attack(**entry["attack"]) for entry in record["attacks"]} >= set(evaluation.STANDARD)


#: Carries runs out; yields each one's folder, what went wrong or nothing, and what it said on the way.
Engine = Callable[[Sequence[Run]], Iterator[tuple[Path, str, str]]]


def plan(path: Path, runs: Path) -> list[Run]:
    """Every run of a sweep file, and those they start from; a run stands behind the one that it starts from.

    Raises `KitError` where the file cannot be read, has an unknown key, recipe, field or value, or asks for two
    different runs in one folder, or for one whose folder holds another: before anything starts.
    """
    import yaml

    try:
        sweep = yaml.safe_load(path.read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise KitError(f"the sweep {path} cannot be read: {' '.join(str(error).split())}") from None
    if not isinstance(sweep, dict) or not isinstance(sweep.get("grid"), list) or not sweep["grid"]:
        raise KitError(f"the sweep {path} has no grid: give it a list of entries, such as '- recipe: pgd_at'")
    if unknown := set(sweep) - {"grid", *DEFAULTS}:
        names = ", ".join(["grid", *DEFAULTS])
        raise KitError(f"{min(map(str, unknown))!r} is no key of a sweep beside its grid: use {names}")
    found: dict[Path, Run] = {}
    for entry in sweep.pop("grid"):
        for run in _expand(entry, sweep, runs):
            for one in filter(None, (run.start, run)):
                _refuse_two(found.setdefault(one.folder, one), one)
    for run in found.values():
        _ = run.done  # refuses another run's folder
    return sorted(found.values(), key=lambda run: run.start is not None)


def _refuse_two(one: Run, other: Run) -> None:
    """Raise `KitError` where two runs of one folder differ."""
    here, there = asdict(one.config), asdict(other.config)
    for name in here:
        if here[name] != there.get(name):
            raise KitError(
                f"{one.name} is asked for twice, with {name} = {here[name]!r} and {there.get(name)!r}: make them equal "
                "(a retraining run's start_epochs are its starting run's epochs), or vary it in the grid"
            )


def _expand(entry: Any, defaults: dict[str, Any], runs: Path) -> Iterator[Run]:
    """The runs of one entry of the grid."""
    if not isinstance(entry, dict) or "recipe" not in entry:
        raise KitError(f"{entry!r} is no entry of a grid: use a recipe and lists of values, such as 'recipe: pgd_at'")
    entry = {**DEFAULTS, **defaults, **entry}
    values = entry.pop("values")
    if not isinstance(values, dict):
        raise KitError(f"values = {values!r} is not allowed: use fields and values, such as {{epochs: 8}}")
    choices = {key: value if isinstance(value, list) else [value] for key, value in entry.items()}
    if empty := [key for key, listed in choices.items() if not listed]:
        raise KitError(f"{empty[0]} = [] is not allowed in a grid: give at least one value")
    recipes, datasets, seeds = (choices.pop(key) for key in ("recipe", "dataset", "seed"))
    for name, dataset, seed, point in itertools.product(recipes, datasets, seeds, itertools.product(*choices.values())):
        varied = [
            f"{field}={_text(value)}" for key, value in zip(choices, point, strict=True) for field in _fields(key)
        ]
        recipe = ",".join([str(name), *varied])
        config = training.configure(recipe, dataset, seed, **values)
        yield Run(recipe, config, training.folder(runs, recipe, config))


def _fields(key: Any) -> tuple[str, ...]:
    return SYMBOLS.get(key, (str(key),))


def _text(value: Any) -> str:
    """A value as the notebooks write it into a recipe's name: 5.0 is 5."""
    return f"{value:g}" if isinstance(value, float) and float(f"{value:g}") == value else str(value)


def estimate(planned: Sequence[Run], runs: Path, workers: int) -> float | None:
    """Seconds that what is left takes on so many workers, from finished runs of one thread; None without any.

    An epoch takes what it took the finished runs of the same recipe, else of any, with the same data and batches.
    """
    seconds: dict[tuple[Any, ...], list[float]] = {}
    for path in runs.glob("*/*/seed*/history.json"):
        history = evaluation.read_record(path)
        config = history["config"]
        key = (config["dataset"], config["model"], config["batch_size"])
        taken = [history["threads"] * entry["seconds"] for entry in history["epochs"]]
        for kind in (key, (*key, path.parent.parent.name.split(",")[0])):
            seconds.setdefault(kind, []).extend(taken)
    total = 0.0
    for run in planned:
        if not run.done:
            key = (run.config.dataset, run.config.model, run.config.batch_size)
            taken = seconds.get((*key, run.recipe.split(",")[0])) or seconds.get(key)
            if not taken:
                return None
            total += run.config.epochs * statistics.median(taken)
    return total / workers


def sweep(planned: Sequence[Run], engine: Engine) -> dict[str, str]:
    """Carry out what is missing of a plan; returns what went wrong, run -> sentence.

    A run that fails does not stop the others, only those that start from it. Where processes die and take others'
    work with them, what is missing is run again; a run that dies alone has failed.
    """
    from joblib.externals.loky.process_executor import BrokenProcessPool

    failed: dict[Path, str] = {}
    finished = sum(run.done for run in planned)
    with tqdm(total=len(planned), initial=finished, unit="run", disable=not training.watched()) as bar:
        for first in (True, False):  # those that start from another wait until all the others are there
            alone = False
            while left := _left([run for run in planned if (run.start is None) == first], failed):
                group, progress = left[:1] if alone else left, False
                try:
                    for folder, error, said in engine(group):
                        progress = True
                        name = "/".join(folder.parts[-3:])
                        if said:
                            tqdm.write(f"{name}: {said.strip()}")
                        if error:
                            failed[folder] = error
                        bar.update()
                        if not training.watched():
                            finished += 1
                            print(f"{finished}/{len(planned)} {name} {'failed' if error else 'finished'}", flush=True)
                except BrokenProcessPool:
                    if alone:
                        failed[group[0].folder] = "its process was killed or crashed, though it ran alone"
                alone = not progress
    return {run.name: failed[run.folder] for run in planned if run.folder in failed}


def _left(group: Sequence[Run], failed: dict[Path, str]) -> list[Run]:
    """What of a group is neither finished nor failed. A run whose starting run failed has failed."""
    left = [run for run in group if run.folder not in failed and not run.done]
    for run in left:
        if run.start is not None and run.start.folder in failed:
            failed[run.folder] = f"{run.start.name}, which it starts from, failed"
    return [run for run in left if run.folder not in failed]


@contextlib.contextmanager
def local(device: str = "auto", jobs: int | None = None, shares: int = 1) -> Iterator[tuple[Engine, int]]:
    """An engine of processes on this machine, one thread each, and their number: `jobs`, or as many as there are cores.

    On CUDA as many as there are GPUs, or shares of them. Raises `KitError` for a device that is absent.
    """
    from joblib import Parallel, cpu_count, delayed

    gpus = torch.cuda.device_count() * shares if data.pick_device(device).type == "cuda" else 0
    workers = jobs or gpus or cpu_count()

    with tempfile.TemporaryDirectory(prefix="frlkit-") as slots:
        loaded: set[str] = set()

        def engine(group: Sequence[Run]) -> Iterator[tuple[Path, str, str]]:
            for name in {run.config.dataset for run in group} - loaded:
                data.load(name)  # refused, downloaded and resized once, not by every process
                loaded.add(name)
            place = (str(data.root().resolve()), gpus, slots)
            pool = Parallel(
                n_jobs=workers,
                backend="loky",
                return_as="generator_unordered",
                batch_size=1,
                initializer=_begin,
                initargs=(os.getpid(),),
            )
            yield from pool(delayed(_here)(run, *place) for run in group)

        yield engine, workers


def _begin(parent: int) -> None:
    """Ready a process of this machine: it ends soon after the sweep's, which a kill may keep from saying so."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)  # as safe as a kill

    threading.Thread(target=watch, daemon=True).start()
    tqdm.set_lock(threading.RLock())  # its own lock is for several processes, and a killed one leaves it behind


def _here(run: Run, root: str, gpus: int, slots: str) -> tuple[Path, str, str]:
    """Carry out a run in a process of this machine. Its progress is not shown: many would write at once."""
    os.environ["FRLKIT_DATA"] = root
    threads, said = torch.get_num_threads(), io.StringIO()
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(said):
            torch.set_num_threads(1)
            training.run(run.config, _data(run.config.dataset, root, _gpu(gpus, slots) if gpus else "cpu"), run.folder)
    except Exception as error:  # whatever it is, the sweep goes on without this run
        return run.folder, _sentence(error), said.getvalue()
    finally:
        torch.set_num_threads(threads)
    return run.folder, "", said.getvalue()


@functools.lru_cache(maxsize=1)
def _data(name: str, root: str, device: str) -> data.Dataset:
    """A process's runs share their data; `root` only tells one folder's from another's."""
    return data.load(name, device=device)


_held: list[Any] = []  # the lock of this process's share


@functools.cache
def _gpu(shares: int, slots: str) -> str:
    """The GPU of this process: it takes a free share and holds it until it ends, however it ends."""
    from filelock import FileLock, Timeout

    while True:
        for share in range(shares):
            lock = FileLock(Path(slots) / f"share{share}.lock")
            with contextlib.suppress(Timeout):
                lock.acquire(timeout=0)
                _held.append(lock)
                return f"cuda:{share % torch.cuda.device_count()}"
        time.sleep(0.1)


@contextlib.contextmanager
def cluster(backend: str, address: str, device: str = "auto", shares: int = 1) -> Iterator[tuple[Engine, int]]:
    """An engine of an existing Ray or Dask cluster, and the number of runs it takes at a time.

    A run's folder travels there and back, so no file system is shared; the kit has to be installed there, and finds its
    data there. A worker that dies costs its run alone, which Ray and Dask send to another by themselves. Raises
    `KitError` where the cluster or the library is not there.
    """
    from joblib import Parallel, delayed

    connect = {"ray": _ray, "dask": _dask}[backend]
    try:
        carry_out, workers, leave = connect(address, device, shares)
    except ImportError:
        library = {"ray": "ray", "dask": "distributed"}[backend]
        raise KitError(f"backend = {backend!r} needs a library that is not there: pip install {library}") from None
    except Exception as error:  # both libraries raise anything
        raise KitError(f"there is no {backend} cluster at {address} ({_sentence(error)}): see --address") from None

    def one(run: Run) -> tuple[Path, str, str]:
        try:
            start = {name: (run.start.folder / name).read_bytes() for name in FILES} if run.start else {}
            files, error = carry_out(run.recipe, run.config, start, device)
            if not error:
                with checkpoint.only_one(run.folder):
                    for name in FILES:
                        checkpoint.write_atomically(run.folder / name, files[name])
                    checkpoint.remove(run.folder / "checkpoint.pt")
        except Exception as trouble:  # its worker died again and again, or the disk is full
            return run.folder, _sentence(trouble), ""
        return run.folder, error, ""

    def engine(group: Sequence[Run]) -> Iterator[tuple[Path, str, str]]:
        # A thread for each run waits for its result. The joblib backends of Ray and Dask send whole calls instead: the
        # former gives nothing back before all of them are done, and a worker that dies takes them all along.
        pool = Parallel(n_jobs=len(group), backend="threading", return_as="generator_unordered", batch_size=1)
        yield from pool(delayed(one)(run) for run in group)

    try:
        yield engine, workers
    finally:
        leave()


def _ray(address: str, device: str, shares: int) -> tuple[Callable[..., Any], int, Callable[[], None]]:
    import ray

    ray.init(address=address, log_to_driver=False, logging_level="ERROR")
    gpus = 1 / shares if device == "cuda" else 0
    task = ray.remote(num_cpus=1, num_gpus=gpus)(away)
    workers = ray.cluster_resources().get("GPU", 0) * shares if gpus else ray.cluster_resources().get("CPU", 0)
    return lambda *words: ray.get(task.remote(*words)), max(1, int(workers)), ray.shutdown


def _dask(address: str, device: str, shares: int) -> tuple[Callable[..., Any], int, Callable[[], None]]:
    from distributed import Client

    client = Client(address, timeout=5)
    return (
        lambda *words: client.submit(away, *words, pure=False).result(),
        max(1, sum(client.nthreads().values())),
        client.close,
    )


def away(recipe: str, config: Config, start: dict[str, bytes], device: str) -> tuple[dict[str, bytes], str]:
    """Carry out a run on a cluster's worker: the finished run's files by name, or what went wrong.

    `start` has the files of the run that it starts from. The working folder lies in the user's cache, under a name made
    from all of this, so that the same run, sent again to the same machine, goes on from its last epoch.
    """
    torch.set_num_threads(1)
    asked = checkpoint.digest({"recipe": recipe, "config": training.described(config), "start": start})
    scratch = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "frlkit" / "runs" / asked[:16]
    place = training.folder(scratch, recipe, config)
    try:
        for name, content in start.items():
            checkpoint.write_atomically(training.start_of(config, place)[1] / name, content)
        tensors = _data(config.dataset, str(data.root()), str(data.pick_device(device)))
        training.run(config, tensors, place)
        files = {name: (place / name).read_bytes() for name in FILES}
    except Exception as error:  # told by name and sentence: not every exception survives the way back
        return {}, _sentence(error)
    shutil.rmtree(scratch, ignore_errors=True)
    return files, ""


def _sentence(error: Exception) -> str:
    said = (str(error).splitlines() or [""])[0]
    return said if isinstance(error, KitError) else f"{type(error).__name__}: {said}"
