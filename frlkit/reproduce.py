"""``python -m frlkit reproduce``: the numbered notebooks through papermill, HTML copies, an index, the claims table.

Each notebook has a folder of its own in the output: executed copy, HTML page, figures and, last, a note of what made
them. It is made in ``unfinished/`` and moved as a whole: what stands under a notebook's name is finished and its own.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import logging
import os
import re
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from frlkit import PROJECT, KitError, checkpoint, data, disk, took
from frlkit.notebook import versions
from frlkit.report import claims, pages

NOTEBOOKS = PROJECT / "notebooks"
LIBRARIES = versions("torch", "torchvision", "numpy", "scipy", "pandas", "matplotlib")  # what results depend on
#: Data set -> notebooks/profiles/*.yaml; Fashion-MNIST and anyone's own have the schedule of "full".
PROFILES = {**{name: name for name in ("digits", "cifar10", "gtsrb", "gtsrb17")}, "svhn": "paper_svhn"}
#: Data set -> notebooks without runs there: nothing is retrained on 43 signs, and certificates are Fashion-MNIST's.
LEFT_OUT = {"gtsrb": "03, 04, 05, 07", **dict.fromkeys(("gtsrb17", "cifar10", "svhn"), "07")}


@dataclass(frozen=True)
class Job:
    """One notebook under one set of parameters; its outputs are in the folder `name`."""

    source: Path
    name: str
    parameters: dict[str, Any]
    live: bool  # whether its data set is there
    images: str = ""  # their fingerprint, where they are there

    def runs(self, root: str = "") -> Path | None:
        """Where the runs of its data set lie, its own or those under `root`; None where it has no data set."""
        root, dataset = root or self.parameters.get("RUNS") or "checkpoints", self.parameters.get("DATASET")
        return PROJECT / root / data.folder_name(dataset) if dataset else None

    def to_train(self) -> list[Path]:
        """The folders of those shipped runs that are not where it looks for them, and that it can train anew."""
        own, shipped = self.runs(), self.runs("checkpoints")
        found = [path.parent for path in shipped.glob("*/seed*/record.json")] if shipped and self.live else []
        return [run for run in found if not (own / run.relative_to(shipped) / "record.json").exists()]


def reproduce(dataset: str, output: Path, *, retrain: bool = False, profile: str = "") -> str:
    """Run whatever is not up to date under `output` and return the claims table as text.

    Without the data set, says so in one line, draws the study from the shipped records and runs it live on the embedded
    digits. With `retrain`, everything is trained from nothing under ``output/retrained`` and no shipped run is read.
    `profile` names a file of ``notebooks/profiles`` in place of the data set's own, such as "smoke".

    Raises
    ------
    KitError
        An unknown data set or profile, a notebook that fails, or no notebooks (a kit installed without its checkout).
    """
    output = output / "retrained" if retrain else output
    os.environ["FRLKIT_DATA"] = str(data.root().resolve())  # the kernels run in another folder
    jobs = list(plan(dataset, output, retrain, profile))
    study = ", ".join(dict.fromkeys(job.parameters["DATASET"] for job in jobs if "DATASET" in job.parameters))
    study += (f", profile {profile}" if profile else "") + (", trained from nothing" if retrain else "")
    with disk.only_one(output):
        left = [job for job in jobs if not _finished(job, output)]
        if left:
            _announce(jobs, left, output)
        notes: dict[str, dict[str, Any]] = {}
        for number, job in enumerate(jobs):
            notes[job.name] = _finished(job, output)  # asked again: an earlier notebook may have trained its runs anew
            if not notes[job.name]:
                later = jobs[number + 1 :]
                notes[job.name] = _run(job, output, [other for other in later if other in left])
                pages.index(notes, [other.name for other in later], output, study, LIBRARIES)
        pages.index(notes, [], output, study, LIBRARIES)
    tables = [(job, table) for job in jobs for table in notes[job.name]["tables"]]
    text = "\n\n".join(f"{table['title']} ({job.name})\n{claims.plain(table['claims'])}" for job, table in tables)
    return f"\n{text}\n\nnotebooks, tables and figures: {output / 'index.html'}"


def plan(dataset: str, output: Path, retrain: bool, profile: str = "") -> Iterator[Job]:
    """The jobs, given what data there are; a notebook without a DATASET parameter runs once, one of `LEFT_OUT` never.

    No two studies share a name: it tells the data set, and the profile where that is not the data set's own."""
    sources = sorted(NOTEBOOKS.glob("[0-9][0-9]_*.ipynb"))
    if not sources:
        raise KitError(f"there are no notebooks in {NOTEBOOKS}: run this from a checkout of the repository")
    import papermill

    if profile:
        dataset = _profile(profile)["DATASET"]
    datasets, images = {dataset: True}, ""
    try:
        images = data.load(dataset).fingerprint
    except data.DataUnavailableError as error:
        shipped = PROJECT / "checkpoints" / data.folder_name(dataset)
        if retrain or not shipped.exists():
            raise
        _say(f"{error}; drawing from the shipped records, and running live on digits")
        datasets = {dataset: False, "digits": True}
    if dataset in LEFT_OUT:
        _say(f"notebooks left out, which have no runs on {dataset}: {LEFT_OUT[dataset]}")
    for source in sources:
        known = papermill.inspect_notebook(str(source))
        for name, live in datasets.items() if "DATASET" in known else [(dataset, True)]:
            if "DATASET" in known and source.stem[:2] in LEFT_OUT.get(name, ""):
                continue
            usual = PROFILES.get(name, "full")
            own = profile if profile and name == dataset else usual
            job = source.stem + (f"_{data.folder_name(name)}" if "DATASET" in known and name != "fashion_mnist" else "")
            job += (own_name := f"_{own}" if own != usual else "")
            values = {**_profile(own), "DATASET": name, "FIGURES": _shown(output / job / "figures")}
            values |= {"RUNS": _shown(output / ("checkpoints" + own_name))} if retrain else {}
            given = {key: value for key, value in values.items() if key in known}
            yield Job(source, job, given, live, images if "DATASET" in given else "")


def _profile(name: str) -> dict[str, Any]:
    """The parameters in a file of ``notebooks/profiles``; raises `KitError` where there is none of that name."""
    import yaml

    known = {path.stem: path for path in sorted((NOTEBOOKS / "profiles").glob("*.yaml"))}
    if name not in known:
        raise KitError(f"profile = {name!r} is unknown: use one of {', '.join(known)}")
    return yaml.safe_load(known[name].read_text(encoding="utf-8"))


def _shown(path: Path) -> str:
    """A path as a notebook that runs in the project's folder may name it: relative where it lies in there."""
    return (path.relative_to(PROJECT) if path.is_relative_to(PROJECT) else path).as_posix()


def _read(path: Path) -> dict[str, Any]:
    """What a note says; nothing where it is missing or damaged, since running again does no harm."""
    with contextlib.suppress(OSError, ValueError):
        found = json.loads(path.read_text(encoding="utf-8"))
        return found if isinstance(found, dict) else {}
    return {}


def _finished(job: Job, output: Path) -> dict[str, Any]:
    """The note on a job that would write again what lies under its name; nothing where it has to run.

    Runs that came later do not count, since a live notebook trains what it lacks: they are another notebook's. Without
    the data set it draws whatever runs there are, so there they count.
    """
    note = _read(output / job.name / "done.json")
    files = [output / job.name / f"{job.name}{ending}" for ending in (".ipynb", ".html")]
    whole = {"runs", "tables"} <= set(note) and all(file.is_file() for file in files)
    if not whole or note.get("made_by") != _made_by(job):
        return {}
    then, now = note["runs"], _hashes(job)
    return note if then == ({file: now.get(file) for file in then} if job.live else now) else {}


def _made_by(job: Job) -> str:
    """A hash of a job's source and parameters, the kit, its libraries, the images and where they are."""
    given = [job.parameters, job.live, job.images, os.environ["FRLKIT_DATA"], LIBRARIES]
    total = hashlib.sha256(json.dumps(given).encode())
    kit = Path(__file__).parent
    for file in (job.source, *sorted(file for ending in ("py", "cpp", "j2") for file in kit.rglob(f"*.{ending}"))):
        total.update(file.name.encode() + file.read_bytes())
    return total.hexdigest()


def _hashes(job: Job) -> dict[str, str]:
    """The hash of every record and weights file among the runs of the job's data set; none where it has no data set."""
    folder, names = job.runs(), ("*.json", "weights.safetensors")
    files = sorted(file for name in names for file in folder.rglob(name)) if folder else []
    return {str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def _announce(jobs: Sequence[Job], left: Sequence[Job], output: Path) -> None:
    """Say what will be done, about how long it takes and how much disk."""
    _say(f"{len(left)} of {len(jobs)} notebooks to run, into {output}:")
    for job in jobs:
        runs, work = job.runs(), ", needs no data"
        if runs:
            work = f", {len(list(runs.glob('*/seed*/record.json')))} runs are finished"
            work += ", what is missing is trained" if job.live else ""
        _say(f"  {job.name}: {_about([job], output) + work if job in left else 'up to date'}")
    train = sorted({run for job in left for run in job.to_train()})
    size = sum(3 * job.source.stat().st_size for job in left)  # a copy, its page, its figures
    size += sum(file.stat().st_size for run in train for file in run.iterdir())
    free = shutil.disk_usage(output).free
    _say(f"in all: {_about(left, output)}; {size / 1e6:,.0f} MB of disk, {free / 1e9:,.1f} GB are free")
    if train:
        histories = [_read(run / "history.json") for run in train]
        spent = sum(it["threads"] * epoch["seconds"] for it in histories for epoch in it.get("epochs", []))
        _say(f"{len(train)} runs to train: the shipped ones' epochs took {took(spent)} of one core")


def _seconds(jobs: Sequence[Job], output: Path) -> float | None:
    """Seconds the jobs may take: as last time here, else as measured where runs reload; None where neither is known."""
    measured = _read(PROJECT / "benchmarks" / "notebooks.json").get("seconds", {})
    last = [_read(output / job.name / "done.json").get("seconds") for job in jobs]
    each = [s or (not job.to_train() and measured.get(job.name)) for s, job in zip(last, jobs, strict=True)]
    return sum(each) if all(each) else None


def _about(jobs: Sequence[Job], output: Path) -> str:
    return "not timed yet" if (seconds := _seconds(jobs, output)) is None else f"about {took(seconds)}"


class _Progress(io.TextIOBase):
    """What the terminal sees of a running notebook: cells done and time left, and the lines of runs in training."""

    def __init__(self, job: Job, expected: float | None, later: float | None) -> None:
        cells = json.loads(job.source.read_text(encoding="utf-8"))["cells"]
        total = sum(cell["cell_type"] == "code" for cell in cells) + 1  # papermill adds the parameters
        self.began, self.expected, self.later = time.monotonic(), expected, later or 0
        self.bar = tqdm(total=total, desc=job.name, leave=False, disable=not sys.stderr.isatty())
        self.bar.bar_format = "{desc}: {bar:20} cell {n_fmt} of {total_fmt}, {elapsed}{postfix}"

    def cell(self, **_: Any) -> None:
        """A code cell is done; what is left takes what was expected, else as if all cells took the same."""
        self.bar.update()
        if self.bar.n:  # a bar that nobody sees counts nothing
            spent = time.monotonic() - self.began
            left = (self.expected or spent / self.bar.n * self.bar.total) - spent
            self.bar.set_postfix_str(f"about {took(max(left, 0) + self.later)} left")

    def write(self, text: str) -> int:
        for line in text.splitlines():
            if re.search(r" epoch \d+/\d+: ", line):
                _say(line)
        return len(text)


def _run(job: Job, output: Path, later: Sequence[Job]) -> dict[str, Any]:
    """Run a job and publish what it made; returns its note. `later` are those to run after it."""
    _say(f"running {job.name}, {_about([job], output)}")
    made_by, cpu = _made_by(job), sum(os.times()[2:4])
    progress = _Progress(job, _seconds([job], output), _seconds(later, output))
    staged, place = output / "unfinished" / job.name, output / job.name
    with contextlib.closing(progress.bar):
        cells = _execute(job, staged, place, progress)
    seconds, cpu = time.monotonic() - progress.began, sum(os.times()[2:4]) - cpu
    note = {"made_by": made_by, "runs": _hashes(job), "live": job.live, **pages.about(cells)}
    note |= {"seconds": seconds, "cpu_seconds": cpu, "took": f"{took(seconds)}, {took(cpu)} of one core"}
    checkpoint.write_json(staged / "done.json", note)
    _publish(staged, place)
    _say(f"{job.name} took {note['took']}")
    return note


def _publish(staged: Path, place: Path) -> None:
    """Put a finished folder in the place of the old one; a kill at any moment leaves no note of what is not whole."""
    for stale in (place.parent / "index.html", place / "done.json"):
        stale.unlink(missing_ok=True)
    if place.exists():
        shutil.rmtree(place)
    os.replace(staged, place)
    with contextlib.suppress(OSError):
        staged.parent.rmdir()  # where no other is unfinished


def _execute(job: Job, staged: Path, place: Path, progress: _Progress) -> list[dict[str, Any]]:
    """Run a notebook, going on from its runs' checkpoints, and write its HTML copy; returns its cells.

    Paths in it are those of `place`, where it will be published.
    """
    import papermill
    from nbclient.exceptions import DeadKernelError

    shutil.rmtree(staged, ignore_errors=True)  # a killed one's
    (staged / "figures").mkdir(parents=True)
    notebook = staged / f"{job.name}.ipynb"
    parameters = {**job.parameters, "FIGURES": _shown(staged / "figures")}
    options = {"stdout_file": progress, "on_cell_executed": progress.cell, "progress_bar": False, "cwd": str(PROJECT)}
    options["extra_arguments"] = ["--log-level=50"]  # not the kernel's words on how it starts and stops
    logging.getLogger("papermill").setLevel(logging.WARNING)
    try:
        papermill.execute_notebook(job.source, notebook, parameters, kernel_name="python3", **options)
    except papermill.PapermillExecutionError as error:
        raise KitError(f"{job.name} failed with {error.ename}: {error.evalue} (see {notebook})") from None
    except DeadKernelError:
        raise KitError(f"{job.name}: its process died, perhaps for want of memory; the same command goes on") from None
    text = notebook.read_text(encoding="utf-8").replace(_shown(staged), _shown(place))
    checkpoint.write_atomically(notebook, text.encode())
    checkpoint.write_atomically(notebook.with_suffix(".html"), pages.notebook(notebook).encode())
    return json.loads(text)["cells"]


def _say(line: str) -> None:
    tqdm.write(line, file=sys.stdout)
    sys.stdout.flush()
