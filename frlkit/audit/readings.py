"""How a file of weights is to be read: which network, behind which preprocessing. What it cannot say is found out.

Each plausible reading classifies the same few hundred clean test images (on what it was trained with, a network is
right however it is read); the one with the lowest error, and among equals the lowest loss, is taken. A reading that was
asked for, and is far worse than another, is refused: its robust error would mean nothing.
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

from frlkit import KitError, data, models, watched
from frlkit.attacks import outputs
from frlkit.audit import networks
from frlkit.audit.doubts import affordable, check
from frlkit.audit.networks import Network, Numbers, Prepared
from frlkit.audit.weights import Weights, find
from frlkit.data import Dataset, Split
from frlkit.evaluation import Attack, batches, predictions, stream

FEW, MANY = 200, 2000  # images that all readings, and the best of them, are compared on; fewer of a large network
FINAL = 12  # how many are those
WORK = 1e11  # floating-point operations that each of the two may take: seconds on one core
SCALES = tuple(2.0 ** (power / 2) for power in range(-12, 5))
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
        said = "mean {}, std {}".format(*(" ".join(f"{number:.4g}" for number in numbers) for numbers in pair))
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
    if not asked:
        raise KitError(f"mean = {mean}: {found[0].title} needs none for its images; leave --mean and --std out")
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
    module = models.place(chosen.module, device)
    return Audited(module, images, str(chosen), about, doubts, weights.error if weights else None)


def _normalisations(
    network: Network, weights: Weights | None, asked: tuple[Numbers | None, Numbers | None], images: Dataset
) -> list[tuple[Numbers, Numbers]]:
    """What the network's images may have been normalised with; what the file or the user says, first."""
    if network.normalises or (weights and weights.own in models.MODELS):
        return [NONE]
    channels = images.test.images.shape[1]
    if asked[0] is not None and not {len(asked[0]), len(asked[1] or ())} <= {1, channels}:
        raise KitError(f"mean = {asked[0]}, std = {asked[1]}: give one number, or one for each of {channels} channels")
    known = (weights.mean, weights.std) if weights else (None, None)
    found = [pair for pair in (asked, known) if None not in pair]
    if not found or asked[0] is not None:
        found += [NONE, USUAL.get(images.name) or _own_numbers(images.train), HALVES, BYTES]
        found.append(IMAGENET if images.test.images.shape[1] == 3 else USUAL["mnist"])
    return list(dict.fromkeys(found))  # type: ignore[arg-type]


def _own_numbers(split: Split) -> tuple[Numbers, Numbers]:
    """Mean and deviation of a data set's own pixels, (channels,) each, on up to 1,000 images."""
    x, _ = split.batch(slice(None, None, max(1, len(split) // 1000)))
    pixels = x.transpose(0, 1).flatten(1)
    std, mean = torch.std_mean(pixels, 1)
    return tuple(round(v, 4) for v in mean.tolist()), tuple(max(round(v, 4), 0.01) for v in std.tolist())


@dataclass(frozen=True)
class _Score:
    """What a reading makes of the same clean images, (N,) each: which are right, and their loss.

    The loss is cross-entropy of the logits times that of `SCALES` which makes it smallest, as a reading may scale them.
    """

    right: np.ndarray
    loss: np.ndarray
    outputs: Tensor  # (N, C), divided by their mean size

    @property
    def error(self) -> float:
        return float(1 - self.right.mean())

    def worse(self, other: _Score, least: float = 0.0, sure: float = 3.0) -> bool:
        """Whether its error is larger: by `least`, and by so many standard errors of the difference."""
        gained, lost = (other.right & ~self.right).sum(), (self.right & ~other.right).sum()
        return bool(gained - lost > max(least * len(self.right), sure * math.sqrt(gained + lost)))

    def less_likely(self, other: _Score) -> bool:
        """Whether its loss is larger: by three standard errors of the difference, and enough to mean anything."""
        difference = self.loss - other.loss
        least = max(1e-3, 0.05 * self.loss.mean(), 3 * difference.std() / math.sqrt(len(difference)))
        return bool(difference.mean() > least)

    def same(self, other: _Score) -> bool:
        """Whether it is the same function, but for a factor: attacks then find the same."""
        return torch.allclose(self.outputs, other.outputs, rtol=0.01, atol=0.01)


def _choose(
    tries: Sequence[Reading], asked: Sequence[Reading], images: Callable[[Network], Dataset]
) -> tuple[Reading, list[float], list[str]]:
    """The best of the readings that were asked for, the error of each of all, and what is doubtful about the choice.

    Of those whose errors can hardly be told apart, the first, likeliest before any image was seen, gives way only to a
    lower loss; where losses do not tell either, and attacks find something else, that is a doubt.
    """
    scores = _scores(tries, images, FEW)
    allowed = [number for number in range(len(tries)) if tries[number] in asked]
    lowest = min(allowed, key=lambda number: scores[number].error)
    best = min(range(len(tries)), key=lambda number: scores[number].error)
    if scores[lowest].worse(scores[best], 0.05):
        raise KitError(
            f"read as {tries[lowest]}, {scores[lowest].error:.1%} of clean images are wrong, and read as "
            f"{tries[best]}, {scores[best].error:.1%}: a robust error of the first would mean nothing; change or leave "
            "out --mean and --std"
        )
    close = [number for number in allowed if not scores[number].worse(scores[lowest])]
    close = sorted({close[0], *sorted(close, key=lambda number: scores[number].error)[:FINAL]})
    final = sorted({*close, best})
    more = dict(zip(final, _scores([tries[number] for number in final], images, MANY), strict=True))
    errors = [more.get(number, scores[number]).error for number in range(len(tries))]
    lowest = min(close, key=errors.__getitem__)
    close = [number for number in close if not more[number].worse(more[lowest], sure=1)]
    loss = {number: more[number].loss.mean() for number in final}
    likeliest = min(close, key=loss.__getitem__)
    chosen = likeliest if more[close[0]].less_likely(more[likeliest]) else close[0]
    if errors[lowest] > 0.75 * (1 - 1 / len(images(tries[0].network).class_names)):
        return tries[close[0]], errors, []  # whatever it has learnt, it is not this
    likely = [number for number in sorted({*close, best}, key=loss.get) if not more[number].less_likely(more[chosen])]
    rivals = [(tries[number], errors[number]) for number in likely if not more[number].same(more[chosen])]
    return tries[chosen], errors, _doubt((tries[chosen], errors[chosen]), rivals, images)


_Told = tuple[Reading, float]  # and the share of clean images that it gets wrong


def _doubt(chosen: _Told, rivals: Sequence[_Told], images: Callable[[Network], Dataset]) -> list[str]:
    """What there is to say of the first of the rivals behind which attacks find something else."""
    ours = _fallen(chosen[0], images) if rivals else np.empty(0)
    for rival in rivals:
        theirs = _fallen(rival[0], images)
        if abs(theirs.sum() - ours.sum()) > max(0.03 * len(ours), 2 * math.sqrt((theirs != ours).sum())):
            said = (
                f"{reading} ({error:.1%} of clean images are wrong, and {fell.mean():.0%} of {len(fell)} attacked)"
                for (reading, error), fell in ((rival, theirs), (chosen, ours))
            )
            return [f"the file could as well be read as {' as '.join(said)}"]
    return []


def _scores(tries: Sequence[Reading], images: Callable[[Network], Dataset], most: int) -> list[_Score]:
    split = images(tries[0].network).test
    count = affordable(_tested(tries[0], split), split, WORK, len(tries), 50, most)
    index = torch.randperm(len(split), generator=stream(0))[:count].to(split.labels.device)
    found = []
    for reading in tqdm(tries, desc="readings compared", leave=False, delay=2, disable=not watched()):
        chosen = images(reading.network).test.take(index)
        model, y = _tested(reading, chosen), chosen.labels
        z = torch.cat([outputs(model, chosen.batch(rows)[0]) for rows in batches(chosen, 100)])
        losses = [F.cross_entropy(z * scale, y, reduction="none") for scale in SCALES]
        loss = min(losses, key=lambda values: values.mean().item())
        size = z.abs().mean().clamp(min=1e-12)
        found.append(_Score((z.argmax(1) == y).cpu().numpy(), loss.cpu().numpy(), z / size))
    return found


def _fallen(reading: Reading, images: Callable[[Network], Dataset]) -> np.ndarray:
    """Which of the same few images are wrong clean or under a short attack: whether it matters how a file is read."""
    split = images(reading.network).test
    model = _tested(reading, split)
    order = torch.randperm(len(split), generator=stream(0)).to(split.labels.device)
    part = split.take(order[: affordable(model, split, WORK, 21, 20, FEW)])
    labels, clean, attacked = predictions(model, part, Attack(steps=10))
    return (clean != labels) | (attacked != labels)


def _tested(reading: Reading, split: Split) -> nn.Module:
    """A reading's network, on its device, see `check`."""
    module = reading.module.to(split.labels.device)
    check(module, reading.network.title, split)
    return module
