"""The public data sets by name (`READERS`), read with torchvision or scikit-learn into `folders.Source`.

To add one, write its reader here and name it in `READERS`.
"""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from frlkit import PROJECT, KitError
from frlkit.models import SIZE
from frlkit.sources import images
from frlkit.sources.folders import Part, Source, of_arrays

FASHION_CLASSES = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
)  # fmt: skip
CIFAR_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
# GTSRB numbers its 43 classes; these are the usual names of the signs, as short as a figure's axis wants them.
SIGNS = (
    "Speed limit 20", "Speed limit 30", "Speed limit 50", "Speed limit 60", "Speed limit 70", "Speed limit 80",
    "End of speed limit 80", "Speed limit 100", "Speed limit 120", "No passing", "No passing over 3.5 t",
    "Right of way at next crossing", "Priority road", "Yield", "Stop", "No vehicles", "No vehicles over 3.5 t",
    "No entry", "General caution", "Dangerous curve left", "Dangerous curve right", "Double curve", "Bumpy road",
    "Slippery road", "Road narrows on the right", "Road work", "Traffic signals", "Pedestrians", "Children crossing",
    "Bicycles crossing", "Ice or snow", "Wild animals crossing", "End of all limits", "Turn right ahead",
    "Turn left ahead", "Ahead only", "Go straight or right", "Go straight or left", "Keep right", "Keep left",
    "Roundabout", "End of no passing", "End of no passing over 3.5 t",
)  # fmt: skip
# Images of each digit in MNIST, to train and to test.
DIGITS = (
    (5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949),
    (980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009),
)
GREY, COLOUR = (SIZE, 1), (SIZE, 3)  # side in pixels and channels


class DataUnavailableError(KitError):
    """A data set that is neither on disk nor can be downloaded."""


def root() -> Path:
    """The data folder: ``FRLKIT_DATA``, else ``data`` in the project.

    A relative ``FRLKIT_DATA`` means the working directory's; where that does not exist, the project's.
    """
    asked = os.environ.get("FRLKIT_DATA")
    try:
        path = Path(asked or PROJECT / "data").expanduser()
        return path if path.is_absolute() or path.exists() else PROJECT / path
    except (OSError, RuntimeError) as error:  # no such user, no right to look
        raise KitError(
            f"FRLKIT_DATA = {asked!r} cannot be looked for ({images.first_line(error)}): use another path"
        ) from None


@contextlib.contextmanager
def _refused(kind: type[KitError], what: str, fix: str) -> Iterator[None]:
    """Torchvision, silent; whatever it raises, from no network to a file cut short, becomes one sentence."""
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            yield
    except Exception as error:
        raise kind(f"{what} ({images.first_line(error)}): {fix}") from None


def _idx(name: str, class_names: tuple[str, ...], counts: tuple[Sequence[int], Sequence[int]]) -> Source:
    """Fashion-MNIST or MNIST, 60,000 + 10,000 images, 28x28 enlarged to 32x32 as the report did."""
    import torchvision

    kind, folder = getattr(torchvision.datasets, name), root()
    wanted = (
        f"{part}-ubyte" for part in ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1")
    )
    if not all((folder / name / "raw" / file).exists() for file in wanted):
        missing = f"{name} is not in {folder} ({name}/raw/*-ubyte) and cannot be downloaded"
        with _refused(DataUnavailableError, missing, "set FRLKIT_DATA to a folder that has it"):
            kind(str(folder), download=True)
    with _refused(KitError, f"{name} in {folder} is damaged", f"delete {name}/raw there"):
        parts = [kind(str(folder), train=train) for train in (True, False)]
    for part, count in zip(parts, counts, strict=True):
        if part.data.shape != (sum(count), 28, 28) or part.targets.bincount().tolist() != list(count):
            raise KitError(f"{name} in {folder} is not the original ({sum(count)} images): delete {name}/raw")
    train, test = (of_arrays(name, part.data.numpy(), part.targets) for part in parts)
    return Source(class_names, {"train": train, "test": test}, form=GREY)


def _digits() -> Source:
    """scikit-learn's embedded digits: 1,797 real scans of 8x8 pixels, enlarged to 32x32; a fixed fifth is the test."""
    from sklearn.datasets import load_digits

    scans = load_digits()
    pixels = np.round(scans.images * (255 / 16)).astype(np.uint8)  # 17 grey levels, 0 to 16
    whole = of_arrays("digits", pixels, scans.target)
    train, test = digits_split(whole.labels, 0.2)
    parts = {"train": whole.take(train), "test": whole.take(test)}
    return Source(tuple(map(str, scans.target_names)), parts, form=GREY, keep=False)


def digits_split(labels: Tensor, share: float, seed: int = 0, groups: None = None) -> tuple[Tensor, Tensor]:
    """The digits' splits as they always were: scikit-learn's rounding of a class's share is another."""
    from sklearn.model_selection import train_test_split  # slow to import

    try:
        parts = train_test_split(np.arange(len(labels)), test_size=share, random_state=seed, stratify=labels.numpy())
    except ValueError as error:
        raise KitError(f"cannot set aside a share of {share} of each class in {len(labels)} images: {error}") from None
    keep, held = (torch.from_numpy(np.sort(part)) for part in parts)
    return keep, held


def _torchvision(name: str, splits: Sequence[dict[str, Any]], read: Callable[[Any], Part]) -> dict[str, Part]:
    """Training and test part of one of torchvision's data sets, downloaded where it is missing.

    torchvision checks what is in the folder against its checksums first: an archive that lies there already is unpacked
    instead of downloaded.
    """
    import torchvision

    kind, folder = getattr(torchvision.datasets, name), root()
    missing = f"{name} is not complete in {folder} and cannot be downloaded"
    with _refused(DataUnavailableError, missing, "put its archive there, or set FRLKIT_DATA to a folder that has it"):
        parts = [kind(str(folder), download=True, **split) for split in splits]
    with _refused(KitError, f"{name} in {folder} is damaged", "delete it there"):
        return dict(zip(("train", "test"), map(read, parts), strict=True))


def _cifar10() -> Source:
    """CIFAR-10: 50,000 + 10,000 colour images of 32x32 pixels."""
    splits = ({"train": True}, {"train": False})
    parts = _torchvision("CIFAR10", splits, lambda part: of_arrays("CIFAR-10", part.data, part.targets))
    return Source(CIFAR_CLASSES, parts, form=COLOUR, keep=False)


def _svhn() -> Source:
    """SVHN, cropped digits: 73,257 + 26,032 colour images of 32x32 pixels, unbalanced."""

    def read(part: Any) -> Part:
        return of_arrays("SVHN", part.data.transpose(0, 2, 3, 1), part.labels)

    parts = _torchvision("SVHN", ({"split": "train"}, {"split": "test"}), read)
    return Source(tuple("0123456789"), parts, form=COLOUR, keep=False)


def _gtsrb() -> Source:
    """GTSRB: 12,630 test images of traffic signs of 43 classes, unbalanced, of any size, resized to 32x32.

    To train, the 26,640 that torchvision downloads, or all 39,209 in the same folders: tracks of about 30 frames of one
    sign, which are the training split's groups.
    """

    def read(part: Any) -> Part:
        files, labels = zip(*part._samples, strict=True)  # torchvision keeps no tensor of them
        if len(set(labels)) != 43:
            raise ValueError(f"{len(set(labels))} of 43 classes have images")
        items = [images.Item(file, Path(file).read_bytes) for file in files]
        return Part(items, torch.tensor(labels), _tracks(files, labels) if part._split == "train" else None)

    parts = _torchvision("GTSRB", ({"split": "train"}, {"split": "test"}), read)
    return Source(SIGNS, parts, form=COLOUR)


def _tracks(files: Sequence[str], labels: Sequence[int]) -> Tensor:
    """The track (N,) of each training image, which is named TTTTT_FFFFF.ppm: track, frame; every class counts anew."""
    return torch.tensor([label * 100_000 + int(Path(f).name[:5]) for f, label in zip(files, labels, strict=True)])


def _gtsrb17() -> Source:
    """The paper's subset of GTSRB: the 17 classes with the most training images, most first, numbered anew."""
    whole = _gtsrb()
    kept = torch.bincount(whole.parts["train"].labels, minlength=len(SIGNS)).argsort(descending=True, stable=True)[:17]
    number = torch.full((len(SIGNS),), -1)
    number[kept] = torch.arange(len(kept))
    parts = {name: part.take((number[part.labels] >= 0).nonzero()[:, 0]) for name, part in whole.parts.items()}
    parts = {name: replace(part, labels=number[part.labels]) for name, part in parts.items()}
    return Source(tuple(SIGNS[index] for index in kept), parts, form=COLOUR)


READERS: dict[str, Callable[[], Source]] = {
    "fashion_mnist": partial(_idx, "FashionMNIST", FASHION_CLASSES, ([6000] * 10, [1000] * 10)),
    "mnist": partial(_idx, "MNIST", tuple("0123456789"), DIGITS),
    "digits": _digits,
    "cifar10": _cifar10,
    "svhn": _svhn,
    "gtsrb": _gtsrb,
    "gtsrb17": _gtsrb17,
}
