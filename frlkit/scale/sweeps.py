"""``frlkit sweep FILE``: a grid of runs, each the same resumable unit that the notebooks read.

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
import itertools
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from frlkit import KitError, checkpoint, data, disk, recipes, records, runs, took, watched
from frlkit.evaluation import STANDARD
from frlkit.recipes import Config, FairConfig
from frlkit.values import shown, to_text

DEFAULTS = {"dataset": "fashion_mnist", "seed": 0, "values": {}}
#: The paper's symbols, which an entry may use for the fields they stand for.
SYMBOLS = {"alpha1": ("alpha_nat",), "alpha2": ("alpha_bdy",), "tau": ("tau_nat", "tau_bdy"), "eps": ("eps_255",)}


@dataclass(frozen=True)
class Run:
    """One run: its recipe with the fields varied, its configuration, its folder."""

    recipe: str
    config: Config
    folder: Path

    @property
    def name(self) -> str:
        return "/".join(self.folder.parts[-3:])  # DATASET/RECIPE/seedN

    @functools.cached_property
    def start(self) -> Run | None:
        """The run that has to be finished before this one."""
        config = recipes.start_of(self.config)
        return config and Run(self.config.start, config, runs.start_folder(self.config, self.folder))

    @functools.cached_property
    def depth(self) -> int:
        """How many runs have to be finished before this one, one after another."""
        return 0 if self.start is None else 1 + self.start.depth

    @property
    def done(self) -> bool:
        """Whether it is finished, and tidied up. Raises `KitError` where the folder's record is damaged, another run's,
        or of other images of a folder."""
        path = self.folder / "record.json"
        if not disk.exists(self.folder / runs.WEIGHTS) or not disk.exists(path):
            return False
        record = records.read(path)
        checkpoint.refuse_other(path, record.get("config", {}), recipes.described(self.config))
        if own := images_there(self.config.dataset):
            runs.refuse_other_images(path, record, own.with_validation(self.config.validation))
        # a kill between two attacks leaves a record with the first, one after the last a lock or the checkpoints
        return runs.all_attacked(record, self.config) and runs.at_rest(self.folder)


def images_there(dataset: str) -> data.Dataset | None:
    """The images of a folder; None for a known data set, and where the folder is not, as on a cluster's driver."""
    place = data.root() / Path(dataset.removeprefix(data.FOLDER)).expanduser()
    return _loaded(dataset) if dataset.startswith(data.FOLDER) and disk.exists(place) else None


@functools.lru_cache(maxsize=1)
def _loaded(dataset: str) -> data.Dataset:
    return data.load(dataset)


#: Carries runs out; yields each one's folder, what went wrong or nothing, and what it said on the way.
Engine = Callable[[Sequence[Run]], Iterator[tuple[Path, str, str]]]


def plan(path: Path, root: Path) -> list[Run]:
    """Every run of a sweep file, and those they start from; a run stands behind the one that it starts from.

    Raises `KitError` where the file cannot be read, has an unknown key, recipe, field or value, or asks for two
    different runs in one folder, or for one whose folder holds another: before anything starts."""
    import yaml

    try:
        sweep = yaml.safe_load(text := path.read_text(encoding="utf-8"))
        if any(len(getattr(token, "value", None) or "") > 1000 for token in yaml.scan(text)):
            raise ValueError("it has a value of more than 1,000 characters")
    except OSError as error:
        raise KitError(
            f"the sweep {path} cannot be read ({error.strerror or error}): name a file, as in sweeps/"
        ) from None
    except Exception as error:  # YAML's own readers of dates and numbers raise anything
        raise KitError(f"the sweep {path} cannot be read: {' '.join(str(error).split()) or 'it is nested'}") from None
    if not isinstance(sweep, dict) or not isinstance(sweep.get("grid"), list) or not sweep["grid"]:
        raise KitError(f"the sweep {path} has no grid: give it a list of entries, such as '- recipe: pgd_at'")
    if unknown := sorted(map(str, set(sweep) - {"grid", *DEFAULTS})):
        raise KitError(f"{unknown[0]!r} is no key of a sweep beside its grid: use grid, {', '.join(DEFAULTS)}")
    found: dict[Any, Run] = {}
    with _counted(f"planning {path.name}") as count:
        for entry in sweep.pop("grid"):
            for run in _expand(entry, sweep, root):
                for one in _with_starts(run):
                    fields = frozenset(one.folder.parent.name.split(","))  # in whatever order
                    _refuse_two(found.setdefault((fields, one.folder.parents[1], one.folder.name), one), one)
                count()
        for run in found.values():
            _ = run.done  # refuses another run's folder
    return sorted(found.values(), key=lambda run: run.depth)


@contextlib.contextmanager
def _counted(title: str) -> Iterator[Callable[[], Any]]:
    """What counts runs, and says so where it takes more than a second."""
    end = time.monotonic() + 1
    with tqdm(desc=title, unit="run", delay=1, leave=False, disable=not watched()) as bar:

        def count() -> None:
            nonlocal end
            bar.update()
            if bar.disable and time.monotonic() > end:
                print(f"{title} ...", flush=True)
                end = math.inf

        yield count


def _with_starts(run: Run) -> list[Run]:
    """A run behind all those that it starts from."""
    return [*(_with_starts(run.start) if run.start else []), run]


def _refuse_two(one: Run, other: Run) -> None:
    """Raise `KitError` where two runs of one folder differ."""
    here, there = vars(one.config), vars(other.config)
    for name in here if here != there else ():
        if here[name] != there.get(name):
            raise KitError(
                f"{one.name} is asked for twice, with {name} = {here[name]!r} and {there.get(name)!r}: make them equal "
                "(a retraining run's start_epochs are its starting run's epochs), or vary it in the grid"
            )


def _expand(entry: Any, defaults: dict[str, Any], root: Path) -> Iterator[Run]:
    """The runs of one entry of the grid."""
    if not isinstance(entry, dict) or "recipe" not in entry:
        raise KitError(
            f"{shown(entry)} is no entry of a grid: use a recipe and lists of values, such as 'recipe: pgd_at'"
        )
    entry = {**DEFAULTS, **defaults, **entry}
    values = entry.pop("values")
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise KitError(f"values = {shown(values)} is not allowed: use fields and values, such as {{epochs: 8}}")
    if named := {"recipe", "method", "dataset", "seed"} & set(values):
        raise KitError(f"{min(named)} is not allowed among values: it names the run's folder; give it beside values")
    choices = {key: value if isinstance(value, list) else [value] for key, value in entry.items()}
    if empty := [key for key, listed in choices.items() if not listed]:
        raise KitError(f"{empty[0]} = [] is not allowed in a grid: give at least one value")
    names, datasets, seeds = (choices.pop(key) for key in ("recipe", "dataset", "seed"))
    for name, dataset, seed, point in itertools.product(names, datasets, seeds, itertools.product(*choices.values())):
        chosen = zip(choices, point, strict=True)
        varied = [f"{field}={to_text(value)}" for key, value in chosen for field in SYMBOLS.get(key, (str(key),))]
        recipe = ",".join([str(name), *varied])
        config = recipes.configure(recipe, dataset, seed, **values)
        yield Run(recipes.spelled(recipe), config, runs.folder(root, recipe, config))


def estimate(planned: Sequence[Run], root: Path, workers: int, gpu: bool = False) -> float | None:
    """Seconds that what is left takes on so many workers, from finished runs of one thread; None without any.

    An image through the network takes what it took the finished runs of the same recipe, else of any, with the same
    data and batches, on a processor, or on any `gpu`."""
    rates: dict[tuple[Any, ...], list[float]] = {}
    sizes: dict[tuple[Any, ...], tuple[int, int]] = {}
    for path in root.glob("*/*/seed*/history.json"):
        history = records.read_history(path)
        try:
            config = (FairConfig if "start" in history["config"] else Config)(**history["config"])
        except KitError:  # another kit's fields, or a network of one's own
            continue
        if (records.device(history) != "CPU") != gpu:
            continue
        key = (config.dataset, config.model, config.batch_size)
        if key not in sizes:
            record = path.with_name("record.json")
            found = records.read(record) if disk.exists(record) else {}
            if not {"training_counts", "images"} <= set(found):
                continue
            sizes[key] = sum(found["training_counts"]), found["images"]
        training, _ = _passes(config, sizes[key][0])
        taken = [history["threads"] * entry["seconds"] / training for entry in history["epochs"]]
        for kind in (key, (*key, path.parent.parent.name.split(",")[0])):
            rates.setdefault(kind, []).extend(taken)
    total = 0.0
    for run in planned:
        if not run.done:
            key = (run.config.dataset, run.config.model, run.config.batch_size)
            taken = rates.get((*key, run.recipe.split(",")[0])) or rates.get(key)
            if not taken:
                return None
            training, validating = _passes(run.config, sizes[key][0])
            tested = sizes[key][1] * sum(attack.steps for attack in runs.attacks_on(run.config))
            total += (run.config.epochs * (training + validating) + tested) * statistics.median(taken)
    return total / workers


def _passes(config: Config, images: int) -> tuple[float, float]:
    """How often an epoch of so many training images sends one through the network: to train, and to validate.

    Training includes its attacks and, of a retraining, the errors behind its multipliers; a share of each batch that is
    not attacked counts as such."""
    held = images * config.validation / (1 - config.validation)
    attacked = config.attacked if config.method == "pgd_at" else 0.0 if config.method == "natural" else 1.0
    training = images * (1 + config.steps * attacked)
    if not isinstance(config, FairConfig):
        return training, 10 * held
    training = training if config.method != "intercept" else 0.0
    measured = min(config.update_images or held, held) * config.updates / config.inner_epochs
    return training + STANDARD[0].steps * measured, STANDARD[0].steps * held


def sweep(planned: Sequence[Run], engine: Engine) -> dict[str, str]:
    """Carry out what is missing of a plan; returns what went wrong, run -> sentence.

    A run that fails does not stop the others, only those that start from it. Where processes die and take others'
    work with them, what is missing is run again; a run that dies alone has failed."""
    from joblib.externals.loky.process_executor import BrokenProcessPool

    failed: dict[Path, str] = {}
    finished = sum(_done(run, failed) for run in planned)
    with tqdm(total=len(planned), initial=finished, unit="run", disable=not watched()) as bar:
        for depth in sorted({run.depth for run in planned}):  # those that start from another wait until it is there
            alone = False
            while left := _left([run for run in planned if run.depth == depth], failed):
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
                        if not watched():
                            finished += 1
                            print(f"{finished}/{len(planned)} {name} {'failed' if error else 'finished'}", flush=True)
                except BrokenProcessPool:
                    if alone:
                        failed[group[0].folder] = "its process was killed or crashed, though it ran alone"
                alone = not progress
    return {run.name: failed[run.folder] for run in planned if run.folder in failed}


def _left(group: Sequence[Run], failed: dict[Path, str]) -> list[Run]:
    """What of a group is neither finished nor failed. A run whose starting run failed has failed."""
    left = [run for run in group if run.folder not in failed and not _done(run, failed)]
    for run in left:
        if run.start is not None and run.start.folder in failed:
            failed[run.folder] = f"{run.start.name}, which it starts from, failed"
    return [run for run in left if run.folder not in failed]


def _done(run: Run, failed: dict[Path, str]) -> bool:
    """Whether a run is finished; where its folder came to hold another's files since it was planned, it has failed."""
    try:
        return run.done
    except KitError as error:
        failed[run.folder] = str(error)
        return False


def preview(planned: Sequence[Run], root: Path, workers: int, gpu: bool = False) -> str:
    """A plan as lines of text: each run done or left, and how long what is left may take."""
    lines = [f"{'done' if run.done else 'left'}  {run.name}" for run in planned]
    left = sum(line.startswith("left") for line in lines)
    seconds = estimate(planned, root, workers, gpu)
    time = "unknown: no run of such data and batches is finished" if seconds is None else f"about {took(seconds)}"
    last = f"{len(planned)} runs, {len(planned) - left} done, {left} left; time on {workers} processes: {time}"
    return "\n".join([*lines, last])
