"""A ladder of ever stronger attacks on the same images: clean, PGD-20, PGD-50 with restarts, AutoAttack.

As in RobustBench, an image that one rung fools is not attacked again, so errors only grow down the ladder. Beneath the
last attack lies the certified error (`certify`), which no attack can exceed. Progress is kept image by image: an
interrupted ladder goes on where it stood.
"""

from __future__ import annotations

import contextlib
import warnings
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from pydantic import AfterValidator, Field, TypeAdapter
from torch import Tensor, nn
from tqdm.auto import tqdm
from typing_extensions import NotRequired, TypedDict

from frlkit import KitError, checkpoint, disk, evaluation, kernels, records, watched
from frlkit.attacks import evaluating, logits
from frlkit.audit import crown
from frlkit.data import Split
from frlkit.evaluation import Attack

CLEAN, AUTOATTACK, CERTIFIED = "clean", "AutoAttack (standard)", "certified"
CHUNK = 100  # images between two writes of the progress
BOUNDED = 4  # and when they are bounded


def _whole(record: dict[str, Any]) -> dict[str, Any]:
    """Labels are those of a `subset`, and every image fell at a rung, at none, or is not yet attacked."""
    labels, fell, rungs = (record[key] for key in ("labels", "fell", "rungs"))
    classes = labels[-1] + 1
    each = len(labels) // classes
    if not each or labels != [label for label in range(classes) for _ in range(each)]:
        raise KitError("labels are not class by class, equally many of each: take the images by `ladder.subset`")
    if len(fell) != len(labels) or not all(-1 <= number <= len(rungs) for number in fell):
        raise KitError(f"fell is not one number from -1 to {len(rungs)} for each of {len(labels)} images")
    verified = record.get("verified", [None] * len(fell))
    standing = [place == len(rungs) for place in fell]
    if len(verified) != len(fell) or any(sure and not up for sure, up in zip(verified, standing, strict=True)):
        raise KitError("verified is not one verdict an image, true only where no rung fooled the model")
    return record


class _Ladder(TypedDict):
    __pydantic_config__ = records.OPEN
    weights_sha256: str
    images_sha256: str
    eps_255: Annotated[float, Field(ge=0, le=255)]
    rungs: Annotated[list[str], Field(min_length=1)]
    labels: Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)]
    fell: list[int]
    verified: NotRequired[list[bool | None]]
    not_supported: NotRequired[str]


_SCHEMA: TypeAdapter[Any] = TypeAdapter(Annotated[_Ladder, AfterValidator(_whole)])


def read(path: Path) -> dict[str, Any]:
    """Read a ladder's record; raises `KitError` where it is missing, no JSON, or not what such a record is."""
    return records.read_as(path, _SCHEMA, "ladder")


def rungs(eps_255: float) -> dict[str, Attack | None]:
    """The attacks by name, weakest first; None where there is no `Attack` to describe them."""
    weak, hard = Attack(eps_255), strong(eps_255)
    return {CLEAN: None, str(weak): weak, str(hard): hard, AUTOATTACK: None}


def strong(eps_255: float) -> Attack:
    """PGD on the margin, 50 steps, 10 restarts: the last rung but one, and what falsifies before certifying."""
    return Attack(eps_255, step_255=eps_255 / 8, steps=50, restarts=10, loss="margin")


def fingerprints(model: nn.Module, split: Split) -> dict[str, str]:
    """Whose a record is that is kept image by image: it goes on with these weights and images alone."""
    images = checkpoint.digest({"images": split.images, "labels": split.labels})
    return {"weights_sha256": checkpoint.digest(dict(model.state_dict())), "images_sha256": images}


def subset(split: Split, images: int, classes: int) -> Split:
    """The first images of every class, equally many of each; raises `KitError` where a class has too few."""
    each = images // classes
    most = int(torch.bincount(split.labels, minlength=classes).min())
    if not 1 <= each <= most:
        raise KitError(f"{images} images is not allowed: use {classes} to {classes * most}")
    return split.take(torch.cat([(split.labels == label).nonzero()[:each, 0] for label in range(classes)]))


def climb(model: nn.Module, split: Split, eps_255: float, path: Path) -> dict[str, Any]:
    """Attack every image with every rung it survives; returns and keeps the record at `path`.

    The record's ``fell`` holds, image by image, the number of the first rung that fools the model, or the number of
    rungs where none does. Images not yet attacked have -1. AutoAttack comes from torchattacks, which has to be
    installed; raises `KitError` where it is not, where the images are no `subset`, or where the file belongs to other
    weights or images.
    """
    about = {**fingerprints(model, split), "eps_255": eps_255, "rungs": list(rungs(eps_255))}
    labels = split.labels.tolist()
    record = _whole({**about, "labels": labels, "fell": [-1] * len(split)})
    if disk.exists(path):
        record = read(path)
        checkpoint.refuse_other(path, {key: record[key] for key in about}, about)
        if record["labels"] != labels:
            raise KitError(f"{path} is damaged: its labels are not those of its images; delete it to climb anew")
    for start in range(0, len(split), CHUNK):
        part = slice(start, start + CHUNK)
        if -1 in record["fell"][part]:
            with evaluation.number_format("float32", split.labels.device):
                record["fell"][part] = _fell(model, *split.batch(part), eps_255, start).tolist()
            record |= {"kernel": kernels.describe(model), "versions": _versions()}
            checkpoint.write_json(path, record)
    return record


def certify(model: nn.Module, split: Split, path: Path, *, steps: int = 0) -> dict[str, Any]:
    """Bound the images that no rung of the finished ladder at `path` fooled (see `crown.margins`); kept there.

    The record's ``verified`` holds true, false, or null (not yet bounded) for each image; where the network is not
    supported, ``not_supported`` says why instead.
    """
    record = finished(path)
    about = fingerprints(model, split)
    checkpoint.refuse_other(path, {key: record[key] for key in about}, about)
    try:
        crown.network(model, split.batch(slice(0, 1))[0])
    except KitError as error:
        record["not_supported"] = str(error)
        checkpoint.write_json(path, record)
        return record
    standing = len(record["rungs"])
    verified = record.setdefault("verified", [None if place == standing else False for place in record["fell"]])
    left = [number for number, sure in enumerate(verified) if sure is None]
    parts = [left[start : start + BOUNDED] for start in range(0, len(left), BOUNDED)]
    for part in tqdm(parts, desc="certify what stands", leave=False, delay=2, disable=not watched()):
        x, y = split.batch(torch.tensor(part, device=split.labels.device))
        found = crown.margins(model, x, y, record["eps_255"] / 255, steps).amin(1) > 0
        for number, sure in zip(part, found.tolist(), strict=True):
            verified[number] = sure
        checkpoint.write_json(path, record)
    return record


def finished(path: Path) -> dict[str, Any]:
    """The record of a ladder that attacked all its images; raises `KitError` where there is none."""
    record = read(path)
    if -1 in record["fell"]:
        raise KitError(f"{path} is unfinished: climb it with the weights and the images first")
    return record


def errors(record: dict[str, Any]) -> dict[str, np.ndarray]:
    """Class-wise error (C,), as fractions, at each rung of a finished ladder, and the certified one if it is there."""
    labels, fell = np.array(record["labels"]), np.array(record["fell"])
    at_rungs = {name: fell <= number for number, name in enumerate(record["rungs"])}
    if "verified" in record:
        at_rungs[CERTIFIED] = ~np.array([bool(sure) for sure in record["verified"]])
    classes = range(labels.max() + 1)
    return {name: np.array([wrong[labels == label].mean() for label in classes]) for name, wrong in at_rungs.items()}


def _fell(model: nn.Module, x: Tensor, y: Tensor, eps_255: float, start: int) -> Tensor:
    fell = torch.full_like(y, len(rungs(eps_255)))
    for number, (name, attack) in enumerate(rungs(eps_255).items()):
        alive = (fell == len(rungs(eps_255))).nonzero()[:, 0]
        if len(alive):
            images = _attacked(model, x[alive], y[alive], name, attack, eps_255, start)
            fell[alive[evaluation.predict(model, images) != y[alive]]] = number
    return fell


def _attacked(
    model: nn.Module, x: Tensor, y: Tensor, name: str, attack: Attack | None, eps_255: float, start: int
) -> Tensor:
    if name == CLEAN:
        return x
    if attack is not None:
        return evaluation.attacked(model, x, y, attack, start)
    if find_spec("torchattacks") is None:
        raise KitError("AutoAttack needs torchattacks: pip install --no-deps torchattacks")
    import torchattacks

    with evaluating(model), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torchattacks, about its own use of torch
        classes = logits(model, x[:1]).shape[1]
        return torchattacks.AutoAttack(_Fast(model), eps=eps_255 / 255, n_classes=classes, seed=0)(x, y)


class _Fast(nn.Module):
    """A model to which others' attacks have the fast path that ours have."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return logits(self.model, x)


def _versions() -> dict[str, str]:
    """The kit's, and torchattacks' where it is there: without it there is a ladder whose last rung nobody needed."""
    with contextlib.suppress(metadata.PackageNotFoundError):
        return {**records.versions(), "torchattacks": metadata.version("torchattacks")}
    return records.versions()
