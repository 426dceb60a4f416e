"""Networks as chains of layers whose bounds can be propagated, and what floating point may add to them.

A layer is a convolution with tanh or ReLU and 2x2 mean or max pooling behind it; a linear layer is a convolution whose
window is the whole map. What is bounded is the network as float32 evaluates it, in any order of its sums: each
convolution is exact but for an error of known size (`rounding`). Bounds are computed in float64 and moved outwards by
more than all of its own roundings can have moved them inwards (`Layer.slack`).

Maps are (images, forms, height, channels, width); where they do not depend on the form, (N, 1, H, C, W).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from frlkit import KitError, interval
from frlkit.attacks import evaluating
from frlkit.interval import Part

FLOAT32, FLOAT64 = 2.0**-24, 2.0**-53  # the largest relative rounding
ACTIVATION = 16  # tanh and pooling count as so many roundings; PyTorch's tanh has 1, the native kernel's 5, pooling 4
BALL = 2.0**-23  # float32 may step so far out of the ball when it rounds x, eps and their sum


@dataclass(frozen=True, eq=False)
class Layer:
    """A convolution of stride 1, (out, in, k, k) and (out,) in float64, and what follows it."""

    weight: Tensor
    bias: Tensor
    padding: int
    activation: str  # "tanh", "relu", or "" for the last layer
    pool: str  # 2x2 "mean", "max", or ""
    side: int  # rows, and columns, before pooling
    slack: Tensor  # (1, 1, side, out, side): how far float64's roundings may move a bound of the convolution's output


def network(model: nn.Module) -> tuple[Layer, ...]:
    """A LeNet-5's or a plain CNN's layers; raises `KitError` for any other network."""
    return chain(interval.parts(model), model.image_shape)


def chain(parts: Sequence[Part], image_shape: Sequence[int]) -> tuple[Layer, ...]:
    """Layers in float64 for images of a shape (channels, side, side); a weight (out, in) takes the whole map."""
    layers: list[Layer] = []
    channels, side, _ = image_shape
    for weight, bias, padding, activation, pool in parts:
        weight, bias = weight.detach().double(), bias.detach().double()
        if weight.ndim == 2:
            weight = weight.view(len(weight), channels, side, side)
        side, channels = side + 2 * padding - weight.shape[-1] + 1, len(weight)
        layers.append(Layer(weight, bias, padding, activation, pool, side, bias))
        side = side // 2 if pool else side
    return _with_slack(layers, image_shape)


def _with_slack(layers: Sequence[Layer], image_shape: Sequence[int]) -> tuple[Layer, ...]:
    """A bound is a sum of products of weights, slopes (at most 1), and intercepts or pixels.

    `size` bounds the sum of the products' absolute values, and a product has passed fewer than `roundings` roundings.
    """
    size = torch.ones(1, *image_shape, dtype=torch.float64, device=layers[0].weight.device)
    roundings, result = size.numel(), []
    for layer in layers:
        size = F.conv2d(size, layer.weight.abs(), layer.bias.abs(), padding=layer.padding)
        roundings += size.numel() + layer.weight[:, 0].numel() + 16
        slack = 2 * roundings * FLOAT64 * size
        result.append(replace(layer, slack=slack.transpose(1, 2)[None]))
        size = size + 1 if layer.activation == "tanh" else 3 * size  # intercepts: at most 1; 2 * size
        size = pooled(size, layer.pool)
    return tuple(result)


def act(layer: Layer, z: Tensor) -> Tensor:
    """What follows a layer's convolution, on its output (N, C, H, W)."""
    return pooled(z.tanh() if layer.activation == "tanh" else z.relu() if layer.activation else z, layer.pool)


def pooled(x: Tensor, pool: str) -> Tensor:
    """Maps (N, C, H, W), pooled."""
    return F.avg_pool2d(x, 2) if pool == "mean" else F.max_pool2d(x, 2) if pool == "max" else x


def rounding(layer: Layer, size: Tensor) -> Tensor:
    """The most by which float32 may miss a convolution's exact output, map (N, 1, H, C, W), given its float32 input.

    A sum of n products is off by at most n / (1 - n) roundings of the sum of their absolute values, whatever its order.
    `size`, map (N, 1, H, in, W), bounds the input's absolute values. The roundings of the input's own tanh and pooling
    are counted here too.
    """
    share = (layer.weight[0].numel() + 1 + ACTIVATION) * FLOAT32
    sums = F.conv2d(size[:, 0].transpose(1, 2), layer.weight.abs(), layer.bias.abs(), padding=layer.padding)
    return (share / (1 - share) * sums).transpose(1, 2)[:, None]


def check_forward(layers: Sequence[Layer], model: nn.Module, x: Tensor) -> None:
    """Refuse a model, say one with hooks or other layers, that does not compute what its layers say, at these images.

    x is (N, channels, height, width), floats in [0, 1].
    """
    exact = x.double()
    for layer in layers:
        exact = act(layer, F.conv2d(exact, layer.weight, layer.bias, padding=layer.padding))
    with evaluating(model), torch.no_grad():
        found = model(x).double()
    if not torch.allclose(found, exact.flatten(1), rtol=1e-3, atol=1e-3):
        raise KitError(
            "certification of this network is not supported: it computes something else than its layers, perhaps in a "
            "hook or in other precision; save its weights and load them into a network of frlkit.models"
        )


def ball(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Middle and half width, maps (N, 1, H, C, W), of a box with all that float32 takes for the ball within [0, 1]."""
    images = x.double().transpose(1, 2)[:, None]
    low, high = (images - eps - BALL).clamp(min=0), (images + eps + BALL).clamp(max=1)
    return (low + high) / 2, (high - low) / 2
