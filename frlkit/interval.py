"""Interval bounds (IBP), and a loss that trains a network for certificates with them (Gowal et al., 2018).

Each layer maps a box to a box. The bounds are far looser than CROWN's on a network that was not trained with them, but
they are cheap, differentiable, and a network learns to keep them tight. A ramp (`warm_up`) is needed: from the full
radius on, training stops at constant predictions.
"""

from __future__ import annotations

from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

from frlkit import KitError
from frlkit.attacks import logits
from frlkit.models import ConvNet, LeNet5


class Part(NamedTuple):
    """A convolution of stride 1, weight (out, in, k, k), or a linear layer, (out, in), and what follows it."""

    weight: Tensor
    bias: Tensor
    padding: int = 0
    activation: str = ""  # "tanh", "relu", or "" for the last layer
    pool: str = ""  # 2x2 "mean", "max", or ""


def parts(model: nn.Module) -> list[Part]:
    """A LeNet-5's or a plain CNN's layers in order; raises `KitError` for any other network."""
    if type(model) is LeNet5:
        hidden = [(model.conv1, 0, "mean"), (model.conv2, 0, "mean"), (model.conv3, 0, ""), (model.fc1, 0, "")]
        activation, last = "tanh", model.fc2
    elif type(model) is ConvNet:
        hidden, activation, last = [(layer, 1, "max") for layer in model.convolutions], "relu", model.linear
    else:
        raise KitError(f"certification of {type(model).__name__} is not supported: use lenet5, cnn3 or cnn4")
    found = [Part(layer.weight, layer.bias, padding, activation, pool) for layer, padding, pool in hidden]
    return [*found, Part(last.weight, last.bias)]


def worst_logits(model: nn.Module, x: Tensor, y: Tensor, eps: float) -> Tensor:
    """Upper bounds of z_j - z_y over the l-infinity ball within [0, 1], (N, C), by intervals; 0 at j = y.

    Where a row's largest other entry is negative, the image is certified, but for float32's rounding: a training
    signal, not a certificate. x is (N, channels, height, width) in [0, 1], y (N,) labels, eps a radius in [0, 1].
    Gradients reach the parameters.
    """
    *hidden, last = parts(model)
    low, high = (x - eps).clamp(min=0), (x + eps).clamp(max=1)
    middle, half = (low + high) / 2, (high - low) / 2
    for part in hidden:
        if part.weight.ndim == 2:
            middle, half = middle.flatten(1), half.flatten(1)
            middle, half = F.linear(middle, part.weight, part.bias), F.linear(half, part.weight.abs())
        else:
            middle = F.conv2d(middle, part.weight, part.bias, padding=part.padding)
            half = F.conv2d(half, part.weight.abs(), padding=part.padding)
        low, high = (_after(part, bound) for bound in (middle - half, middle + half))
        middle, half = (low + high) / 2, (high - low) / 2
    weight = last.weight - last.weight[y][:, None]  # (N, C, in): the difference of two logits is one linear form
    flat = middle.flatten(1)[:, None], half.flatten(1)[:, None]
    return (weight * flat[0]).sum(2) + (weight.abs() * flat[1]).sum(2) + last.bias - last.bias[y][:, None]


def _after(part: Part, z: Tensor) -> Tensor:
    """Activation and pooling, which are monotone: bounds in, bounds out."""
    z = z.tanh() if part.activation == "tanh" else z.relu()
    return F.avg_pool2d(z, 2) if part.pool == "mean" else F.max_pool2d(z, 2) if part.pool == "max" else z


def certified_loss(model: nn.Module, x: Tensor, y: Tensor, eps: float, share: float = 0.5) -> Tensor:
    """(1 - share) * cross-entropy of the clean images + share * cross-entropy of `worst_logits`, mean over the batch.

    The second term is an upper bound of the cross-entropy under any attack. `eps`, and `share` in [0, 1], are those of
    the moment: multiply both by `warm_up`.
    """
    if not 0 <= share <= 1:
        raise KitError(f"share = {share!r} is not allowed: use a number from 0 to 1")
    worst = F.cross_entropy(worst_logits(model, x, y, eps), y)
    return (1 - share) * F.cross_entropy(logits(model, x), y) + share * worst


def warm_up(progress: float, start: float = 0.1, end: float = 0.6) -> float:
    """0 until `start` of the training is over, then a straight line to 1 at `end`; `progress` is in [0, 1]."""
    return min(1.0, max(0.0, (progress - start) / (end - start)))
