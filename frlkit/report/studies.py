"""The runs that a notebook's study needs, trained where they are missing, read where finished, or attacked again."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from frlkit import KitError, checkpoint, models, records, runs, watched
from frlkit.data import Dataset, folder_name
from frlkit.evaluation import BATCH, Attack, predictions
from frlkit.recipes import BASE, FAIR, RECIPES, Config, configure, described
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


def _run(recipe: str, dataset: str, seed: int, folder: Path, **lengths: Any) -> tuple[Config, Path]:
    """A run's configuration and its folder; a length that was asked for wins over the first edition's."""
    recipe = names.lasting(recipe, lengths["frl_epochs"])
    config = configure(recipe, dataset, seed, **values(recipe, **lengths))
    return config, runs.folder(folder, recipe, config)


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
            config, place = _run(recipe, dataset, seed, folder, **lengths)
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

    A title without such a run, or without a recipe, is left out: claims about it are not tested. A run that is being
    attacked at this moment is not finished.
    """
    found: Records = {}
    histories: Records = {}
    for recipe in map(names.recipe, titles):
        for seed in seeds:
            try:
                config, place = _run(recipe, dataset, seed, folder, **lengths)
                record, history = _results(place)
            except KitError:
                continue
            same = record.get("config") == history.get("config") == described(config)
            if same and runs.all_attacked(record, config):
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
            _, place = _run(recipe, dataset, seed, folder, **lengths)
            right = records.outcomes(place / records.OUTCOMES, record["weights_sha256"])
            if attack in right:
                kept[-1][seed] = right[attack]
    seeds = sorted(set(kept[0]) & set(kept[1]))
    return [np.array([one[seed] for seed in seeds]) for one in kept]


def recheck(found: Records, recipe: str, folder: Path, tensors: Dataset, **lengths: Any) -> str:
    """Attack the first seed's weights again, here and now, with `standard`'s attacks; says that they agree with the
    record.

    Where the outcomes of its test images were kept, one batch of them, class by class beside those; else all images.
    Raises `KitError` where a class's error is other than the record's by more than one image, or half a per cent of
    its images, which rounding may change on another machine; of colour images a twentieth, as a GPU's random starts do.
    """
    record, test, some = found[recipe][0], tensors.test, ""
    config, place = _run(recipe, tensors.name, record["config"]["seed"], folder, **lengths)
    model = runs.load(place, config, test.labels.device)
    attacks, share = records.standard(tensors.name), 0.005
    kept = records.outcomes(place / records.OUTCOMES, record["weights_sha256"])
    if {*map(str, attacks)} <= {*kept} and len(test) > BATCH:
        share = 0.05 if test.images.shape[1] == 3 else share
        test, some = test.take(torch.arange(BATCH)), f", {BATCH:,} of the test images"
    for attack in attacks:
        labels, clean, attacked = predictions(model, test, attack)
        images, robust = np.bincount(labels, minlength=len(tensors.class_names)), robust_errors(record, attack.eps_255)
        right = {"clean": clean == labels, str(attack): (clean == labels) & (attacked == labels)}
        for (name, stands), whole in zip(right.items(), (record["natural"], robust), strict=True):
            before = np.multiply(whole, images)
            if some:
                before = np.bincount(labels, ~kept[name][: len(labels)], len(images))
            wrong = np.bincount(labels, ~stands, len(images))
            off = np.abs(wrong - before) - np.maximum(1, share * images)
            if off.max() > 1e-6:
                worst = int(off.argmax())
                raise KitError(
                    f"{recipe}, {name}: {wrong[worst]:.0f} images of {tensors.class_names[worst]} are wrong here, and "
                    f"{before[worst]:.0f} by the record: weights, images or record are not of one run; take {place} "
                    "from the repository again, or delete it to have it trained anew"
                )
    return f"{recipe}: recomputed on this machine{some}, agrees with its record"


def verify(folder: Path, tensors: Dataset, begins: Sequence[str] = ("",)) -> Iterator[tuple[Path, float | None]]:
    """Every finished run of this data set under `folder`, recomputed: its folder, the largest class-wise difference.

    Only those whose RECIPE/seedN begins with one of `begins`. A bar counts them where a person watches.
    The difference is None where the network is somebody's own and not lent here. Raises `KitError` where a file is
    damaged, or its record belongs to other weights or images.
    """
    own = tensors
    found = runs.finished(folder / folder_name(tensors.name))
    asked = [place for place in found if "/".join(place.parts[-2:]).startswith(tuple(begins))]
    for place in tqdm(asked, unit="run", leave=False, disable=not watched()):
        record = records.read(place / "record.json")
        if models.elsewhere(str(record.get("config", {}).get("model"))):
            yield place, None
            continue
        model, config = runs.read_weights(place / runs.WEIGHTS)
        share = config.get("validation", tensors.share)
        own = own if own.share == share else tensors.with_validation(share)
        runs.refuse_other_images(place / "record.json", record, own)
        if record.get("weights_sha256") != checkpoint.digest(dict(model.state_dict())):
            raise KitError(f"{place / 'record.json'} belongs to other weights than {place / runs.WEIGHTS}: delete it")
        attacks = [Attack(**entry["attack"]) for entry in record["attacks"]]
        again = records.evaluate(models.place(model, tensors.test.labels.device), tensors, attacks)
        yield place, largest_difference(record, again)


def largest_difference(record: Mapping[str, Any], other: Mapping[str, Any]) -> float:
    """The largest class-wise difference (a fraction) of two records of one model under the same attacks.

    Raises `KitError` where they do not have the same classes and attacks.
    """
    classes = [len(r.get("natural", ())) for r in (record, other)]
    if classes[0] != classes[1]:
        raise KitError(f"one record has errors of {classes[0]} classes, the other of {classes[1]}")
    ours, theirs = ({Attack(**entry["attack"]): entry["robust"] for entry in r["attacks"]} for r in (record, other))
    if only := set(ours) ^ set(theirs):
        raise KitError(f"only one of the two records has {min(map(str, only))}: evaluate both alike")
    differences = [np.subtract(ours[attack], theirs[attack]) for attack in ours]
    differences += [np.subtract(record["natural"], other["natural"])] if ours else []
    return float(np.abs(differences).max(initial=0))


def robust_errors(record: Mapping[str, Any], eps_255: float) -> np.ndarray:
    """A record's class-wise robust error (C,) under the standard attack at a radius in 1/255."""
    return np.array(entry_of(record, eps_255)["robust"])


def has(record: Mapping[str, Any], eps_255: float) -> bool:
    """Whether a record has the standard attack at a radius in 1/255."""
    return any(Attack(**entry["attack"]) == Attack(eps_255=eps_255) for entry in record["attacks"])


def entry_of(record: Mapping[str, Any], eps_255: float) -> dict[str, Any]:
    """A record's entry for the standard attack at a radius in 1/255; raises `KitError` where it has none."""
    for entry in record["attacks"]:
        if Attack(**entry["attack"]) == Attack(eps_255=eps_255):
            return entry
    raise KitError(f"the record has no {Attack(eps_255=eps_255)}: evaluate the weights with it first")
