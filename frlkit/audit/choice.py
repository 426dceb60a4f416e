"""Which of several readings of a file of weights is right, found out on clean images (`choose`).

Each plausible reading classifies the same few hundred clean test images (on what it was trained with, a network is
right however it is read), and those that are left up to ten thousand; the one with the lowest error, and among equals
the lowest loss, is taken. A reading that was asked for, and is far worse than another, is refused: its robust error
would mean nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm.auto import tqdm

from frlkit import KitError, watched
from frlkit.attacks import outputs
from frlkit.audit.doubts import affordable, check
from frlkit.audit.networks import Network, Numbers, Prepared
from frlkit.data import Dataset, Split
from frlkit.evaluation import Attack, batches, predictions, stream

FEW, MORE = 200, (2000, 10_000)  # images that all readings, and those left, are compared on; fewer of a large network
WORK = 1e11  # floating-point operations that each comparison may take: seconds on one core
SCALES = tuple(2.0 ** (power / 2) for power in range(-12, 5))
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
    def options(self) -> str:
        """What asks for these numbers on the command line."""
        mean, std = (",".join(f"{number:g}" for number in numbers) for numbers in (self.mean, self.std))
        return f"--mean {mean} --std {std}"

    @property
    def module(self) -> nn.Module:
        """From images in [0, 1] to logits: the network itself where it needs no preprocessing."""
        if (self.mean, self.std) == NONE and not self.network.border:
            return self.network.module
        return Prepared(self.network.module, self.mean, self.std, self.network.border)


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


def choose(
    tries: Sequence[Reading], asked: Sequence[Reading], images: Callable[[Network], Dataset]
) -> tuple[Reading, list[float], list[str]]:
    """The best of the readings that were asked for, the error of each of all, and what is doubtful about the choice.

    Those left after a few images (`_left`) are compared on more. Of those whose errors can hardly be told apart then,
    the first, likeliest before any image was seen, gives way only to a lower loss, or to a lower error beside it. Where
    losses do not tell either, or contradict the errors, and attacks find something else, that is a doubt.
    """
    scores = _scores(tries, images, FEW)
    left = [number for number in range(len(tries)) if tries[number] in asked]
    lowest = min(left, key=lambda number: scores[number].error)
    best = min(range(len(tries)), key=lambda number: scores[number].error)
    if scores[lowest].worse(scores[best], 0.05):
        raise KitError(
            f"read as {tries[lowest]}, {scores[lowest].error:.1%} of clean images are wrong, and read as "
            f"{tries[best]}, {scores[best].error:.1%}: a robust error of the first would mean nothing; change or leave "
            "out --mean and --std"
        )
    unasked = {best} - {*left}
    for most in MORE:
        left = _left(left, scores)
        group = sorted({*left, *unasked})
        if all(scores[number].same(scores[group[0]]) for number in group[1:]):
            break
        for number, score in zip(group, _scores([tries[number] for number in group], images, most), strict=True):
            scores[number] = score
    left = _left(left, scores)
    errors = [score.error for score in scores]
    loss = [score.loss.mean() for score in scores]
    lowest = min(left, key=errors.__getitem__)
    close = [number for number in left if not scores[number].worse(scores[lowest])]
    likeliest = min(close, key=loss.__getitem__)
    first, other = scores[close[0]], scores[likeliest]
    chosen = likeliest if first.less_likely(other) or first.worse(other, sure=2) else close[0]
    if errors[lowest] > 0.75 * (1 - 1 / len(images(tries[0].network).class_names)):
        return tries[close[0]], errors, []  # whatever it has learnt, it is not this
    ours = scores[chosen]
    rivals = [
        number
        for number in sorted({*left, *unasked} - {chosen}, key=loss.__getitem__)
        if not scores[number].same(ours) and (not scores[number].less_likely(ours) or ours.worse(scores[number]))
    ]
    told = [(tries[number], errors[number], len(scores[number].right)) for number in (chosen, *rivals)]
    return tries[chosen], errors, _doubt(told[0], told[1:], images)


def _left(numbers: Sequence[int], scores: Sequence[_Score]) -> list[int]:
    """Those readings that are not surely worse than another in both, their error and their loss."""
    lowest = min(numbers, key=lambda number: scores[number].error)
    likeliest = min(numbers, key=lambda number: scores[number].loss.mean())
    return [
        number
        for number in numbers
        if not scores[number].worse(scores[lowest]) or not scores[number].less_likely(scores[likeliest])
    ]


_Told = tuple[Reading, float, int]  # and the share of so many clean images that it gets wrong


def _doubt(chosen: _Told, rivals: Sequence[_Told], images: Callable[[Network], Dataset]) -> list[str]:
    """What there is to say of the first of the rivals behind which attacks find something else, and what settles it."""
    ours = _fallen(chosen[0], images) if rivals else np.empty(0)
    for rival in rivals:
        theirs = _fallen(rival[0], images)
        if abs(theirs.sum() - ours.sum()) > max(0.03 * len(ours), 2 * math.sqrt((theirs != ours).sum())):
            said = (
                f"{reading} ({error:.1%} of {count} clean images are wrong, {fell.mean():.0%} of {len(fell)} attacked)"
                for (reading, error, count), fell in ((rival, theirs), (chosen, ours))
            )
            options = [*dict.fromkeys(reading.options for reading in (rival[0], chosen[0]))]
            settles = " or ".join(options) if options[1:] else "--model file.py:factory"
            return [f"the file could as well be read as {' as '.join(said)}: say which, with {settles}"]
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
