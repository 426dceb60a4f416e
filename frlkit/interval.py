"""Interval bounds (IBP), cheap and differentiable: what trains a network for certificates (Gowal et al., 2018).

Each layer maps a box to a box. The bounds are far looser than CROWN's on a network that was not trained with them, but
a network learns to keep them tight. A ramp (`warm_up`) is needed: from the full radius on, training stops at constant
predictions.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from frlkit import KitError
from frlkit.data import Split
from frlkit.evaluation import batches, shares
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


def worst_logits(model: nn.Module, x: Tensor, y: Tensor, eps: float | Tensor) -> Tensor:
    """Upper bounds of z_j - z_y over the l-infinity ball within [0, 1], (N, C), by intervals; 0 at j = y.

    Where a row's largest other entry is negative, the image is certified, but for float32's rounding: a training
    signal, not a certificate. x is (N, channels, height, width) in [0, 1], y (N,) labels, eps a radius in [0, 1] or one
    an image, (N,). Gradients reach the parameters.
    """
    *hidden, last = parts(model)
    eps = eps.view(-1, 1, 1, 1) if isinstance(eps, Tensor) else eps
    low, high = (x - eps).clamp(min=0), (x + eps).clamp(max=1)
    middle, half = (low + high) / 2, (high - low) / 2
    for part in hidden:
        if part.weight[0].numel() == middle[0].numel():  # a window that is the whole map
            weight = part.weight.flatten(1)
            middle, half = F.linear(middle.flatten(1), weight, part.bias), F.linear(half.flatten(1), weight.abs())
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


def warm_up(progress: float, ramp: float) -> float:
    """From 0 in a straight line to 1 when a share `ramp` of the training is over; `progress` is in [0, 1]."""
    return min(1.0, progress / ramp) if ramp else 1.0


@torch.no_grad()
def class_errors(model: nn.Module, split: Split, eps: float) -> np.ndarray:
    """Class-wise share (C,) of images that intervals do not certify at radius `eps` in [0, 1]: above any robust error.

    Raises `KitError` where a class has no image, or the network is not supported.
    """
    worst = [worst_logits(model, *split.batch(rows), eps) for rows in batches(split)]
    # the label's own entry is 0, so one wrong class at 0 or above leaves the image uncertified
    open_ = (torch.cat(worst) >= 0).sum(1) > 1
    return shares(open_.cpu().numpy(), split.labels.cpu().numpy(), split.classes)
