"""Numbers from class-wise errors, as plain arrays: spread over classes, intervals, rank correlations, Holm's procedure.

Errors are (S, C), one row per seed and one column per class, in whatever unit the caller uses.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats

from frlkit import KitError

DRAWS = 2000  # of a bootstrap


def gini(values: ArrayLike) -> np.ndarray:
    """Gini coefficient over the last axis, 0 (all alike) to 1 - 1/C (one has all): mean |x_i - x_j| / (2 mean x)."""
    errors = np.asarray(values, dtype=float)
    mean = errors.mean(-1)
    apart = np.abs(errors[..., :, None] - errors[..., None, :]).mean((-2, -1))
    return np.divide(apart, 2 * mean, out=np.zeros_like(mean), where=mean > 0)


def spread(errors: ArrayLike, fixed: int) -> dict[str, np.ndarray]:
    """How unevenly each seed's errors (S, C) fall on the classes: name -> (S,).

    The worst class may be another in every seed, which makes a maximum noisy and biased upwards; `fixed` is one class
    (its column) in all of them. The standard deviation over classes is the population's (they are all the classes).
    """
    values = np.asarray(errors, dtype=float)
    ordered = np.sort(values, axis=1)
    return {
        "average": values.mean(1),
        "worst": ordered[:, -1],
        "fixed class": values[:, fixed],
        "mean of the two worst": ordered[:, -2:].mean(1),
        "sd over classes": values.std(1),
        "range": ordered[:, -1] - ordered[:, 0],
        "Gini": gini(values),
    }


def worst_class(shares: np.ndarray, class_names: Sequence[str]) -> str:
    """The class with the largest mean error over seeds, `shares` being (S, C), or how many have it: at a ceiling none
    of them is the worst."""
    means = shares.mean(axis=0)
    worst = [name for name, mean in zip(class_names, means, strict=True) if mean == means.max()]
    return worst[0] if len(worst) == 1 else f"{len(worst)} classes"


def worst_interval(shares: np.ndarray, images: np.ndarray, draws: int = DRAWS) -> tuple[float, float]:
    """Bootstrap 95 % interval of the worst class's error, mean over seeds; `shares` (S, C) are fractions.

    Seeds are resampled and, within each, every class's test images, `images` (C,) of them, for which a binomial draw is
    the same thing. The worst class is found anew in each draw, so the interval shows the upward bias of a maximum too.
    """
    generator = np.random.default_rng(0)
    worst = np.zeros((len(shares), draws))  # each seed's own draws; a resampled seed takes one of them
    reach = 6 * np.sqrt(shares * (1 - shares) / images) + 6 / images  # a draw further off has odds below 1e-6
    rivals = shares + reach >= (shares - reach).max(1, keepdims=True)
    for row, column in np.argwhere(rivals):
        drawn = generator.binomial(images[column], shares[row, column], draws) / images[column]
        np.maximum(worst[row], drawn, out=worst[row])
    seeds, which = (generator.integers(size, size=(draws, len(shares))) for size in worst.shape)
    low, high = np.percentile(worst[seeds, which].mean(1), [2.5, 97.5])
    return float(low), float(high)


def paired_worst(ours: ArrayLike, theirs: ArrayLike, labels: ArrayLike) -> tuple[float, float, float]:
    """Worst-class error of one method minus another's, mean over seeds, with its bootstrap 95 % interval: fractions.

    Arguments and errors as in `paired_worst_draws`.
    """
    change, draws = paired_worst_draws(ours, theirs, labels)
    low, high = np.percentile(draws, [2.5, 97.5])
    return change, float(low), float(high)


def paired_worst_draws(
    ours: ArrayLike, theirs: ArrayLike, labels: ArrayLike, draws: int = DRAWS
) -> tuple[float, np.ndarray]:
    """Worst-class error of one method minus another's, mean over seeds, and what bootstrap draws make of it: fractions.

    `ours` and `theirs` (S, N) are True where seed s is right about test image n (clean, or under one attack), `labels`
    (N,) the classes. Both methods saw the same images, so each draw takes the same ones for both and for every seed:
    what an image does to both cancels. Seeds are resampled in pairs.

    Raises `KitError` where the shapes do not belong together.
    """
    wrong = ~np.stack([np.asarray(ours, dtype=bool), np.asarray(theirs, dtype=bool)])  # (2, S, N)
    classes = np.asarray(labels)
    if wrong.ndim != 3 or wrong.shape[2] != len(classes):
        raise KitError(
            f"outcomes of shape {wrong.shape[1:]} and {len(classes)} labels do not belong together: use (seeds, images)"
        )
    members = [np.flatnonzero(classes == label) for label in np.unique(classes)]
    seeds, times = _resampled(wrong.shape[1], tuple(map(len, members)), draws)
    worst, drawn = np.zeros(wrong.shape[:2]), np.zeros((draws, *wrong.shape[:2]))
    for index, often in zip(members, times, strict=True):
        part = wrong[:, :, index]
        worst = np.maximum(worst, part.mean(2))
        # whole numbers below 2²⁴: exact in float32
        found = often.astype(np.float32) @ part.reshape(-1, len(index)).T.astype(np.float32)
        drawn = np.maximum(drawn, found.reshape(drawn.shape).astype(float) / len(index))
    change = drawn[:, 0] - drawn[:, 1]  # (draws, S)
    return float((worst[0] - worst[1]).mean()), np.take_along_axis(change, seeds, 1).mean(1)


@functools.lru_cache(maxsize=4)
def _resampled(seeds: int, counts: tuple[int, ...], draws: int) -> tuple[np.ndarray, list[np.ndarray]]:
    """What each draw of a bootstrap takes: seeds (draws, S), and how often each image of every class (draws, count).

    The same for every pair of methods with as many seeds and images, for drawing takes far longer than what follows.
    """
    generator = np.random.default_rng(0)
    which = generator.integers(seeds, size=(draws, seeds))
    shares = (np.full(count, 1 / count) for count in counts)
    times = [generator.multinomial(len(share), share, size=draws) for share in shares]
    return which, [often.astype(np.uint8 if often.max() < 256 else int) for often in times]


def class_errors(right: ArrayLike, labels: ArrayLike) -> np.ndarray:
    """Class-wise errors (S, C), fractions, of outcomes `right` (S, N), as of `studies.outcomes`; `labels` (N,)."""
    members = np.eye(int(np.max(labels)) + 1)[np.asarray(labels)]
    return ~np.asarray(right, dtype=bool) @ members / members.sum(0)


def wilson(wrong: ArrayLike, images: ArrayLike) -> list[tuple[float, float]]:
    """Wilson's 95 % interval of each class's error: `wrong` of its `images`, both (C,) whole numbers; fractions."""
    pairs = zip(np.asarray(wrong).tolist(), np.asarray(images).tolist(), strict=True)
    found = [stats.binomtest(count, of).proportion_ci(method="wilson") for count, of in pairs]
    return [(float(each.low), float(each.high)) for each in found]


def hardest(wrong: ArrayLike, images: ArrayLike) -> tuple[int, np.ndarray]:
    """The class with the largest error, and against each class Fisher's exact two-sided p-value, (C,); 1 at itself.

    `wrong` of each class's `images` (C,). The class was chosen for its error, and still it is the hardest with 95 %
    confidence where every other p-value is below 0.05: a test against the runner-up at the full, two-sided level does
    for all (Hung & Fithian, 2019, "Rank verification for exponential families").
    """
    count, of = np.asarray(wrong), np.asarray(images)
    worst = int((count / of).argmax())
    mine = [count[worst], of[worst] - count[worst]]
    p = [stats.fisher_exact([mine, [k, n - k]]).pvalue for k, n in zip(count, of, strict=True)]
    return worst, np.where(np.arange(len(of)) == worst, 1.0, np.minimum(p, 1.0))


def rank_correlations(difficulty: ArrayLike, target: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    """Spearman's rank correlation over classes, seed by seed, with every class left out in turn.

    Both arguments are (S, C). Returns rho and its two-sided p-value, each (S, 1 + C): all classes first, then without
    class 0, 1, ... NaN where there are fewer than three classes left or one side is the same for all of them.
    """
    x, y = np.asarray(difficulty, dtype=float), np.asarray(target, dtype=float)
    everyone = np.arange(x.shape[1])
    kept = [everyone, *(np.delete(everyone, left) for left in everyone)]
    found = np.array([[_spearman(a[index], b[index]) for index in kept] for a, b in zip(x, y, strict=True)])
    return found[..., 0], found[..., 1]


def _spearman(x: np.ndarray, y: np.ndarray) -> tuple[float, float]:
    if len(x) < 3 or np.ptp(x) == 0 or np.ptp(y) == 0:
        return np.nan, np.nan
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of scipy, where rho is exactly one
        result = stats.spearmanr(x, y)
    return float(result.statistic), float(result.pvalue)


def partial_rank_correlations(covariate: ArrayLike, target: ArrayLike, given: ArrayLike) -> np.ndarray:
    """Spearman's partial rank correlation over classes, seed by seed: of covariate and target, `given` held fixed.

    All are (S, C). Returns rho and its two-sided p-value (t with C - 3 degrees of freedom) as (2, S): the correlation
    of what is left of both sides' ranks once the ranks of `given` are regressed out. NaN where there are fewer than
    four classes, or nothing is left of a side.
    """
    return np.array([_partial(*row) for row in zip(*map(np.asarray, (covariate, target, given)), strict=True)]).T


def _partial(x: np.ndarray, y: np.ndarray, z: np.ndarray) -> tuple[float, float]:
    (xy, _), (xz, _), (yz, _) = _spearman(x, y), _spearman(x, z), _spearman(y, z)
    free, left = len(x) - 3, (1 - xz**2) * (1 - yz**2)
    if free < 1 or not left > 1e-12:
        return np.nan, np.nan
    rho = float(np.clip((xy - xz * yz) / np.sqrt(left), -1, 1))
    return rho, 2 * float(stats.t.sf(abs(rho) * np.sqrt(free / max(1 - rho**2, 1e-300)), free))


def p_beyond(values: ArrayLike, limit: float, side: str) -> float:
    """One-sided p-value of a t test over seeds that the mean is "less" or "greater" than `limit`.

    Where all seeds agree exactly, the mean is taken as it stands: 0 or 1.
    """
    found = np.asarray(values, dtype=float)
    if np.ptp(found) == 0:
        return float(not (found[0] < limit if side == "less" else found[0] > limit))
    return float(stats.ttest_1samp(found, limit, alternative=side).pvalue)


def mean_interval(values: ArrayLike, level: float = 0.95) -> tuple[float, float]:
    """The t interval of a mean over seeds; NaN for fewer than two."""
    found = np.asarray(values, dtype=float)
    if len(found) < 2:
        return np.nan, np.nan
    half = stats.t.ppf((1 + level) / 2, len(found) - 1) * found.std(ddof=1) / np.sqrt(len(found))
    return float(found.mean() - half), float(found.mean() + half)


def prediction(values: ArrayLike, level: float = 0.95) -> tuple[float, float]:
    """The t interval in which one more run's value lies; NaN for fewer than two values."""
    found = np.asarray(values, dtype=float)
    low, high = mean_interval(found, level)
    wider = np.sqrt(len(found) + 1)  # of its own spread and that of the mean: s √(1 + 1/n) for s / √n
    return float(found.mean() + wider * (low - found.mean())), float(found.mean() + wider * (high - found.mean()))


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's adjusted p-values, in the order given: with k left, the smallest counts k times, and none before it more.

    A family in which those below 0.05 are believed holds a false one with probability 0.05 at most.
    """
    adjusted = [0.0] * len(p_values)
    highest = 0.0
    for place, index in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        highest = max(highest, min(1.0, (len(p_values) - place) * p_values[index]))
        adjusted[index] = highest
    return adjusted


def front(points: ArrayLike) -> np.ndarray:
    """Which of M points (M, K) are on the Pareto front: no other is as small in all coordinates and smaller in one."""
    values = np.asarray(points, dtype=float)
    as_small = (values[:, None] <= values[None]).all(2)
    smaller = (values[:, None] < values[None]).any(2)
    return ~(as_small & smaller).any(0)
