"""Class-wise natural, boundary and robust error of any network.

A sample counts as boundary error when it is right clean and wrong attacked, so R_rob = R_nat + R_bdy, class by class
(Zhang et al., 2019; the paper's Eq. 16). Errors are fractions in code and per cent in tables.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Literal

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn
from tqdm.auto import tqdm

from frlkit import KitError, watched
from frlkit.attacks import LOSSES, outputs, pgd
from frlkit.data import Split
from frlkit.models import SIZE
from frlkit.values import Count, Pixels, Seed, checked

BATCH = 1000  # images of up to 3x32x32 attacked at a time; a sample's random start depends on it


@checked
class Attack:
    """An evaluation attack; radius and step in 1/255, `seed` for its random starts."""

    eps_255: Pixels = 8.0
    step_255: Pixels = 2.0
    steps: Annotated[int, Field(ge=0, le=10**6)] = 20
    restarts: Count = 1
    loss: Literal[LOSSES] = "ce"  # type: ignore[valid-type]
    seed: Seed = 0

    def __str__(self) -> str:
        extra = f", {self.restarts} restarts" if self.restarts > 1 else ""
        loss = "" if self.loss == "ce" else f", {self.loss} loss"
        seed = f", seed {self.seed}" if self.seed else ""
        return f"PGD-{self.steps} at {self.eps_255:g}/255, step {self.step_255:g}/255{extra}{loss}{seed}"


#: What every finished run is measured with: the stated radius, and the report's actual one.
STANDARD = (Attack(eps_255=8.0), Attack(eps_255=16.0))


@dataclass(frozen=True)
class ClassErrors:
    """Class-wise errors as fractions, each (C,): natural, robust, and the test images of each class."""

    natural: np.ndarray
    robust: np.ndarray
    counts: np.ndarray
    confusion: np.ndarray  # (C, C): true class by class predicted under attack, in images
    right: np.ndarray  # (N,) bool, image by image: right clean ...
    stands: np.ndarray  # ... and right under attack too

    @property
    def boundary(self) -> np.ndarray:
        return self.robust - self.natural


def stream(*keys: int, device: str | torch.device = "cpu") -> torch.Generator:
    """A random generator that depends on whole numbers alone, such as (seed, epoch), of which a trailing 0 counts as
    absent: no state is carried over."""
    seed = int(np.random.SeedSequence(keys).generate_state(1, np.uint64)[0])
    return torch.Generator(device=device).manual_seed(seed % 2**63)


@contextlib.contextmanager
def number_format(precision: str, device: torch.device) -> Iterator[None]:
    """The numbers that a network computes with inside: float32, "bf16", or "tf32", on a CPU float32, on a GPU
    TensorFloat-32, which PyTorch's convolutions use unless told otherwise."""
    if precision == "bf16":
        with torch.autocast(device.type, torch.bfloat16):
            yield
        return
    switches = (torch.backends.cuda.matmul, torch.backends.cudnn) if device.type == "cuda" else ()
    before = [switch.allow_tf32 for switch in switches]
    try:
        for switch in switches:
            switch.allow_tf32 = precision == "tf32"
        yield
    finally:
        for switch, value in zip(switches, before, strict=True):
            switch.allow_tf32 = value


def predict(model: nn.Module, images: Tensor) -> Tensor:
    """Predicted classes (N,) of float images, in eval mode; the mode is restored."""
    return outputs(model, images).argmax(1)


def batches(split: Split, most: int | None = None) -> list[slice]:
    """The rows of a split, `most` or `BATCH` at a time; of larger images as many as have no more pixels than those."""
    most = most or BATCH
    size = max(1, min(most, most * 3 * SIZE**2 // split.images.shape[1:].numel()))
    return [slice(start, start + size) for start in range(0, len(split), size)]


def attacked(model: nn.Module, x: Tensor, y: Tensor, attack: Attack, number: int, only: Tensor | None = None) -> Tensor:
    """The adversarial images of a batch under `attack`, its random start that of batch `number`; see `attacks.pgd`."""
    generator = stream(attack.seed, number, device=x.device)
    settings = {"restarts": attack.restarts, "loss": attack.loss, "generator": generator, "only": only}
    return pgd(model, x, y, attack.eps_255 / 255, attack.step_255 / 255, attack.steps, **settings)


def _attacked(
    model: nn.Module, split: Split, attack: Attack, wrong_too: bool = True, most: int | None = None
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Labels, clean predictions and adversarial images of a whole split, batch by batch, with a bar where one watches.

    Without `wrong_too`, images that are wrong clean come back as they are; the others do not notice.
    """
    rows = tqdm(batches(split, most), desc=str(attack), leave=False, delay=2, disable=not watched())
    for number, part in enumerate(rows):
        x, y = split.batch(part)
        clean = predict(model, x)
        only = None if wrong_too else clean == y
        yield y, clean, attacked(model, x, y, attack, number, only)


def class_errors(model: nn.Module, split: Split, attack: Attack) -> ClassErrors:
    """Evaluate a whole split in batches, clean and under `attack`.

    The clean image lies in the ball, so a sample that is wrong clean counts as wrong attacked too, and is not attacked.
    Raises `KitError` where a class has no image or the network has too few outputs for the labels.
    """
    return tally(*predictions(model, split, attack), split.classes)


def changed(model: nn.Module, split: Split, attack: Attack) -> np.ndarray:
    """Share of each class whose prediction the attack changes, right or wrong, (C,): the report's boundary error."""
    labels, clean, attacked = predictions(model, split, attack, True)
    return shares(clean != attacked, labels, split.classes)


def predictions(
    model: nn.Module, split: Split, attack: Attack, wrong_too: bool = False, most: int | None = None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Labels, and predicted classes clean and under attack, (N,) each, `most` images at a time (`batches`).

    In float32, whatever the model was trained with. Without `wrong_too`, images that are wrong clean are not attacked:
    their prediction stays.
    """
    if not len(split):
        raise KitError("the split has no images: its errors are undefined")
    with number_format("float32", split.labels.device):
        parts = _attacked(model, split, attack, wrong_too, most)
        found = [(y, clean, predict(model, adversarial)) for y, clean, adversarial in parts]
    labels, clean, attacked = (torch.cat(part).cpu().numpy() for part in zip(*found, strict=True))
    return labels, clean, attacked if wrong_too else np.where(clean == labels, attacked, clean)


def class_similarity(model: nn.Module, split: Split, attack: Attack) -> Tensor:
    """Mean probability of each class over the attacked images of each class, (C, C) float64: true by predicted."""
    sums: Tensor | float = 0.0
    with number_format("float32", split.labels.device):
        for y, _, adversarial in _attacked(model, split, attack):
            probabilities = outputs(model, adversarial).softmax(1).double().cpu()
            sums = sums + F.one_hot(y.cpu(), probabilities.shape[1]).double().T @ probabilities
    return sums / sums.sum(1, keepdim=True)


def shares(marked: np.ndarray, labels: np.ndarray, classes: int | None = None) -> np.ndarray:
    """Share of each class's samples that are marked, (C,). Raises `KitError` where one of so many classes has no image;
    without their number, up to the largest label."""
    counts = np.bincount(labels, minlength=classes or 0)
    if (counts == 0).any():
        raise KitError(f"class {int(counts.argmin())} has no image in this split: its error is undefined")
    return np.bincount(labels, marked, len(counts)) / counts


def tally(labels: np.ndarray, clean: np.ndarray, attacked: np.ndarray, classes: int | None = None) -> ClassErrors:
    """Class-wise errors from true labels and the predictions clean and under attack, all (N,) whole numbers.

    Raises `KitError` where one of so many classes has no image; without their number, up to the largest label.
    """
    right = clean == labels
    stands = right & (attacked == labels)
    natural, robust = (shares(~sound, labels, classes) for sound in (right, stands))
    counts, classes = np.bincount(labels), len(natural)
    confusion = np.zeros((classes, max(classes, int(attacked.max()) + 1)), dtype=np.int64)
    np.add.at(confusion, (labels, attacked), 1)
    return ClassErrors(natural, robust, counts, confusion, right, stands)
