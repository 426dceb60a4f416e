"""Data sets as resident tensors: a whole split is one uint8 tensor on the device, floats in [0, 1] appear at the batch.

To add a data set, write its reader and name it in `READERS`; anyone's own images need none: ``folder:PATH``. No
normalisation, no worker processes; augmentation is the training's (`augmented`). The validation split is drawn from the
training set here, before any training, so no model has seen it; frames of one sign (GTSRB) stay on one side.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from frlkit import PROJECT, KitError, checkpoint, disk
from frlkit.models import SIZE

FOLDER = "folder:"
PADDING = 4  # pixels, of the random crop
IMAGES = (".bmp", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
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
PARTS = ("train", "test")  # of a folder of images


_TENSORS = ("images", "labels")


class DataUnavailableError(KitError):
    """A data set that is neither on disk nor can be downloaded."""


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

    def to(self, device: str | torch.device, classes: int) -> Split:
        """This split on a device, as one of a data set of so many classes."""
        groups = None if self.groups is None else self.groups.to(device)
        return Split(self.images.to(device), self.labels.to(device), groups, classes)


@dataclass(frozen=True)
class Dataset:
    """A data set's three disjoint splits and its class names, in label order."""

    name: str
    class_names: tuple[str, ...]
    train: Split
    validation: Split
    test: Split
    share: float = 0.1  # of the training images, in the validation split

    def with_validation(self, share: float) -> Dataset:
        """This data set with another share of its training images set aside: itself where the share is the same."""
        if share == self.share:
            return self
        images, labels = (torch.cat([getattr(s, kind) for s in (self.train, self.validation)]) for kind in _TENSORS)
        groups = None
        if self.train.groups is not None and self.validation.groups is not None:
            groups = torch.cat([self.train.groups, self.validation.groups])
        both = Split(images, labels, groups, self.train.classes)
        keep, held = stratified_split(labels.cpu(), share, 0, None if groups is None else groups.cpu())
        parts = both.take(keep.to(labels.device)), both.take(held.to(labels.device))
        return Dataset(self.name, self.class_names, *parts, self.test, share)

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
    name : one of `READERS`, or ``folder:PATH`` with ``train/<class>/*`` and ``test/<class>/*`` there (see `_folder`)
    device : where the tensors live
    validation : share of each class's training images set aside before any training, at least one (`stratified_split`);
        of GTSRB, share of each class's tracks
    split_seed : the seed of that draw, independent of any run's seed

    Raises
    ------
    DataUnavailableError
        Not on disk and no download: says which folder was searched.
    KitError
        Unknown name, files that are damaged, or a class without an image in one of the three splits.
    """
    check_name(name)
    if not 0 < validation < 1:
        raise KitError(f"validation = {validation!r}: use a share of the training images between 0 and 1, such as 0.1")
    class_names, train, test = _folder(name.removeprefix(FOLDER)) if name.startswith(FOLDER) else READERS[name]()
    _every_class(class_names, test, "test", 1)
    _every_class(class_names, train, "training", 2)  # one to train, one to validate
    draw = _digits_split if name == "digits" else stratified_split
    keep, held = draw(train.labels, validation, split_seed, train.groups)
    splits = [split.to(device, len(class_names)) for split in (train.take(keep), train.take(held), test)]
    return Dataset(name, class_names, *splits, validation)


def _every_class(class_names: Sequence[str], split: Split, part: str, least: int) -> None:
    """Refuse a split with fewer than `least` images of a class."""
    for name, count in zip(class_names, split.labels.bincount(minlength=len(class_names)).tolist(), strict=True):
        if count < least:
            raise KitError(
                f"class {name!r} has {count} {part} image{'' if count == 1 else 's'}, and needs {least} or more: "
                "add images to it, or leave the class out of the data set"
            )


def check_name(name: str) -> None:
    """Refuse a data set that is neither in `READERS` nor ``folder:PATH``."""
    if not isinstance(name, str) or (name not in READERS and not name.startswith(FOLDER)):
        raise KitError(f"dataset = {name!r} is unknown: use one of {', '.join(READERS)}, or {FOLDER}PATH")
    if name.removeprefix(FOLDER) == "":
        raise KitError(f"dataset = {name!r} names no folder: use {FOLDER}PATH, with train/<class>/* and test/<class>/*")


def folder_name(name: str) -> str:
    """A data set's name as part of a path: ``folder:my/images`` becomes ``folder-my-images``."""
    return re.sub(r"[^\w.-]+", "-", name)


def augmented(images: Tensor, kind: str, generator: torch.Generator) -> Tensor:
    """Randomly shifted, and for "crop_flip" mirrored, copies of a batch (N, channels, side, side), on its device.

    "crop" pads by 4 black pixels and cuts a window of the old size anywhere, one draw per image, as torchvision's
    ``RandomCrop(side, padding=4)``; "crop_flip" mirrors every image with probability one half as well.
    """
    count, _, side, _ = images.shape
    device = images.device
    corner = torch.randint(2 * PADDING + 1, (2, count), generator=generator, device=device)
    window = torch.arange(side, device=device)
    rows, columns = corner[0, :, None] + window, corner[1, :, None] + window  # (N, side)
    if kind == "crop_flip":
        mirrored = torch.rand(count, generator=generator, device=device) < 0.5
        columns = torch.where(mirrored[:, None], columns.flip(1), columns)
    padded = torch.nn.functional.pad(images, (PADDING,) * 4)
    sample = torch.arange(count, device=device)[:, None, None]
    # The channels are last after indexing with (N, side, side) around a slice.
    return padded[sample, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2).contiguous()


def stratified_split(labels: Tensor, share: float, seed: int, groups: Tensor | None = None) -> tuple[Tensor, Tensor]:
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
    train, test = _digits_split(labels, 0.2, seed=0)
    names = tuple(str(name) for name in scans.target_names)
    return names, Split(images[train], labels[train]), Split(images[test], labels[test])


def _digits_split(labels: Tensor, share: float, seed: int, groups: None = None) -> tuple[Tensor, Tensor]:
    """The digits' splits as they always were: scikit-learn's rounding of a class's share is another."""
    from sklearn.model_selection import train_test_split  # slow to import

    try:
        parts = train_test_split(np.arange(len(labels)), test_size=share, random_state=seed, stratify=labels.numpy())
    except ValueError as error:
        raise KitError(f"cannot set aside a share of {share} of each class in {len(labels)} images: {error}") from None
    keep, held = (torch.from_numpy(np.sort(part)) for part in parts)
    return keep, held


def _torchvision(name: str, splits: Sequence[dict[str, Any]], read: Callable[[Any], Split]) -> tuple[Split, Split]:
    """Training and test split of one of torchvision's data sets, downloaded where it is missing.

    torchvision checks what is in the folder against its checksums first: an archive that lies there already is unpacked
    instead of downloaded.
    """
    import torchvision

    kind, folder = getattr(torchvision.datasets, name), root()
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            parts = [kind(str(folder), download=True, **split) for split in splits]
    except Exception as error:  # no network, no disk, a mirror's nonsense: whatever it is, there are no data
        reason = (str(error).splitlines() or [""])[0] or type(error).__name__
        raise DataUnavailableError(
            f"{name} is not complete in {folder} and cannot be downloaded ({reason}): "
            f"put its archive there, or set FRLKIT_DATA to a folder that has it"
        ) from None
    try:
        train, test = map(read, parts)
    except Exception as error:
        reason = (str(error).splitlines() or [""])[0] or type(error).__name__
        raise KitError(f"{name} in {folder} is damaged ({reason}): delete it there") from None
    return train, test


def _cifar10() -> tuple[tuple[str, ...], Split, Split]:
    """CIFAR-10: 50,000 + 10,000 colour images of 32x32 pixels."""
    splits = ({"train": True}, {"train": False})
    return CIFAR_CLASSES, *_torchvision("CIFAR10", splits, lambda part: _split(part.data, part.targets))


def _svhn() -> tuple[tuple[str, ...], Split, Split]:
    """SVHN, cropped digits: 73,257 + 26,032 colour images of 32x32 pixels, unbalanced."""

    def read(part: Any) -> Split:
        return _split(part.data.transpose(0, 2, 3, 1), part.labels)

    return tuple("0123456789"), *_torchvision("SVHN", ({"split": "train"}, {"split": "test"}), read)


def _gtsrb() -> tuple[tuple[str, ...], Split, Split]:
    """GTSRB: 12,630 test images of traffic signs of 43 classes, unbalanced, of any size, resized to 32x32.

    To train, the 26,640 that torchvision downloads, or all 39,209 in the same folders: tracks of about 30 frames of one
    sign, which are the training split's groups.
    """

    def read(part: Any) -> Split:
        files, labels = zip(*part._samples, strict=True)  # torchvision keeps no tensor of them
        if len(set(labels)) != 43:
            raise ValueError(f"{len(set(labels))} of 43 classes have images")
        return Split(_cached_files([Path(file) for file in files]), torch.tensor(labels), _tracks(files, labels))

    train, test = _torchvision("GTSRB", ({"split": "train"}, {"split": "test"}), read)
    return SIGNS, train, Split(test.images, test.labels)  # a test file's name is a number, not a track's


def _tracks(files: Sequence[str], labels: Sequence[int]) -> Tensor:
    """The track (N,) of each training image, which is named TTTTT_FFFFF.ppm: track, frame; every class counts anew."""
    return torch.tensor([label * 100_000 + int(Path(f).name[:5]) for f, label in zip(files, labels, strict=True)])


def _gtsrb17() -> tuple[tuple[str, ...], Split, Split]:
    """The paper's subset of GTSRB: the 17 classes with the most training images, most first, numbered anew."""
    names, train, test = _gtsrb()
    kept = torch.bincount(train.labels, minlength=len(names)).argsort(descending=True, stable=True)[:17]
    number = torch.full((len(names),), -1)
    number[kept] = torch.arange(len(kept))
    parts = [split.take(number[split.labels] >= 0) for split in (train, test)]
    return tuple(names[index] for index in kept), *(replace(part, labels=number[part.labels]) for part in parts)


def _folder(place: str) -> tuple[tuple[str, ...], Split, Split]:
    """Anyone's images: ``train/<class>/*`` and ``test/<class>/*`` under a path, resized to 32x32 colour.

    A relative path is one in the data folder (`root`), so that a run's name does not depend on the machine. The classes
    are the folders' names, sorted; training and test have to have the same.
    """
    folder = root() / Path(place).expanduser()
    if not folder.is_dir():
        raise DataUnavailableError(f"dataset = '{FOLDER}{place}': there is no folder {folder}")
    classes = {part: sorted(path.name for path in folder.glob(f"{part}/*") if path.is_dir()) for part in PARTS}
    if len(classes["train"]) < 2 or classes["train"] != classes["test"]:
        raise KitError(
            f"{folder} has {len(classes['train'])} classes under train/ and {len(classes['test'])} under test/: "
            "use the same two or more folders of images in both"
        )
    splits = []
    for part in PARTS:
        files, labels = [], []
        for label, name in enumerate(classes[part]):
            found = sorted(path for path in (folder / part / name).iterdir() if path.suffix.lower() in IMAGES)
            if not found:
                raise KitError(f"{folder / part / name} has no image: use files that end in {', '.join(IMAGES)}")
            files += found
            labels += [label] * len(found)
        splits.append(Split(_cached_files(files), torch.tensor(labels)))
    return tuple(classes["train"]), *splits


READERS: dict[str, Callable[[], tuple[tuple[str, ...], Split, Split]]] = {
    "fashion_mnist": _fashion_mnist,
    "digits": _digits,
    "cifar10": _cifar10,
    "svhn": _svhn,
    "gtsrb": _gtsrb,
    "gtsrb17": _gtsrb17,
}


def _split(images: np.ndarray, labels: Sequence[int]) -> Split:
    """From (N, height, width, 3) pixels and labels."""
    return Split(torch.from_numpy(images).permute(0, 3, 1, 2).contiguous(), torch.tensor(labels, dtype=torch.int64))


def _read_image(file: Path) -> np.ndarray:
    """An image file as (32, 32, 3) pixels; its aspect is not kept, as with torchvision's ``Resize((32, 32))``."""
    from PIL import Image

    try:
        with Image.open(file) as image:
            return np.asarray(image.convert("RGB").resize((SIZE, SIZE), Image.Resampling.BILINEAR))
    except Exception as error:  # Pillow raises many kinds
        raise KitError(f"the image {file} cannot be read ({error}): repair or delete it") from None


def _cached_files(files: Sequence[Path]) -> Tensor:
    """(N, 3, 32, 32) uint8 of image files, read once per machine: kept under their names, sizes and times."""
    listing = [(str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns) for file in files]

    def read() -> Tensor:
        return torch.from_numpy(np.stack([_read_image(file) for file in files])).permute(0, 3, 1, 2).contiguous()

    return _cached(hashlib.sha256(repr(listing).encode()), (len(files), 3, SIZE, SIZE), read)


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
    key = hashlib.sha256(pixels.numpy().tobytes())
    return _cached(key, (len(pixels), 1, SIZE, SIZE), lambda: resize(pixels))


def _cached(key: Any, shape: tuple[int, ...], make: Callable[[], Tensor]) -> Tensor:
    """Images of a shape, uint8, kept in the user's cache under a hash, or made."""
    folder = disk.cache()
    path = folder / f"resized-{key.hexdigest()[:16]}.npy"
    with contextlib.suppress(Exception):  # absent, or damaged in whatever way: made again
        cached = np.load(path, allow_pickle=False)
        if cached.shape == shape and cached.dtype == np.uint8:
            return torch.from_numpy(cached)
    images = make()
    try:
        buffer = io.BytesIO()
        np.save(buffer, images.numpy())
        checkpoint.write_atomically(path, buffer.getvalue())
    except OSError as error:
        warnings.warn(
            f"the resized images cannot be kept in {folder} ({error}): the next start resizes again", stacklevel=2
        )
    return images
