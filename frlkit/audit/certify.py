"""Certified class by class: every image verified, falsified, or undecided; the truth lies between.

An attack finds images that are falsified, and so a lower bound of a class's robust error; CROWN verifies images, and
one less their share is the certified error, an upper bound that no attack can ever exceed. What plain CROWN leaves
undecided is taken up again with lines fitted to each bound (`steps`), then cut into pieces (`branch`, `seconds`).
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import pandas as pd
import torch
from pydantic import AfterValidator, Field, TypeAdapter
from torch import nn
from tqdm.auto import tqdm
from typing_extensions import NotRequired, TypedDict

from frlkit import KitError, checkpoint, disk, evaluation, records, watched
from frlkit.audit import branch, crown, ladder
from frlkit.data import Split
from frlkit.evaluation import Attack

VERIFIED, FALSIFIED, UNDECIDED = VERDICTS = ("verified", "falsified", "undecided")
CHUNK = 100  # images attacked at a time; a sample's random start depends on it
BATCH = 4  # images bounded at a time, between two writes of the progress


class _Record(TypedDict):
    __pydantic_config__ = records.OPEN
    labels: Annotated[list[Annotated[int, Field(ge=0, le=10**6)]], Field(min_length=1)]
    verdicts: list[Literal[VERDICTS] | None]  # type: ignore[valid-type]
    margins: list[float | None]
    steps: list[Annotated[int, Field(ge=0)] | None]
    seconds: Annotated[float, Field(ge=0)]
    limits: NotRequired[list[Annotated[float, Field(ge=0)]]]  # seconds of cutting tried on each image


def _agrees(record: dict[str, Any]) -> dict[str, Any]:
    """As many images everywhere, and each verdict the one that its margin says."""
    if len({len(record[key]) for key in ("labels", "verdicts", "margins", "steps", "limits") if key in record}) > 1:
        raise ValueError("its lists do not have as many images each")
    for verdict, margin, steps in zip(record["verdicts"], record["margins"], record["steps"], strict=True):
        said = FALSIFIED if margin is None else VERIFIED if margin > 0 else UNDECIDED
        if (verdict or FALSIFIED) != said or (margin is not None and steps is None):
            raise ValueError(f"a margin of {margin} after {steps} steps is called {verdict}")
    return record


_RECORD: TypeAdapter[Any] = TypeAdapter(Annotated[_Record, AfterValidator(_agrees)])


def read(path: Path) -> dict[str, Any]:
    """Read a certification; raises `KitError` where it is missing, no JSON, or contradicts itself."""
    return records.read_as(path, _RECORD, "certification")


def first(split: Split, images: int | None, balanced: bool = False) -> Split:
    """The first so many images of a split, or all; raises `KitError` where there are fewer.

    `balanced`: the first of every class, equally many of each, class by class (`ladder.subset`), of all as many as the
    smallest class has.
    """
    if balanced:
        classes = split.classes or int(split.labels.max()) + 1
        least = int(split.labels.bincount(minlength=classes).min())
        return ladder.subset(split, classes * least if images is None else images, classes)
    if images is not None and not 1 <= images <= len(split):
        raise KitError(f"images = {images} is not allowed: use 1 to {len(split)}, so many does this split have")
    return Split(split.images[:images], split.labels[:images], classes=split.classes)


def certify(
    model: nn.Module, split: Split, eps_255: float, *, steps: int = 0, seconds: float = 0.0, path: Path | None = None
) -> dict[str, Any]:
    """Decide every image of a split, as far as the effort goes; kept at `path`, image by image, and gone on with.

    Parameters
    ----------
    model : a LeNet-5 or plain CNN of `frlkit.models`
    split : images and labels
    eps_255 : radius in 1/255
    steps : rounds of fitting the lines to each bound, on images that plain CROWN leaves undecided
    seconds : time for cutting each image that is then still undecided into pieces, from when its first bounds stand
    path : JSON; where it holds the same weights, images and radius, only what less effort left undecided is done

    Returns
    -------
    dict
        Plain data: ``verdicts``, one of `VERDICTS` an image; ``margins``, the best lower bound of each image's smallest
        margin, None where it was falsified; ``steps`` tried on it, and ``limits``, seconds of cutting; ``seconds`` that
        the bounds took, all images together; ``labels``; hashes of weights and images; ``attack``.

    Raises
    ------
    KitError
        A value out of range, a network that is not supported, or a file of other weights, images or radius.
    """
    if isinstance(steps, bool) or not isinstance(steps, int) or not 0 <= steps <= 10**4:
        raise KitError(f"steps = {steps!r}: use a whole number from 0 to 10000")
    if isinstance(seconds, bool) or not isinstance(seconds, (int, float)) or not 0 <= seconds <= 86400:
        raise KitError(f"seconds = {seconds!r}: use a number from 0 to 86400, so many for each undecided image")
    if not len(split):
        raise KitError("the split has no images: there is nothing to certify")
    check(model, split)
    with evaluation.number_format("float32", split.labels.device):  # what is certified is the float32 network
        return _certify(model, split, _begin(model, split, ladder.strong(eps_255), path), steps, seconds, path)


def _certify(
    model: nn.Module, split: Split, record: dict[str, Any], steps: int, seconds: float, path: Path | None
) -> dict[str, Any]:
    eps_255 = record["attack"]["eps_255"]
    left = [number for number in range(len(split)) if _is_open(record, number, steps, seconds)]
    with tqdm(total=len(left), desc=f"certify at {eps_255:g}/255", unit="img", disable=not watched()) as bar:
        for start in range(0, len(split), CHUNK):
            rows = [number for number in left if start <= number < start + CHUNK]
            if any(record["verdicts"][number] is None for number in rows):
                _falsify(model, split, record, start)
            alive = [number for number in rows if record["verdicts"][number] != FALSIFIED]
            bar.update(len(rows) - len(alive))
            for first in range(0, len(alive), BATCH):
                batch = alive[first : first + BATCH]
                _verify(model, split, record, batch, steps)
                _keep(record, path)
                for number in batch:
                    if _is_open(record, number, 0, seconds):
                        _cut(model, split, record, number, seconds)
                        _keep(record, path)
                bar.update(len(batch))
    if left:
        _keep(record, path)
    return record


def check(model: nn.Module, split: Split) -> None:
    """Refuse, before any work, a model that cannot be certified: `KitError` says why."""
    crown.network(model, split.batch(slice(0, 1))[0])


def _keep(record: dict[str, Any], path: Path | None) -> None:
    if path is not None:
        checkpoint.write_json(path, record)


def _begin(model: nn.Module, split: Split, attack: Attack, path: Path | None) -> dict[str, Any]:
    """The record at `path`, or a new one; refuses another run's."""
    about = {**ladder.fingerprints(model, split), "attack": asdict(attack)}
    if path is not None and disk.exists(path):
        record = read(path)
        checkpoint.refuse_other(path, {key: record.get(key) for key in about}, about)
        if record["labels"] != split.labels.tolist():
            raise KitError(f"{path} cannot be gone on with: its labels are not those of its images; delete it")
        return record
    progress = {**{key: [None] * len(split) for key in ("verdicts", "margins", "steps")}, "seconds": 0.0}
    return {**about, "labels": split.labels.tolist(), **progress, "versions": records.versions()}


def _is_open(record: dict[str, Any], number: int, steps: int, seconds: float = 0.0) -> bool:
    verdict = record["verdicts"][number]
    tried = record["limits"][number] if "limits" in record else 0.0
    return verdict is None or (verdict == UNDECIDED and (record["steps"][number] < steps or tried < seconds))


def _falsify(model: nn.Module, split: Split, record: dict[str, Any], start: int) -> None:
    """Attack the images of one chunk that have no verdict yet; those wrong without any attack are falsified too."""
    x, y = split.batch(slice(start, start + CHUNK))
    attacked = evaluation.attacked(model, x, y, Attack(**record["attack"]), start)
    fooled = (evaluation.predict(model, x) != y) | (evaluation.predict(model, attacked) != y)
    for number, is_fooled in enumerate(fooled.tolist(), start):
        if is_fooled and record["verdicts"][number] is None:
            record["verdicts"][number] = FALSIFIED


def _verify(model: nn.Module, split: Split, record: dict[str, Any], rows: Sequence[int], steps: int) -> None:
    """Bound the margins of a few images, the lines tilted where plain CROWN is not enough."""
    for effort in (0, steps) if steps else (0,):
        left = [number for number in rows if _is_open(record, number, effort)]
        if not left:
            continue
        began = time.perf_counter()
        x, y = split.batch(torch.tensor(left, device=split.labels.device))
        bounds = crown.margins(model, x, y, record["attack"]["eps_255"] / 255, effort).amin(1)
        for number, margin in zip(left, bounds.tolist(), strict=True):
            kept = record["margins"][number]  # by cutting, it may be the better one
            margin = margin if kept is None else max(margin, kept)
            record["verdicts"][number] = VERIFIED if margin > 0 else UNDECIDED
            record["margins"][number], record["steps"][number] = margin, effort
        record["seconds"] += time.perf_counter() - began


def _cut(model: nn.Module, split: Split, record: dict[str, Any], number: int, seconds: float) -> None:
    """Branch and bound on one image."""
    began = time.perf_counter()
    x, y = split.batch(slice(number, number + 1))
    margin, is_fooled = branch.decide(model, x, y, record["attack"]["eps_255"] / 255, seconds)
    margin = max(margin, record["margins"][number])
    record["verdicts"][number] = FALSIFIED if is_fooled else VERIFIED if margin > 0 else UNDECIDED
    record["margins"][number] = None if is_fooled else margin
    record.setdefault("limits", [0.0] * len(split))[number] = float(seconds)
    record["seconds"] += time.perf_counter() - began


def bracket(
    model: nn.Module, split: Split, eps_255: float, *, steps: int = 0, seconds: float = 0.0, path: Path | None = None
) -> dict[str, Any]:
    """What an audit keeps of `certify`: ``eps_255``, ``images``, and by class the shares of each of `VERDICTS`.

    For a network that is not supported, {"not_supported": why}. Raises `KitError` where a class has no image.
    """
    try:
        check(model, split)
    except KitError as error:
        return {"not_supported": str(error)}
    record = certify(model, split, eps_255, steps=steps, seconds=seconds, path=path)
    labels, verdicts = np.array(record["labels"]), np.array(record["verdicts"])
    counts = np.bincount(labels, minlength=split.classes or 0)
    if (counts == 0).any():
        raise KitError(f"class {int(counts.argmin())} has no image in this split: nothing is certified there")
    shares = {name: (np.bincount(labels, verdicts == name, len(counts)) / counts).tolist() for name in VERDICTS}
    return {"eps_255": float(eps_255), "images": len(split), **shares}


def summary(record: dict[str, Any], class_names: Sequence[str]) -> pd.DataFrame:
    """Images of each class, and in % (NaN where it has none): verified, falsified, undecided; last of all images.

    The robust error lies between falsified and 100 % less verified. Raises `KitError` where the record is unfinished.
    """
    if None in record["verdicts"]:
        raise KitError("the certification is unfinished: run the same again, it goes on from there")
    frame = pd.crosstab(np.array(record["labels"]), np.array(record["verdicts"]))
    frame = frame.reindex(columns=VERDICTS, index=range(len(class_names)), fill_value=0)
    frame.columns.name = None
    frame.index = list(class_names)
    frame = pd.concat([frame, frame.sum().to_frame("all").T])  # a class may be called so too
    images = frame.sum(axis=1)
    shares = (100 * frame.div(images, axis=0)).round(1)
    shares.insert(0, "images", images)
    return shares
