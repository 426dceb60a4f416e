"""How a file of weights is to be read: which network, behind which preprocessing. What it cannot say is found out.

The plausible readings are listed here, what the file or the user says first; `choice` compares them.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from frlkit import KitError, data, models
from frlkit.audit import networks
from frlkit.audit.choice import BYTES, HALVES, NONE, RANGES, Reading, choose
from frlkit.audit.networks import Network, Numbers
from frlkit.audit.weights import Weights, find
from frlkit.data import Dataset, Split

#: What people subtract and divide by, channel by channel.
USUAL: dict[str, tuple[Numbers, Numbers]] = {
    "fashion_mnist": ((0.2860,), (0.3530,)),
    "mnist": ((0.1307,), (0.3081,)),
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "svhn": ((0.4377, 0.4438, 0.4728), (0.1980, 0.2010, 0.1970)),
}
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


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
    chosen, errors, doubts = choose(tries, asked, lambda network: load(network.size, network.channels))
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
