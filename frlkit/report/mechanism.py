"""Who pays for whom: attacked confusions before and after, groups of similar classes, fronts, constraints."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from frlkit import KitError
from frlkit.report import rules, statistics, tables
from frlkit.report.names import plain, title
from frlkit.report.studies import entry_of

Seeds = Sequence[Mapping[str, Any]]  # of one recipe: a record or a history per seed


def confusion(records: Seeds, eps_255: float) -> pd.DataFrame:
    """Where the attacked images of each class end, in per cent of the class, mean over seeds: true by predicted class.

    Under the standard attack at `eps_255` (in 1/255), which leaves an image that is wrong clean where it is.
    Raises `KitError` where a record has no such attack.
    """
    shares = []
    for record in records:
        counts = np.array(entry_of(record, eps_255)["confusion"], dtype=float)
        shares.append(100 * counts / counts.sum(1, keepdims=True))
    names = [plain(name) for name in records[0]["class_names"]]
    more = [f"output {number}" for number in range(len(names), shares[0].shape[1])]  # outputs that no class has
    return pd.DataFrame(np.mean(shares, axis=0), index=names, columns=[*names, *more])


def who_pays(before: Seeds, after: Seeds, eps_255: float) -> pd.DataFrame:
    """Class by class, what changes from one method to another under attack, in points (mean over seeds).

    A class is the *source* of its own errors and the *target* of others'. "own error": the change of its robust error;
    "taken for it": of the images of other classes that end there, in per cent of one class (so both columns have the
    same sum where all classes count alike). "now goes to" and "no longer to" name the class that the most more, and the
    most fewer, of its images end in.
    """
    change = confusion(after, eps_255) - confusion(before, eps_255)
    own = -pd.Series(np.diag(change), change.index)
    others = change.mask(np.eye(*change.shape, dtype=bool))
    taken = others.sum()[change.index]

    def named(row: pd.Series, place: str, sign: str) -> str:
        return f"{place} {row[place]:+.1f}" if (row[place] > 0) == (sign == "+") and row[place] else "–"

    return pd.DataFrame(
        {
            "own error": own.round(1),
            "taken for it": taken.round(1),
            "now goes to": {name: named(row, row.idxmax(), "+") for name, row in others.iterrows()},
            "no longer to": {name: named(row, row.idxmin(), "-") for name, row in others.iterrows()},
        }
    )


def payers(pays: pd.DataFrame) -> str:
    """What `who_pays` found, in words: whose error falls most, whose rises most, and what is left over all classes."""
    own, taken = pays["own error"], pays["taken for it"]
    gains, loses = own.idxmin(), own.idxmax()
    return (
        f"own robust error: from {own[gains]:+.1f} points ({gains}) to {own[loses]:+.1f} ({loses}); others' images "
        f"taken for {gains}: {taken[gains]:+.1f} % of a class; sum over all classes {own.sum():+.1f} points"
    )


def group_error(errors: pd.DataFrame, recipe: str, measure: str, group: Sequence[str]) -> pd.DataFrame:
    """Mean error (%) of a group of classes, of its worst, and of all others, seed by seed, from `tables.tidy`.

    Where one class of the group gains what another loses, the worst falls and the mean does not. Raises `KitError`
    where a class is not there.
    """
    scores = tables.classwise(errors, recipe, measure)
    if missing := [name for name in group if name not in scores.columns]:
        raise KitError(f"class {missing[0]!r} is not there: use {', '.join(scores.columns)}")
    inside = scores[list(group)]
    others = scores.drop(columns=list(group)).mean(axis=1)
    return pd.DataFrame({"mean of the group": inside.mean(axis=1), "its worst": inside.max(axis=1), "others": others})


def pareto(scored: pd.DataFrame, average: str, worst: str) -> pd.DataFrame:
    """Mean over seeds of two columns of `tables.scores`, one row a recipe, and whether it is on the Pareto front."""
    means = scored[[average, worst]].groupby(level="recipe", sort=False).mean()
    return means.assign(front=statistics.front(means.to_numpy()))


def dominated(scored: pd.DataFrame, recipe: str, columns: Sequence[str]) -> str:
    """Which others have means as low in all columns of `tables.scores`, and one lower beyond chance, in words.

    Beyond chance: the paired t interval (95 %) over seeds lies below 0. Others with too few common seeds do not count.
    """
    better, compared = [], False
    for other in scored.index.unique("recipe").drop(recipe):
        change = (scored.loc[other][list(columns)] - scored.loc[recipe][list(columns)]).dropna()
        if len(change) < rules.FEWEST_SEEDS:
            continue
        compared = True
        beyond = min(statistics.mean_interval(change[column])[1] for column in columns)
        if (change.mean() <= 0).all() and beyond < 0:
            better.append(title(other))
    if not compared:
        return f"not compared: no other has {rules.FEWEST_SEEDS} seeds in common with it"
    return f"dominated by {', '.join(better) or 'none'}"


def violations(history: Mapping[str, Any], tau_nat: float = 0.05, tau_bdy: float = 0.07) -> pd.DataFrame:
    """Largest v(i) = R(f, i) - R(f) - tau over classes on the validation split, in points, epoch by epoch.

    Columns natural, boundary and largest (of both); epoch 0 is the model that retraining starts from. All constraints
    hold where "largest" is at most 0. Tolerances are fractions.
    """
    start = [history["start"]["validation"]] if "start" in history else []
    rows = []
    for errors in (*start, *(entry["validation"] for entry in history["epochs"])):
        natural, robust = np.array(errors["natural"]), np.array(errors["robust"])
        kinds = ((natural, tau_nat), (robust - natural, tau_bdy))
        rows.append([100 * float(kind.max() - kind.mean() - tau) for kind, tau in kinds])
    frame = pd.DataFrame(rows, columns=["natural", "boundary"], index=range(1 - len(start), len(rows) + 1 - len(start)))
    return frame.assign(largest=frame.max(axis=1)).rename_axis("epoch")


def smallest_violation(histories: Mapping[str, Seeds], recipe: str, **tau: float) -> pd.Series:
    """The smallest of a run's largest violations after any epoch, in points, seed by seed; empty where there are none.

    Algorithm 1 stops as soon as all constraints hold, so an epoch that reaches 0 would have been its last.
    """
    found = {h["config"]["seed"]: violations(h, **tau)["largest"].loc[1:].min() for h in histories.get(recipe, [])}
    return pd.Series(found, name=title(recipe), dtype=float)


def smallest_violations(histories: Mapping[str, Seeds], **tau: float) -> pd.DataFrame:
    """Of every recipe, the smallest of its epochs' largest violations, at what price, and when: mean ± sd over seeds.

    In points, over the epochs after the start; "of" counts the seeds in which it was either constraint's. The price is
    that epoch's average validation errors in per cent. "satisfied" counts the seeds with an epoch without violation.
    """
    rows = {}
    for recipe, seeds in histories.items():
        every = [violations(history, **tau) for history in seeds]
        best = [int(frame["largest"].loc[1:].idxmin()) for frame in every]
        there = pd.DataFrame([frame.loc[epoch] for frame, epoch in zip(every, best, strict=True)])
        errors = [history["epochs"][epoch - 1]["validation"] for history, epoch in zip(seeds, best, strict=True)]
        price = {kind: [100 * np.mean(found[kind]) for found in errors] for kind in ("natural", "robust")}
        rows[recipe] = {
            "at the start": tables.plus_minus([frame["largest"].iloc[0] for frame in every]),
            "smallest": tables.plus_minus(there["largest"]),
            "of": _counted(there[["natural", "boundary"]].idxmax(axis=1)),
            **{f"{kind} average there": tables.plus_minus(values) for kind, values in price.items()},
            "in epoch": ", ".join(map(str, best)),
            "after the last": tables.plus_minus([frame["largest"].iloc[-1] for frame in every]),
            "satisfied": f"{sum(there['largest'] <= 0)} of {len(every)}",
        }
    return pd.DataFrame(rows).T


def worst_by_seed(errors: pd.DataFrame, recipe: str, measure: str) -> str:
    """Which class is the worst in how many seeds, from `tables.tidy`: "Coat 3, Pullover 1, Shirt 1"."""
    return _counted(tables.classwise(errors, recipe, measure).idxmax(axis=1))


def _counted(found: pd.Series) -> str:
    return ", ".join(f"{name} {count}" for name, count in found.value_counts().items())


def multiplier_sums(seeds: Seeds) -> pd.DataFrame:
    """Sums of one recipe's multipliers by epoch: a row an epoch, columns (natural or boundary, seed).

    Read off the class weights: 1/C + φ as printed, else 1/C + φ - mean φ, from which φ is known where some class
    violates nothing and has none.
    """
    sums = {}
    for kind, field in (("natural", "weights_nat"), ("boundary", "weights_bdy")):
        for history in seeds:
            weights = np.array([entry[field] for entry in history["epochs"]])
            printed = history["config"].get("weighting") == "printed"
            least = 1 / weights.shape[1] if printed else weights.min(axis=1, keepdims=True)
            sums[kind, history["config"]["seed"]] = (weights - least).sum(axis=1)
    frame = pd.DataFrame(sums)
    return frame.set_axis(range(1, len(frame) + 1)).rename_axis("epoch")


def weight_movement(histories: Mapping[str, Seeds], epochs: int = 10) -> pd.DataFrame:
    """How far the class weights of both losses move in an epoch, so whether the multipliers settle: a row a recipe.

    The sum of absolute changes, mean over the first and over the last `epochs` changes of a run, mean ± sd over seeds.
    """
    rows = {}
    for recipe, seeds in histories.items():
        weights = [np.array([[e["weights_nat"], e["weights_bdy"]] for e in history["epochs"]]) for history in seeds]
        moved = [np.abs(np.diff(by_epoch, axis=0)).sum(axis=(1, 2)) for by_epoch in weights]
        parts = {f"first {epochs} epochs": slice(epochs), f"last {epochs} epochs": slice(-epochs, None)}
        rows[recipe] = {
            name: tables.plus_minus([one[part].mean() for one in moved], decimals=3) for name, part in parts.items()
        }
    return pd.DataFrame(rows).T
