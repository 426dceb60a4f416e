"""What carries a sweep's runs out: processes of this machine, or an existing Ray or Dask cluster."""

from __future__ import annotations

import contextlib
import functools
import io
import os
import shutil
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from frlkit import KitError, checkpoint, data, disk, recipes, records, runs
from frlkit.recipes import Config
from frlkit.scale.sweeps import Engine, Run

Place = contextlib.AbstractContextManager[tuple[Engine, int]]  # an engine, and how many runs it takes at a time


def choose(backend: str, address: str, device: str, jobs: int | None, shares: int) -> Place:
    """What carries a sweep out; raises `KitError` where the command line's options do not go together."""
    if backend != "local" and not address:
        raise KitError(f"--backend {backend} needs its cluster's address: give --address HOST:PORT")
    if (backend == "local") == bool(address):
        raise KitError(f"--backend {backend} with --address {address!r} is not allowed: a cluster has one, local none")
    if backend == "local":
        return local(device, jobs, shares)
    if jobs:
        raise KitError(f"--jobs {jobs} is not allowed with --backend {backend}: the cluster has as many as it has")
    if backend == "dask" and shares > 1:
        raise KitError(f"--shares {shares} is not allowed with --backend dask: start a worker a share on each GPU")
    return cluster(backend, address, device, shares)


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
            with _deaf() as heard:
                results = pool(delayed(_here)(run, *place) for run in group)
            if heard:
                results.throw(KeyboardInterrupt)  # where the pool hears it, too
            yield from results

        yield engine, workers


@contextlib.contextmanager
def _deaf() -> Iterator[list[int]]:
    """Processes that begin now never hear Ctrl-C, and in this one, which ends them, it only fills this list."""
    from multiprocessing import resource_tracker

    from joblib.externals.loky.backend import resource_tracker as lokys

    heard: list[int] = []
    if not hasattr(signal, "pthread_sigmask") or threading.current_thread() is not threading.main_thread():
        yield heard
        return
    resource_tracker.ensure_running(), lokys.ensure_running()  # now: their start would end it
    before = signal.signal(signal.SIGINT, lambda number, _: heard.append(number))
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # which they inherit
    try:
        yield heard
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        signal.signal(signal.SIGINT, before)


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
            runs.run(run.config, _data(run.config.dataset, root, _gpu(gpus, slots) if gpus else "cpu"), run.folder)
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
    while True:
        for share in range(shares):
            if hold := disk.claim(Path(slots) / f"share{share}.lock"):
                _held.append(hold)
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
            start = files_of(run.start.folder) if run.start else {}
            files, error = carry_out(run.recipe, run.config, start, device)
            if not error:
                receive(run, files)
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


def files_of(place: Path) -> dict[str, bytes]:
    """A finished run's files by name; outcomes where it has them."""
    kept = [name for name in runs.FILES if name != records.OUTCOMES or (place / name).exists()]
    return {name: (place / name).read_bytes() for name in kept}


def receive(run: Run, files: Mapping[str, bytes]) -> None:
    """Keep what a worker sent back: only this run's own files, whole and at one with each other, reach its folder.

    Raises `KitError` where a file is missing or damaged, weights, record or history are another run's, the record is of
    other weights or lacks an attack, the history lacks epochs, or they are of other images or classes. It is that run's
    failure alone.
    """
    if missing := set(runs.FILES) - {records.OUTCOMES} - set(files):
        raise KitError(f"the worker sent no {min(missing)}")
    with tempfile.TemporaryDirectory(prefix="frlkit-") as scratch:
        place = Path(scratch)
        for name in set(runs.FILES) & set(files):
            (place / name).write_bytes(files[name])
        model, config = runs.read_weights(place / runs.WEIGHTS)
        record, history = records.read(place / "record.json"), records.read_history(place / "history.json")
        kept = records.outcomes(place / records.OUTCOMES, record.get("weights_sha256"))
    for found in (config, record.get("config", {}), history["config"]):
        checkpoint.refuse_other(run.folder, found, recipes.described(run.config))
    if record.get("weights_sha256") != checkpoint.digest(dict(model.state_dict())):
        raise KitError("the worker's record is of other weights than it sent")
    classes = {len(record["class_names"]), len(history["epochs"][0]["validation"]["natural"]), _outputs(model)}
    same = {record.get("data_sha256"), history.get("data_sha256")}
    if record["dataset"] != run.config.dataset or len(classes) > 1 or len(same) > 1:
        raise KitError("the worker's weights, record and history are not of one data set")
    if not counted(record):
        raise KitError("the worker's record has errors other than those of the images that it counts")
    if records.OUTCOMES in files and not kept:
        raise KitError("the worker's outcomes are of other weights than it sent")
    if len(history["epochs"]) != run.config.epochs or not runs.all_attacked(record, run.config):
        raise KitError("the worker sent an unfinished run")
    with disk.only_one(run.folder):
        for name in runs.FILES:
            if name in files:
                checkpoint.write_atomically(run.folder / name, files[name])
        checkpoint.remove(run.folder / "checkpoint.pt")


def counted(record: Mapping[str, Any]) -> bool:
    """Whether each attack's errors follow from the images it counts, and no class is right more often than clean."""
    for entry in record["attacks"]:
        table, counts, natural = entry["confusion"], record["class_counts"], np.array(record["natural"])
        if any(len(row) < len(table) or sum(row) != count for row, count in zip(table, counts, strict=True)):
            return False
        robust = 1 - np.diagonal([row[: len(table)] for row in table]) / counts
        said = np.array([entry["robust"], np.add(entry["boundary"], natural)])
        if not np.allclose(said, robust, atol=1e-6) or (robust < natural - 1e-6).any():
            return False
    return True


def _outputs(model: nn.Module) -> int:
    *_, bias = model.parameters()
    return len(bias)


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
    asked = checkpoint.digest({"recipe": recipe, "config": recipes.described(config), "start": start})
    scratch = disk.cache() / "runs" / asked[:16]
    place = runs.folder(scratch, recipe, config)
    try:
        for name, content in start.items():
            checkpoint.write_atomically(runs.start_folder(config, place) / name, content)
        tensors = _data(config.dataset, str(data.root()), str(data.pick_device(device)))
        runs.run(config, tensors, place)
        files = files_of(place)
    except Exception as error:  # told by name and sentence: not every exception survives the way back
        return {}, _sentence(error)
    shutil.rmtree(scratch, ignore_errors=True)
    return files, ""


def _sentence(error: Exception) -> str:
    if isinstance(error, torch.OutOfMemoryError):  # its own is a page
        return "the GPU's memory is full: run fewer at a time (--shares), and this command again"
    said = (str(error).splitlines() or [""])[0]
    return said if isinstance(error, KitError) else f"{type(error).__name__}: {said}"
