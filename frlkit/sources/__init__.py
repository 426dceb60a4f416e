"""Where images come from: public data sets by name (`datasets`), anyone's folders (`folders`), decoded (`images`).

The core's `data` asks one question, `read`; the rest here is what a data set may be called and where it may lie.
"""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from frlkit import KitError
from frlkit.sources import folders, images
from frlkit.sources.datasets import READERS, DataUnavailableError, digits_split, root
from frlkit.sources.folders import Part
from frlkit.sources.splits import stratified_split, three

FOLDER = "folder:"


def read(
    name: str, share: float, size: int | None, channels: int | None, upright: bool
) -> tuple[tuple[str, ...], list[Part], Tensor, list[str], bool]:
    """Class names; training, validation and test part; all pixels, uint8, in that order; notes (`data.load`); and
    whether the validation part was drawn from the training images, and is not a folder's own."""
    check_name(name)
    if not 0 < share < 1:
        raise KitError(f"validation = {share!r}: use a share of the training images between 0 and 1, such as 0.1")
    if not (size is None or (type(size) is int and 8 <= size <= 1024)) or channels not in (None, 1, 3):
        raise KitError(f"size = {size!r}, channels = {channels!r}: use 8 to 1024 pixels and 1 or 3 channels, or None")
    source = folders.find(_place(name)) if name.startswith(FOLDER) else READERS[name]()
    if source.form and (channels not in (3, None) or upright):
        raise KitError(f"channels and upright are for {FOLDER}PATH: the images of {name} are as they are")
    parts = three(source, share, digits_split if name == "digits" else stratified_split)
    size, channels = (size or source.form[0], source.form[1]) if source.form else (size, channels)
    items = [item for part in parts for item in part.items]
    pixels, notes = images.read(items, size=size, channels=channels, upright=upright, keep=source.keep)
    notes = [] if source.form else source.notes + notes
    return source.class_names, parts, pixels, notes, "validation" not in source.parts


def check_name(name: str) -> str:
    """The name, where it is one of `READERS` or ``folder:PATH``; raises `KitError` for another."""
    if not isinstance(name, str) or (name not in READERS and not name.startswith(FOLDER)):
        raise KitError(f"dataset = {name!r} is unknown: use one of {', '.join(READERS)}, or {FOLDER}PATH")
    if not name.removeprefix(FOLDER).strip():
        raise KitError(f"dataset = {name!r} names no folder: use {FOLDER}PATH, with train/<class>/* and test/<class>/*")
    if not folders.printable(name):
        raise KitError(f"dataset = {name!r} has characters that no table can show: rename the folder, or link to it")
    return name


def _place(name: str) -> Path:
    """Where ``folder:PATH`` is."""
    try:
        path = root() / Path(name.removeprefix(FOLDER)).expanduser()
        there = path.is_dir() or (path.suffix == ".npz" and path.is_file())
    except (OSError, RuntimeError, ValueError) as error:  # no right to look, no such user, no such path
        raise KitError(
            f"dataset = {name!r} cannot be looked for ({images.first_line(error)}): use another path"
        ) from None
    if not there:
        raise DataUnavailableError(f"dataset = {name!r}: there is no folder {path}, or .npz file")
    return path
