"""How a file of weights is to be read: which network, behind which preprocessing. What it cannot say is found out.

Each plausible reading classifies the same few hundred clean training images, so that no choice is made on those that
are audited; the one with the lowest natural error is taken. A reading that was asked for, and is far worse than
another, is refused: its robust error would mean nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm.auto import tqdm

from frlkit import KitError, data, watched
from frlkit.audit import networks
from frlkit.audit.doubts import affordable
from frlkit.audit.networks import Network
from frlkit.audit.weights import Weights, find
from frlkit.data import Dataset, Split
from frlkit.evaluation import batches, predict, stream
from frlkit.values import first_line

IMAGES = 500  # that readings are compared on, or fewer of a large network
WORK = 1e11  # floating-point operations that comparing readings may take, all together: seconds on one core
Numbers = tuple[float, ...]
#: What people subtract and divide by, channel by channel.
USUAL: dict[str, tuple[Numbers, Numbers]] = {
    "fashion_mnist": ((0.2860,), (0.3530,)),
    "mnist": ((0.1307,), (0.3081,)),
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "svhn": ((0.4377, 0.4438, 0.4728), (0.1980, 0.2010, 0.1970)),
}
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
NONE, HALVES, BYTES = ((0.0,), (1.0,)), ((0.5,), (0.5,)), ((0.0,), (1 / 255,))
RANGES = {NONE: "[0, 1]", HALVES: "[-1, 1]", BYTES: "[0, 255]"}


class Prepared(nn.Module):
    """A network behind its preprocessing: a black border, then (x - mean) / std; takes images in [0, 1]."""

    def __init__(self, network: nn.Module, mean: Numbers, std: Numbers, border: int = 0) -> None:
        super().__init__()
        self.network, self.border = network, border
        for name, values in (("mean", mean), ("std", std)):
            self.register_buffer(name, torch.tensor(values).view(1, -1, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        return self.network((F.pad(images, (self.border,) * 4) - self.mean) / self.std)


@dataclass(frozen=True)
class Reading:
    """A network and the numbers that its images are normalised with."""

    network: Network
    mean: Numbers
    std: Numbers

    def __str__(self) -> str:
        if self.network.normalises:
            return f"{self.network.title}, with its own normalisation"
        pair = (self.mean, self.std)
        said = f"mean {_listed(self.mean)}, std {_listed(self.std)}"
        return f"{self.network.title}, images {'in ' + RANGES[pair] if pair in RANGES else 'less ' + said}"

    @property
    def module(self) -> nn.Module:
        """From images in [0, 1] to logits: the network itself where it needs no preprocessing."""
        if (self.mean, self.std) == NONE and not self.network.border:
            return self.network.module
        return Prepared(self.network.module, self.mean, self.std, self.network.border)


@dataclass(frozen=True)
class Audited:
    """A model ready to be audited, from images in [0, 1] to logits; its images; and how the file was read."""

    model: nn.Module
    data: Dataset
    title: str
    reading: dict[str, Any]
    doubts: list[str]
    said_error: float | None  # natural error by the file's own record


def read(
    path: Path | None,
    dataset: str,
    model: str = "",
    *,
    mean: Numbers | None = None,
    std: Numbers | None = None,
    size: int | None = None,
    channels: int | None = None,
    key: str = "",
    upright: bool = False,
    device: str | torch.device = "cpu",
) -> Audited:
    """Find out what a file of weights is, on the images that it is to be audited on.

    Parameters
    ----------
    path : the file, see `weights.find`; None for a factory that loads its weights itself
    dataset : a data set's name, or ``folder:PATH``
    model : see `networks.candidates`
    mean, std : one number a channel, or one for all, for images in [0, 1]; None to find out
    size, channels, upright : of a folder's images, see `data.load`; None for what network or files suggest
    key : where in the file the weights lie, if in several places

    Raises
    ------
    KitError
        Whatever `find`, `candidates` and `data.load` refuse; and a mean and std with which the natural error is far
        worse than another way.
    """
    if (mean is None) != (std is None) or not all(value > 0 for value in std or ()):
        raise KitError(f"mean = {mean}, std = {std}: give both, one number for each channel, deviations above 0")
    weights = None if path is None else find(path, key)
    loaded: dict[tuple[int | None, int | None], Dataset] = {}

    def load(side: int | None, colours: int | None) -> Dataset:
        where = (side or size, colours or channels)
        if size and side not in (None, size):
            raise KitError(f"size = {size}: this network takes images of {side}x{side}; leave --size out")
        if where not in loaded:
            grey_or_colour = {"channels": where[1], "upright": upright} if dataset.startswith(data.FOLDER) else {}
            loaded[where] = data.load(dataset, device=device, size=where[0], **grey_or_colour)
        if colours not in (None, has := loaded[where].test.images.shape[1]):
            raise KitError(f"{path or model} takes images of {colours} channels, and those of {dataset} have {has}")
        return loaded[where]

    classes = len(load(*networks.image_shape(model)).class_names)
    found = networks.candidates(model, weights, classes)
    if size:
        found = [network for network in found if network.size in (None, size)] or found
    tries = [
        Reading(network, *numbers)
        for network in found
        for numbers in _normalisations(network, weights, (mean, std), load(network.size, network.channels))
    ]
    asked = [reading for reading in tries if mean is None or (reading.mean, reading.std) == (mean, std)]
    chosen, errors, doubts = _choose(tries, asked, lambda network: load(network.size, network.channels))
    images = load(chosen.network.size, chosen.network.channels)
    if weights and weights.others:
        doubts.append(f"the file has weights under {', '.join(map(repr, weights.others))} too: --key audits those")
    pair = (chosen.mean, chosen.std)
    about = {
        "model": chosen.network.title,
        "mean": None if pair == NONE else list(chosen.mean),
        "std": None if pair == NONE else list(chosen.std),
        "size": images.test.images.shape[-1],
        "channels": images.test.images.shape[1],
        "value_range": RANGES.get(pair, "normalised"),
        "key": weights.key if weights else "",
        "prefix": weights.prefix if weights else "",
        "tried": [{"reading": str(reading), "natural": error} for reading, error in zip(tries, errors, strict=True)],
    }
    module = chosen.module.to(device)
    return Audited(module, images, str(chosen), about, doubts, weights.error if weights else None)


def _listed(numbers: Numbers) -> str:
    return " ".join(f"{number:.4g}" for number in numbers)


def _normalisations(
    network: Network, weights: Weights | None, asked: tuple[Numbers | None, Numbers | None], images: Dataset
) -> list[tuple[Numbers, Numbers]]:
    """What the network's images may have been normalised with; what the file or the user says, first."""
    if network.normalises:
        return [NONE]
    known = (weights.mean, weights.std) if weights else (None, None)
    found = [pair for pair in (asked, known) if None not in pair]
    if not found or asked[0] is not None:
        found += [NONE, USUAL.get(images.name) or _own_numbers(images.train), HALVES, BYTES]
        found += [IMAGENET] * (images.test.images.shape[1] == 3)
    return list(dict.fromkeys(found))  # type: ignore[arg-type]


def _own_numbers(split: Split) -> tuple[Numbers, Numbers]:
    """Mean and deviation of a data set's own pixels, (channels,) each, on up to 1,000 images."""
    x, _ = split.batch(slice(None, None, max(1, len(split) // 1000)))
    pixels = x.transpose(0, 1).flatten(1)
    std, mean = torch.std_mean(pixels, 1)
    return tuple(round(v, 4) for v in mean.tolist()), tuple(max(round(v, 4), 0.01) for v in std.tolist())


def _choose(
    tries: Sequence[Reading], asked: Sequence[Reading], images: Callable[[Network], Dataset]
) -> tuple[Reading, list[float], list[str]]:
    """The best of the readings that were asked for, the natural error of each of all, and what is doubtful about it."""
    right = _right(tries, images)
    errors = [1 - values.mean() for values in right]
    order = sorted(range(len(tries)), key=lambda number: errors[number])
    allowed = [number for number in order if tries[number] in asked]
    first = min(allowed)  # the likeliest before any image was seen: it gives way only to what is surely better
    chosen = allowed[0] if _worse(right[first], right[allowed[0]]) else first
    best = order[0]
    if _worse(right[chosen], right[best], 0.05):
        raise KitError(
            f"read as {tries[chosen]}, its error on clean images is {errors[chosen]:.1%}, and read as {tries[best]}, "
            f"{errors[best]:.1%}: a robust error of the first would mean nothing; change or leave out --mean and --std"
        )
    for other in order:
        alike = not _worse(right[other], right[chosen], sure=1) and (right[other] != right[chosen]).mean() > 0.02
        if other != chosen and alike and errors[other] < 0.5 * (1 - 1 / len(images(tries[0].network).class_names)):
            doubt = f"the file could as well be read as {tries[other]} (error on clean images {errors[other]:.1%})"
            return tries[chosen], errors, [f"{doubt} as {tries[chosen]} ({errors[chosen]:.1%})"]
    return tries[chosen], errors, []


def _right(tries: Sequence[Reading], images: Callable[[Network], Dataset]) -> list[np.ndarray]:
    """Which of the same clean training images each reading classifies rightly, (N,) of bool each."""
    split = images(tries[0].network).train
    most = affordable(_tested(tries[0], split), split, WORK, len(tries), 50, IMAGES)
    index = torch.randperm(len(split), generator=stream(0))[:most]
    found = []
    for reading in tqdm(tries, desc="readings compared", leave=False, delay=2, disable=not watched()):
        chosen = images(reading.network).train.take(index.to(split.labels.device))
        model = _tested(reading, chosen)
        parts = [predict(model, x) == y for x, y in (chosen.batch(rows) for rows in batches(chosen, 100))]
        found.append(torch.cat(parts).cpu().numpy())
    return found


def _tested(reading: Reading, split: Split) -> nn.Module:
    """A reading's network, after it has classified one image into the data set's classes; refuses it in a sentence."""
    module = reading.module.to(split.labels.device).eval()
    x, _ = split.batch(slice(0, 1))
    shape = "x".join(map(str, x.shape[1:]))
    try:
        with torch.no_grad():
            outputs = module(x)
    except Exception as error:  # a stranger's network can raise anything
        raise KitError(
            f"{reading.network.title} does not take images of {shape} ({first_line(error)}): give --size and --channels"
        ) from None
    if not isinstance(outputs, Tensor) or outputs.shape != (1, split.classes):
        given = tuple(outputs.shape) if isinstance(outputs, Tensor) else type(outputs).__name__
        raise KitError(
            f"{reading.network.title} returns {given} for one image of {shape}, and the data set has {split.classes} "
            "classes: it must return one logit for each of them"
        )
    return module


def _worse(one: np.ndarray, other: np.ndarray, least: float = 0.0, sure: float = 3.0) -> bool:
    """Whether one reading is worse than another on the same images: by `least`, and by so many standard errors."""
    gained, lost = (other & ~one).sum(), (one & ~other).sum()
    return bool(gained - lost > max(least * len(one), sure * math.sqrt(gained + lost)))
