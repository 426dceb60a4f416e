"""A run's folder: start, go on, finish, reload.

RUNS/DATASET/RECIPE/seedN holds ``checkpoint.pt`` after every epoch of a run, and of a finished one
``weights.safetensors``, ``history.json``, ``record.json`` and ``outcomes.npz``.
"""

from __future__ import annotations

import contextlib
import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from frlkit import KitError, __version__, checkpoint, disk, distributed, kernels, models, records, training
from frlkit.data import Dataset, folder_name
from frlkit.evaluation import Attack
from frlkit.recipes import OWN, Config, FairConfig, described, spelled, start_of
from frlkit.values import first_line

WEIGHTS = "weights.safetensors"
FILES = (WEIGHTS, "history.json", records.OUTCOMES, "record.json")  # the record makes a run finished: it comes last


def folder(runs: Path, recipe: str, config: Config) -> Path:
    """Where a run lives: RUNS/DATASET/RECIPE/seedN, data set and recipe in their one spelling, or the folder that has
    the recipe's fields in another order."""
    place, name = runs / folder_name(config.dataset), spelled(recipe)
    try:
        if name.count(",") > 1 and not (place / name).exists() and place.is_dir():
            name = _orders(place, place.stat().st_mtime_ns).get(frozenset(name.split(",")), name)
    except OSError as error:
        raise disk.not_read(place, error) from None
    return place / name / f"seed{config.seed}"


@functools.lru_cache(maxsize=8)
def _orders(place: Path, _changed: int) -> dict[frozenset[str], str]:
    """The recipes of a data set's folder by their parts, as long as it does not change."""
    return {frozenset(path.name.split(",")): path.name for path in sorted(place.iterdir())}


def own_start(model: nn.Module) -> str:
    """The `start` of a run that goes on from a network as it stands: the head of its weights' digest."""
    return OWN + checkpoint.digest(dict(model.state_dict()))[:16]


def start_folder(config: Config, place: Path) -> Path:
    """Where the run lives that the retraining run in `place` starts from: beside it."""
    return place.parents[1] / config.start / place.name  # type: ignore[attr-defined]


def run(config: Config, data: Dataset, place: Path) -> nn.Module:
    """Train, or go on training, or reload: the model after `config.epochs` epochs.

    One process at a time: a second waits. Raises `KitError` where the folder belongs to another configuration or cannot
    be written, and `training.TrainingDivergedError` where the loss or a weight is no longer finite.
    """
    own = data.with_validation(config.validation)
    if distributed.from_main(lambda: disk.exists(place / WEIGHTS) and at_rest(place)):
        return _finish(config, own, place)
    with disk.only_one(place) if distributed.is_main() else contextlib.nullcontext():
        if not distributed.from_main(lambda: disk.exists(place / WEIGHTS)):
            _train(config, own, place, data)
        return _finish(config, own, place)


def at_rest(place: Path) -> bool:
    """Whether a run is evaluated, nobody works in its folder, and no kill has left anything there."""
    left = disk.exists(place / "checkpoint.pt") or disk.exists(checkpoint.previous(place / "checkpoint.pt"))
    return disk.exists(place / "record.json") and disk.at_rest(place) and not left


def _train(config: Config, data: Dataset, place: Path, whole: Dataset) -> None:
    """Epochs from the newest checkpoint to the last, saving after each; leaves weights and history. `whole` is the data
    set before its validation images were set aside, for the run that this one starts from."""
    path = place / "checkpoint.pt"
    own: dict[str, Any] = {"config": described(config), "data_sha256": data.fingerprint, "made_by": []}
    state = distributed.from_main(lambda: checkpoint.resume(path, own["config"]))
    if state is None:
        progress = training.begin(config, data, _starting_model(config, whole, place))
        if progress.start is not None:
            progress.start = {"sha256": checkpoint.digest(dict(progress.model.state_dict())), **progress.start}
    else:
        refuse_other_images(path, state, data)
        progress = training.resume(config, data, state)
        own["made_by"] += state.get("made_by", [])
    _note_machine(own["made_by"], progress.model, place)
    progress.title = "/".join(place.parts[-3:])  # DATASET/RECIPE/seedN
    for _ in training.epochs(progress):
        if distributed.is_main():
            checkpoint.save(path, {**own, **progress.plain()})
    if distributed.is_main():
        start = {} if progress.start is None else {"start": progress.start}
        kept = {**own, **own["made_by"][-1], **start, "epochs": progress.history}
        checkpoint.write_json(place / "history.json", kept)
        write_weights(place / WEIGHTS, progress.result.state_dict(), own["config"], len(data.class_names))


def refuse_other_images(path: Path, found: Mapping[str, Any], data: Dataset) -> None:
    """Raise `KitError` where a run's file was made with other images or another split than these."""
    if found.get("data_sha256", data.fingerprint) != data.fingerprint:  # the first runs kept no fingerprint
        raise KitError(
            f"{path} was made with other images of {data.name} than those that are there now: bring them back, or "
            "choose another folder for the runs, or delete that one"
        )


def _note_machine(made_by: list[dict[str, Any]], model: nn.Module, place: Path) -> None:
    """Add what carries the run out, where it changes: bit equality with the straight run needs the same throughout."""
    now = {"kernel": kernels.describe(model), "threads": torch.get_num_threads(), "versions": records.versions()}
    if made_by and made_by[-1] != now and distributed.is_main():
        changed = ", ".join(f"{key} {last} -> {now[key]}" for key, last in made_by[-1].items() if last != now[key])
        print(f"{place} goes on with {changed}: its result may differ in rounding from a run made with one of them")
    if [now] != made_by[-1:]:
        made_by.append(now)


def _starting_model(config: Config, data: Dataset, place: Path) -> nn.Module:
    """A network drawn from the seed, or what a retraining run starts from: a finished run, trained if missing, or the
    network that was lent. Raises `KitError` where that one's weights are others than the configuration says."""
    start = start_of(config)
    if start is not None:
        return run(start, data, start_folder(config, place))
    model, wanted = training.fresh_model(config, data), getattr(config, "start", "")
    if wanted.startswith(OWN) and wanted != (found := own_start(model)):
        raise KitError(f"{place} starts from {wanted} and the weights of {config.model} are {found}: bring those")
    return model


def _finish(config: Config, data: Dataset, place: Path) -> nn.Module:
    """The trained model, with its record of test errors; the working checkpoints are gone."""

    def evaluate() -> None:
        model, about = load(place, config, data.train.labels.device), {"config": described(config)}
        refuse_other_images(place / "history.json", records.read_history(place / "history.json"), data)
        records.evaluate(model, data, attacks_on(config), path=place / "record.json", about=about)
        checkpoint.remove(place / "checkpoint.pt")

    distributed.from_main(evaluate)
    return load(place, config, data.train.labels.device)


def attacks_on(config: Config) -> tuple[Attack, ...]:
    """The attacks that a finished run's record has, at least."""
    return records.standard(config.dataset, preliminary=not isinstance(config, FairConfig))


def all_attacked(record: Mapping[str, Any], config: Config) -> bool:
    """Whether a record has all of `attacks_on`: it grows attack by attack."""
    return {Attack(**entry["attack"]) for entry in record["attacks"]} >= {*attacks_on(config)}


def write_weights(path: Path, state: dict[str, Tensor], config: dict[str, Any], classes: int) -> None:
    """A model's weights as safetensors, with configuration, number of classes and a digest in the header."""
    tensors = {name: value.detach().cpu().contiguous() for name, value in state.items()}
    head = {"format": "pt", "frlkit": __version__, "config": json.dumps(config), "num_classes": str(classes)}
    content = safetensors.torch.save(tensors, metadata={**head, "sha256": checkpoint.digest(tensors)})
    # the library writes the header in another order every time: sorted, the same weights are the same file
    end = 8 + int.from_bytes(content[:8], "little")
    text = json.dumps(json.loads(content[8:end]), sort_keys=True, ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    checkpoint.write_atomically(path, len(text).to_bytes(8, "little") + text + content[end:])


def read_weights(path: Path) -> tuple[nn.Module, dict[str, Any]]:
    """A finished run's model on the CPU, and its configuration; raises `KitError` where the file is missing, damaged or
    another kind of file."""
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            head = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
        config, classes = json.loads(head["config"]), int(head["num_classes"])
        model = models.build(config["model"], classes, seed=0)  # the caller's random numbers are left alone
        model.load_state_dict(tensors)
        whole = checkpoint.digest(dict(model.state_dict())) == head["sha256"]
    except FileNotFoundError:
        raise KitError(f"there is no file {path}: train the run first") from None
    except OSError as error:
        raise disk.not_read(path, error) from None
    except KitError as error:  # such as a network of one's own
        raise KitError(f"{path}: {error}") from None
    except Exception as error:  # a damaged or foreign file can raise anything
        reason = first_line(error)[:150]
        raise KitError(f"{path} is no weights file of a finished run ({reason}): delete it to train anew") from None
    if not whole:
        raise KitError(f"{path} is damaged: its weights do not match its own digest; delete it to train anew")
    if name := models.nonfinite(tensors):
        raise KitError(f"{path}: {name} has weights that are NaN or infinite; delete it, and train with a lower lr")
    return model, config


def load(place: Path, config: Config, device: str | torch.device = "cpu") -> nn.Module:
    """A finished run's model. Raises `KitError` where its file is damaged or belongs to another configuration."""
    model, found = read_weights(place / WEIGHTS)
    checkpoint.refuse_other(place, found, described(config))
    return models.place(model, device)


def finished(runs: Path) -> list[Path]:
    """The folders of all finished runs below RUNS or RUNS/DATASET."""
    return sorted(path.parent for path in runs.rglob("seed*/record.json"))
