"""Class-wise natural, boundary and robust error, and the records they are kept in.

A sample counts as boundary error when it is right clean and wrong attacked, so R_rob = R_nat + R_bdy, class by class
(Zhang et al., 2019; the paper's Eq. 16). Errors are fractions in code and per cent in tables.
"""

from __future__ import annotations

import contextlib
import functools
import json
import platform
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from frlkit import KitError, __version__, checkpoint, kernels
from frlkit.attacks import LOSSES, evaluating, logits, pgd
from frlkit.data import Dataset, Split

T = TypeVar("T")
BATCH = 1000  # images attacked at a time; a sample's random start depends on it


@dataclass(frozen=True)
class Attack:
    """An evaluation attack; radius and step in 1/255, `seed` for its random starts."""

    eps_255: float = 8.0
    step_255: float = 2.0
    steps: int = 20
    restarts: int = 1
    loss: str = "ce"
    seed: int = 0

    def __post_init__(self) -> None:
        radii = (("eps_255", 0, 255), ("step_255", 0, 255))
        for name, low, high in (*radii, ("steps", 0, 10**6), ("restarts", 1, 10**6), ("seed", 0, 2**31)):
            value, whole = getattr(self, name), not name.endswith("_255")
            kinds = int if whole else (int, float)
            if isinstance(value, bool) or not isinstance(value, kinds) or not low <= value <= high:
                raise KitError(f"{name} = {value!r}: use a {'whole ' if whole else ''}number from {low} to {high}")
        if self.loss not in LOSSES:
            raise KitError(f"loss = {self.loss!r} is unknown: use one of {', '.join(LOSSES)}")

    def __str__(self) -> str:
        extra = f", {self.restarts} restarts" if self.restarts > 1 else ""
        loss = "" if self.loss == "ce" else f", {self.loss} loss"
        return f"PGD-{self.steps} at {self.eps_255:g}/255, step {self.step_255:g}/255{extra}{loss}"


#: What every finished run is measured with: the stated radius, and the report's actual one.
STANDARD = (Attack(eps_255=8.0), Attack(eps_255=16.0))


def standard(dataset: str) -> tuple[Attack, ...]:
    """`STANDARD`, and for GTSRB the paper's radius there, 12/255."""
    return (*STANDARD, Attack(eps_255=12.0)) if dataset.startswith("gtsrb") else STANDARD


@dataclass(frozen=True)
class ClassErrors:
    """Class-wise errors as fractions, each (C,): natural, robust, and the test images of each class."""

    natural: np.ndarray
    robust: np.ndarray
    counts: np.ndarray
    confusion: np.ndarray  # (C, C): true class by class predicted under attack, in images

    @property
    def boundary(self) -> np.ndarray:
        return self.robust - self.natural


def stream(*keys: int, device: str | torch.device = "cpu") -> torch.Generator:
    """A random generator that depends on whole numbers alone, such as (seed, epoch): no state is carried over.

    Calls must agree on how many keys they give for one purpose: a trailing 0 counts as absent.
    """
    seed = int(np.random.SeedSequence(keys).generate_state(1, np.uint64)[0])
    return torch.Generator(device=device).manual_seed(seed % 2**63)


@contextlib.contextmanager
def number_format(precision: str, device: torch.device) -> Iterator[None]:
    """The numbers that a network computes with inside: float32, or on a GPU TensorFloat-32 ("tf32"), or "bf16".

    PyTorch lets convolutions use TensorFloat-32 unless told otherwise, so float32 has to be asked for too. On a CPU
    "tf32" is float32.
    """
    if precision == "bf16":
        with torch.autocast(device.type, torch.bfloat16):
            yield
        return
    if device.type != "cuda":
        yield
        return
    switches = (torch.backends.cuda.matmul, torch.backends.cudnn)
    before = [switch.allow_tf32 for switch in switches]
    try:
        for switch in switches:
            switch.allow_tf32 = precision == "tf32"
        yield
    finally:
        for switch, value in zip(switches, before, strict=True):
            switch.allow_tf32 = value


@torch.no_grad()
def predict(model: nn.Module, images: Tensor) -> Tensor:
    """Predicted classes (N,) of float images, in eval mode; the mode is restored."""
    with evaluating(model):
        return logits(model, images).argmax(1)


def _attacked(model: nn.Module, split: Split, attack: Attack) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Images, labels and adversarial images of a whole split, batch by batch."""
    for number, start in enumerate(range(0, len(split), BATCH)):
        x, y = split.batch(slice(start, start + BATCH))
        radius, step = attack.eps_255 / 255, attack.step_255 / 255
        settings = {"restarts": attack.restarts, "loss": attack.loss}
        generator = stream(attack.seed, number, device=x.device)
        yield x, y, pgd(model, x, y, radius, step, attack.steps, generator=generator, **settings)


def _in_float32(measure: Callable[..., T]) -> Callable[..., T]:
    """Errors are measured in float32, whatever the model was trained with."""

    @functools.wraps(measure)
    def measured(model: nn.Module, split: Split, attack: Attack) -> T:
        with number_format("float32", split.labels.device):
            return measure(model, split, attack)

    return measured


@_in_float32
def class_errors(model: nn.Module, split: Split, attack: Attack) -> ClassErrors:
    """Evaluate a whole split in batches, clean and under `attack`.

    The clean image lies in the ball, so a sample that is wrong clean counts as wrong attacked too.

    Raises `KitError` where a class has no image or the network has too few outputs for the labels.
    """
    if not len(split):
        raise KitError("the split has no images: its errors are undefined")
    clean, attacked = [], []
    for x, y, adversarial in _attacked(model, split, attack):
        clean.append(predict(model, x))
        attacked.append(torch.where(clean[-1] == y, predict(model, adversarial), clean[-1]))
    labels = split.labels.cpu().numpy()
    return tally(labels, torch.cat(clean).cpu().numpy(), torch.cat(attacked).cpu().numpy())


@_in_float32
@torch.no_grad()
def class_similarity(model: nn.Module, split: Split, attack: Attack) -> Tensor:
    """Mean probability of each class over the attacked images of each class, (C, C) float64: true by predicted."""
    sums: Tensor | float = 0.0
    for _, y, adversarial in _attacked(model, split, attack):
        with evaluating(model):
            probabilities = logits(model, adversarial).softmax(1).double().cpu()
        sums = sums + F.one_hot(y.cpu(), probabilities.shape[1]).double().T @ probabilities
    return sums / sums.sum(1, keepdim=True)


def tally(labels: np.ndarray, clean: np.ndarray, attacked: np.ndarray) -> ClassErrors:
    """Class-wise errors from true labels and the predictions clean and under attack, all (N,) whole numbers."""
    classes = int(labels.max()) + 1
    counts = np.bincount(labels, minlength=classes)
    if (counts == 0).any():
        raise KitError(f"class {int(counts.argmin())} has no image in this split: its error is undefined")
    natural = np.bincount(labels[clean != labels], minlength=classes) / counts
    robust = np.bincount(labels[(clean != labels) | (attacked != labels)], minlength=classes) / counts
    confusion = np.zeros((classes, max(classes, int(attacked.max()) + 1)), dtype=np.int64)
    np.add.at(confusion, (labels, attacked), 1)
    return ClassErrors(natural, robust, counts, confusion)


def versions() -> dict[str, str]:
    """What a record says about the software that made it."""
    import torchvision

    return {
        "frlkit": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
    }


def evaluate(
    model: nn.Module,
    data: Dataset,
    attacks: Iterable[Attack] | None = None,
    *,
    path: Path | None = None,
    about: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Errors on the whole test split as a record: plain data, ready for JSON.

    A record has the data set, the weights' hash, versions, ``natural`` and, in ``attacks``, one entry per attack with
    ``robust``, ``boundary`` and ``confusion``. With `path`, a record there of the same weights and data is reused, only
    missing attacks are computed, and the result is written back. `about` is stored beside it. The attacks are those of
    `standard` unless given.
    """
    if missing := set(range(len(data.class_names))) - set(data.test.labels.unique().tolist()):
        raise KitError(f"class {min(missing)} has no image in the test split: its error is undefined")
    weights = checkpoint.digest(dict(model.state_dict()))
    record: dict[str, Any] = {
        **(about or {}),
        "dataset": data.name,
        "split": "test",
        "class_names": list(data.class_names),
        "weights_sha256": weights,
        "attacks": [],
    }
    if path is not None and path.exists():
        found = read_record(path)
        if all(found.get(key) == record[key] for key in record if key != "attacks"):
            record = found
    done = [Attack(**entry["attack"]) for entry in record["attacks"]]
    for attack in standard(data.name) if attacks is None else attacks:
        if attack in done:
            continue
        errors = class_errors(model, data.test, attack)
        record["images"] = int(errors.counts.sum())
        record["class_counts"] = errors.counts.tolist()
        record["natural"] = errors.natural.tolist()
        entry = {"attack": asdict(attack), "robust": errors.robust.tolist(), "boundary": errors.boundary.tolist()}
        made_by = {"kernel": kernels.describe(model), "versions": versions()}
        record["attacks"].append({**entry, "confusion": errors.confusion.tolist(), **made_by})
        if path is not None:
            checkpoint.write_json(path, record)
    return record


def read_record(path: Path) -> dict[str, Any]:
    """Read a record; raises `KitError` where it is missing or no JSON object."""
    try:
        record = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise KitError(f"the record {path} cannot be read ({error}): delete it to have it computed again") from None
    if not isinstance(record, dict):
        raise KitError(f"the record {path} is no JSON object: delete it to have it computed again")
    return record


def robust_errors(record: dict[str, Any], eps_255: float) -> np.ndarray:
    """A record's class-wise robust error (C,) under the standard attack at a radius in 1/255."""
    for entry in record["attacks"]:
        if Attack(**entry["attack"]) == Attack(eps_255=eps_255):
            return np.array(entry["robust"])
    raise KitError(f"the record has no {Attack(eps_255=eps_255)}: evaluate the weights with it first")


def largest_difference(record: dict[str, Any], other: dict[str, Any]) -> float:
    """The largest class-wise difference (a fraction) of two records of one model under the same attacks."""
    ours, theirs = ({Attack(**entry["attack"]): entry["robust"] for entry in r["attacks"]} for r in (record, other))
    if only := set(ours) ^ set(theirs):
        raise KitError(f"only one of the two records has {min(map(str, only))}: evaluate both alike")
    differences = [np.subtract(record["natural"], other["natural"])]
    differences += [np.subtract(ours[attack], theirs[attack]) for attack in ours]
    return float(np.abs(differences).max())
