"""The one epoch loop: natural training, PGD-AT, TRADES and Fair Robust Learning (FRL), resumable after every epoch.

Every epoch's random numbers derive from (seed, epoch) alone, so a run that was stopped and resumed equals the straight
run bit for bit on CPU (same torch, same number of threads, same kernel).
"""

from __future__ import annotations

import contextlib
import math
import os
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm.auto import tqdm

from frlkit import KitError, checkpoint, distributed, evaluation, fairness, kernels, models
from frlkit.attacks import logits, pgd
from frlkit.data import Dataset, Split, augmented, check_name, folder_name
from frlkit.evaluation import Attack, stream

# The purposes of an epoch's random streams: order of the images, starts of the attacks, images to estimate errors on,
# shifts and mirrorings.
ORDER, START, ESTIMATE, AUGMENT = 0, 1, 2, 3


class TrainingDivergedError(KitError):
    """The loss became NaN or infinite."""


@dataclass(frozen=True)
class Config:
    """Everything that decides a run's result; radius and step in 1/255. Unknown or mistyped values raise `KitError`."""

    METHODS: ClassVar[tuple[str, ...]] = ("natural", "pgd_at", "trades")

    method: str
    dataset: str = "fashion_mnist"
    model: str = "lenet5"
    seed: int = 0
    epochs: int = 15
    batch_size: int = 100
    optimizer: str = "adam"  # or sgd
    lr: float = 1e-3
    momentum: float = 0.9  # sgd only
    weight_decay: float = 0.0
    lr_divide: float = 3.0  # the rate is divided by this ...
    lr_every: int = 4  # ... after every so many epochs
    eps_255: float = 8.0
    step_255: float = 2.0
    steps: int = 10
    attacked: float = 1.0  # pgd_at: share of each batch that is replaced by its adversarial images
    beta: float = 6.0  # trades: weight of the KL term
    schedule: str = "step"  # or "cyclic": the rate rises to lr in the first two fifths of the run and falls to 0
    augment: str = "none"  # or "crop", "crop_flip": of the training images (see `data.augmented`)
    precision: str = "float32"  # or "tf32", "bf16": of the network's products on a GPU, in training and its attacks

    def __post_init__(self) -> None:
        for field in fields(self):
            value, kind = getattr(self, field.name), field.type
            right = type(value) in (int, float) if kind == "float" else type(value).__name__ == kind
            if not right:
                raise KitError(f"{field.name} = {value!r} is not allowed: use a {kind}")
            if field.name == "dataset":
                check_name(value)
                continue
            low, high, allowed = (0, 1, self.METHODS) if field.name == "method" else RANGES[field.name]
            if allowed and value not in allowed:
                raise KitError(f"{field.name} = {value!r} is unknown: use one of {', '.join(allowed)}")
            if not allowed and not low <= value <= high:  # NaN compares false
                raise KitError(f"{field.name} = {value!r} is not allowed: use a {kind} from {low:g} to {high:g}")


@dataclass(frozen=True)
class FairConfig(fairness.Rule, Config):
    """A retraining run (FRL): goes on from the finished run of `start` with the same seed, data set and batch size."""

    METHODS: ClassVar[tuple[str, ...]] = ("frl", "pgd_at", "report_reweight", "report_remargin")

    start: str = "pgd_at"  # the recipe whose weights it starts from ...
    start_epochs: int = 15  # ... after so many epochs
    updates: int = 1  # of the multipliers in each epoch, evenly spaced
    measure_255: float = 8.0  # radius at which the errors behind an update are measured (PGD-20, step 2/255)
    update_images: int = 0  # they are measured on so many random validation images; 0: on all
    step: str = "own"  # step size in proportion to the sample's own radius, or to the batch's largest, or fixed
    predicted_targets: bool = True  # report_reweight: attacked images are trained towards, and weighted by, the
    # prediction for the clean image (the report); False: towards its probabilities, weighted by the label
    unshuffled_labels: bool = False  # report_remargin: labels stay behind when the images are shuffled (the report)


_POSITIVE = sys.float_info.min
RANGES: dict[str, tuple[float, float, tuple[str, ...]]] = {
    "model": (0, 0, tuple(models.MODELS)),
    "optimizer": (0, 0, ("adam", "sgd")),
    "schedule": (0, 0, ("step", "cyclic")),
    "augment": (0, 0, ("none", "crop", "crop_flip")),
    "precision": (0, 0, ("float32", "tf32", "bf16")),
    "seed": (0, 2**31, ()),
    "epochs": (1, 10**5, ()),
    "batch_size": (1, 10**6, ()),
    "lr": (_POSITIVE, 1e3, ()),
    "momentum": (0, 1, ()),
    "weight_decay": (0, 1e3, ()),
    "lr_divide": (1, 1e6, ()),
    "lr_every": (1, 10**5, ()),
    "eps_255": (0, 255, ()),
    "step_255": (0, 255, ()),
    "steps": (1, 10**5, ()),
    "attacked": (_POSITIVE, 1, ()),
    "beta": (0, 1e6, ()),
    "scheme": (0, 0, ("multipliers", "dafa", "one_class")),
    "alpha_nat": (0, 1e6, ()),
    "alpha_bdy": (0, 1e6, ()),
    "alpha_margin": (-1e6, 1e6, ()),
    "tau_nat": (0, 1, ()),
    "tau_bdy": (0, 1, ()),
    "target": (0, 0, ("boundary", "robust")),
    "bound": (0, 1, ()),
    "radius_low": (0, 1, ()),
    "radius_high": (1, 1e6, ()),
    "smoothing": (_POSITIVE, 1, ()),
    "weighting": (0, 0, ("lagrangian", "softmax")),
    "subtract_average": (0, 1, ()),
    "accumulate": (0, 1, ()),
    "clamp_state": (0, 1, ()),
    "strength": (0, 1e3, ()),
    "chosen": (0, 10**6, ()),
    "start": (0, 0, ("natural", "pgd_at_half", "pgd_at", "trades")),
    "start_epochs": (1, 10**5, ()),
    "updates": (1, 10**5, ()),
    "measure_255": (0, 255, ()),
    "update_images": (0, 10**9, ()),
    "step": (0, 0, ("own", "largest", "fixed")),
    "predicted_targets": (0, 1, ()),
    "unshuffled_labels": (0, 1, ()),
}

#: The recipes of the preliminary study: what differs between its models. Schedule and optimiser are the same.
RECIPES: dict[str, dict[str, Any]] = {
    "natural": {"method": "natural"},
    "pgd_at_half": {"method": "pgd_at", "attacked": 0.5, "steps": 20},  # the report's
    "pgd_at": {"method": "pgd_at", "attacked": 1.0, "steps": 10},  # the paper's
    "trades": {"method": "trades", "beta": 6.0, "steps": 10},
}


_COLOUR = {"model": "preact_resnet18", "optimizer": "sgd", "weight_decay": 5e-4}
_SIGNS = {**_COLOUR, "eps_255": 12.0, "step_255": 3.0}
#: What a data set asks for, beneath a recipe's own fields: from nothing, and when a finished run is retrained.
#:
#: The colour data sets have the paper's scale: SGD, momentum 0.9, weight decay 5e-4, ten inner steps; epochs and batch
#: size are in ``notebooks/profiles/paper_*.yaml``. Rates are divided by 10 after every 40 epochs; retraining begins at
#: 0.001, as in the authors' code. 8/255, for GTSRB 12/255. Anyone's images (``folder:``) get the three-layer CNN.
SETTINGS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "cifar10": (
        {**_COLOUR, "lr": 0.1, "lr_divide": 10.0, "lr_every": 40, "augment": "crop_flip"},
        {**_COLOUR, "lr": 1e-3, "lr_divide": 10.0, "lr_every": 40, "augment": "crop_flip"},
    ),
    "svhn": (
        {**_COLOUR, "lr": 0.01, "lr_divide": 10.0, "lr_every": 40},
        {**_COLOUR, "lr": 1e-3, "lr_divide": 10.0, "lr_every": 40},
    ),
    "gtsrb": (
        {**_SIGNS, "model": "cnn3", "lr": 0.01, "lr_divide": 10.0, "lr_every": 40},
        {**_SIGNS, "model": "cnn3", "lr": 1e-3, "lr_divide": 10.0, "lr_every": 40, "measure_255": 12.0},
    ),
    "gtsrb17": (
        {**_SIGNS, "model": "cnn4", "lr": 0.01, "lr_divide": 10.0, "lr_every": 40},
        {**_SIGNS, "model": "cnn4", "lr": 1e-3, "lr_divide": 10.0, "lr_every": 40, "measure_255": 12.0},
    ),
    "folder": ({"model": "cnn3"}, {"model": "cnn3"}),
}


def configure(recipe: str, dataset: str, seed: int, **values: Any) -> Config:
    """The configuration of a named recipe, or of a variation such as ``"uniform,beta=6,steps=20"``.

    `values` are further fields of the configuration; they do not show in the name. Raises `KitError` for an unknown
    recipe or field, or a value that does not fit.
    """
    name, *variations = recipe.split(",")
    known = {**RECIPES, **fairness.RECIPES}
    if name not in known:
        raise KitError(f"recipe = {name!r} is unknown: use one of {', '.join(known)}")
    kind = FairConfig if name in fairness.RECIPES else Config
    types = {field.name: field.type for field in fields(kind) if field.name not in ("dataset", "seed")}
    for variation in variations:
        key, _, text = variation.partition("=")
        if key in types:
            values[key] = _value(key, text, types[key])
        else:
            values[key] = text
    if unknown := set(values) - set(types):
        raise KitError(f"{min(unknown)!r} is no field of a run of {name}: use {', '.join(types)}")
    check_name(dataset)
    asked = SETTINGS.get(dataset.partition(":")[0], ({}, {}))[kind is FairConfig]
    return kind(dataset=dataset, seed=seed, **{**asked, **known[name], **values})


#: Fields that came after the first runs were shipped: a run's files name them only where they are not the default.
LATER = ("schedule", "augment", "precision")


def described(config: Config) -> dict[str, Any]:
    """A configuration as a run's files keep it."""
    defaults = {field.name: field.default for field in fields(config)}
    values = asdict(config)
    return {name: values[name] for name in values if name not in LATER or values[name] != defaults[name]}


def _value(name: str, text: str, kind: str) -> Any:
    """A field's value from text."""
    try:
        return (
            {"True": True, "False": False}[text]
            if kind == "bool"
            else {"int": int, "float": float, "str": str}[kind](text)
        )
    except (KeyError, ValueError):
        raise KitError(f"{name} = {text!r} is not allowed: use a {kind}") from None


def folder(runs: Path, recipe: str, config: Config) -> Path:
    """Where a run lives: RUNS/DATASET/RECIPE/seedN, ``folder:PATH`` written as `data.folder_name` does."""
    return runs / folder_name(config.dataset) / recipe / f"seed{config.seed}"


def start_of(config: FairConfig, folder: Path) -> tuple[Config, Path]:
    """The run that the retraining run in `folder` starts from: its configuration, and its folder beside that one."""
    shared = {"epochs": config.start_epochs, "batch_size": config.batch_size, "model": config.model}
    start = configure(config.start, config.dataset, config.seed, **shared)
    return start, folder.parents[1] / config.start / folder.name


def loss(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    config: Config,
    generator: torch.Generator,
    balance: fairness.Setting | None = None,
) -> Tensor:
    """The training loss of one batch: cross-entropy, clean (natural), attacked (PGD-AT), or with TRADES' KL term.

    With a `balance`, the loss of a retraining run: every term is a mean weighted by class, and the attack has each
    class's radius.
    """
    if balance is not None:
        return _fair_loss(model, x, y, config, generator, balance)
    attack = (config.eps_255 / 255, config.step_255 / 255, config.steps)
    if config.method == "natural":
        return F.cross_entropy(logits(model, x), y)
    if config.method == "pgd_at":
        share = math.ceil(config.attacked * len(x))  # the batch is in random order, so its head is a random share
        adversarial = pgd(model, x[:share], y[:share], *attack, generator=generator)
        return F.cross_entropy(logits(model, torch.cat([adversarial, x[share:]])), y)
    adversarial = pgd(model, x, y, *attack, loss="kl", random_start="gaussian", generator=generator)
    clean = logits(model, x)
    divergence = F.kl_div(logits(model, adversarial).log_softmax(1), clean.softmax(1), reduction="batchmean")
    return F.cross_entropy(clean, y) + config.beta * divergence


def _fair_loss(
    model: nn.Module, x: Tensor, y: Tensor, config: FairConfig, generator: torch.Generator, balance: fairness.Setting
) -> Tensor:
    """The loss of a retraining run, by its method.

    frl: weighted cross-entropy of the clean images + beta * weighted KL(p(x) || p(x')), the surrogates of R_nat and
    R_bdy (section 4.2 of the paper; the authors' code). pgd_at: weighted cross-entropy of the attacked images.
    report_reweight and report_remargin: what the report's code computes.
    """
    eps = config.eps_255 / 255 * balance.radius_factors[y]  # (N,)
    step = torch.full_like(eps, config.step_255 / 255)
    if config.step != "fixed":
        own = balance.radius_factors[y]
        step = step * (own if config.step == "own" else own.max())
    if config.method == "frl":
        adversarial = pgd(model, x, y, eps, step, config.steps, loss="kl", random_start="gaussian", generator=generator)
        clean, attacked = logits(model, torch.cat([x, adversarial])).chunk(2)
        natural = _weighted_cross_entropy(clean, y, balance.weights_nat)
        return natural + config.beta * _weighted_divergence(attacked, clean, balance.weights_bdy[y])
    share = math.ceil(config.attacked * len(x))
    adversarial = pgd(model, x[:share], y[:share], eps[:share], step[:share], config.steps, generator=generator)
    if config.method == "pgd_at":
        return _weighted_cross_entropy(logits(model, torch.cat([adversarial, x[share:]])), y, balance.weights_bdy)
    if config.method == "report_remargin":
        order = torch.randperm(len(x), generator=generator, device=x.device)
        shuffled = torch.cat([adversarial, x[share:]])[order]
        labels = y if config.unshuffled_labels else y[order]
        clean, mixed = logits(model, torch.cat([x, shuffled])).chunk(2)
        return _weighted_cross_entropy(clean, y, balance.weights_nat) + F.cross_entropy(mixed, labels)
    clean, attacked = logits(model, torch.cat([x, adversarial])).chunk(2)
    natural = _weighted_cross_entropy(clean, y, balance.weights_nat)
    if config.predicted_targets:
        return natural + _weighted_cross_entropy(attacked, clean.argmax(1), balance.weights_bdy)
    return natural + _weighted_divergence(attacked, clean, balance.weights_bdy[y])


def _weighted_cross_entropy(logits: Tensor, y: Tensor, weights: Tensor) -> Tensor:
    """Cross-entropy, mean over the batch with weights by class (C,); 0 where no class of the batch has any weight."""
    return F.cross_entropy(logits, y, weights) if bool(weights[y].any()) else 0 * logits.sum()


def _weighted_divergence(attacked: Tensor, clean: Tensor, weights: Tensor) -> Tensor:
    """KL(p(x) || p(x')), mean over the batch with the given weights (N,); 0 where all are 0."""
    divergence = F.kl_div(attacked.log_softmax(1), clean.softmax(1), reduction="none").sum(1)
    return (weights * divergence).sum() / weights.sum().clamp(min=torch.finfo(weights.dtype).tiny)


def train_epoch(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    split: Split,
    config: Config,
    epoch: int,
    part: tuple[int, int] = (0, 1),
    balance: fairness.Setting | None = None,
) -> Iterator[tuple[int, float]]:
    """Train one epoch (counted from 0), yielding (images, loss) of each batch; every image is used once.

    `part` = (k, n) trains only the k-th of n consecutive parts of the epoch's batches, counted from 0.
    """
    device = split.labels.device
    starts = stream(config.seed, epoch, START, part[0], device=device)
    order = torch.randperm(len(split), generator=stream(config.seed, epoch, ORDER)).to(device)
    batches = order.split(config.batch_size)
    first, last = (len(batches) * (part[0] + k) // part[1] for k in (0, 1))
    shifts = stream(config.seed, epoch, AUGMENT, part[0], device=device)
    model.train()
    for number, index in enumerate(batches[first:last], start=first):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(config, epoch + number / len(batches))
        x, y = split.batch(index)
        if config.augment != "none":
            x = augmented(x, config.augment, shifts)
        with evaluation.number_format(config.precision, device):
            batch_loss = loss(model, x, y, config, starts, balance)
        value = batch_loss.item()
        if not math.isfinite(value):
            raise TrainingDivergedError(
                f"epoch {epoch + 1}, batch {number + 1}: the loss is {value}; the checkpoint of the epoch before is "
                f"intact; lower lr = {config.lr:g} or look at the data"
            )
        optimizer.zero_grad(set_to_none=True)
        batch_loss.backward()
        distributed.average_gradients(model)
        optimizer.step()
        yield len(index), value


def learning_rate(config: Config, epoch: float) -> float:
    """The rate after so many epochs, whole or not: lr / lr_divide^floor(epoch / lr_every), or the cyclic triangle."""
    if config.schedule == "cyclic":
        done = epoch / config.epochs
        return config.lr * float(np.interp(done, [0, 0.4, 1], [0, 1, 0]))
    return config.lr / config.lr_divide ** (int(epoch) // config.lr_every)


def run(config: Config, data: Dataset, folder: Path) -> nn.Module:
    """Train, or go on training, or reload: the model after `config.epochs` epochs.

    One process at a time: a second waits. `folder` holds ``checkpoint.pt`` after every epoch; a finished run leaves
    ``weights.pt`` (configuration and weights), ``history.json`` (loss, rate and validation errors of each epoch) and
    ``record.json`` (test errors under `evaluation.STANDARD`). Raises `KitError` where the folder belongs to another
    configuration or cannot be written, and `TrainingDivergedError` where the loss is no longer finite.
    """
    weights = folder / "weights.pt"

    def finished() -> bool:
        return weights.exists() and (folder / "record.json").exists() and checkpoint.at_rest(folder)

    if distributed.from_main(finished):
        return _finish(config, data, folder)
    with checkpoint.only_one(folder) if distributed.is_main() else contextlib.nullcontext():
        if not distributed.from_main(weights.exists):
            state = _train(config, data, folder)
            made_by = {"kernel": state["kernel"], "threads": torch.get_num_threads(), "versions": evaluation.versions()}
            start = {"start": state["start"]} if "start" in state else {}
            history = {"config": described(config), **made_by, **start, "epochs": state["history"]}
            classes = len(data.class_names)
            if distributed.is_main():
                checkpoint.write_json(folder / "history.json", history)
                kept = {"config": described(config), "num_classes": classes, "model": state["model"]}
                checkpoint.save(weights, kept)
        return _finish(config, data, folder)


def _finish(config: Config, data: Dataset, folder: Path) -> nn.Module:
    """The trained model, with its record of test errors; the working checkpoints are gone."""
    with distributed.main_alone() as main:
        if main:
            model = load(folder, config, data.train.labels.device)
            evaluation.evaluate(model, data, path=folder / "record.json", about={"config": described(config)})
            checkpoint.remove(folder / "checkpoint.pt")
    return model if main else load(folder, config, data.train.labels.device)


def study(
    recipes: Sequence[str], seeds: Sequence[int], dataset: str, runs: Path, tensors: Dataset | None, **values: Any
) -> tuple[dict[str, list[dict[str, Any]]], dict[str, list[dict[str, Any]]]]:
    """Every recipe under every seed: test records and training histories, recipe -> one per seed.

    Finished runs under `runs` are reloaded, missing ones trained. Where there are no data (`tensors` is None) the
    finished runs' records are all there is: one that is missing, or belongs to another configuration, is refused.
    """
    records: dict[str, list[dict[str, Any]]] = {recipe: [] for recipe in recipes}
    histories: dict[str, list[dict[str, Any]]] = {recipe: [] for recipe in recipes}
    for recipe in recipes:
        for seed in seeds:
            config = configure(recipe, dataset, seed, **values)
            place = folder(runs, recipe, config)
            if tensors is not None:
                run(config, tensors, place)
            for name, kept in (("record.json", records), ("history.json", histories)):
                kept[recipe].append(evaluation.read_record(place / name))
                checkpoint.refuse_other(place / name, kept[recipe][-1].get("config", {}), described(config))
    return records, histories


def recheck(
    records: dict[str, list[dict[str, Any]]], recipe: str, runs: Path, tensors: Dataset, **values: Any
) -> float:
    """Attack the first seed's weights again, here and now: the largest class-wise difference from the record."""
    record = records[recipe][0]
    config = configure(recipe, tensors.name, record["config"]["seed"], **values)
    model = load(folder(runs, recipe, config), config, tensors.test.labels.device)
    return evaluation.largest_difference(record, evaluation.evaluate(model, tensors))


def verify(runs: Path, tensors: Dataset) -> Iterator[tuple[Path, float]]:
    """Every finished run of this data set under `runs`, recomputed: its folder, the largest class-wise difference.

    Raises `KitError` where a file is damaged, or its record belongs to other weights.
    """
    for path in sorted((runs / folder_name(tensors.name)).glob("*/seed*/record.json")):
        record, state = evaluation.read_record(path), _weights(path.with_name("weights.pt"))
        if record.get("weights_sha256") != checkpoint.digest(state["model"]):
            raise KitError(f"{path} belongs to other weights than {path.with_name('weights.pt')}: delete it")
        model = models.place(models.build(state["config"]["model"], state["num_classes"]), tensors.test.labels.device)
        model.load_state_dict(state["model"])
        attacks = [Attack(**entry["attack"]) for entry in record["attacks"]]
        yield path.parent, evaluation.largest_difference(record, evaluation.evaluate(model, tensors, attacks))


def load(folder: Path, config: Config, device: str | torch.device = "cpu") -> nn.Module:
    """A finished run's model. Raises `KitError` where its file is damaged or belongs to another configuration."""
    state = _weights(folder / "weights.pt", device)
    checkpoint.refuse_other(folder, state["config"], described(config))
    model = models.place(models.build(config.model, state["num_classes"], seed=config.seed), device)
    model.load_state_dict(state["model"])
    return model


def _weights(path: Path, device: str | torch.device = "cpu") -> dict[str, Any]:
    """A weights file's content. Raises `KitError` where it is damaged or another kind of file."""
    state = checkpoint.read(path, device)
    if missing := [name for name in ("config", "num_classes", "model") if name not in state]:
        raise KitError(f"{path} is no weights file of a finished run: it has no {missing[0]}; delete it to train anew")
    return state


def _train(config: Config, data: Dataset, folder: Path) -> dict[str, Any]:
    """Epochs from the newest checkpoint to the last, saving after each; returns the final state."""
    path = folder / "checkpoint.pt"
    device = data.train.labels.device
    state = distributed.from_main(lambda: checkpoint.resume(path, described(config)))
    if state is None:
        model = _starting_model(config, data, folder)
        state = {"config": described(config), "epoch": 0, "history": []}
        if isinstance(config, FairConfig):
            multipliers = fairness.initial(len(data.class_names))
            start = {
                "sha256": checkpoint.digest(dict(model.state_dict())),
                "validation": _validation_errors(model, data),
            }
            state |= {"multipliers": multipliers._asdict(), "start": start}
        optimizer = _optimizer(model, config)
    else:
        model = models.place(models.build(config.model, len(data.class_names), seed=config.seed), device)
        model.load_state_dict(state["model"])
        optimizer = _optimizer(model, config)
        optimizer.load_state_dict(state["optimizer"])
    for epoch in range(state["epoch"], config.epochs):
        began = time.perf_counter()
        entry: dict[str, Any] = {"lr": learning_rate(config, epoch)}
        if isinstance(config, FairConfig):
            batches = _balanced_epoch(model, optimizer, data, config, epoch, state)
        else:
            batches = train_epoch(model, optimizer, data.train, config, epoch)
        entry["loss"] = _follow(batches, data.train, config, epoch, folder)
        entry["seconds"] = round(time.perf_counter() - began, 2)
        if isinstance(config, FairConfig):
            entry["validation"] = _validation_errors(model, data)
            balance = fairness.setting(fairness.State(**state["multipliers"]), config)
            entry |= {name: values.tolist() for name, values in balance._asdict().items()}
        else:
            attack = Attack(config.eps_255, config.step_255, steps=10)
            entry["validation"] = _validation_errors(model, data, attack)
        state |= {
            "epoch": epoch + 1,
            "model": model.state_dict(),
            "optimizer": optimizer.state_dict(),
            "history": [*state["history"], entry],
            "kernel": kernels.describe(model),
        }
        if distributed.is_main():
            checkpoint.save(path, state, keep_previous=True)
    return state


def _starting_model(config: Config, data: Dataset, folder: Path) -> nn.Module:
    """A network drawn from the seed, or for a retraining run the finished run it starts from, trained if missing."""
    if isinstance(config, FairConfig):
        start, place = start_of(config, folder)
        return run(start, data, place)
    return models.place(models.build(config.model, len(data.class_names), seed=config.seed), data.train.labels.device)


def _validation_errors(model: nn.Module, data: Dataset, attack: Attack = evaluation.STANDARD[0]) -> dict[str, Any]:
    """Class-wise natural and robust errors on the validation split, as the history keeps them."""
    errors = evaluation.class_errors(model, data.validation, attack)
    return {"natural": errors.natural.tolist(), "robust": errors.robust.tolist()}


def _balanced_epoch(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    data: Dataset,
    config: FairConfig,
    epoch: int,
    state: dict[str, Any],
) -> Iterator[tuple[int, float]]:
    """One epoch of Algorithm 1: errors on the validation split, multipliers, training under them; `updates` times.

    The multipliers are read from `state` and written back to it.
    """
    for part in range(config.updates):
        multipliers = _next_multipliers(model, data, config, epoch, part, state)
        state["multipliers"] = multipliers._asdict()
        balance = fairness.setting(multipliers, config)
        balance = fairness.Setting(*(values.float().to(data.train.labels.device) for values in balance))
        yield from train_epoch(model, optimizer, data.train, config, epoch, (part, config.updates), balance)


def _next_multipliers(
    model: nn.Module, data: Dataset, config: FairConfig, epoch: int, part: int, state: dict[str, Any]
) -> fairness.State:
    multipliers, classes = fairness.State(**state["multipliers"]), len(data.class_names)
    attack = Attack(eps_255=config.measure_255)
    if config.scheme == "one_class":
        return fairness.one_class(classes, config)
    if config.scheme == "dafa":
        if (epoch, part) != (0, 0):  # one shot
            return multipliers
        return fairness.dafa(evaluation.class_similarity(model, data.validation, attack), config)
    split = data.validation
    if config.update_images:
        generator = stream(config.seed, epoch, ESTIMATE, part)
        index = torch.randperm(len(split), generator=generator)[: config.update_images]
        split = Split(split.images[index.to(split.labels.device)], split.labels[index.to(split.labels.device)])
        if missed := set(range(classes)) - set(split.labels.tolist()):
            raise KitError(
                f"update_images = {config.update_images} is not allowed here: "
                f"a draw of so many misses class {min(missed)}; use more, or 0 for all"
            )
    if split is data.validation and attack == evaluation.STANDARD[0] and part == 0:  # measured when the epoch ended
        known = (state["history"][-1] if state["history"] else state["start"])["validation"]
        natural, robust = (torch.tensor(known[kind], dtype=torch.float64) for kind in ("natural", "robust"))
    else:
        errors = evaluation.class_errors(model, split, attack)
        natural, robust = torch.from_numpy(errors.natural), torch.from_numpy(errors.robust)
    return fairness.update(multipliers, natural, robust - natural, config)


def _follow(batches: Iterator[tuple[int, float]], split: Split, config: Config, epoch: int, folder: Path) -> float:
    """Run an epoch, with a progress bar where someone watches, one line where not; returns the mean loss."""
    title = f"{'/'.join(folder.parts[-3:])} epoch {epoch + 1}/{config.epochs}"  # DATASET/RECIPE/seedN
    total, seen, began = 0.0, 0, time.perf_counter()
    with tqdm(
        total=len(split), desc=title, unit="img", leave=False, disable=not (watched() and distributed.is_main())
    ) as bar:
        for images, value in batches:
            total, seen = total + images * value, seen + images
            bar.update(images)
            bar.set_postfix(loss=f"{total / seen:.4f}", refresh=False)
    if not watched() and distributed.is_main():
        rate = seen / (time.perf_counter() - began)
        memory = ""
        if split.labels.is_cuda:
            memory = f", peak memory {torch.cuda.max_memory_allocated(split.labels.device) / 2**30:.1f} GiB"
        print(f"{title}: loss {total / seen:.4f}, {rate:,.0f} images/s{memory}", flush=True)
    return total / seen


def watched() -> bool:
    """Whether a person sees progress live: a terminal, Jupyter or Colab, but not papermill, nbval or a pipe."""
    return sys.stderr.isatty() or "JPY_SESSION_NAME" in os.environ or "google.colab" in sys.modules


def _optimizer(model: nn.Module, config: Config) -> torch.optim.Optimizer:
    if config.optimizer == "adam":
        return torch.optim.Adam(model.parameters(), lr=config.lr, weight_decay=config.weight_decay)
    return torch.optim.SGD(model.parameters(), lr=config.lr, momentum=config.momentum, weight_decay=config.weight_decay)
