"""Tables from result records: errors are fractions in the records and per cent here, mean ± sd over seeds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from scipy.stats import spearmanr

from frlkit import evaluation

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
            by_measure = [record["natural"], *(evaluation.robust_errors(record, eps) for eps in RADII)]
            for measure, errors in zip(MEASURES, by_measure, strict=True):
                for name, count, error in zip(record["class_names"], record["class_counts"], errors, strict=True):
                    rows.append((recipe, record["config"]["seed"], name, measure, 100 * error, count))
    return pd.DataFrame(rows, columns=["recipe", "seed", "class", "measure", "error", "images"])


def classwise(errors: pd.DataFrame, recipe: str, measure: str) -> pd.DataFrame:
    """One row per seed, one column per class, of `tidy`'s table: error in per cent."""
    part = errors[(errors["recipe"] == recipe) & (errors["measure"] == measure)]
    return part.pivot(index="seed", columns="class", values="error")[list(dict.fromkeys(part["class"]))]


def summary(errors: pd.DataFrame) -> pd.DataFrame:
    """Average over classes, worst and best class of each recipe and measure in `tidy`'s table.

    Each is taken within a seed, then given as mean ± sd over seeds. The interval is the worst class's (see
    `worst_interval`); the class named is worst in the mean over seeds. Unbalanced classes add the average over images.
    """
    rows = {}
    for recipe, measure in dict.fromkeys(zip(errors["recipe"], errors["measure"], strict=True)):
        scores = classwise(errors, recipe, measure)
        low, high = worst_interval(errors, recipe, measure)
        images = errors.loc[errors["recipe"] == recipe].drop_duplicates("class")["images"].to_numpy()
        unbalanced = {"average over images": plus_minus((scores * images).sum(axis=1) / images.sum())}
        rows[recipe, measure] = {
            "average": plus_minus(scores.mean(axis=1)),
            **(unbalanced if len(set(images)) > 1 else {}),
            "worst": plus_minus(scores.max(axis=1)),
            "worst, 95 %": f"{low:.1f} to {high:.1f}",
            "best": plus_minus(scores.min(axis=1)),
            "worst class": scores.mean().idxmax(),
        }
    return pd.DataFrame(rows).T


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
            natural, robust = np.array(record["natural"]), evaluation.robust_errors(record, eps_255)
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
    mean = f"{np.mean(values):.1f}"
    return f"{mean} ± {np.std(values, ddof=1):.1f}" if len(values) > 1 else mean
