"""Data sets as resident tensors: a whole split is one uint8 tensor on the device, floats in [0, 1] appear at the batch.

The wing `frlkit.sources` reads public data sets and anyone's images (``folder:PATH``), and draws the validation split
from the training set before any training, so no model has seen it. No normalisation; augmentation is the training's.
"""

from __future__ import annotations

import hashlib
import re
import sys
from collections import Counter
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from frlkit import KitError, sources
from frlkit.models import SIZE
from frlkit.sources import FOLDER, READERS, DataUnavailableError, check_name, root, stratified_split

__all__ = ["READERS", "DataUnavailableError", "Dataset", "Split", "check_name", "load", "root", "stratified_split"]
PADDING = 4  # pixels, of the random crop


@dataclass(frozen=True)
class Split:
    """Images (N, channels, height, width) as uint8 and labels (N,) as int64, both on one device.

    `groups` (N,) numbers the images that belong together, such as the frames of one track, where there are such;
    `classes` is the data set's number of classes, so that nobody has to guess it from the largest label.
    """

    images: Tensor
    labels: Tensor
    groups: Tensor | None = None
    classes: int | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def batch(self, index: Tensor | slice) -> tuple[Tensor, Tensor]:
        """Images as floats in [0, 1], and labels, of the given samples."""
        return self.images[index].float().div_(255), self.labels[index]

    def take(self, index: Tensor) -> Split:
        """The samples of an index or a mask (N,), in its order."""
        groups = None if self.groups is None else self.groups[index]
        return Split(self.images[index], self.labels[index], groups, self.classes)

    def draw(self, count: int, generator: torch.Generator) -> Tensor:
        """The index, (count,), of images drawn at random; one of each class that they miss takes another's place.
        Raises `KitError` where `count` is below the number of classes."""
        classes = self.classes or int(self.labels.max()) + 1
        if count < classes:
            raise KitError(f"{count} images are fewer than the {classes} classes: their errors are undefined; use more")
        order = torch.randperm(len(self), generator=generator).to(self.labels.device)
        labels, drawn = self.labels[order].tolist(), list(range(min(count, len(self))))
        for missed in sorted(set(labels) - {labels[place] for place in drawn}):
            many = Counter(labels[place] for place in drawn)
            spare = max(number for number, place in enumerate(drawn) if many[labels[place]] > 1)
            drawn[spare] = labels.index(missed)
        return order[drawn]


@dataclass(frozen=True)
class Dataset:
    """A data set's three disjoint splits, its class names in label order, and notes on how its files were read."""

    name: str
    class_names: tuple[str, ...]
    train: Split
    validation: Split
    test: Split
    notes: tuple[str, ...] = ()
    share: float = 0.1  # of the training images, in the validation split
    drawn: bool = True  # validation images are drawn from the training images, and are not a folder's own

    def with_validation(self, share: float) -> Dataset:
        """This data set with another share of its training images set aside: itself where the share is the same, or
        the validation images are a folder's own."""
        if share == self.share or not self.drawn:
            return self
        one, other = self.train, self.validation
        groups = None if one.groups is None else torch.cat([one.groups, other.groups])
        labels = torch.cat([one.labels, other.labels])
        whole = Split(torch.cat([one.images, other.images]), labels, groups, one.classes)
        drawn = stratified_split(labels.cpu(), share, groups=None if groups is None else groups.cpu())
        train, validation = (whole.take(index.to(labels.device)) for index in drawn)
        return replace(self, train=train, validation=validation, share=share)

    @property
    def splits(self) -> dict[str, Split]:
        """The three splits by name."""
        return {"train": self.train, "validation": self.validation, "test": self.test}

    @cached_property
    def class_counts(self) -> dict[str, list[int]]:
        """Number of images of each class, in label order, of each split by name."""
        classes = len(self.class_names)
        return {name: split.labels.bincount(minlength=classes).tolist() for name, split in self.splits.items()}

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over class names, images and labels of the three splits, the same on every device."""
        total = hashlib.sha256(repr(self.class_names).encode())
        for name, split in self.splits.items():
            total.update(f"{name}{tuple(split.images.shape)}".encode())
            for tensor in (split.images, split.labels):
                total.update(tensor.cpu().contiguous().numpy().data)
        return total.hexdigest()


def pick_device(name: str = "auto") -> torch.device:
    """``auto`` (CUDA where there is one), ``cpu`` or ``cuda``; raises `KitError` for another or an absent device."""
    if name not in ("auto", "cpu", "cuda"):
        raise KitError(f"device = {name!r} is unknown: use auto, cpu or cuda")
    if name == "cuda" and not torch.cuda.is_available():
        raise KitError("device = 'cuda': this machine has no usable CUDA device; use auto or cpu")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def load(
    name: str,
    *,
    device: str | torch.device = "cpu",
    validation: float = 0.1,
    size: int | None = SIZE,
    channels: int | None = 3,
    upright: bool = False,
) -> Dataset:
    """Load a data set by name.

    Parameters
    ----------
    name : one of `READERS`, or ``folder:PATH`` with ``train/<class>/*`` and ``test/<class>/*`` there, or another of the
        layouts of `folders.find`; a relative path is one in the data folder (`root`), so that a run's name does not
        depend on the machine
    device : where the tensors live
    validation : share of each class's training images set aside before any training, at least one (`stratified_split`);
        of GTSRB, share of each class's tracks; a folder's own validation images are used instead; the same images
        whatever a run's seed
    size : side in pixels, as the kit's own networks take it unless said otherwise; None for what the files suggest
    channels, upright : of a folder's images (`images.read`): 1 or 3 channels, as the kit's own colour networks take
        them unless said otherwise, None for what the files suggest; whether EXIF turns them

    What was skipped, resized or scaled in a folder is printed to stderr, and kept as `Dataset.notes`. Raises
    `DataUnavailableError`, with the folder searched, where it is neither on disk nor downloaded, and `KitError` for an
    unknown name, damaged files, or a class without an image in one of the three splits.
    """
    names, parts, pixels, notes, drawn = sources.read(name, validation, size, channels, upright)
    for note in notes:
        print(f"{name}: {note}", file=sys.stderr)
    splits = []
    for part, view in zip(parts, pixels.split([len(part.items) for part in parts]), strict=True):
        groups = None if part.groups is None else part.groups.to(device)
        splits.append(Split(view.to(device), part.labels.to(device), groups, len(names)))
    return Dataset(name, names, *splits, tuple(notes), validation, drawn)


def folder_name(name: str) -> str:
    """A data set's name as part of a path, another one for every name: ``folder:photos`` becomes ``folder-photos``.

    All but letters, digits, ``_``, ``.`` and ``-`` becomes ``-``, and a hash tells ``folder:a/b`` from ``folder:a-b``.
    """
    plain = re.sub(r"[^\w.-]+", "-", name)
    if name in READERS or (re.fullmatch(rf"{FOLDER}[\w.-]{{1,60}}", name) and not re.search(r"-[0-9a-f]{8}$", name)):
        return plain
    return f"{plain[:60]}-{hashlib.sha256(name.encode(errors='replace')).hexdigest()[:8]}"


def augmented(images: Tensor, generator: torch.Generator) -> Tensor:
    """Randomly shifted and mirrored copies of a batch (N, channels, side, side), on its device.

    A window of the old side is cut anywhere from the images padded by 4 black pixels, as torchvision's
    ``RandomCrop(side, padding=4)`` does, and every image is mirrored with probability one half.
    """
    count, _, side, _ = images.shape
    device = images.device
    corner = torch.randint(2 * PADDING + 1, (2, count), generator=generator, device=device)
    window = torch.arange(side, device=device)
    rows, columns = corner[0, :, None] + window, corner[1, :, None] + window  # (N, side)
    mirrored = torch.rand(count, generator=generator, device=device) < 0.5
    columns = torch.where(mirrored[:, None], columns.flip(1), columns)
    padded = torch.nn.functional.pad(images, (PADDING,) * 4)
    sample = torch.arange(count, device=device)[:, None, None]
    # The channels are last after indexing with (N, side, side) around a slice.
    return padded[sample, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2).contiguous()
