"""Where people's images lie: folders of files, arrays in an ``.npz``, Hugging Face data sets saved on disk (`find`).

All become lists of `images.Item` with labels. Nothing is left out without a note that says what was and where.
"""

from __future__ import annotations

import json
import os
import unicodedata
from collections import Counter
from collections.abc import Container
from dataclasses import dataclass, field
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from frlkit import KitError
from frlkit.sources.images import Item, first_line, listed
from frlkit.values import plain

PARTS = {"train": ("train", "training"), "validation": ("val", "valid", "validation"), "test": ("test", "testing")}
PART_OF = {alias: part for part, aliases in PARTS.items() for alias in aliases}
LAYOUT = "use train/<class>/*, test/<class>/* and, if you like, val/<class>/*"
ARRAYS = "use arrays x_train, y_train, x_test, y_test and, if you like, x_val, y_val and class_names, none of objects"
SYSTEM = ("__macosx", "thumbs.db", "desktop.ini")  # what systems leave behind, beside hidden files
NO_PICTURES = ("BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF")  # Pillow knows these formats and cannot decode them alone


@dataclass
class Part:
    """Images not yet read, and their labels (N,); `groups` as in `data.Split`."""

    items: list[Item]
    labels: Tensor
    groups: Tensor | None = None

    def take(self, index: Tensor) -> Part:
        """The samples of an index."""
        groups = None if self.groups is None else self.groups[index]
        return Part([self.items[number] for number in index.tolist()], self.labels[index], groups)


@dataclass
class Source:
    """Class names in label order; "train", "test" and perhaps "validation"; notes on what was skipped.

    A public data set has a `form`, (side in pixels, channels), and may be quicker to read than to `keep` in the cache.
    """

    class_names: tuple[str, ...] = ()
    parts: dict[str, Part] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    form: tuple[int, int] | None = None
    keep: bool = True


def of_arrays(name: str, pixels: np.ndarray, labels: Any) -> Part:
    """A part of pixels (N, height, width[, channels]) and labels (N,)."""
    items = [Item(f"{name}[{number}]", partial(pixels.__getitem__, number)) for number in range(len(pixels))]
    return Part(items, torch.as_tensor(labels, dtype=torch.int64))


def find(place: Path) -> Source:
    """The images at a place: a folder (`LAYOUT`; any nesting), a saved Hugging Face ``DatasetDict``, or an ``.npz``.

    Raises `KitError` where there is no such layout, and for class names that no table could show.
    """
    reader = _arrays if place.suffix == ".npz" else _arrow if (place / "dataset_dict.json").exists() else _folders
    layout = ARRAYS if reader is _arrays else LAYOUT
    try:
        source = reader(place)
    except KitError:
        raise
    except Exception as error:  # whatever a stranger's file makes its reader raise
        raise KitError(f"{place} cannot be read ({first_line(error)}): repair it, or {layout}") from None
    if missing := [part for part in ("train", "test") if part not in source.parts]:
        hint = " (or rename val to test: validation images are then drawn from train)" * ("validation" in source.parts)
        if reader is _arrow or (place / "state.json").exists() or next(place.rglob("*.parquet"), None):
            hint = " (of the library datasets, what save_to_disk of a DatasetDict with train and test wrote)"
        raise KitError(f"{place} has no images to {' and no images to '.join(missing)}: {layout}{hint}")
    if len(source.class_names) < 2:
        raise KitError(f"{place} has {len(source.class_names)} classes: two or more are needed; {layout}")
    shown = Counter(map(_shown, source.class_names))
    for name in source.class_names:
        if shown[_shown(name)] > 1 or not _shown(name) or not printable(name):
            raise KitError(f"{place} has a class {name!r} that no table can show: rename it (and use each name once)")
    return source


def _shown(name: str) -> str:
    """What a reader sees of a name: one form of each character, single spaces, nothing invisible."""
    return plain("".join(c for c in unicodedata.normalize("NFC", name) if unicodedata.category(c) != "Cf"))


def printable(name: str) -> bool:
    """Whether a name fits into one line: no control characters, line ends, halves of characters, reversed direction."""
    reversing = "\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"
    return not any(unicodedata.category(c) in ("Cc", "Cs", "Zl", "Zp") or c in reversing for c in name)


def _folders(place: Path) -> Source:
    """``train/<class>/*`` and so on; the classes are the folders' names, sorted."""
    skipped: Counter[tuple[str, Path]] = Counter()
    parts: dict[str, dict[str, list[Item]]] = {}
    folders, others = _entries(place, skipped)
    for folder in folders:
        if (part := PART_OF.get(folder.name.lower())) is None:
            skipped["folders", place] += 1
            continue
        _once(place, part, parts)
        classes, loose = _entries(folder, skipped)
        above = (place.resolve(), folder.resolve())
        found = {one.name: _images(one, skipped, above) for one in classes}
        sheets = [file for file in loose if file.name.endswith("_annotations.txt")]
        if sheets and len(found) == 1:
            found, loose = _by_sheet(sheets[0], *found.values(), skipped), [f for f in loose if f != sheets[0]]
        others += loose
        parts[part] = {name: [Item(str(f), f.read_bytes) for f in files] for name, files in found.items()}
    if "validation" in parts and [*parts.get("test", ())] == ["images"]:
        skipped["test images without labels (so val is the test)", place / "test"] += len(parts["test"]["images"])
        parts["test"] = parts.pop("validation")
    skipped.update((_kind(file), file.parent) for file in others)
    for part, classes in parts.items():
        _same_classes(place, part, sorted(classes), sorted(parts.get("train", classes)))
        if empty := [name for name, items in classes.items() if not items]:
            there = "".join(f", but {kind}" for kind in sorted({kind for kind, at in skipped if at.name in empty}))
            raise KitError(
                f"{place}: no image to {part} in {listed(empty)}{there}: add images (.png, .jpg, …), or remove it"
            )
    names = sorted(parts.get("train", ()))
    source = Source(tuple(names))
    for part, classes in parts.items():
        pairs = [(item, label) for label, name in enumerate(names) for item in classes[name]]
        source.parts[part] = Part([item for item, _ in pairs], torch.tensor([label for _, label in pairs]))
    said = []
    for kind, count in Counter(kind for kind, _ in skipped.elements()).items():
        where = listed(sorted(str(folder.relative_to(place)) for what, folder in skipped if what == kind), 3)
        said.append(f"{kind}: {count} (in {where})")
    if said:
        source.notes.append(f"skipped {'; '.join(said)}")
    return source


def _by_sheet(sheet: Path, files: list[Path], skipped: Counter[tuple[str, Path]]) -> dict[str, list[Path]]:
    """A part's images by class where a table says it, FILE, tab, CLASS, as beside Tiny ImageNet's val/images."""
    rows = [line.split("\t") for line in sheet.read_text(encoding="utf-8").splitlines()]
    class_of = {row[0]: row[1] for row in rows if len(row) > 1}
    if without := [file.name for file in files if file.name not in class_of]:
        raise KitError(f"{sheet} says no class of {listed(without, 3)}: add a line for each, FILE, tab, CLASS")
    skipped["lines of images that are not there", sheet.parent] += len(class_of) - len(files)
    found: dict[str, list[Path]] = {}
    for file in files:
        found.setdefault(class_of[file.name], []).append(file)
    return found


def _once(place: Path, part: str, found: Container[str]) -> None:
    """Refuse a second part of the same kind, such as val/ beside valid/."""
    if part in found:
        raise KitError(f"{place} has images to {part} twice ({', '.join(PARTS[part])}): keep one of them")


def _entries(folder: Path, skipped: Counter[tuple[str, Path]]) -> tuple[list[Path], list[Path]]:
    """A folder's folders and files, sorted, without those that are hidden or that systems leave behind."""
    found: tuple[list[Path], list[Path]] = ([], [])
    with os.scandir(folder) as entries:
        for entry in sorted(entries, key=lambda entry: entry.name):
            if entry.name.startswith(".") or entry.name.lower() in SYSTEM:
                skipped["hidden or system entries", folder] += 1
            else:
                found[not entry.is_dir()].append(folder / entry.name)
    return found


def _images(folder: Path, skipped: Counter[tuple[str, Path]], above: tuple[Path, ...]) -> list[Path]:
    """All image files under a class's folder, itself under some others."""
    above = (*above, folder.resolve())
    folders, files = _entries(folder, skipped)
    found = [file for file in files if file.suffix.lower() in _suffixes()]
    skipped.update((_kind(file), folder) for file in files if file.suffix.lower() not in _suffixes())
    for inner in folders:
        if inner.resolve() in above:
            skipped["links to a folder above", folder] += 1
        else:
            found += _images(inner, skipped, above)
    return found


@lru_cache
def _suffixes() -> frozenset[str]:
    """Of every image file that Pillow reads."""
    from PIL import Image

    known = Image.registered_extensions()  # reads in all of Pillow's formats
    return frozenset(end for end, kind in known.items() if kind in Image.OPEN and kind not in NO_PICTURES)


def _kind(file: Path) -> str:
    return f"{file.suffix.lower()} files" if file.suffix else "files without extension"


def _same_classes(place: Path, part: str, classes: list[str], expected: list[str]) -> None:
    """Refuse a part whose classes are not training's, and name those that differ."""
    only = {"train": sorted({*expected} - {*classes}), part: sorted({*classes} - {*expected})}
    if any(only.values()):
        alike = [{unicodedata.normalize("NFKC", name).casefold() for name in names} for names in only.values()]
        said = " and ".join(f"{listed(names)} only to {what}" for what, names in only.items() if names)
        hint = " (the same but for capitals or accents' coding)" if set.intersection(*alike) else ""
        raise KitError(f"{place} has the classes {said}{hint}: use the same names in every part")


def _arrays(place: Path) -> Source:
    """The arrays of an ``.npz``; without class_names the classes are the different labels."""
    with np.load(place, allow_pickle=False) as file:
        arrays = {key.lower(): file[key] for key in file.files}
    there = listed(arrays)
    parts, names = {}, arrays.pop("class_names", None)
    for alias, part in PART_OF.items():
        for x, y in ((f"x_{alias}", f"y_{alias}"), (f"{alias}_images", f"{alias}_labels")):
            if x in arrays and y in arrays:
                _once(place, part, parts)
                parts[part] = (x, arrays.pop(x), arrays.pop(y).reshape(-1))
    if "train" not in parts:
        raise KitError(f"{place} has no images to train among its arrays ({there}): {ARRAYS}")
    values = np.unique(parts["train"][2]) if names is None else np.arange(len(names))
    source = Source(tuple(map(str, values if names is None else names)))
    for part, (key, pixels, labels) in parts.items():
        coloured = pixels.ndim == 4 and not {pixels.shape[1], pixels.shape[3]}.isdisjoint((1, 3, 4))
        if len(labels) != len(pixels) or not (pixels.ndim == 3 or coloured) or not np.isin(labels, values).all():
            raise KitError(
                f"{place}: {key} {pixels.shape} and its {len(labels)} labels do not fit: use (N, height, width), or 1, "
                "3 or 4 channels behind or before those, a label for each (not one-hot), and none that training has not"
            )
        if pixels.ndim == 4 and pixels.shape[3] not in (1, 3, 4):
            pixels = pixels.transpose(0, 2, 3, 1)  # channels first, as torch has them
        if pixels.dtype == np.uint8 and pixels.max(initial=0) < 2:
            pixels = pixels.astype(bool)  # of 0 and 1, not all but black
        source.parts[part] = of_arrays(key, pixels, np.searchsorted(values, labels))
    if arrays:
        source.notes.append(f"skipped the arrays {listed(arrays)}")
    return source


def _arrow(place: Path) -> Source:
    """A ``datasets.DatasetDict`` as its ``save_to_disk`` writes it: a column of images, one of class labels."""
    try:
        import pyarrow as pa
    except ImportError:
        raise KitError(f"{place} is a Hugging Face data set: reading it needs pyarrow (pip install pyarrow)") from None
    source = Source()
    for split in json.loads((place / "dataset_dict.json").read_text(encoding="utf-8"))["splits"]:
        if (part := PART_OF.get(split.lower())) is None:
            source.notes.append(f"skipped the split {split!r}")
            continue
        _once(place, part, source.parts)
        files = (place / split / f"{name}.json" for name in ("dataset_info", "state"))
        info, state = (json.loads(file.read_text(encoding="utf-8")) for file in files)
        kinds = {key: v.get("_type") for key, v in info["features"].items() if isinstance(v, dict)}  # else a list
        of = {kind: [column for column in kinds if kinds[column] == kind] for kind in ("Image", "ClassLabel")}
        if [*map(len, of.values())] != [1, 1]:
            said = " and ".join(f"{listed(names) or 'none'} of {kind}" for kind, names in of.items())
            raise KitError(
                f"{place} has the columns {said} in {split!r}: it needs one column of images and one of class labels "
                "(class_encode_column makes one, remove_columns leaves others out)"
            )
        (image,), (label,) = of.values()
        shards = [str(place / split / Path(entry["filename"]).name) for entry in state["_data_files"]]
        table = pa.concat_tables([pa.ipc.open_stream(pa.memory_map(file)).read_all() for file in shards])
        names, labels = tuple(info["features"][label]["names"]), table.column(label).to_pylist()
        if source.class_names not in ((), names):
            _same_classes(place, split, list(names), list(source.class_names))
            raise KitError(f"{place} numbers its classes differently in {split!r}: save its splits together")
        if strange := {number for number in labels if number is None or not 0 <= number < len(names)}:
            raise KitError(
                f"{place} has labels {listed(strange)} in {split!r}, of {len(names)} classes: label or drop them"
            )
        read = partial(lambda cells, number: (cells[number].as_py() or {}).get("bytes"), table.column(image))
        items = [Item(f"{split}[{number}]", partial(read, number)) for number in range(len(labels))]
        source.class_names, source.parts[part] = names, Part(items, torch.tensor(labels))
    return source
