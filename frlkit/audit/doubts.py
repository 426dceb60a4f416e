"""Reasons to doubt a robust error, looked for on a few images: what AutoAttack's authors advise to check.

A number can be too good because gradients vanish, because the network returns probabilities, or because the evaluation
itself is wrong; and it means nothing where the network was not read rightly. None of these raises an error by itself,
so each is tried here, in seconds: the larger the network, the fewer the images.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from tqdm.auto import tqdm

from frlkit import KitError, watched
from frlkit.attacks import evaluating, logits, objective, outputs, pgd
from frlkit.data import Split
from frlkit.evaluation import batches, predict, stream
from frlkit.values import first_line

IMAGES, LEAST = 500, 16  # at most, and at least
WORK = 5e11  # floating-point operations for all attacks together: some 20 seconds on one core
RADII_255 = (4, 16, 128)  # at the last, no image keeps what it shows
STEPS = 8


def doubts(model: nn.Module, split: Split, said_error: float | None = None) -> list[str]:
    """Sentences that say what is suspicious about this network on these images; empty where nothing is.

    `said_error` is the natural error, a fraction, that the file of weights says it has.
    """
    order = torch.randperm(len(split), generator=stream(0)).to(split.labels.device)
    classes = split.classes or int(split.labels.max()) + 1
    clean = order[: affordable(model, split, WORK, 1, LEAST, IMAGES)]
    passes = 2 * (STEPS * len(RADII_255) + 1) + 5  # a step costs two
    x, y = split.batch(order[: affordable(model, split, WORK, passes, LEAST, IMAGES)])
    with tqdm(total=4 + len(RADII_255), desc="doubts", leave=False, delay=2, disable=not watched()) as bar:
        found = [_natural_error(model, split.take(clean), said_error)]
        for check in (_probabilities, _vanishing_gradients, _labels_matter):
            bar.update()
            found.append(check(model, x, y, classes))
        found += _growing_radii(model, x, y, classes, bar)
    return [sentence for sentence in found if sentence]


def check(module: nn.Module, title: str, split: Split) -> None:
    """Refuse in a sentence a network that does not give an image finite logits, one a class, with gradients."""
    x, _ = split.batch(slice(0, 1))
    shape = "x".join(map(str, x.shape[1:]))
    try:
        with torch.enable_grad(), evaluating(module):
            found = module(x.requires_grad_())
    except Exception as error:  # a stranger's network can raise anything
        raise KitError(
            f"{title} does not take images of {shape} ({first_line(error)}): give --size and --channels"
        ) from None
    if not isinstance(found, Tensor) or found.shape != (1, split.classes):
        given = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
        raise KitError(
            f"{title} returns {given} for one image of {shape}, and the data set has {split.classes} "
            "classes: it must return one logit for each of them"
        )
    if not found.isfinite().all():
        raise KitError(
            f"{title} returns NaN or infinite logits for an image: its weights or its preprocessing are damaged"
        )
    if not found.requires_grad:
        raise KitError(f"{title} returns logits without a gradient: leave no_grad and numpy out, or no attack can work")


def affordable(model: nn.Module, split: Split, work: float, passes: int, least: int, most: int) -> int:
    """How many images of a split so many passes may see for so much work, in floating-point operations."""
    x, _ = split.batch(slice(0, 1))
    with FlopCounterMode(display=False) as counter, torch.no_grad(), evaluating(model):
        model(x)
    return max(least, min(most, int(work / (passes * max(1, counter.get_total_flops())))))


def _natural_error(model: nn.Module, split: Split, said: float | None) -> str:
    wrong = torch.cat([predict(model, split.batch(part)[0]) != split.labels[part] for part in batches(split, 50)])
    error, images, counts = wrong.double().mean().item(), len(split), split.labels.bincount()
    guess = 1 - counts.max().item() / images
    if error > guess - 2 * math.sqrt(guess * (1 - guess) / images) and _guesses(wrong, split.labels, counts):
        return (
            f"the natural error on {images} images, {error:.0%}, is no better than guessing ({guess:.0%}): the "
            "network, its preprocessing or its order of classes is another"
        )
    if said is not None and error > said + max(0.05, 3 * math.sqrt(said * (1 - said) / images)):
        return f"the natural error on {images} images is {error:.0%}, and the file itself says {said:.0%}"
    return ""


def _guesses(wrong: Tensor, labels: Tensor, counts: Tensor) -> bool:
    """Whether the mean of the classes' errors is that of guessing too: where one class has nearly all images, the error
    over images says little.
    """
    present = counts[counts > 0].double()
    errors = torch.bincount(labels, wrong.double(), len(counts))[counts > 0] / present
    guess = 1 - 1 / len(present)
    deviation = (guess * (1 - guess) / present).sum().sqrt() / len(present)
    return bool(errors.mean() > max(guess - 2 * deviation, guess / 2))  # of few images a deviation says nothing


def _probabilities(model: nn.Module, x: Tensor, y: Tensor, classes: int) -> str:
    z = outputs(model, x)
    if bool((z >= 0).all()) and torch.allclose(z.sum(1), torch.ones(len(x), device=x.device), atol=1e-4):
        return "the network returns probabilities: attacks need logits, or their gradients vanish"
    return ""


def _vanishing_gradients(model: nn.Module, x: Tensor, y: Tensor, classes: int) -> str:
    with torch.enable_grad(), evaluating(model):
        pixels = x.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(objective(logits(model, pixels), y, "ce").sum(), pixels, allow_unused=True)
    zero = 1.0 if gradient is None else (gradient.flatten(1) == 0).all(1).double().mean().item()
    if zero > 0.01:
        return f"{zero:.0%} of the images have no input gradient at all: PGD cannot attack them, trust no robust error"
    return ""


def _labels_matter(model: nn.Module, x: Tensor, y: Tensor, classes: int) -> str:
    """The error on labels drawn at random must be that of guessing."""
    drawn = torch.randint(0, classes, y.shape, generator=stream(1)).to(y.device)
    error, guess = (predict(model, x) != drawn).double().mean().item(), 1 - 1 / classes
    if abs(error - guess) > 5 * math.sqrt(guess * (1 - guess) / len(y)):
        return f"the error on random labels is {error:.0%} instead of {guess:.0%}: labels and predictions are confused"
    return ""


def _growing_radii(model: nn.Module, x: Tensor, y: Tensor, classes: int, bar: tqdm) -> list[str]:
    """Predictions repeat, attacks stay in their ball, errors grow with the radius, and no image survives all."""
    sentences, wrong = [], predict(model, x) != y
    errors = [wrong.double().mean().item()]
    first, second = outputs(model, x), outputs(model, x)
    if not torch.allclose(first, second, rtol=0.01, atol=1e-3 * first.abs().max().item()):
        sentences.append("the same images give other logits when asked again: not deterministic in eval mode")
    for eps_255 in RADII_255:
        bar.update()
        eps = eps_255 / 255
        attacked = pgd(model, x, y, eps, eps / 4, STEPS, generator=stream(2, device=x.device))
        if (attacked - x).abs().max() > eps + 1e-6 or attacked.min() < 0 or attacked.max() > 1:
            sentences.append(f"the attack at {eps_255}/255 leaves its ball or [0, 1]")
        errors.append((wrong | (predict(model, attacked) != y)).double().mean().item())
        if errors[-1] < errors[-2] - 0.02 - 1 / len(y):
            sentences.append(
                f"the error falls from {errors[-2]:.1%} to {errors[-1]:.1%} as the radius grows to {eps_255}/255"
            )
    if errors[-1] < 0.9 * (1 - 1 / classes):
        sentences.append(f"at {RADII_255[-1]}/255 the error is only {errors[-1]:.0%}: gradients seem to be masked")
    return sentences
