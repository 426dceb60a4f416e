"""Epochs as a generator of states: natural training, PGD-AT, TRADES, Fair Robust Learning. Knows no file.

Every epoch's random numbers derive from (seed, epoch) alone, so a run that was stopped and resumed equals the straight
run bit for bit on CPU (same torch, same number of threads, same kernel).
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from tqdm.auto import tqdm

from frlkit import KitError, distributed, evaluation, fairness, interval, models, watched
from frlkit.attacks import outputs
from frlkit.data import Dataset, Split, augmented
from frlkit.evaluation import STANDARD, Attack, stream
from frlkit.losses import loss
from frlkit.recipes import Config, FairConfig

# The purposes of an epoch's random streams: order of the images, starts of the attacks, images to estimate errors on,
# shifts and mirrorings.
ORDER, START, ESTIMATE, AUGMENT = 0, 1, 2, 3

Batches = Iterator[tuple[int, float]]  # trains as it is read; yields (images, loss) of each batch


class TrainingDivergedError(KitError):
    """The loss or a weight became NaN or infinite."""


@dataclass
class Progress:
    """A run between two epochs. `plain` is what a file keeps of it, `resume` its inverse."""

    config: Config
    data: Dataset
    model: nn.Module
    optimizer: torch.optim.Optimizer
    average: nn.Module | None  # the running average of the weights, where the run keeps one
    epoch: int = 0  # epochs done
    history: list[dict[str, Any]] = field(default_factory=list)
    multipliers: fairness.State | None = None  # of a retraining run
    start: dict[str, Any] | None = None  # its errors on the validation split before the first epoch
    title: str = "training"  # of its progress bars and lines

    @property
    def result(self) -> nn.Module:
        """The model that is validated and kept."""
        return self.average or self.model

    def plain(self) -> dict[str, Any]:
        """Tensors, numbers, text and lists."""
        state = {
            "epoch": self.epoch,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "history": self.history,
        }
        if self.average is not None:
            state["average"] = self.average.state_dict()
        if self.multipliers is not None:
            state |= {"multipliers": self.multipliers._asdict(), "start": self.start}
        return state


def begin(config: Config, data: Dataset, model: nn.Module) -> Progress:
    """A run before its first epoch, from a model that becomes its own."""
    run = _around(config, data, model)
    if isinstance(config, FairConfig):
        run.multipliers = fairness.initial(len(data.class_names))
        run.start = {"validation": _validation_errors(run)}
    return run


def resume(config: Config, data: Dataset, state: Mapping[str, Any]) -> Progress:
    """A run from what `Progress.plain` kept of it."""
    run = _around(config, data, fresh_model(config, data))
    run.model.load_state_dict(state["model"])
    run.optimizer.load_state_dict(state["optimizer"])
    if run.average is not None:
        run.average.load_state_dict(state["average"])
    if isinstance(config, FairConfig):
        run.multipliers, run.start = fairness.State(**state["multipliers"]), state["start"]
    run.epoch, run.history = state["epoch"], list(state["history"])
    return run


def _around(config: Config, data: Dataset, model: nn.Module) -> Progress:
    """A run around a model, with its optimiser and, where the run keeps one, its running average."""
    kind, own = torch.optim.Adam, {}
    if config.optimizer == "sgd":
        kind, own = torch.optim.SGD, {"momentum": config.momentum}
    optimizer = kind(model.parameters(), lr=config.lr, weight_decay=config.weight_decay, **own)
    return Progress(config, data, model, optimizer, copy.deepcopy(model) if config.ema else None)


def fresh_model(config: Config, data: Dataset) -> nn.Module:
    """A network drawn from the run's seed."""
    model = models.build(config.model, len(data.class_names), seed=config.seed)
    return models.place(model, data.train.labels.device)


def epochs(run: Progress) -> Iterator[Progress]:
    """Train to the run's last epoch, yielding it after each.

    Raises `TrainingDivergedError` where the loss or a weight is no longer finite: before that epoch is yielded.
    """
    for epoch in range(run.epoch, run.config.epochs):
        began = time.perf_counter()
        entry: dict[str, Any] = {"lr": learning_rate(run.config, epoch), "loss": _mean_loss(run)}
        _refuse_nonfinite(run)
        entry["seconds"] = round(time.perf_counter() - began, 2)
        entry["validation"] = _validation_errors(run)
        if run.multipliers is not None:
            balance = fairness.setting(run.multipliers, run.config)
            entry |= {name: values.tolist() for name, values in balance._asdict().items()}
        run.epoch, run.history = epoch + 1, [*run.history, entry]
        yield run


def _mean_loss(run: Progress) -> float:
    """Train an epoch, with a progress bar where someone watches, one line where not; returns its mean loss over the
    images."""
    title, labels = f"{run.title} epoch {run.epoch + 1}/{run.config.epochs}", run.data.train.labels
    began, total, seen = time.perf_counter(), 0.0, 0
    shown = watched() and distributed.is_main()
    with tqdm(total=len(labels), desc=title, unit="img", leave=False, disable=not shown) as bar:
        for images, value in _epoch(run):
            total, seen = total + images * value, seen + images
            bar.update(images)
            bar.set_postfix(loss=f"{value:.4f}", refresh=False)
    if not watched() and distributed.is_main():
        speed, memory = len(labels) / (time.perf_counter() - began), ""
        if labels.is_cuda:
            memory = f", peak memory {torch.cuda.max_memory_allocated(labels.device) / 2**30:.1f} GiB"
        print(f"{title}: loss {total / seen:.4f}, {speed:,.0f} images/s{memory}", flush=True)
    return total / seen


def _refuse_nonfinite(run: Progress) -> None:
    """The loss is looked at before each step; what the last step did to weights, and so to outputs, is seen here."""
    split, said = run.data.validation, ""
    if name := models.nonfinite(run.result.state_dict()):
        said = f"{name} has weights"
    elif not all(outputs(run.result, split.batch(part)[0]).isfinite().all() for part in evaluation.batches(split)):
        said = "the network has outputs for validation images"
    if said:
        raise TrainingDivergedError(
            f"epoch {run.epoch + 1}: {said} that are NaN or infinite; the checkpoint of the epoch before is intact; "
            f"lower lr = {run.config.lr:g}"
        )


def _validation_errors(run: Progress) -> dict[str, Any]:
    """Class-wise natural and robust errors on the validation split, as the history keeps them."""
    config = run.config
    attack = Attack(config.eps_255, config.step_255, steps=10)
    if isinstance(config, FairConfig):  # what steers the run, unless that is measured on images drawn anew
        attack = STANDARD[0] if config.update_images else Attack(config.measure_255)
    errors = evaluation.class_errors(run.result, run.data.validation, attack)
    return {"natural": errors.natural.tolist(), "robust": errors.robust.tolist()}


def _epoch(run: Progress) -> Batches:
    """One epoch; of a retraining, of Algorithm 1: errors on the validation split, multipliers, training under them,
    `updates` times."""
    config = run.config
    if run.multipliers is None:
        yield from train_epoch(run)
        return
    for part in range(config.updates):
        before = run.multipliers
        if run.epoch % config.inner_epochs == 0:
            run.multipliers = _next_multipliers(run, part)
        if config.method == "intercept":
            yield _move_head(run, before)
            continue
        balance = fairness.setting(run.multipliers, config)
        balance = fairness.Setting(*(values.float().to(run.data.train.labels.device) for values in balance))
        yield from train_epoch(run, (part, config.updates), balance)


@torch.no_grad()
def _move_head(run: Progress, before: fairness.State) -> tuple[int, float]:
    """The controls without training: output biases, or the norms of the output's rows, follow the multipliers; the
    loss is the validation images', clean."""
    *_, weight, bias = run.model.parameters()
    moved = fairness.offsets(run.multipliers) - fairness.offsets(before)
    if run.config.moved == "biases":
        bias += moved.to(bias)
    else:
        weight *= moved.exp().to(weight)[:, None]
    split = run.data.validation
    z = torch.cat([outputs(run.model, split.batch(part)[0]) for part in evaluation.batches(split)])
    return len(run.data.train), F.cross_entropy(z, split.labels).item()


def _next_multipliers(run: Progress, part: int) -> fairness.State:
    config, split = run.config, run.data.validation
    attack = Attack(eps_255=config.measure_255)
    if config.scheme == "one_class":
        return fairness.one_class(len(run.data.class_names), config)
    if config.scheme == "dafa":
        if (run.epoch, part) != (0, 0):  # one shot
            return run.multipliers
        return fairness.dafa(evaluation.class_similarity(run.result, split, attack), config)
    if config.update_images:
        split = _drawn(run, part)
    if config.boundary != "wrong":
        natural = evaluation.class_errors(run.result, split, Attack(eps_255=0.0, steps=0)).natural
        if config.boundary == "changed":
            boundary = evaluation.changed(run.result, split, attack)
        else:
            boundary = interval.class_errors(run.result, split, attack.eps_255 / 255) - natural
    elif not config.update_images and part == 0:  # measured when the epoch ended
        known = (run.history[-1] if run.history else run.start)["validation"]
        natural, boundary = np.array(known["natural"]), np.subtract(known["robust"], known["natural"])
    else:
        errors = evaluation.class_errors(run.result, split, attack)
        natural, boundary = errors.natural, errors.boundary
    return fairness.update(run.multipliers, torch.from_numpy(natural), torch.from_numpy(boundary), config)


def _drawn(run: Progress, part: int) -> Split:
    """Random validation images to estimate errors on, some of every class."""
    split, wanted, classes = run.data.validation, run.config.update_images, len(run.data.class_names)
    if wanted < classes:
        raise KitError(f"update_images = {wanted} is not allowed here: use {classes} or more, or 0 for all images")
    return split.take(split.draw(wanted, stream(run.config.seed, run.epoch, ESTIMATE, part)))


def train_epoch(run: Progress, part: tuple[int, int] = (0, 1), balance: fairness.Setting | None = None) -> Batches:
    """Train a run's next epoch, yielding (images, loss) of each batch; every image is used once.

    `part` = (k, n) trains only the k-th of n parts of the epoch's batches, from 0; `balance` is a retraining run's.
    """
    split, config, epoch, device = run.data.train, run.config, run.epoch, run.data.train.labels.device
    starts = stream(config.seed, epoch, START, part[0], device=device)
    order = torch.randperm(len(split), generator=stream(config.seed, epoch, ORDER)).to(device)
    batches = order.split(config.batch_size)
    first, last = (len(batches) * (part[0] + k) // part[1] for k in (0, 1))
    shifts = stream(config.seed, epoch, AUGMENT, part[0], device=device)
    backward = "tf32" if config.precision == "bf16" else config.precision  # bf16's casts autograd repeats
    for group in run.optimizer.param_groups:
        group["lr"] = learning_rate(config, epoch)
    run.model.train()
    for number, index in enumerate(batches[first:last], start=first):
        done = epoch + number / len(batches)
        x, y = split.batch(index)
        if config.augment != "none":
            x = augmented(x, shifts)
        with evaluation.number_format(config.precision, device):
            batch_loss = loss(run.model, x, y, config, starts, balance, done / config.epochs)
        value = batch_loss.item()
        if not math.isfinite(value):
            raise TrainingDivergedError(
                f"epoch {epoch + 1}, batch {number + 1}: the loss is {value}; the checkpoint of the epoch before is "
                f"intact; lower lr = {config.lr:g} or look at the data"
            )
        run.optimizer.zero_grad(set_to_none=True)
        with evaluation.number_format(backward, device):
            batch_loss.backward()
        distributed.average_gradients(run.model)
        run.optimizer.step()
        if run.average is not None:
            _follow(run.average, run.model, config.ema)
        yield len(index), value


@torch.no_grad()
def _follow(average: nn.Module, model: nn.Module, decay: float) -> None:
    """One step of the running average of the weights; what batch normalisation counts is taken over."""
    torch._foreach_lerp_(list(average.parameters()), list(model.parameters()), 1 - decay)
    for kept, buffer in zip(average.buffers(), model.buffers(), strict=True):
        kept.copy_(buffer)


def learning_rate(config: Config, epoch: int) -> float:
    """The rate after so many epochs: lr / lr_divide^floor(epoch / lr_every)."""
    return config.lr / config.lr_divide ** (epoch // config.lr_every)
