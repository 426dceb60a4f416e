"""Certified class by class: every image verified, falsified, or undecided; the truth lies between.

An attack finds images that are falsified, and so a lower bound of a class's robust error; CROWN verifies images, and
one less their share is the certified error, an upper bound that no attack can ever exceed.
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
from pydantic import AfterValidator, ConfigDict, Field, TypeAdapter
from torch import nn
from tqdm.auto import tqdm
from typing_extensions import TypedDict

from frlkit import KitError, checkpoint, evaluation, records, watched
from frlkit.attacks import pgd
from frlkit.audit import crown
from frlkit.data import Split
from frlkit.evaluation import Attack

VERIFIED, FALSIFIED, UNDECIDED = VERDICTS = ("verified", "falsified", "undecided")
CHUNK = 100  # images attacked at a time; a sample's random start depends on it
BATCH = 4  # images bounded at a time, between two writes of the progress


class _Record(TypedDict):
    __pydantic_config__ = ConfigDict(strict=True, extra="allow", allow_inf_nan=False)
    labels: list[int]
    verdicts: list[Literal[VERDICTS] | None]  # type: ignore[valid-type]
    margins: list[float | None]
    steps: list[Annotated[int, Field(ge=0)] | None]
    seconds: Annotated[float, Field(ge=0)]


def _same_images(record: dict[str, Any]) -> dict[str, Any]:
    if len({len(record[key]) for key in ("labels", "verdicts", "margins", "steps")}) > 1:
        raise ValueError("its lists do not have as many images each")
    return record


_RECORD: TypeAdapter[Any] = TypeAdapter(Annotated[_Record, AfterValidator(_same_images)])


def attack(eps_255: float) -> Attack:
    """The attack that falsifies: PGD on the margin, 50 steps, 10 restarts."""
    return Attack(eps_255=eps_255, step_255=eps_255 / 8, steps=50, restarts=10, loss="margin")


def first(split: Split, images: int | None) -> Split:
    """The first so many images of a split, or all; raises `KitError` where there are fewer."""
    if images is not None and not 1 <= images <= len(split):
        raise KitError(f"images = {images} is not allowed: use 1 to {len(split)}, so many does this split have")
    return Split(split.images[:images], split.labels[:images])


def certify(
    model: nn.Module, split: Split, eps_255: float, *, steps: int = 0, path: Path | None = None
) -> dict[str, Any]:
    """Decide every image of a split, as far as the effort goes; kept at `path`, image by image, and gone on with.

    Parameters
    ----------
    model : a LeNet-5 or plain CNN of `frlkit.models`
    split : images and labels
    eps_255 : radius in 1/255
    steps : rounds of fitting the lines to each bound, on images that plain CROWN leaves undecided
    path : JSON; where it holds the same weights, images and radius, only what less effort left undecided is done

    Returns
    -------
    dict
        Plain data: ``verdicts``, one of `VERDICTS` an image; ``margins``, the best lower bound of each image's smallest
        margin, None where it was falsified; ``steps`` tried on it; ``seconds`` that the bounds took, all images
        together; ``labels``; hashes of weights and images; ``attack``.

    Raises
    ------
    KitError
        A value out of range, a network that is not supported, or a file of other weights, images or radius.
    """
    if isinstance(steps, bool) or not isinstance(steps, int) or not 0 <= steps <= 10**4:
        raise KitError(f"steps = {steps!r}: use a whole number from 0 to 10000")
    if not len(split):
        raise KitError("the split has no images: there is nothing to certify")
    crown.network(model)  # refuses what is not supported before any work
    record = _begin(model, split, attack(eps_255), path)
    left = [number for number in range(len(split)) if _is_open(record, number, steps)]
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
                bar.update(len(batch))
                if path is not None:
                    checkpoint.write_json(path, record)
    if path is not None:
        checkpoint.write_json(path, record)
    return record


def _begin(model: nn.Module, split: Split, attack: Attack, path: Path | None) -> dict[str, Any]:
    """The record at `path`, or a new one; refuses another run's."""
    about = {
        "weights_sha256": checkpoint.digest(dict(model.state_dict())),
        "images_sha256": checkpoint.digest({"images": split.images, "labels": split.labels}),
        "attack": asdict(attack),
    }
    if path is not None and path.exists():
        record = records.read_as(path, _RECORD, "certification")
        checkpoint.refuse_other(path, {key: record.get(key) for key in about}, about)
        return record
    images = len(split)
    progress = {"verdicts": [None] * images, "margins": [None] * images, "steps": [None] * images, "seconds": 0.0}
    return {**about, "labels": split.labels.tolist(), **progress, "versions": records.versions()}


def _is_open(record: dict[str, Any], number: int, steps: int) -> bool:
    verdict = record["verdicts"][number]
    return verdict is None or (verdict == UNDECIDED and record["steps"][number] < steps)


def _falsify(model: nn.Module, split: Split, record: dict[str, Any], start: int) -> None:
    """Attack the images of one chunk that have no verdict yet; those wrong without any attack are falsified too."""
    rows = slice(start, start + CHUNK)
    x, y = split.batch(rows)
    attack = Attack(**record["attack"])
    settings = {"restarts": attack.restarts, "loss": attack.loss}
    generator = evaluation.stream(attack.seed, start, device=x.device)
    attacked = pgd(
        model, x, y, attack.eps_255 / 255, attack.step_255 / 255, attack.steps, generator=generator, **settings
    )
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
            record["verdicts"][number] = VERIFIED if margin > 0 else UNDECIDED
            record["margins"][number], record["steps"][number] = margin, effort
        record["seconds"] += time.perf_counter() - began


def summary(record: dict[str, Any], class_names: Sequence[str]) -> pd.DataFrame:
    """Images of each class, and in %: verified, falsified, undecided; and the same over all images.

    The robust error lies between falsified and 100 % less verified. Raises `KitError` where the record is unfinished.
    """
    if None in record["verdicts"]:
        raise KitError("the certification is unfinished: run the same again, it goes on from there")
    frame = pd.crosstab(np.array(record["labels"]), np.array(record["verdicts"]))
    frame = frame.reindex(columns=VERDICTS, index=range(len(class_names)), fill_value=0)
    frame.columns.name = None
    frame.index = list(class_names)
    frame.loc["all"] = frame.sum()
    images = frame.sum(axis=1)
    shares = (100 * frame.div(images, axis=0)).round(1)
    shares.insert(0, "images", images)
    return shares
