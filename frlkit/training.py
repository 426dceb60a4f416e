"""The one epoch loop: natural training, PGD adversarial training (PGD-AT) and TRADES, resumable after every epoch.

Every epoch's random numbers derive from (seed, epoch) alone, so a run that was stopped and resumed equals the straight
run bit for bit on CPU (same torch, same number of threads, same kernel).
"""

from __future__ import annotations

import math
import os
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm.auto import tqdm

from frlkit import KitError, checkpoint, evaluation, kernels, models
from frlkit.attacks import pgd
from frlkit.data import READERS, Dataset, Split
from frlkit.evaluation import Attack, stream

ORDER, START = 0, 1  # the purposes of an epoch's random streams: order of the images, starts of the attacks


class TrainingDivergedError(KitError):
    """The loss became NaN or infinite."""


@dataclass(frozen=True)
class Config:
    """Everything that decides a run's result; radius and step in 1/255. Unknown or mistyped values raise `KitError`."""

    method: str  # natural, pgd_at or trades
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

    def __post_init__(self) -> None:
        for field in fields(self):
            value, kind = getattr(self, field.name), field.type
            fits = isinstance(value, (int, float)) if kind == "float" else type(value).__name__ == kind
            if not fits or isinstance(value, bool):
                raise KitError(f"{field.name} = {value!r} is not allowed: use a {kind}")
            low, high, allowed = RANGES[field.name]
            if allowed and value not in allowed:
                raise KitError(f"{field.name} = {value!r} is unknown: use one of {', '.join(allowed)}")
            if not allowed and not low <= value <= high:  # NaN compares false
                raise KitError(f"{field.name} = {value!r} is not allowed: use a {kind} from {low:g} to {high:g}")


_POSITIVE = sys.float_info.min
RANGES: dict[str, tuple[float, float, tuple[str, ...]]] = {
    "method": (0, 0, ("natural", "pgd_at", "trades")),
    "dataset": (0, 0, tuple(READERS)),
    "model": (0, 0, tuple(models.MODELS)),
    "optimizer": (0, 0, ("adam", "sgd")),
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
}

#: The recipes of the preliminary study: what differs between its models. Schedule and optimiser are the same.
RECIPES: dict[str, dict[str, Any]] = {
    "natural": {"method": "natural"},
    "pgd_at_half": {"method": "pgd_at", "attacked": 0.5, "steps": 20},  # the report's
    "pgd_at": {"method": "pgd_at", "attacked": 1.0, "steps": 10},  # the paper's
    "trades": {"method": "trades", "beta": 6.0, "steps": 10},
}


def configure(recipe: str, dataset: str, seed: int, **values: Any) -> Config:
    """The configuration of a named recipe; `values` are further fields of `Config`."""
    if recipe not in RECIPES:
        raise KitError(f"recipe = {recipe!r} is unknown: use one of {', '.join(RECIPES)}")
    if unknown := set(values) - {field.name for field in fields(Config)}:
        raise KitError(
            f"{min(unknown)!r} is no field of a run: use {', '.join(field.name for field in fields(Config))}"
        )
    return Config(dataset=dataset, seed=seed, **{**RECIPES[recipe], **values})


def folder(runs: Path, recipe: str, config: Config) -> Path:
    """Where a run lives: RUNS/DATASET/RECIPE/seedN."""
    return runs / config.dataset / recipe / f"seed{config.seed}"


def loss(model: nn.Module, x: Tensor, y: Tensor, config: Config, generator: torch.Generator) -> Tensor:
    """The training loss of one batch: cross-entropy, clean (natural), attacked (PGD-AT), or with TRADES' KL term."""
    attack = (config.eps_255 / 255, config.step_255 / 255, config.steps)
    if config.method == "natural":
        return F.cross_entropy(model(x), y)
    if config.method == "pgd_at":
        share = math.ceil(config.attacked * len(x))  # the batch is in random order, so its head is a random share
        adversarial = pgd(model, x[:share], y[:share], *attack, generator=generator)
        return F.cross_entropy(model(torch.cat([adversarial, x[share:]])), y)
    adversarial = pgd(model, x, y, *attack, loss="kl", random_start="gaussian", generator=generator)
    clean = model(x)
    divergence = F.kl_div(model(adversarial).log_softmax(1), clean.softmax(1), reduction="batchmean")
    return F.cross_entropy(clean, y) + config.beta * divergence


def train_epoch(
    model: nn.Module, optimizer: torch.optim.Optimizer, split: Split, config: Config, epoch: int
) -> Iterator[tuple[int, float]]:
    """Train one epoch (counted from 0), yielding (images, loss) of each batch; every image is used once."""
    device = split.labels.device
    starts = stream(config.seed, epoch, START, device=device)
    order = torch.randperm(len(split), generator=stream(config.seed, epoch, ORDER)).to(device)
    model.train()
    for number, index in enumerate(order.split(config.batch_size)):
        batch_loss = loss(model, *split.batch(index), config, starts)
        value = batch_loss.item()
        if not math.isfinite(value):
            raise TrainingDivergedError(
                f"epoch {epoch + 1}, batch {number + 1}: the loss is {value}; the checkpoint of the epoch before is "
                f"intact; lower lr = {config.lr:g} or look at the data"
            )
        optimizer.zero_grad(set_to_none=True)
        batch_loss.backward()
        optimizer.step()
        yield len(index), value


def learning_rate(config: Config, epoch: int) -> float:
    """Step decay: lr / lr_divide^(epoch // lr_every), epochs counted from 0."""
    return config.lr / config.lr_divide ** (epoch // config.lr_every)


def run(config: Config, data: Dataset, folder: Path) -> nn.Module:
    """Train, or go on training, or reload: the model after `config.epochs` epochs.

    `folder` holds ``checkpoint.pt`` after every epoch; a finished run leaves ``weights.pt`` (configuration and
    weights), ``history.json`` (loss, rate and validation errors of each epoch) and ``record.json`` (test errors under
    `evaluation.STANDARD`). Raises `KitError` where the folder belongs to another configuration and
    `TrainingDivergedError` where the loss is no longer finite.
    """
    weights = folder / "weights.pt"
    device = data.train.labels.device
    if not weights.exists():
        state = _train(config, data, folder)
        made_by = {"kernel": state["kernel"], "threads": torch.get_num_threads(), "versions": evaluation.versions()}
        checkpoint.write_json(
            folder / "history.json", {"config": asdict(config), **made_by, "epochs": state["history"]}
        )
        classes = len(data.class_names)
        checkpoint.save(weights, {"config": asdict(config), "num_classes": classes, "model": state["model"]})
    model = load(folder, config, device)
    about = {"config": asdict(config)}
    evaluation.evaluate(model, data, path=folder / "record.json", about=about)
    for name in (folder / "checkpoint.pt", checkpoint.previous(folder / "checkpoint.pt")):
        name.unlink(missing_ok=True)
    return model


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
                checkpoint.refuse_other(place / name, kept[recipe][-1].get("config", {}), asdict(config))
    return records, histories


def load(folder: Path, config: Config, device: str | torch.device = "cpu") -> nn.Module:
    """A finished run's model. Raises `KitError` where its file is damaged or belongs to another configuration."""
    state = checkpoint.read(folder / "weights.pt", device)
    checkpoint.refuse_other(folder, state["config"], asdict(config))
    model = models.build(config.model, state["num_classes"], seed=config.seed).to(device)
    model.load_state_dict(state["model"])
    return model


def _train(config: Config, data: Dataset, folder: Path) -> dict[str, Any]:
    """Epochs from the newest checkpoint to the last, saving after each; returns the final state."""
    path = folder / "checkpoint.pt"
    device = data.train.labels.device
    model = models.build(config.model, len(data.class_names), seed=config.seed).to(device)
    optimizer = _optimizer(model, config)
    state = checkpoint.resume(path, asdict(config), device)
    history: list[dict[str, Any]] = []
    if state is not None:
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        history = state["history"]
    for epoch in range(len(history), config.epochs):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(config, epoch)
        began = time.perf_counter()
        mean_loss = _run_epoch(model, optimizer, data.train, config, epoch, folder)
        seconds = time.perf_counter() - began
        errors = evaluation.class_errors(model, data.validation, Attack(config.eps_255, config.step_255, steps=10))
        validation = {"natural": errors.natural.tolist(), "robust": errors.robust.tolist()}
        rate = learning_rate(config, epoch)
        history.append({"loss": mean_loss, "lr": rate, "validation": validation, "seconds": round(seconds, 2)})
        state = {
            "config": asdict(config),
            "epoch": epoch + 1,
            "model": model.state_dict(),
            "optimizer": optimizer.state_dict(),
            "history": history,
            "kernel": kernels.describe(model),
        }
        checkpoint.save(path, state, keep_previous=True)
    assert state is not None  # config.epochs >= 1
    return {"model": model.state_dict(), "history": history, "kernel": state["kernel"]}


def _run_epoch(
    model: nn.Module, optimizer: torch.optim.Optimizer, split: Split, config: Config, epoch: int, folder: Path
) -> float:
    """`train_epoch` with a progress bar where someone watches, one line where not; returns the mean loss."""
    title = f"{'/'.join(folder.parts[-3:])} epoch {epoch + 1}/{config.epochs}"  # DATASET/RECIPE/seedN
    total, seen, began = 0.0, 0, time.perf_counter()
    with tqdm(total=len(split), desc=title, unit="img", leave=False, disable=not watched()) as bar:
        for images, value in train_epoch(model, optimizer, split, config, epoch):
            total, seen = total + images * value, seen + images
            bar.update(images)
            bar.set_postfix(loss=f"{total / seen:.4f}", refresh=False)
    if not watched():
        rate = seen / (time.perf_counter() - began)
        print(f"{title}: loss {total / seen:.4f}, {rate:,.0f} images/s", flush=True)
    return total / seen


def watched() -> bool:
    """Whether a person sees progress live: a terminal, Jupyter or Colab, but not papermill, nbval or a pipe."""
    return sys.stderr.isatty() or "JPY_SESSION_NAME" in os.environ or "google.colab" in sys.modules


def _optimizer(model: nn.Module, config: Config) -> torch.optim.Optimizer:
    if config.optimizer == "adam":
        return torch.optim.Adam(model.parameters(), lr=config.lr, weight_decay=config.weight_decay)
    return torch.optim.SGD(model.parameters(), lr=config.lr, momentum=config.momentum, weight_decay=config.weight_decay)
