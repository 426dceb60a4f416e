"""Tables from result records: errors are fractions in the records and per cent here, mean ± sd over seeds."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy.stats import spearmanr

from frlkit import KitError, checkpoint, records

RADII = (8, 16)  # of the standard attacks, in 1/255
MEASURES = ("natural", *(f"PGD-20 {eps}/255" for eps in RADII))

Records = Mapping[str, Sequence[Mapping[str, Any]]]  # recipe -> one record per seed


def error_table(record: Mapping[str, Any], robust: Sequence[float]) -> pd.DataFrame:
    """Class-wise errors of one model in per cent, with the average over classes and the worst class below.

    Where the classes have different numbers of images, the average over images stands beside that over classes.
    """
    class_names, natural, images = record["class_names"], record["natural"], record["class_counts"]
    columns = {"natural": np.array(natural), "boundary": np.subtract(robust, natural), "robust": np.array(robust)}
    frame = pd.DataFrame(columns, index=list(class_names))
    rows = {"average": frame.mean(), "worst": frame.max()}
    if len(set(images)) > 1:
        over_images = frame.mul(images, axis=0).sum() / sum(images)
        rows = {"average over classes": frame.mean(), "average over images": over_images, "worst": frame.max()}
    below = pd.DataFrame(rows).T
    return (100 * pd.concat([frame, below])).round(1)


def tidy(records: Records) -> pd.DataFrame:
    """One row per recipe, seed, class and measure (one of `MEASURES`): error in per cent, and the class's images."""
    rows = []
    for recipe, seeds in records.items():
        for record in seeds:
            by_measure = [record["natural"], *(records.robust_errors(record, eps) for eps in RADII)]
            for measure, errors in zip(MEASURES, by_measure, strict=True):
                for name, count, error in zip(record["class_names"], record["class_counts"], errors, strict=True):
                    rows.append((recipe, record["config"]["seed"], name, measure, 100 * error, count))
    return pd.DataFrame(rows, columns=["recipe", "seed", "class", "measure", "error", "images"])


def classwise(errors: pd.DataFrame, recipe: str, measure: str) -> pd.DataFrame:
    """One row per seed, one column per class, of `tidy`'s table: error in per cent."""
    part = errors[(errors["recipe"] == recipe) & (errors["measure"] == measure)]
    return part.pivot(index="seed", columns="class", values="error")[list(dict.fromkeys(part["class"]))]


def statistics(errors: pd.DataFrame) -> pd.DataFrame:
    """Average, worst and best class of each recipe and measure in `tidy`'s table, in numbers.

    Each is taken within a seed; its mean over seeds stands under its name, the standard deviation (n - 1; NaN for one
    seed) under "sd". Low and high are the worst class's interval (see `worst_interval`); the class named is worst in
    the mean over seeds. The average is over classes; where they differ in size, that over images stands beside it.
    """
    rows = {}
    for recipe, measure in dict.fromkeys(zip(errors["recipe"], errors["measure"], strict=True)):
        scores = classwise(errors, recipe, measure)
        low, high = worst_interval(errors, recipe, measure)
        average, worst, best = scores.mean(axis=1), scores.max(axis=1), scores.min(axis=1)
        images = errors.loc[errors["recipe"] == recipe].drop_duplicates("class")["images"].to_numpy()
        over = (scores * images).sum(axis=1) / images.sum()
        unbalanced = {"average over images": over.mean(), "average over images sd": over.std()}
        rows[recipe, measure] = {
            **{"average": average.mean(), "average sd": average.std()},
            **(unbalanced if len(set(images)) > 1 else {}),
            **{"worst": worst.mean(), "worst sd": worst.std(), "worst low": low, "worst high": high},
            **{"best": best.mean(), "best sd": best.std(), "worst class": scores.mean().idxmax()},
        }
    return pd.DataFrame.from_dict(rows, orient="index")


def summary(errors: pd.DataFrame) -> pd.DataFrame:
    """`statistics` to read: mean ± sd with one decimal, and the worst class's interval."""
    return pd.DataFrame(
        {
            key: {
                **{
                    name: _plus_minus(row[name], row[f"{name} sd"])
                    for name in ("average", "average over images")
                    if name in row
                },
                "worst": _plus_minus(row["worst"], row["worst sd"]),
                "worst, 95 %": f"{row['worst low']:.1f} to {row['worst high']:.1f}",
                "best": _plus_minus(row["best"], row["best sd"]),
                "worst class": row["worst class"],
            }
            for key, row in statistics(errors).iterrows()
        }
    ).T


def collect(paths: Sequence[Path]) -> dict[str, dict[str, list[dict[str, Any]]]]:
    """The records of all finished runs in these folders: data set -> recipe -> one per seed.

    Raises `KitError` where a folder has none, a file is no run's record, or runs of one recipe differ in more than
    their seeds, so that no mean over them makes sense.
    """
    found: dict[str, dict[str, dict[int, Path]]] = {}
    for path in paths:
        files = sorted(path.rglob("record.json"))
        if not files:
            raise KitError(f"there are no finished runs in {path}: name a folder that train or sweep has written to")
        for file in dict.fromkeys(file.resolve() for file in files):
            record = records.read(file)
            if not {"config", "natural", "attacks"} <= set(record):
                raise KitError(f"{file} is no record of a run: name a folder that train or sweep has written to")
            recipe, config = file.parent.parent.name, record["config"]
            seeds = found.setdefault(config["dataset"], {}).setdefault(recipe, {})
            if seeds.setdefault(config["seed"], file) != file:
                raise KitError(f"{file} and {seeds[config['seed']]} are the same seed: name the folder of one of them")
    kept_by: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for dataset, recipes in found.items():
        for recipe, seeds in recipes.items():
            kept = [records.read(seeds[seed]) for seed in sorted(seeds)]
            for seed, record in zip(sorted(seeds), kept, strict=True):
                checkpoint.refuse_other(seeds[seed], record["config"], {**kept[0]["config"], "seed": seed})
            kept_by.setdefault(dataset, {})[recipe] = kept
    return kept_by


def by_method(
    records: Mapping[str, Records], measured: Callable[[pd.DataFrame], pd.DataFrame] = summary
) -> pd.DataFrame:
    """One row per data set and recipe of `collect`'s records: how many seeds, and each measure's `summary`.

    With `statistics` as `measured`, the same in numbers.
    """
    rows = []
    for dataset, recipes in records.items():
        table = measured(tidy(recipes))
        for recipe, seeds in recipes.items():
            cells = {
                f"{measure}, {name}": value
                for measure in MEASURES
                for name, value in table.loc[recipe, measure].items()
            }
            rows.append({"dataset": dataset, "recipe": recipe, "seeds": len(seeds), **cells})
    return pd.DataFrame(rows)


def worst_interval(errors: pd.DataFrame, recipe: str, measure: str, draws: int = 2000) -> tuple[float, float]:
    """Bootstrap 95 % interval of the worst class's error in per cent, mean over seeds.

    Seeds are resampled and, within each, every class's test images, for which a binomial draw is the same thing. The
    worst class is found anew in each draw, so the interval shows the upward bias of a maximum too.
    """
    part = errors[(errors["recipe"] == recipe) & (errors["measure"] == measure)]
    shares = classwise(errors, recipe, measure).to_numpy() / 100  # (seeds, classes)
    images = part.drop_duplicates("class")["images"].to_numpy()
    generator = np.random.default_rng(0)
    seeds = generator.integers(len(shares), size=(draws, len(shares)))
    worst = 100 * (generator.binomial(images, shares[seeds]) / images).max(axis=2)  # (draws, seeds)
    low, high = np.percentile(worst.mean(axis=1), [2.5, 97.5])
    return float(low), float(high)


def scores(records: Records, eps_255: float = 8) -> pd.DataFrame:
    """One row per recipe and seed: average over classes and worst class of each error in per cent (paper's Table 1).

    Robust and boundary error are under the standard attack at `eps_255` (in 1/255).
    """
    rows = {}
    for recipe, seeds in records.items():
        for record in seeds:
            natural, robust = np.array(record["natural"]), records.robust_errors(record, eps_255)
            kinds = {"natural": natural, "boundary": robust - natural, "robust": robust}
            rows[recipe, record["config"]["seed"]] = {
                f"{kind} {what}": 100 * getattr(errors, how)()
                for kind, errors in kinds.items()
                for what, how in (("average", "mean"), ("worst", "max"))
            }
    return pd.DataFrame(rows).T.rename_axis(["recipe", "seed"])


def means(scored: pd.DataFrame) -> pd.DataFrame:
    """`scores`, or their differences, as mean ± sd over seeds: one row per recipe."""
    return pd.DataFrame(
        {recipe: part.apply(plus_minus) for recipe, part in scored.groupby(level="recipe", sort=False)}
    ).T


def against(scored: pd.DataFrame, control: str) -> pd.DataFrame:
    """`scores` of every other recipe minus those of `control` with the same seed, in percentage points."""
    others = scored.drop(index=control, level="recipe")
    reference = scored.loc[control].reindex(others.index.get_level_values("seed"))
    return others - reference.to_numpy()


def gap(errors: pd.DataFrame, recipe: str, measure: str) -> pd.Series:
    """Worst class minus average over classes, in percentage points, seed by seed."""
    scores = classwise(errors, recipe, measure)
    return scores.max(axis=1) - scores.mean(axis=1)


def established(change: pd.Series) -> bool:
    """Whether a change, one value per seed, is there: the same sign in every seed, and its mean above twice its sd.

    One seed establishes nothing.
    """
    same_sign = (change > 0).all() or (change < 0).all()
    return bool(len(change) > 1 and same_sign and abs(change.mean()) > 2 * change.std())


def rank_correlation(difficulty: pd.Series, target: pd.Series) -> dict[str, float]:
    """Spearman's rank correlation over classes, and again without the most difficult one; two-sided p-values beside."""
    row: dict[str, float] = {}
    for label, left in (("", difficulty.index), (" without worst", difficulty.index.drop(difficulty.idxmax()))):
        rho, p_value = spearmanr(difficulty[left], target[left])
        row |= {f"rho{label}": round(float(rho), 2), f"p{label}": round(float(p_value), 3)}
    return row


def plus_minus(values: Sequence[float] | pd.Series) -> str:
    """``mean ± sd`` with one decimal; the sd (n - 1) is left out where there is only one value."""
    return _plus_minus(np.mean(values), np.std(values, ddof=1) if len(values) > 1 else math.nan)


def _plus_minus(mean: float, sd: float) -> str:
    return f"{mean:.1f}" if math.isnan(sd) else f"{mean:.1f} ± {sd:.1f}"
