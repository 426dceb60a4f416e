"""Tables from result records: errors are fractions in the records and per cent here, mean ± sd over seeds."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from frlkit import KitError, checkpoint
from frlkit.records import read, standard
from frlkit.report import statistics as numbers
from frlkit.report.names import plain
from frlkit.report.studies import has, robust_errors

pd.set_option("display.html.use_mathjax", False)  # a class may be called "$5" or "a$b$"

RADII = (8, 16)  # of the standard attacks, in 1/255
SIGNS = 12  # the radius at which the paper's traffic signs are trained and attacked, in 1/255
SECOND = 4  # the other radius of the paper's Figure 1, which is CIFAR-10's, in 1/255
MEASURES = ("natural", *(f"PGD-20 {eps}/255" for eps in RADII))
FORMATS = ("text", "markdown", "csv", "json")

Records = Mapping[str, Sequence[Mapping[str, Any]]]  # recipe -> one record per seed


def error_table(record: Mapping[str, Any], robust: Sequence[float]) -> pd.DataFrame:
    """Class-wise errors of one model in per cent, with the average over classes and the worst class below.

    Where the classes have different numbers of images, the average over images stands beside that over classes.
    """
    class_names, natural, images = record["class_names"], record["natural"], record["class_counts"]
    columns = {"natural": np.array(natural), "boundary": np.subtract(robust, natural), "robust": np.array(robust)}
    frame = pd.DataFrame(columns, index=[plain(name) for name in class_names])
    rows = {"average": frame.mean(), "worst": frame.max()}
    if len(set(images)) > 1:
        over_images = frame.mul(images, axis=0).sum() / sum(images)
        rows = {"average over classes": frame.mean(), "average over images": over_images, "worst": frame.max()}
    return (100 * pd.concat([frame, pd.DataFrame(rows).T])).round(1)


def tidy(records: Records) -> pd.DataFrame:
    """One row per recipe, seed, class and measure: error in per cent, and the class's images.

    The measures are `MEASURES`; behind them these records' other `radius`, and CIFAR-10's `SECOND` if all have it.
    """
    second = [SECOND] * all(r.get("dataset") == "cifar10" and has(r, SECOND) for one in records.values() for r in one)
    radii, rows = dict.fromkeys((*RADII, radius(records), *second)), []
    for recipe, seeds in records.items():
        for record in seeds:
            by_measure = [record["natural"], *(robust_errors(record, eps) for eps in radii)]
            for measure, errors in zip(("natural", *map("PGD-20 {}/255".format, radii)), by_measure, strict=True):
                for name, count, error in zip(record["class_names"], record["class_counts"], errors, strict=True):
                    rows.append((recipe, record["config"]["seed"], plain(name), measure, 100 * error, count))
    return pd.DataFrame(rows, columns=["recipe", "seed", "class", "measure", "error", "images"])


def radius(records: Records) -> int:
    """Where the robust error of these records is quoted, in 1/255: at 8, on signs at 12, as they are trained."""
    own = {int(a.eps_255) for seeds in records.values() for r in seeds for a in standard(r.get("dataset", ""))}
    return max(own - {*RADII}, default=RADII[0])


def note(source: str, network: str, record: Mapping[str, Any]) -> str:
    """Behind a figure's title: data set, network, attack steps if fewer than ten, images to train and to test."""
    training = f"{words} training and " if (words := trained_on(record)) else ""
    few = f", {steps} attack steps in training" if (steps := record.get("config", {}).get("steps", 10)) < 10 else ""
    return f"{source}, {network}{few}; {training}{record['images']:,} test images"


def trained_on(record: Mapping[str, Any]) -> str:
    """How many images trained a model; of GTSRB's, of how many: torchvision downloads 26,640, all of it has 39,209."""
    counts, signs = record.get("training_counts"), "gtsrb" in record.get("dataset", "")
    of = f" of {39_209 if counts and max(counts) > 1500 else 26_640:,}" if signs else ""
    return f"{sum(counts):,}{of}" if counts else ""


def sizes(records: Records, recipe: str) -> pd.DataFrame:
    """Each class's training images, or test images where a record has only those: a row a seed, a column a class."""
    rows = {r["config"]["seed"]: r.get("training_counts", r["class_counts"]) for r in records[recipe]}
    classes = [plain(name) for name in records[recipe][0]["class_names"]]
    return pd.DataFrame.from_dict(rows, orient="index", columns=classes).rename_axis("seed")


def classwise(errors: pd.DataFrame, recipe: str, measure: str) -> pd.DataFrame:
    """One row per seed, one column per class, of `tidy`'s table: error in per cent; no rows where there are no runs."""
    part = errors[(errors["recipe"] == recipe) & (errors["measure"] == measure)]
    return part.pivot(index="seed", columns="class", values="error")[list(dict.fromkeys(part["class"]))]


def _parts(errors: pd.DataFrame) -> Iterator[tuple[tuple[str, str], np.ndarray, np.ndarray, list[str]]]:
    """Of every recipe and measure of `tidy`'s table: its (S, C) errors in per cent, each class's images, the names."""
    columns = {name: errors[name].to_numpy() for name in ("seed", "class", "error", "images")}
    for key, index in errors.groupby(["recipe", "measure"], sort=False).indices.items():
        seed, kind, error, images = (column[index] for column in columns.values())
        classes = list(dict.fromkeys(kind))
        yield key, error.reshape(len(set(seed)), len(classes)), images[: len(classes)], classes


def statistics(errors: pd.DataFrame) -> pd.DataFrame:
    """Average, worst and best class of each recipe and measure in `tidy`'s table, in numbers.

    Each is taken within a seed; its mean over seeds stands under its name, the standard deviation (n - 1; NaN for one
    seed) under "sd". Low and high are the worst class's interval (`worst_interval`), which is then named
    (`worst_class`). The average is over classes; where they differ in size, that over images stands beside it.
    """
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    for key, found, images, classes in _parts(errors):
        values = {"average": found.mean(1)}
        if len(set(images)) > 1:
            values["average over images"] = found @ images / images.sum()
        values |= {"worst": found.max(1), "best": found.min(1)}
        low, high = numbers.worst_interval(found / 100, images)
        rows[key] = {}
        for name, by_seed in values.items():
            rows[key] |= {name: by_seed.mean(), f"{name} sd": by_seed.std(ddof=1) if len(by_seed) > 1 else math.nan}
            rows[key] |= {"worst low": 100 * low, "worst high": 100 * high} if name == "worst" else {}
        rows[key]["worst class"] = numbers.worst_class(found, classes)
    return pd.DataFrame.from_dict(rows, orient="index")


def summary(errors: pd.DataFrame) -> pd.DataFrame:
    """`statistics` to read: mean ± sd with one decimal, and the worst class's interval."""
    rows = {}
    for key, row in statistics(errors).to_dict("index").items():
        rows[key] = {}
        for name in ("average", "average over images", "worst", "best"):
            if not math.isnan(row.get(name, math.nan)):
                rows[key][name] = _plus_minus(row[name], row[f"{name} sd"])
            if name == "worst":
                rows[key]["worst, 95 %"] = f"{row['worst low']:.1f} to {row['worst high']:.1f}"
        rows[key]["worst class"] = row["worst class"]
    return pd.DataFrame.from_dict(rows, orient="index")


def spread(errors: pd.DataFrame, measure: str, fixed: str) -> pd.DataFrame:
    """How unevenly errors fall on classes, one row a recipe: `statistics.spread` as mean ± sd over seeds, in per cent.

    One `fixed` class is the same in all seeds; the Gini coefficient is from 0 to 1.
    """
    rows = {}
    for (recipe, found_measure), found, _, classes in _parts(errors):
        if found_measure == measure:
            values = numbers.spread(found, classes.index(fixed))
            rows[recipe] = {name: plus_minus(by_seed, 3 if name == "Gini" else 1) for name, by_seed in values.items()}
    return pd.DataFrame.from_dict(rows, orient="index").rename(columns={"fixed class": f"{fixed} in every seed"})


def collect(paths: Sequence[Path]) -> dict[str, dict[str, list[dict[str, Any]]]]:
    """The records of all finished runs in these folders: data set -> recipe -> one per seed.

    Raises `KitError` where a folder has none, a file is no run's record, or runs of one recipe differ in more than
    their seeds, so that no mean over them makes sense.
    """
    found: dict[str, dict[str, dict[int, tuple[Path, dict[str, Any]]]]] = {}
    for path in paths:
        files = sorted(path.rglob("record.json"))
        if not files:
            raise KitError(f"there are no finished runs in {path}: name a folder that train or sweep has written to")
        for file in dict.fromkeys(file.resolve() for file in files):
            record = read(file)
            if not {"config", "natural", "attacks"} <= set(record) or not {"dataset", "seed"} <= set(record["config"]):
                raise KitError(f"{file} is no record of a run: name a folder that train or sweep has written to")
            recipe, config = file.parent.parent.name, record["config"]
            seeds = found.setdefault(config["dataset"], {}).setdefault(recipe, {})
            other, _ = seeds.setdefault(config["seed"], (file, record))
            if other != file:
                raise KitError(f"{file} and {other} are the same seed: name the folder of one of them")
    return {dataset: {recipe: _alike(seeds) for recipe, seeds in by.items()} for dataset, by in found.items()}


def _alike(seeds: Mapping[int, tuple[Path, dict[str, Any]]]) -> list[dict[str, Any]]:
    """The records in the order of their seeds, which have to be all that differs."""
    kept = [seeds[seed] for seed in sorted(seeds)]
    first = kept[0][1]["config"]
    for file, record in kept:
        checkpoint.refuse_other(file, record["config"], {**first, "seed": record["config"]["seed"]})
    return [record for _, record in kept]


def by_method(
    records: Mapping[str, Records], measured: Callable[[pd.DataFrame], pd.DataFrame] = summary
) -> pd.DataFrame:
    """One row per data set and recipe of `collect`'s records: how many seeds, and each measure's `summary`.

    With `statistics` as `measured`, the same in numbers.
    """
    rows = []
    for dataset, recipes in records.items():
        errors = tidy(recipes)
        table, measures = measured(errors).to_dict("index"), errors["measure"].unique()
        for recipe, seeds in recipes.items():
            cells = {f"{measure}, {k}": v for measure in measures for k, v in table[recipe, measure].items()}
            rows.append({"dataset": dataset, "recipe": recipe, "seeds": len(seeds), **cells})
    return pd.DataFrame(rows)


def rendered(records: Mapping[str, Records], kind: str = "text") -> str:
    """`by_method` as text (a block a data set and measure), Markdown, CSV or JSON; `KitError` for another kind."""
    if kind not in FORMATS:
        raise KitError(f"format = {kind!r} is not allowed: use one of {', '.join(FORMATS)}")
    if kind in ("csv", "json"):
        frame = by_method(records, statistics)
        return frame.to_csv(index=False) if kind == "csv" else frame.to_json(orient="records", indent=1) + "\n"
    if kind == "markdown":
        frame = by_method(records)
        for name in frame.columns:
            if name == "dataset" or name.endswith("worst class"):  # anyone's names: no formula, no tag, no emphasis
                frame[name] = frame[name].str.replace(r"([\\`*_$<\[~])", r"\\\1", regex=True)
        return markdown(frame.columns, frame.to_numpy()) + "\n"
    blocks = []
    for dataset, recipes in records.items():
        table, seeds = summary(tidy(recipes)), list(map(len, recipes.values()))
        for measure in table.index.unique(level=1):
            part = table.xs(measure, level=1).assign(seeds=seeds)
            blocks.append(f"{dataset}, {measure}, errors in %, mean ± sd over seeds\n{_folded(part).to_string()}\n")
    return "\n".join(blocks)


def _folded(table: pd.DataFrame, width: int = 36) -> pd.DataFrame:
    """A table whose rows' names are broken behind commas, into lines of about a width; the last has the numbers."""
    rows: list[tuple[str, list[Any]]] = []
    for name, values in zip(table.index, table.to_numpy().tolist(), strict=True):
        *first, last = textwrap.wrap(
            str(name).replace(",", ", "), width, subsequent_indent="  ", break_on_hyphens=False
        )
        rows += [*((line, [""] * len(values)) for line in first), (last, values)]
    names = [name.replace(", ", ",").ljust(width) for name, _ in rows]
    return pd.DataFrame([values for _, values in rows], names, table.columns)


def markdown(head: Sequence[Any], rows: Sequence[Sequence[Any]]) -> str:
    """A Markdown table; a cell's bars are escaped and its line breaks become spaces."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(
        f"| {' | '.join(' '.join(str(c).split()).replace('|', chr(92) + '|') for c in line)} |" for line in lines
    )


def scores(records: Records, eps_255: float | None = None) -> pd.DataFrame:
    """One row per recipe and seed: average over classes and worst class of each error in per cent (paper's Table 1).

    Robust and boundary error are under the standard attack at `eps_255` (in 1/255), by default these records' `radius`.
    Where classes differ in size, the averages over images follow.
    """
    eps_255 = radius(records) if eps_255 is None else eps_255
    rows: dict[tuple[str, int], dict[str, float]] = {}
    for recipe, seeds in records.items():
        for record in seeds:
            natural, robust = np.array(record["natural"]), robust_errors(record, eps_255)
            kinds: dict[str, np.ndarray] = {"natural": natural, "boundary": robust - natural, "robust": robust}
            found = {
                f"{kind} {what}": 100 * getattr(errors, how)()
                for kind, errors in kinds.items()
                for what, how in (("average", "mean"), ("worst", "max"))
            }
            if len(set(images := record.get("class_counts", ()))) > 1:
                found |= {f"{k} average over images": 100 * np.average(e, weights=images) for k, e in kinds.items()}
            rows[recipe, record["config"]["seed"]] = found
    columns = [f"{kind} {what}" for kind in ("natural", "boundary", "robust") for what in ("average", "worst")]
    columns = list(next(iter(rows.values()), columns))
    index = pd.MultiIndex.from_tuples(list(rows), names=["recipe", "seed"])
    return pd.DataFrame(list(rows.values()), index, columns, dtype=float)


def last_epoch(histories: Records) -> pd.DataFrame:
    """One row a recipe: average and worst class of the last epoch's validation errors in per cent, mean over seeds."""
    rows = {}
    for recipe, seeds in histories.items():
        found = [history["epochs"][-1]["validation"] for history in seeds]
        rows[recipe] = {
            f"{kind} {what}": 100 * np.mean([getattr(np, how)(errors[kind]) for errors in found])
            for kind in ("natural", "robust")
            for what, how in (("average", "mean"), ("worst", "max"))
        }
    return pd.DataFrame.from_dict(rows, orient="index").round(1)


def means(scored: pd.DataFrame) -> pd.DataFrame:
    """`scores`, or their differences, as mean ± sd over seeds: one row per recipe."""
    return pd.DataFrame({recipe: part.apply(plus_minus) for recipe, part in scored.groupby(level=0, sort=False)}).T


def gap(errors: pd.DataFrame, recipe: str, measure: str) -> pd.Series:
    """Worst class minus average over classes, in percentage points, seed by seed."""
    return (scores := classwise(errors, recipe, measure)).max(axis=1) - scores.mean(axis=1)


def plus_minus(values: Sequence[float] | np.ndarray | pd.Series, decimals: int = 1) -> str:
    """``mean ± sd``; the sd (n - 1) is left out where there is only one value; of none, a dash."""
    sd = np.std(values, ddof=1) if len(values) > 1 else math.nan
    return _plus_minus(np.mean(values), sd, decimals) if len(values) else "–"


def _plus_minus(mean: float, sd: float, decimals: int = 1) -> str:
    return f"{mean:.{decimals}f}" + ("" if math.isnan(sd) else f" ± {sd:.{decimals}f}")
