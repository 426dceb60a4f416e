"""``python -m frlkit reproduce``: the numbered notebooks through papermill, HTML copies, an index, the claims table."""

from __future__ import annotations

import hashlib
import html
import io
import json
import logging
import os
import re
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from frlkit import PROJECT, KitError, checkpoint, data
from frlkit.report import claims

NOTEBOOKS = PROJECT / "notebooks"
#: Data set -> notebooks/profiles/*.yaml; anyone's own has the schedule of "full".
PROFILES = {
    "fashion_mnist": "full",
    "digits": "digits",
    **{name: f"paper_{name}" for name in ("cifar10", "svhn", "gtsrb", "gtsrb17")},
}


@dataclass(frozen=True)
class Job:
    """One notebook under one set of parameters; its outputs are ``name.ipynb`` and ``name.html``."""

    source: Path
    name: str
    parameters: dict[str, Any]
    live: bool  # whether its data set is there


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
    done_file = output / "done.json"
    done = _noted(done_file)
    tables = []
    for job in (bar := tqdm(jobs, unit="notebook", disable=not sys.stderr.isatty())):
        bar.set_description(job.name)
        files = [output / f"{job.name}{ending}" for ending in (".ipynb", ".html")]
        if not (all(file.exists() for file in files) and _up_to_date(job, done.get(job.name, {}))):
            _say(f"running {job.name}")
            _execute(job, *files)
            done[job.name] = {"made_by": _made_by(job), "runs": _runs(job)}
            checkpoint.write_json(done_file, done)
        cells = json.loads(files[0].read_text())["cells"]
        tables += [{"notebook": job.name, **table} for table in claims.from_notebook(cells)]
    write_index(jobs, tables, output)
    text = "\n\n".join(f"{table['title']} ({table['notebook']})\n{claims.plain(table['claims'])}" for table in tables)
    return f"\n{text}\n\nnotebooks, tables and figures: {output / 'index.html'}"


def plan(dataset: str, output: Path, retrain: bool, profile: str = "") -> Iterator[Job]:
    """The jobs, given what data there are: a notebook without a DATASET parameter runs once."""
    import papermill

    sources = sorted(NOTEBOOKS.glob("[0-9][0-9]_*.ipynb"))
    if not sources:
        raise KitError(f"there are no notebooks in {NOTEBOOKS}: run this from a checkout of the repository")
    if profile:
        dataset = _profile(profile)["DATASET"]
    datasets = {dataset: True}
    try:
        data.load(dataset)
    except data.DataUnavailableError as error:
        shipped = PROJECT / "checkpoints" / data.folder_name(dataset)
        if retrain or not shipped.exists():
            raise
        _say(f"{error}; drawing from the shipped records, and running live on digits")
        datasets = {dataset: False, "digits": True}
    folders = {"RUNS": str(output / "checkpoints"), "FIGURES": str(output / "figures")} if retrain else {}
    for source in sources:
        known = papermill.inspect_notebook(str(source))
        for name, live in datasets.items() if "DATASET" in known else [(dataset, True)]:
            own = profile if profile and name == dataset else PROFILES.get(name, "full")
            values = {**_profile(own), "DATASET": name, **folders}
            parameters = {key: value for key, value in values.items() if key in known}
            suffix = f"_{data.folder_name(name)}" if "DATASET" in known and name != "fashion_mnist" else ""
            yield Job(source, source.stem + suffix, parameters, live)


def _profile(name: str) -> dict[str, Any]:
    """The parameters in a file of ``notebooks/profiles``; raises `KitError` where there is none of that name."""
    import yaml

    known = {path.stem: path for path in sorted((NOTEBOOKS / "profiles").glob("*.yaml"))}
    if name not in known:
        raise KitError(f"profile = {name!r} is unknown: use one of {', '.join(known)}")
    return yaml.safe_load(known[name].read_text())


def _noted(path: Path) -> dict[str, Any]:
    """What was done before; nothing where the note is missing or damaged, since running again does no harm."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _up_to_date(job: Job, done: dict[str, Any]) -> bool:
    """Whether the job would write again what it wrote when `done` was noted.

    Runs that came later do not count, since a live notebook trains what it lacks: they are another notebook's. Without
    the data set it draws whatever runs there are, so there they count.
    """
    if done.get("made_by") != _made_by(job):
        return False
    then, now = done["runs"], _runs(job)
    return then == ({file: now.get(file) for file in then} if job.live else now)


def _made_by(job: Job) -> str:
    """A hash of a job's source and parameters, the kit, and where the data are."""
    total = hashlib.sha256(json.dumps([job.parameters, job.live, os.environ["FRLKIT_DATA"]]).encode())
    kit = [*Path(__file__).parent.rglob("*.py"), *Path(__file__).parent.rglob("*.cpp")]
    for file in (job.source, *sorted(kit)):
        total.update(str(file).encode() + file.read_bytes())
    return total.hexdigest()


def _runs(job: Job) -> dict[str, str]:
    """The hash of every record and weights file among the runs of the job's data set; none where it has no data set."""
    if "DATASET" not in job.parameters:
        return {}
    folder = PROJECT / (job.parameters.get("RUNS") or "checkpoints") / data.folder_name(job.parameters["DATASET"])
    files = sorted([*folder.rglob("*.json"), *folder.rglob("weights.pt")])
    return {str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


class _Progress(io.TextIOBase):
    """What the terminal sees of a notebook's output: the lines of runs in training."""

    def write(self, text: str) -> int:
        for line in text.splitlines():
            if re.search(r" epoch \d+/\d+: ", line):
                _say(line)
        return len(text)


def _execute(job: Job, notebook: Path, page: Path) -> None:
    """Run a notebook, going on from its runs' checkpoints, and write its HTML copy."""
    import papermill
    from nbconvert import HTMLExporter

    notebook.parent.mkdir(parents=True, exist_ok=True)
    logging.getLogger("papermill").setLevel(logging.WARNING)
    try:
        papermill.execute_notebook(
            str(job.source),
            str(notebook),
            job.parameters,
            kernel_name="python3",
            cwd=str(PROJECT),
            progress_bar=sys.stderr.isatty(),
            stdout_file=_Progress(),
        )
    except papermill.PapermillExecutionError as error:
        raise KitError(f"{job.name} failed with {error.ename}: {error.evalue} (see {notebook})") from None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # nbconvert on pictures without a description
        body, _ = HTMLExporter(template_name="lab").from_filename(str(notebook))
    checkpoint.write_atomically(page, body.encode())


def write_index(jobs: list[Job], tables: list[dict[str, Any]], output: Path) -> None:
    """``index.html``: links to the executed notebooks, every claims table, every figure."""
    escape = html.escape
    links = "".join(f'<li><a href="{job.name}.html">{escape(job.name)}</a></li>' for job in jobs)
    parts = []
    for table in tables:
        rows = "".join(
            "<tr>"
            + "".join(f"<td>{escape(c)}</td>" for c in (claims.phrase(row), row["claim"], row["evidence"]))
            + "</tr>"
            for row in table["claims"]
        )
        title = f"{escape(table['title'])} <small>{escape(table['notebook'])}</small>"
        parts.append(f"<h2>{title}</h2><table><tr><th>verdict<th>claim<th>evidence</tr>{rows}</table>")
    figures = sorted({figure for job in jobs for figure in _figures(job)})
    for figure in figures:
        source = escape(os.path.relpath(figure, output))
        parts.append(
            f'<figure><img src="{source}" alt="{escape(figure.stem)}"><figcaption>{source}</figcaption></figure>'
        )
    page = f"""<!doctype html><html lang="en"><meta charset="utf-8"><title>Robust or fair: reproduction</title>
<style>body{{font:16px/1.5 sans-serif;max-width:70rem;margin:2rem auto;padding:0 1rem}} img{{max-width:100%}}
td,th{{text-align:left;vertical-align:top;padding:.3rem .8rem .3rem 0;border-top:1px solid #ddd}}</style>
<h1>To be Robust or to be Fair: reproduction</h1><ul>{links}</ul>{"".join(parts)}</html>"""
    checkpoint.write_atomically(output / "index.html", page.encode())


def _figures(job: Job) -> list[Path]:
    """A job's pictures: those in its figures folder whose names begin with the notebook's subject."""
    folder = PROJECT / (job.parameters.get("FIGURES") or "figures")
    return sorted(folder.glob(f"{job.name[:2]}_*.png"))


def _say(line: str) -> None:
    tqdm.write(line, file=sys.stdout)
    sys.stdout.flush()
