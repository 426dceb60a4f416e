"""Data sets as resident tensors: a whole split is one uint8 tensor on the device, floats in [0, 1] appear at the batch.

To add a data set, write its reader and name it in `READERS`. No normalisation, no augmentation, no worker processes.
The validation split is drawn from the training set here, before any training, so no model has seen it.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from frlkit import PROJECT, KitError, checkpoint

SIZE = 32  # LeNet-5's input side in pixels
FASHION_CLASSES = (
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)


class DataUnavailableError(KitError):
    """A data set that is neither on disk nor can be downloaded."""


@dataclass(frozen=True)
class Split:
    """Images (N, channels, height, width) as uint8 and labels (N,) as int64, both on one device."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def batch(self, index: Tensor | slice) -> tuple[Tensor, Tensor]:
        """Images as floats in [0, 1], and labels, of the given samples."""
        return self.images[index].float().div_(255), self.labels[index]


@dataclass(frozen=True)
class Dataset:
    """A data set's three disjoint splits and its class names, in label order."""

    name: str
    class_names: tuple[str, ...]
    train: Split
    validation: Split
    test: Split


def root() -> Path:
    """The data folder: ``FRLKIT_DATA``, else ``data`` in the project.

    A relative ``FRLKIT_DATA`` means the working directory's; where that does not exist, the project's.
    """
    path = Path(os.environ.get("FRLKIT_DATA") or PROJECT / "data").expanduser()
    return path if path.is_absolute() or path.exists() else PROJECT / path


def pick_device(name: str = "auto") -> torch.device:
    """``auto`` (CUDA where there is one), ``cpu`` or ``cuda``; raises `KitError` for another or an absent device."""
    if name not in ("auto", "cpu", "cuda"):
        raise KitError(f"device = {name!r} is unknown: use auto, cpu or cuda")
    if name == "cuda" and not torch.cuda.is_available():
        raise KitError("device = 'cuda': this machine has no usable CUDA device; use auto or cpu")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def load(name: str, *, device: str | torch.device = "cpu", validation: float = 0.1, split_seed: int = 0) -> Dataset:
    """Load a data set by name.

    Parameters
    ----------
    name : one of `READERS`
    device : where the tensors live
    validation : share of the training images set aside, stratified by class, before any training
    split_seed : the seed of that draw, independent of any run's seed

    Raises
    ------
    DataUnavailableError
        Not on disk and no download: says which folder was searched.
    KitError
        Unknown name, or files that are damaged.
    """
    if name not in READERS:
        raise KitError(f"dataset = {name!r} is unknown: use one of {', '.join(READERS)}")
    if not 0 < validation < 1:
        raise KitError(f"validation = {validation!r}: use a share of the training images between 0 and 1, such as 0.1")
    class_names, train, test = READERS[name]()
    keep, held = stratified_split(train.labels, validation, split_seed)
    splits = (Split(train.images[keep], train.labels[keep]), Split(train.images[held], train.labels[held]), test)
    on_device = [Split(split.images.to(device), split.labels.to(device)) for split in splits]
    return Dataset(name, class_names, *on_device)


def stratified_split(labels: Tensor, share: float, seed: int) -> tuple[Tensor, Tensor]:
    """Sorted indices of the larger and of the smaller part; the smaller holds `share` of every class."""
    from sklearn.model_selection import train_test_split  # slow to import

    try:
        parts = train_test_split(np.arange(len(labels)), test_size=share, random_state=seed, stratify=labels.numpy())
    except ValueError as error:
        raise KitError(f"cannot set aside a share of {share} of each class in {len(labels)} images: {error}") from None
    keep, held = (torch.from_numpy(np.sort(part)) for part in parts)
    return keep, held


def _fashion_mnist() -> tuple[tuple[str, ...], Split, Split]:
    """Zalando's Fashion-MNIST: 60,000 + 10,000 images, 28x28 enlarged to 32x32 as the report did."""
    from torchvision.datasets import FashionMNIST

    folder = root()
    if not _present(folder):
        try:
            with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
                FashionMNIST(str(folder), download=True)
        except Exception as error:  # no network, no disk, a mirror's nonsense: whatever it is, there are no data
            reason = (str(error).splitlines() or [""])[0] or type(error).__name__
            raise DataUnavailableError(
                f"Fashion-MNIST is not in {folder} (FashionMNIST/raw/*-ubyte) and cannot be downloaded "
                f"({reason}): set FRLKIT_DATA to a folder that has it"
            ) from None
    try:
        parts = [FashionMNIST(str(folder), train=train) for train in (True, False)]
    except Exception as error:  # torchvision's reader checks nothing: a file cut short can raise anything
        reason = (str(error).splitlines() or [""])[0] or type(error).__name__
        raise KitError(f"Fashion-MNIST in {folder} is damaged ({reason}): delete FashionMNIST/raw there") from None
    for part, count in zip(parts, (60_000, 10_000), strict=True):
        if part.data.shape != (count, 28, 28) or part.targets.bincount().tolist() != [count // 10] * 10:
            raise KitError(f"Fashion-MNIST in {folder} is not the original ({count} images): delete FashionMNIST/raw")
    train, test = (Split(_cached_resize(part.data), part.targets) for part in parts)
    return FASHION_CLASSES, train, test


def _present(folder: Path) -> bool:
    names = ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1")
    return all((folder / "FashionMNIST" / "raw" / f"{name}-ubyte").exists() for name in names)


def _digits() -> tuple[tuple[str, ...], Split, Split]:
    """scikit-learn's embedded digits: 1,797 real scans of 8x8 pixels, enlarged to 32x32; a fixed fifth is the test."""
    from sklearn.datasets import load_digits

    scans = load_digits()
    pixels = torch.from_numpy(np.round(scans.images * (255 / 16)).astype(np.uint8))  # 17 grey levels, 0 to 16
    images, labels = resize(pixels), torch.from_numpy(scans.target).long()
    train, test = stratified_split(labels, 0.2, seed=0)
    names = tuple(str(name) for name in scans.target_names)
    return names, Split(images[train], labels[train]), Split(images[test], labels[test])


READERS: dict[str, Callable[[], tuple[tuple[str, ...], Split, Split]]] = {
    "fashion_mnist": _fashion_mnist,
    "digits": _digits,
}


def resize(pixels: Tensor) -> Tensor:
    """(N, height, width) uint8 -> (N, 1, 32, 32) uint8, exactly torchvision's ``Resize(32)`` on PIL images."""
    from PIL import Image
    from torchvision.transforms import Resize

    enlarge = Resize(SIZE)  # bilinear
    return torch.from_numpy(np.stack([np.asarray(enlarge(Image.fromarray(image))) for image in pixels.numpy()]))[
        :, None
    ]


def _cached_resize(pixels: Tensor) -> Tensor:
    """`resize`, done once per machine: kept under a name made from the pixels, so it can never be the wrong one."""
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "frlkit"
    path = folder / f"resized-{hashlib.sha256(pixels.numpy().tobytes()).hexdigest()[:16]}.npy"
    shape = (len(pixels), 1, SIZE, SIZE)
    with contextlib.suppress(Exception):  # absent, or damaged in whatever way: made again
        cached = np.load(path, allow_pickle=False)
        if cached.shape == shape and cached.dtype == np.uint8:
            return torch.from_numpy(cached)
    images = resize(pixels)
    try:
        buffer = io.BytesIO()
        np.save(buffer, images.numpy())
        checkpoint.write_atomically(path, buffer.getvalue())
    except OSError as error:
        warnings.warn(
            f"the resized images cannot be kept in {folder} ({error}): the next start resizes again", stacklevel=2
        )
    return images
