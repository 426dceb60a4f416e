"""Reasons to doubt a robust error, looked for on a few hundred images: what AutoAttack's authors advise to check.

A number can be too good because gradients vanish, because the network returns probabilities, or because the evaluation
itself is wrong. None of these raises an error by itself, so each is tried here.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from frlkit.attacks import evaluating, logits, objective, pgd
from frlkit.data import Split
from frlkit.evaluation import predict, stream

IMAGES = 500
RADII_255 = (0, 4, 8, 16, 32, 64, 128)  # at the last, no image keeps what it shows


def doubts(model: nn.Module, split: Split) -> list[str]:
    """Sentences that say what is suspicious about this network on these images; empty where nothing is."""
    index = torch.randperm(len(split), generator=stream(0))[:IMAGES].to(split.labels.device)
    x, y = split.batch(index)
    found = [_probabilities(model, x), _vanishing_gradients(model, x, y), _labels_matter(model, x, y)]
    return [sentence for sentence in (*found, *_growing_radii(model, x, y)) if sentence]


def _probabilities(model: nn.Module, x: Tensor) -> str:
    with torch.no_grad(), evaluating(model):
        outputs = logits(model, x)
    if bool((outputs >= 0).all()) and torch.allclose(outputs.sum(1), torch.ones(len(x), device=x.device), atol=1e-4):
        return "the network returns probabilities: attacks need logits, or their gradients vanish"
    return ""


def _vanishing_gradients(model: nn.Module, x: Tensor, y: Tensor) -> str:
    with torch.enable_grad(), evaluating(model):
        pixels = x.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(objective(logits(model, pixels), y, "ce").sum(), pixels, allow_unused=True)
    zero = 1.0 if gradient is None else (gradient.flatten(1) == 0).all(1).double().mean().item()
    if zero > 0.01:
        return f"{zero:.0%} of the images have no input gradient at all: PGD cannot attack them, trust no robust error"
    return ""


def _labels_matter(model: nn.Module, x: Tensor, y: Tensor) -> str:
    """The error on labels drawn at random must be that of guessing."""
    classes = int(y.max()) + 1
    drawn = torch.randint(0, classes, y.shape, generator=stream(1)).to(y.device)
    error, guess = (predict(model, x) != drawn).double().mean().item(), 1 - 1 / classes
    if abs(error - guess) > 5 * math.sqrt(guess * (1 - guess) / len(y)):
        return f"the error on random labels is {error:.0%} instead of {guess:.0%}: labels and predictions are confused"
    return ""


def _growing_radii(model: nn.Module, x: Tensor, y: Tensor) -> list[str]:
    """Radius 0 changes nothing, attacks stay in their ball, errors grow with the radius, and no image survives all."""
    sentences, wrong = [], predict(model, x) != y
    errors = [wrong.double().mean().item()]
    for eps_255 in RADII_255:
        eps = eps_255 / 255
        attacked = pgd(model, x, y, eps, eps / 4, 20, generator=stream(2, device=x.device))
        if (attacked - x).abs().max() > eps + 1e-6 or attacked.min() < 0 or attacked.max() > 1:
            sentences.append(f"the attack at {eps_255}/255 leaves its ball or [0, 1]")
        errors.append((wrong | (predict(model, attacked) != y)).double().mean().item())
        if eps_255 == 0 and errors[1] != errors[0]:
            sentences.append("an attack of radius 0 changes predictions: the network is not deterministic in eval mode")
        if errors[-1] < errors[-2] - 0.02:
            sentences.append(
                f"the error falls from {errors[-2]:.1%} to {errors[-1]:.1%} as the radius grows to {eps_255}/255"
            )
    if errors[-1] < 0.9 * (1 - 1 / (int(y.max()) + 1)):
        sentences.append(f"at {RADII_255[-1]}/255 the error is only {errors[-1]:.0%}: gradients seem to be masked")
    return sentences
