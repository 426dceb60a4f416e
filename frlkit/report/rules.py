"""One rule for each kind of claim: from numbers seed by seed to the p-values that support and contradict it.

Fewer than `FEWEST_SEEDS` seeds test nothing. Changes are differences of two methods under the same seed (`minus`).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from frlkit.report import names, statistics, tables

FEWEST_SEEDS = 5


@dataclass(frozen=True)
class Comparison:
    """One test: what was measured, the p-value with which it supports the claim and that with which it contradicts it.

    Without enough seeds (`tested` is False) it says why, and there are no p-values. `misses` is how far the mean lies
    on the wrong side of the limit, negative on the right one.
    """

    says: str
    supports: float = 1.0
    contradicts: float = 1.0
    tested: bool = True
    misses: float = math.inf

    @property
    def p(self) -> float:
        return min(self.supports, self.contradicts)


@dataclass(frozen=True)
class Question:
    """A claim by its key, and the comparisons that decide it: each of them has to support it."""

    key: str
    comparisons: tuple[Comparison, ...]


def minus(scored: pd.DataFrame, title: str, reference: str, column: str) -> pd.Series:
    """A method minus another, seed by seed, of one column of `tables.scores`; empty where either has no runs."""
    both = [names.recipe(name) for name in (title, reference)]
    known = set(scored.index.get_level_values(0))
    parts = [scored.loc[recipe][column] if recipe in known else pd.Series(dtype=float) for recipe in both]
    return (parts[0] - parts[1]).dropna().rename(f"{title} − {reference}")


def differences(scored: pd.DataFrame, pairs: Iterable[tuple[str, str]]) -> pd.DataFrame:
    """`minus` of every column, mean ± sd over seeds: a row a pair; those without runs are left out."""
    rows = {f"{a} − {b}": {c: minus(scored, a, b, c) for c in scored.columns} for a, b in pairs}
    shown = {pair: {c: tables.plus_minus(v) for c, v in row.items() if len(v)} for pair, row in rows.items()}
    return pd.DataFrame(shown).T.dropna(how="all")


def lower(key: str, *changes: pd.Series, unit: str = "points") -> Question:
    """The claim that these changes are negative, each a difference seed by seed: paired t test, two-sided 95 %."""
    return Question(key, tuple(_two_sided(change, "less", unit) for change in changes))


def higher(key: str, *changes: pd.Series, unit: str = "points") -> Question:
    """The claim that these changes are positive: as `lower`."""
    return Question(key, tuple(_two_sided(change, "greater", unit) for change in changes))


def at_most(key: str, *values: pd.Series, limit: float, unit: str = "points") -> Question:
    """The claim that the means are below `limit`: t test against it, two-sided 95 %. A change not there does not do."""
    return Question(key, tuple(_against(value, limit, "less", unit) for value in values))


def at_least(key: str, *values: pd.Series, limit: float, unit: str = "points") -> Question:
    """The claim that the means are above `limit`; "cannot lower it by m" is ``at_least(..., limit=-m)``."""
    return Question(key, tuple(_against(value, limit, "greater", unit) for value in values))


def lower_over_images(
    key: str, label: str, ours: np.ndarray, theirs: np.ndarray, labels: Sequence[int], unit: str = "points"
) -> Question:
    """The claim that a method's worst-class error is below another's, for other seeds *and* other test images.

    For few images a class, where what chance put among them outweighs the seeds. Arguments as in
    `statistics.paired_worst`, whose bootstrap gives the p-values: twice the share of draws on the other side of 0.
    """
    if len(ours) < FEWEST_SEEDS:
        return Question(key, (Comparison(f"{label}: {_seeds(len(ours))}", tested=False),))
    change, draws = statistics.paired_worst_draws(ours, theirs, labels)
    low, high = np.percentile(draws, [2.5, 97.5])
    says = f"{label}: {100 * change:.1f} {unit} [{100 * low:.1f}, {100 * high:.1f}] over seeds and images"
    p = [min(1.0, 2 * max(float(np.mean(side)), 1 / len(draws))) for side in (draws >= 0, draws <= 0)]
    return Question(key, (Comparison(says, *p),))


def correlated(key: str, difficulty: pd.DataFrame, targets: Mapping[str, pd.DataFrame]) -> Question:
    """The claim that rank correlations over classes are positive, whichever class is left out.

    `difficulty` and each target have a row a seed and a column a class. In each seed, Spearman's rho with all classes
    and with every class left out in turn. Twice the median over seeds of one-sided p-values is a valid p-value whatever
    their dependence, and the largest over the classes left out counts.
    """
    return Question(key, tuple(_rank(difficulty, target, label) for label, target in targets.items()))


def correlated_given(
    key: str, covariate: pd.DataFrame, given: pd.DataFrame, targets: Mapping[str, pd.DataFrame]
) -> Question:
    """The claim that rank correlations over classes are positive with `given` held fixed, each as in `correlated`.

    For class imbalance: `covariate` is minus the classes' sizes and `given` their difficulty, or the other way round.
    No class is left out.
    """
    return Question(key, tuple(_partial_rank(covariate, given, target, label) for label, target in targets.items()))


def hardest(key: str, wrong: Sequence[int], images: Sequence[int], class_names: Sequence[str]) -> Question:
    """The claim that one class has a larger error than every other, tested on images: see `statistics.hardest`."""
    worst, p = statistics.hardest(wrong, images)
    rivals = [k for k in range(len(images)) if k != worst]
    rival = max(rivals, key=lambda k: (p[k], wrong[k] / images[k]))
    shares = {k: f"{names.plain(class_names[k])} {100 * wrong[k] / images[k]:.1f} %" for k in (worst, rival)}
    return Question(key, (Comparison(f"{shares[worst]}, next {shares[rival]}", supports=float(p[rival])),))


def every(question: Question) -> Question:
    """The same claim as one comparison: it holds where all its parts do, so the weakest part's p-value supports it.

    For claims of many parts (intersection-union test); the smallest, times their number, contradicts it.
    """
    parts = question.comparisons
    supports = max(part.supports for part in parts)
    contradicts = min(1.0, len(parts) * min(part.contradicts for part in parts))
    tested = all(part.tested for part in parts)
    weakest = max(parts, key=lambda part: (not part.tested, part.supports, -part.contradicts, part.misses))
    says = f"of {len(parts)} comparisons the weakest: {weakest.says}"
    return Question(question.key, (Comparison(says, supports, contradicts, tested),))


def _two_sided(change: pd.Series, side: str, unit: str) -> Comparison:
    return _against(change, 0, side, unit, limited="")


def _against(value: pd.Series, limit: float, side: str, unit: str, limited: str = ", limit {:g}") -> Comparison:
    value = value.dropna()  # seeds that one side of a difference lacks
    misses = (value.mean() - limit) * (1 if side == "less" else -1) if len(value) else math.inf
    if len(value) < FEWEST_SEEDS:
        found = f"{_said(value, unit)}, " if len(value) else f"{value.name}: "
        return Comparison(found + _seeds(len(value)), tested=False, misses=misses)
    low, high = statistics.mean_interval(value)
    says = f"{_said(value, unit)} [{low:.1f}, {high:.1f}]{limited.format(limit)}"
    return Comparison(says, *_both_ways(value, limit, side), misses=misses)


def _both_ways(values: pd.Series, limit: float, side: str) -> tuple[float, float]:
    """p-values for and against a mean on this side of the limit: either may be believed, so both are two-sided."""
    other = "greater" if side == "less" else "less"
    supports, contradicts = (min(1.0, 2 * statistics.p_beyond(values, limit, way)) for way in (side, other))
    return supports, contradicts


def _rank(difficulty: pd.DataFrame, target: pd.DataFrame, label: str) -> Comparison:
    seeds = difficulty.index.intersection(target.dropna().index)
    if not len(seeds):
        return Comparison(f"{label}: {_seeds(0)}", tested=False)
    x, y = difficulty.loc[seeds], target.loc[seeds, difficulty.columns]
    rho, p = statistics.rank_correlations(x.to_numpy(), y.to_numpy())
    if np.isnan(rho).any():
        return Comparison(f"{label}: no rank correlation of {rho.shape[1] - 1} classes", tested=False)
    worst = _combined(rho, p)
    medians = np.median(rho, axis=0)
    left = 1 + int(medians[1:].argmin())
    says = f"{label}: rho {medians[0]:.2f}, without {names.plain(x.columns[left - 1])} {medians[left]:.2f}"
    if len(seeds) < FEWEST_SEEDS:
        return Comparison(f"{says}, {_seeds(len(seeds))}", tested=False)
    return Comparison(f"{says} (medians of {_seeds(len(seeds), enough=True)})", *worst)


def _partial_rank(covariate: pd.DataFrame, given: pd.DataFrame, target: pd.DataFrame, label: str) -> Comparison:
    seeds = covariate.index.intersection(given.index).intersection(target.dropna().index)
    if not len(seeds):
        return Comparison(f"{label}: {_seeds(0)}", tested=False)
    sides = (frame.loc[seeds, covariate.columns].to_numpy() for frame in (covariate, target, given))
    rho, p = statistics.partial_rank_correlations(*sides)
    if np.isnan(rho).any():
        return Comparison(f"{label}: no partial rank correlation of {covariate.shape[1]} classes", tested=False)
    says = f"{label}: partial rho {np.median(rho):.2f}"
    if len(seeds) < FEWEST_SEEDS:
        return Comparison(f"{says}, {_seeds(len(seeds))}", tested=False)
    return Comparison(f"{says} (median of {_seeds(len(seeds), enough=True)})", *_combined(rho[:, None], p[:, None]))


def _combined(rho: np.ndarray, p: np.ndarray) -> tuple[float, float]:
    """One p-value for positive and one for negative correlations, from two-sided ones (S, K): see `correlated`."""
    one_sided = (np.where(rho > 0, p / 2, 1 - p / 2), np.where(rho < 0, p / 2, 1 - p / 2))
    up, down = (min(1.0, 2 * float(np.median(found, axis=0).max())) for found in one_sided)
    return up, down


def _seeds(count: int, *, enough: bool = False) -> str:
    if not count:
        return "no runs"
    return f"{count} seed{'s' if count > 1 else ''}" + ("" if enough else f", {FEWEST_SEEDS} needed")


def _said(values: pd.Series, unit: str) -> str:
    return f"{values.name}: {tables.plus_minus(values)} {unit}"
