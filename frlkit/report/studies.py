"""The runs that a notebook's study needs: some trained where they are missing, others read where they are finished."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from frlkit import KitError, checkpoint, records, runs
from frlkit.data import Dataset
from frlkit.recipes import BASE, FAIR, RECIPES, configure, described
from frlkit.report import names

Records = dict[str, list[dict[str, Any]]]  # recipe -> one per seed


def values(recipe: str, epochs: int, frl_epochs: int, batch_size: int, model: str = "") -> dict[str, Any]:
    """A run's fields from a notebook's parameters: its retraining has its recipe's own length where `frl_epochs` is 0.

    `model` is empty for the network that the data set asks for.
    """
    shared = {"batch_size": batch_size, **({"model": model} if model else {})}
    base = recipe.split(",")[0]
    if base in BASE:
        return {"epochs": epochs, **shared}
    begins = RECIPES[base].values.get("start") if base in RECIPES else None
    given = {"epochs": frl_epochs} if frl_epochs else {}
    start = (frl_epochs or RECIPES[begins].values["epochs"]) if begins in FAIR else epochs
    return {**given, "start_epochs": start, **shared}


def study(
    titles: Sequence[str],
    seeds: Sequence[int],
    dataset: str,
    folder: Path,
    tensors: Dataset | None,
    *,
    needed: Iterable[str] = (),
    **lengths: Any,
) -> tuple[Records, Records]:
    """Records and histories, recipe -> one per seed, of these titles (`names.METHODS`) or recipes.

    Missing runs are trained; where there are no data (`tensors` is None), those that are finished are all there is:
    raises `KitError` where one of the titles `needed` has none. `lengths` are the parameters of `values`.
    """
    found: Records = {}
    histories: Records = {}
    if tensors is None:
        found, histories = finished(titles, seeds, dataset, folder, **lengths)
        if missing := [title for title in needed if names.recipe(title) not in found]:
            raise KitError(f"there is no finished run of {missing[0]} ({dataset}) in {folder}, and no data to train it")
        return found, histories
    for recipe in map(names.recipe, titles):
        for seed in seeds:
            config = configure(recipe, dataset, seed, **values(recipe, **lengths))
            place = runs.folder(folder, recipe, config)
            runs.run(config, tensors, place)
            record, history = _results(place)
            for result in (record, history):
                checkpoint.refuse_other(place, result.get("config", {}), described(config))
            found.setdefault(recipe, []).append(record)
            histories.setdefault(recipe, []).append(history)
    return found, histories


def _results(place: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    return records.read(place / "record.json"), records.read_history(place / "history.json")


def finished(
    titles: Iterable[str], seeds: Sequence[int], dataset: str, folder: Path, **lengths: Any
) -> tuple[Records, Records]:
    """As `study`, of the runs that are finished with exactly this configuration, in however many of the seeds.

    A title without such a run, or without a recipe, is left out: claims about it are not tested.
    """
    found: Records = {}
    histories: Records = {}
    for recipe in map(names.recipe, titles):
        for seed in seeds:
            try:
                config = configure(recipe, dataset, seed, **values(recipe, **lengths))
                record, history = _results(runs.folder(folder, recipe, config))
            except KitError:
                continue
            if record.get("config") == history.get("config") == described(config):
                found.setdefault(recipe, []).append(record)
                histories.setdefault(recipe, []).append(history)
    return found, histories


def outcomes(
    found: Records, pair: Sequence[str], folder: Path, attack: str, dataset: str, **lengths: Any
) -> list[np.ndarray]:
    """Whether two methods are right about each test image under an attack (its name, or "clean"): two (S, N) arrays.

    A row for each seed of which both methods kept their outcomes; no rows where there are none. For
    `statistics.paired_worst`.
    """
    kept: list[dict[int, np.ndarray]] = []
    for recipe in map(names.recipe, pair):
        kept.append({})
        for record in found.get(recipe, []):
            seed = record["config"]["seed"]
            place = runs.folder(folder, recipe, configure(recipe, dataset, seed, **values(recipe, **lengths)))
            right = records.outcomes(place / records.OUTCOMES, record["weights_sha256"])
            if attack in right:
                kept[-1][seed] = right[attack]
    seeds = sorted(set(kept[0]) & set(kept[1]))
    return [np.array([one[seed] for seed in seeds]) for one in kept]


def recheck(found: Records, recipe: str, folder: Path, tensors: Dataset, **lengths: Any) -> float:
    """Attack the first seed's weights again, here and now, with `standard`'s attacks: the largest class-wise difference
    from the record."""
    record = found[recipe][0]
    config = configure(recipe, tensors.name, record["config"]["seed"], **values(recipe, **lengths))
    model = runs.load(runs.folder(folder, recipe, config), config, tensors.test.labels.device)
    again = records.evaluate(model, tensors)
    compared = [records.entry_of(record, entry["attack"]["eps_255"]) for entry in again["attacks"]]
    return records.largest_difference({**record, "attacks": compared}, again)
