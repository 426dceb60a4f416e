"""Images as resident tensors: decoded, scaled to 8 bits, resized, kept in one memory-mapped file (`read`).

The file lies in the user's cache under the hash of the bytes that the images were made from, so no other image can be
taken for them. What was scaled, resized or dropped on the way is said in notes. Where images lie: `folders`.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import itertools
import json
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from frlkit import KitError, checkpoint, disk, values

GREY = ("1", "L", "LA", "La", "I", "F", "I;16", "I;16B", "I;16L", "I;16N")  # Pillow's modes
DEEP = ("I", "F", "I;16", "I;16B", "I;16L", "I;16N")  # of more than 8 bits
LARGEST = 224  # pixels, the side of a data set of larger images unless asked for otherwise
LISTED = 100  # names, at most, in a message


@dataclass(frozen=True, slots=True)
class Item:
    """One image: its name in messages, and its content: an image file's bytes or pixels (height, width[, channels])."""

    name: str
    content: Callable[[], bytes | np.ndarray]


def read(
    items: Sequence[Item], *, size: int | None, channels: int | None, upright: bool = False, keep: bool = True
) -> tuple[Tensor, list[str]]:
    """Images (N, channels, size, size) as uint8, and notes on what was done to them; kept in the cache if `keep`.

    The aspect is not kept, as with torchvision's ``Resize((size, size))``. `size` None is the smallest side of any, up
    to `LARGEST`; `channels` None is 1 where all are grey, else 3. EXIF's orientation counts if `upright`, which
    torchvision ignores. Deep images (16 bits, floats) are scaled by `_range`, one range for all; no transparency.
    Raises `KitError` that lists all images that cannot be read.
    """
    make = partial(_make, items, size, channels, upright)
    if not keep:
        return _in_memory(make)
    key = hashlib.sha256(repr((1, len(items), size, channels, upright)).encode())  # 1: of this module's way of reading
    for item in items:
        with contextlib.suppress(Exception):  # it is listed with the others that cannot be read
            content = item.content()
            shape = (content.shape, content.dtype) if isinstance(content, np.ndarray) else len(content or b"")
            key.update(f"{shape}".encode() + (content.tobytes() if isinstance(content, np.ndarray) else content or b""))
    return _cached(key.hexdigest(), make)


Made = tuple[tuple[int, ...], Iterator[bytes], list[str]]  # a shape, its pixels image by image, notes


@dataclass
class _Survey:
    """What all images together have: sides (width, height), colour, ranges of deep ones, remarks, unreadable ones."""

    sides: set[tuple[int, int]] = field(default_factory=set)
    grey: bool = True
    ends: dict[str, set[float]] = field(default_factory=dict)  # extreme values of deep ones, "whole" or "float"
    remarks: Counter[str] = field(default_factory=Counter)
    unreadable: dict[str, str] = field(default_factory=dict)

    def add(self, picture: Any) -> None:
        """Look at one image as `_open` returns it."""
        if deep := isinstance(picture, np.ndarray):
            self.ends.setdefault(_number(picture), set()).update((picture.min().item(), picture.max().item()))
        self.sides.add(picture.shape[1::-1] if deep else picture.size)
        self.grey &= picture.ndim == 2 if deep else picture.mode in GREY
        self.remarks["of more than 8 bits, scaled by their range"] += deep
        if not deep:
            self.remarks["turned in their EXIF data (upright=True turns them)"] += _turned(picture)
            self.remarks["of several frames, of which the first counts"] += getattr(picture, "is_animated", False)
            self.remarks["transparent, which does not count"] += picture.has_transparency_data


def _make(items: Sequence[Item], size: int | None, channels: int | None, upright: bool) -> Made:
    """Look at every image and choose size, channels and ranges; the pixels come when they are asked for."""
    survey = _Survey()
    for item in items:
        try:
            survey.add(_open(item, upright))
        except Exception as error:  # Pillow raises many kinds
            survey.unreadable[item.name] = first_line(error)
    if not survey.sides:
        raise _cannot_be_read(survey.unreadable)
    channels = channels or (1 if survey.grey else 3)
    size = size or min(LARGEST, min(map(min, survey.sides)))
    spans = {number: _range(number, min(ends), max(ends)) for number, ends in survey.ends.items()}
    notes = [
        f"{count} image{'s are' if count > 1 else ' is'} {what}" for what, count in survey.remarks.items() if count
    ]
    notes += [f"values from {low:g} to {high:g} become 0 to 255" for low, high in spans.values()]
    if channels == 1 and not survey.grey:
        notes.append("colour images become grey")
    if survey.sides != {(size, size)}:
        least, most = (f"{w}x{h}" for w, h in (min(survey.sides), max(survey.sides)))
        notes.append(f"images of {least}{f' to {most}' if least != most else ''} pixels become {size}x{size}")

    def pixels() -> Iterator[bytes]:
        for item in items:
            try:
                image = _decode(_open(item, upright), size, channels, spans)
            except Exception as error:
                survey.unreadable[item.name] = first_line(error)
            else:
                yield image.tobytes()
        if survey.unreadable:
            raise _cannot_be_read(survey.unreadable)

    return (len(items), channels, size, size), pixels(), notes


def _open(item: Item, upright: bool) -> Any:
    """A Pillow image of 8 bits, not yet decoded, or the pixels (height, width[, channels]) of a deep one."""
    from PIL import Image, ImageOps

    content = item.content()
    if isinstance(content, np.ndarray):
        pixels = content[..., 0] if content.ndim == 3 and content.shape[2] == 1 else content
        if pixels.dtype in (bool, np.uint8):
            return Image.fromarray(pixels if pixels.dtype == np.uint8 else pixels * np.uint8(255))
    else:
        if not content:
            raise ValueError("it is empty")
        image = Image.open(io.BytesIO(content))
        if upright and _turned(image):
            image = ImageOps.exif_transpose(image)
        if image.mode not in DEEP:
            return image
        pixels = np.asarray(image)
    if pixels.dtype.kind not in "iuf":
        raise ValueError(f"its pixels are {pixels.dtype}")
    if not np.isfinite(pixels).all():
        raise ValueError("it holds NaN or infinity")
    return pixels


def _turned(image: Any) -> bool:
    """Whether EXIF says that the image is to be turned or mirrored; Pillow would decode a whole PNG to find none."""
    return (image.format != "PNG" or "exif" in image.info) and image.getexif().get(274, 1) != 1  # 274: orientation


def _decode(picture: Any, size: int, channels: int, spans: dict[str, tuple[float, float]]) -> np.ndarray:
    """Pixels (channels, size, size), uint8, of an image as `_open` returns it."""
    from PIL import Image

    if isinstance(picture, np.ndarray):
        low, high = spans[_number(picture)]
        picture = Image.fromarray(np.round((picture.astype(float) - low) * (255 / (high - low))).astype(np.uint8))
    if picture.mode == "P":
        picture = picture.convert("RGBA")  # straight to RGB, Pillow warns of a transparent palette
    picture = picture.convert("L" if channels == 1 else "RGB")
    if picture.size != (size, size):
        picture = picture.resize((size, size), Image.Resampling.BILINEAR)
    return np.asarray(picture).reshape(size, size, channels).transpose(2, 0, 1)


def _number(pixels: np.ndarray) -> str:
    return "float" if pixels.dtype.kind == "f" else "whole"


def _range(number: str, low: float, high: float) -> tuple[float, float]:
    """The values that become black and white: of deep images, those that their kind can have.

    Whole numbers from 0 to the next power of two (4095 of 12 bits); floats 0 to 1, -1 to 1 or 0 to 255, the first that
    holds them all; anything else from the lowest to the highest value.
    """
    usual = [(0, 1), (-1, 1), (0, 255)] if number == "float" else [(0, 2 ** max(1, int(high).bit_length()) - 1)]
    fitting = [ends for ends in usual if ends[0] <= low and high <= ends[1]]
    return fitting[0] if fitting else (low, max(high, low + 1))


def _cannot_be_read(failed: dict[str, str]) -> KitError:
    names = listed((f"{name} ({reason})" for name, reason in failed.items()), quoted=False)
    return KitError(f"{len(failed)} image{'s' * (len(failed) > 1)} cannot be read: {names}: repair or delete them")


def first_line(error: Exception) -> str:
    from PIL import UnidentifiedImageError

    if isinstance(error, UnidentifiedImageError):
        return "no image"  # Pillow's own words name a buffer
    return values.first_line(error)


def listed(names: Iterable[Any], most: int = LISTED, *, quoted: bool = True) -> str:
    """Names as a list in a sentence, not more than so many."""
    said = [repr(name) if quoted else str(name) for name in names]
    return ", ".join(said[:most]) + (f" and {len(said) - most} more" if len(said) > most else "")


def _cached(key: str, make: Callable[[], Made]) -> tuple[Tensor, list[str]]:
    """What `make` makes, kept in the user's cache under a hash and mapped into memory."""
    path = (folder := disk.cache()) / f"images-{key[:32]}.npy"
    with contextlib.suppress(Exception):  # absent, or damaged in whatever way: made again
        return _mapped(path)
    try:
        checkpoint.write_atomically(path, _file(*make()))
        return _mapped(path)
    except OSError as error:
        warnings.warn(f"images cannot be kept in {folder} ({error}): the next start reads them again", stacklevel=2)
    return _in_memory(make)


def _file(shape: tuple[int, ...], pixels: Iterator[bytes], notes: list[str]) -> Iterator[bytes]:
    """An .npy file, followed by notes and a hash of what stands before them."""
    head, total = io.BytesIO(), hashlib.sha256()
    np.lib.format.write_array_header_1_0(head, {"descr": "|u1", "fortran_order": False, "shape": shape})
    for block in itertools.chain([head.getvalue()], pixels):
        total.update(block)
        yield block
    yield json.dumps({"notes": notes, "sha256": total.hexdigest()}).encode()


def _mapped(path: Path) -> tuple[Tensor, list[str]]:
    """The images and notes of a file of `_file`; raises some exception where a byte of it has changed."""
    array = np.load(path, mmap_mode="c", allow_pickle=False)
    length, total = array.offset + array.nbytes, hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(min(1 << 20, length - file.tell())):
            total.update(block)
        said = json.loads(file.read())
    if said["sha256"] != total.hexdigest():
        raise ValueError("damaged")
    return torch.from_numpy(array), said["notes"]


def _in_memory(make: Callable[[], Made]) -> tuple[Tensor, list[str]]:
    shape, pixels, notes = make()
    images = torch.empty(shape, dtype=torch.uint8)
    for place, image in zip(images.numpy().reshape(shape[0], -1), pixels, strict=True):  # to the end: see `_make`
        place[:] = np.frombuffer(image, np.uint8)
    return images, notes
