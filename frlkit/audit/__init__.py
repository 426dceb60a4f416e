"""Any network, audited class by class: read its file, doubt it, attack it, climb the ladder, certify it (`audit`)."""

from __future__ import annotations

import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from tqdm.auto import tqdm

from frlkit import KitError, checkpoint, kernels, records, watched
from frlkit.attacks import pgd
from frlkit.audit import certify as certification
from frlkit.audit import ladder as rungs
from frlkit.audit.doubts import affordable, check, doubts
from frlkit.data import Dataset, Split
from frlkit.evaluation import BATCH, Attack, batches, number_format, predict, predictions, stream, tally

RADII_255 = tuple(float(radius) for radius in range(1, 17))  # of the curve
CURVE_STEPS = 10  # of a quarter of the radius each


def audit(
    model: nn.Module,
    images: Dataset,
    attack: Attack | None = None,
    *,
    reading: dict[str, Any] | None = None,
    known: tuple[str, ...] | list[str] = (),
    said_error: float | None = None,
    most: int | None = None,
    curve: bool = True,
    ladder: int = 0,
    certify: int = 0,
    path: Path | None = None,
    command: str = "",
) -> dict[str, Any]:
    """Natural, boundary and robust error of each class, and what there is to say about them, as plain data.

    Parameters
    ----------
    model : from images in [0, 1], (N, channels, side, side), to logits (N, C); any preprocessing belongs to it
    images : their test split is attacked
    attack : default: PGD-20 at 8/255
    reading, known, said_error : how a file of weights was understood, see `readings.read`; doubts already found; the
        natural error that the file says
    most : test images at most, drawn alike for every model; None for all
    curve : also attack each image with radii from 1/255 to 16/255 (`_fell_at`)
    ladder, certify : so many images, from the first, climb the ladder to AutoAttack, or are certified at the attack's
        radius; 0 for none
    path : JSON, written when the attack is done and again after each further part; beside it those parts keep theirs
    command : what made this, for the record

    Returns
    -------
    dict
        ``dataset``, ``class_names``, ``images``, ``labels_per_class``, ``attack``; ``natural``, ``robust``,
        ``boundary``, fractions by class; ``confusion``: ``natural`` and ``robust``, images by true class and class
        taken for; ``curve``: ``eps_255`` and ``robust``, from 0 on; ``ladder`` and ``certified`` where asked for;
        ``reading``, ``doubts``, ``fingerprints``, ``command``, ``versions``, ``seconds``.

    Raises
    ------
    KitError
        A class without an image, a network that does not fit, or a part that cannot be done.
    """
    if not isinstance(images, Dataset) or not isinstance(model, nn.Module):
        raise KitError(
            f"an audit takes a torch.nn.Module and a frlkit.data.Dataset, not {type(model).__name__} and "
            f"{type(images).__name__}: frlkit.data.load(NAME) gives one"
        )
    path = None if path is None else Path(path)
    began, attack, classes = time.perf_counter(), attack or Attack(), len(images.class_names)
    test = _drawn(images, most)
    further = {name: rungs.subset(test, n, classes) for name, n in (("ladder", ladder), ("certified", certify)) if n}
    if ladder and classes < 4:
        raise KitError(f"{images.name} has {classes} classes: AutoAttack's targeted losses need four or more")
    if further and path is None:
        raise KitError("a ladder and certificates are kept image by image: give a path (--output FOLDER)")
    check(model, type(model).__name__, test)
    suspicious = [*known, *doubts(model, test, said_error)]
    for sentence in suspicious:
        print(f"doubtful: {sentence}", file=sys.stderr)
    few = BATCH if affordable(model, test, 2e10, 1, 1, BATCH) == BATCH else BATCH // 10  # gradients fill the memory
    labels, clean, attacked = predictions(model, test, attack, False, few)
    errors = tally(labels, clean, attacked, classes)
    found: dict[str, Any] = {
        "dataset": images.name,
        "class_names": list(images.class_names),
        "images": len(test),
        "labels_per_class": errors.counts.tolist(),
        "attack": asdict(attack),
        "natural": errors.natural.tolist(),
        "robust": errors.robust.tolist(),
        "boundary": errors.boundary.tolist(),
        "confusion": {
            "natural": tally(labels, clean, clean, classes).confusion.tolist(),
            "robust": errors.confusion.tolist(),
        },
        "curve": [],
        "reading": reading or _as_given(model, test),
        "doubts": suspicious,
        "fingerprints": {"weights": checkpoint.digest(dict(model.state_dict())), "data": images.fingerprint},
        "command": command,
        "kernel": kernels.describe(model),
        "versions": records.versions(),
    }

    def keep(**parts: Any) -> None:
        found.update(parts, seconds=round(time.perf_counter() - began, 1))
        if path is not None:
            checkpoint.write_json(path, found)

    fell = np.where(errors.stands, np.inf, np.where(errors.right, attack.eps_255, 0.0))
    radii = np.array([0.0, attack.eps_255])
    keep(curve=_curve(labels, fell, radii))
    if curve:
        radii = np.union1d([0.0, *RADII_255], [attack.eps_255] if attack.eps_255 <= RADII_255[-1] else [])
        keep(curve=_curve(labels, _fell_at(model, test, attack, fell, radii, few), radii))
    if ladder and path is not None:
        keep(**_ladder(model, further["ladder"], attack, path.with_name("ladder.json")))
    if certify and path is not None:
        certificates = path.with_name("certificates.json")
        keep(certified=certification.bracket(model, further["certified"], attack.eps_255, path=certificates))
    return found


def _drawn(images: Dataset, most: int | None) -> Split:
    """The test images, or so many of them, some of every class; raises `KitError` where a class has none."""
    test = images.test
    if most is not None and most < len(test):
        test = test.take(test.draw(most, stream(3)).sort().values)
    counts = test.labels.bincount(minlength=len(images.class_names))
    if not counts.all():
        raise KitError(
            f"class {images.class_names[int(counts.argmin())]!r} has none of the {len(test)} test images: its error is "
            "undefined; audit more (--images)"
        )
    return test


def _as_given(model: nn.Module, test: Split) -> dict[str, Any]:
    """What stands for a reading where the model came as a module: it takes images in [0, 1]."""
    shape = {"size": test.images.shape[-1], "channels": test.images.shape[1], "value_range": "[0, 1]"}
    return {"model": type(model).__name__, "mean": None, "std": None, **shape, "key": "", "prefix": "", "tried": []}


def _fell_at(
    model: nn.Module, test: Split, attack: Attack, fell: np.ndarray, radii: np.ndarray, few: int
) -> np.ndarray:
    """The smallest radius of a rising list at which each image falls, (N,), 0 where it is wrong clean, else infinity.

    `fell` says so for radius 0 and the attack's own. Between what stands and what falls each image is attacked at the
    radius in the middle, until they are neighbours: errors over the radius can only rise, and four attacks do for 17
    radii. They are of `CURVE_STEPS` steps of a quarter of the radius.
    """
    stands = np.where(np.isinf(fell), np.searchsorted(radii, attack.eps_255, "right") - 1, 0)
    falls = np.searchsorted(radii, fell)
    for turn in range(1, len(radii)):
        left = np.flatnonzero(falls - stands > 1)
        middle = (falls + stands) // 2
        if not len(left):
            break
        part = test.take(torch.from_numpy(left).to(test.labels.device))
        rows = tqdm(batches(part, few), desc=f"errors over radii, {turn}", leave=False, delay=2, disable=not watched())
        for number, chosen in enumerate(rows, 1):
            x, y = part.batch(chosen)
            eps = torch.from_numpy(radii[middle[left[chosen]]] / 255).to(x)
            generator = stream(attack.seed, turn, number, device=x.device)
            steps = min(CURVE_STEPS, attack.steps)
            with number_format("float32", x.device):
                moved = pgd(model, x, y, eps, eps / 4, steps, loss=attack.loss, generator=generator)
                fooled = (predict(model, moved) != y).cpu().numpy()
            falls[left[chosen]] = np.where(fooled, middle[left[chosen]], falls[left[chosen]])
            stands[left[chosen]] = np.where(fooled, stands[left[chosen]], middle[left[chosen]])
    return np.append(radii, np.inf)[falls]


def _curve(labels: np.ndarray, fell: np.ndarray, radii: np.ndarray) -> list[dict[str, Any]]:
    """The share of each class that falls at a radius or below."""
    counts = np.bincount(labels)
    return [
        {"eps_255": float(eps), "robust": (np.bincount(labels[fell <= eps], minlength=len(counts)) / counts).tolist()}
        for eps in radii
    ]


def _ladder(model: nn.Module, split: Split, attack: Attack, path: Path) -> dict[str, Any]:
    """Errors at each rung, and last the certified ones; or, beside them, why nothing is certified."""
    rungs.climb(model, split, attack.eps_255, path)
    record = rungs.certify(model, split, path)
    errors = rungs.errors(record)
    climbed = [{"rung": name, "robust": values.tolist(), "images": len(split)} for name, values in errors.items()]
    why = record.get("not_supported")
    return {"ladder": climbed, "certified": {"not_supported": why}} if why else {"ladder": climbed}
