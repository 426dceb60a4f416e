"""Who is in which split: the test images that a source names, and a validation split drawn before any training."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from frlkit import KitError
from frlkit.sources.folders import Part, Source


def three(source: Source, share: float, draw: Callable[..., tuple[Tensor, Tensor]]) -> list[Part]:
    """Training, validation and test part, the second the source's own or drawn from the first, before any is read."""
    train, held_out, test = (source.parts.get(name) for name in ("train", "validation", "test"))
    _every_class(source.class_names, test, "test", 1)
    if held_out is not None:
        _every_class(source.class_names, held_out, "validation", 1)
        _every_class(source.class_names, train, "training", 1)
        return [train, held_out, test]
    _every_class(source.class_names, train, "training", 2)  # one to train, one to validate
    keep, held = draw(train.labels, share, groups=train.groups)
    return [train.take(keep), train.take(held), test]


def _every_class(class_names: Sequence[str], images: Part, part: str, least: int) -> None:
    """Refuse a part with fewer than `least` images of a class."""
    for name, count in zip(class_names, images.labels.bincount(minlength=len(class_names)).tolist(), strict=True):
        if count < least:
            raise KitError(
                f"class {name!r} has {count} {part} image{'' if count == 1 else 's'}, and needs {least} or more: "
                "add images to it, or leave the class out of the data set"
            )


def stratified_split(
    labels: Tensor, share: float, seed: int = 0, groups: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Sorted indices of the larger and of the smaller part of labels (N,), drawn class by class.

    The smaller gets max(1, round(share · n)) of a class's n images, but never all of them. With `groups` (N,) whole
    groups are drawn, and n counts the class's groups. Raises `KitError` where a class has one image, or group, alone.
    """
    draw = np.random.RandomState(seed)  # numpy keeps its stream for ever
    units = (torch.arange(len(labels)) if groups is None else groups).numpy()
    held = []
    for label in np.unique(labels.numpy()):
        members = np.flatnonzero(labels.numpy() == label)
        choice = draw.permutation(np.unique(units[members]))
        if len(choice) < 2:
            what = "image" if groups is None else "group of images"
            raise KitError(f"class {label} has one {what} alone: it cannot be in both parts; add images")
        chosen = choice[-min(max(1, round(share * len(choice))), len(choice) - 1) :]
        held.append(members[np.isin(units[members], chosen)])
    mask = torch.zeros(len(labels), dtype=torch.bool)
    mask[torch.from_numpy(np.concatenate(held))] = True
    return (~mask).nonzero()[:, 0], mask.nonzero()[:, 0]
