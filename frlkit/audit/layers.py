"""Networks as chains of layers whose bounds can be propagated, and what floating point may add to them.

A layer is a convolution with tanh or ReLU and 2x2 mean or max pooling behind it; a linear layer is a convolution whose
window is the whole map; before the first may stand a `Front`, a border and a normalisation. What is bounded is the
network as float32 evaluates it, in any order of its sums: each convolution is exact but for an error of known size
(`rounding`). Bounds are computed in float64 and moved outwards by more than all of its own roundings can have moved
them inwards (`Layer.slack`).

Maps are (images, forms, height, channels, width); where they do not depend on the form, (N, 1, H, C, W).
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from frlkit import KitError, interval
from frlkit.attacks import evaluating
from frlkit.audit.networks import LeNet, Prepared
from frlkit.evaluation import number_format
from frlkit.interval import Part

FLOAT32, FLOAT64 = 2.0**-24, 2.0**-53  # the largest relative rounding
ACTIVATION = 16  # tanh and pooling count as so many roundings; PyTorch's tanh has 1, the native kernel's 5, pooling 4
BALL = 2.0**-23  # float32 may step so far out of the ball when it rounds x, eps and their sum
ACTIVE = {nn.ReLU: "relu", nn.Tanh: "tanh"}
POOLS = {nn.AvgPool2d: "mean", nn.MaxPool2d: "max"}
PASSED = (nn.Flatten, nn.Identity, nn.Dropout, nn.Dropout2d)  # they change nothing when a network is evaluated


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


class Front(NamedTuple):
    """What stands before the first layer: `border` black pixels around the image, then (x - mean) / std."""

    mean: Tensor  # (1, channels or 1, 1, 1) float64, as std
    std: Tensor
    border: int

    def __call__(self, images: Tensor) -> Tensor:
        """Images (N, C, H, W) in [0, 1] -> what the first layer takes, both in float64."""
        return (F.pad(images, (self.border,) * 4) - self.mean) / self.std

    def undo(self, inputs: Tensor) -> Tensor:
        """The images of some inputs."""
        rows, columns = (slice(self.border, side - self.border) for side in inputs.shape[2:])
        return (inputs * self.std + self.mean)[:, :, rows, columns]


def front(model: nn.Module) -> Front | None:
    """A prepared network's border and normalisation; None where there is none."""
    if type(model) is not Prepared:
        return None
    return Front(model.mean.detach().double(), model.std.detach().double(), model.border)


def network(model: nn.Module, x: Tensor) -> tuple[Layer, ...]:
    """The layers of a network, which compute at images x, (N, channels, side, side) in [0, 1], what it does.

    The network is one of the kit's LeNet-5 and plain CNNs, LeNet-5 as people build it, or an nn.Sequential of
    convolutions of stride 1, each with its activation and perhaps 2x2 pooling, and of linear layers; or one of these
    `Prepared`. Raises `KitError` for any other, and for one that computes something else, say in a hook.
    """
    before, (channels, side, _) = front(model), x.shape[1:]
    largest = torch.ones(1, dtype=torch.float64)
    if before is not None:
        side = side + 2 * before.border
        largest = torch.maximum(before.mean.abs(), (1 - before.mean).abs()) / before.std * (1 + 2**-20)
    *hidden, last = found = parts(model)
    after = {(part.activation, part.pool) for part in hidden}
    if not after <= {*itertools.product(["tanh", "relu"], ["", "mean"]), ("relu", "max")} or last[3:] != ("", ""):
        raise _unsupported("behind each layer but the last, and only there, must stand ReLU, or tanh without maxima")
    layers = chain(found, (channels, side, side), largest)
    exact = before(x.double()) if before else x.double()
    for layer in layers:
        exact = act(layer, F.conv2d(exact, layer.weight, layer.bias, padding=layer.padding))
    with number_format("float32", x.device), evaluating(model), torch.no_grad():  # what is bounded
        found = model(x).double()
    if not torch.allclose(found, exact.flatten(1), rtol=1e-3, atol=1e-3):
        raise _unsupported("it computes something else than its layers, perhaps in a hook or in other precision")
    return layers


def parts(model: nn.Module) -> list[Part]:
    """A network's layers in order, see `network`."""
    if type(model) is Prepared:
        return parts(model.network)
    if type(model) is LeNet:
        pool, activation = {"average": "mean"}.get(model.pool, model.pool), model.activation.lower()
        hidden = [(model.conv1, pool), (model.conv2, pool), (model.fc1, ""), (model.fc2, "")]
        found = [_part(layer)._replace(activation=activation, pool=pool) for layer, pool in hidden]
        return [*found, _part(model.fc3)]
    return _of_sequence(model) if type(model) is nn.Sequential else interval.parts(model)


def _of_sequence(model: nn.Sequential) -> list[Part]:
    found: list[Part] = []
    left: list[nn.Module] = [*model]
    while left:
        kind = type(module := left.pop(0))
        if kind is nn.Sequential:
            left = [*module, *left]
        elif kind in (nn.Conv2d, nn.Linear):
            found.append(_part(module))
        elif kind in ACTIVE and found and not found[-1].activation and found[-1].pool != "mean":
            found[-1] = found[-1]._replace(activation=ACTIVE[kind])  # a maximum may come before or behind
        elif kind in POOLS and found and not found[-1].pool and _halves(module):
            found[-1] = found[-1]._replace(pool=POOLS[kind])
        elif kind not in PASSED:
            raise _unsupported(f"its {kind.__name__} is not, where it stands")
    if not found:
        raise _unsupported("it has no layer")
    return found


def _part(layer: nn.Module) -> Part:
    """A layer's weight, bias and padding."""
    bias = layer.weight.new_zeros(len(layer.weight)) if layer.bias is None else layer.bias
    if isinstance(layer, nn.Linear):
        return Part(layer.weight, bias)
    plain = layer.stride == layer.dilation == (1, 1) and layer.groups == 1 and layer.padding_mode == "zeros"
    if not plain or isinstance(layer.padding, str) or len({*layer.padding}) > 1 or len({*layer.kernel_size}) > 1:
        raise _unsupported("a convolution must be square, of stride 1 and padded with zeros")
    return Part(layer.weight, bias, layer.padding[0])


def _halves(pool: nn.Module) -> bool:
    """Whether it pools 2x2 cells without overlap."""
    pair = {2, (2, 2)}
    usual = getattr(pool, "dilation", 1) == 1 and not getattr(pool, "return_indices", False)
    return pool.kernel_size in pair and pool.stride in pair and pool.padding == 0 and not pool.ceil_mode and usual


def _unsupported(why: str) -> KitError:
    return KitError(
        f"certification of this network is not supported: {why}; use LeNet-5, a plain CNN, or an nn.Sequential of "
        "convolutions of stride 1 with ReLU or tanh, 2x2 pooling and linear layers"
    )


def chain(parts: Sequence[Part], image_shape: Sequence[int], largest: Tensor | None = None) -> tuple[Layer, ...]:
    """Layers in float64 for inputs of a shape (channels, side, side); a weight (out, in) takes the whole map.

    `largest`, (1, channels or 1, 1, 1), is the largest absolute value of an input; 1 where it is not given.
    """
    layers: list[Layer] = []
    channels, side, _ = image_shape
    for number, (weight, bias, padding, activation, pool) in enumerate(parts, 1):
        weight, bias = weight.detach().double(), bias.detach().double()
        if weight[0].numel() == channels * side * side:
            weight = weight.view(len(weight), channels, side, side)
        elif weight.ndim == 2 or weight.shape[1] != channels or weight.shape[-1] > side + 2 * padding:
            raise _unsupported(f"layer {number} does not fit a map of {channels} channels of {side}x{side}")
        side, channels = side + 2 * padding - weight.shape[-1] + 1, len(weight)
        if pool and side % 2:
            raise _unsupported(f"layer {number} puts out an odd number of rows, {side}, to be pooled")
        layers.append(Layer(weight, bias, padding, activation, pool, side, bias))
        side = side // 2 if pool else side
    return _with_slack(layers, image_shape, torch.ones(1) if largest is None else largest)


def _with_slack(layers: Sequence[Layer], image_shape: Sequence[int], largest: Tensor) -> tuple[Layer, ...]:
    """A bound is a sum of products of weights, slopes (at most 1), and intercepts or pixels.

    `size` bounds the sum of the products' absolute values, and a product has passed fewer than `roundings` roundings.
    """
    weight = layers[0].weight
    size = largest.to(weight) * torch.ones(1, *image_shape, dtype=torch.float64, device=weight.device)
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


def ball(x: Tensor, eps: float, before: Front | None = None) -> tuple[Tensor, Tensor]:
    """Middle and half width, maps (N, 1, H, C, W), of a box with all that float32 takes for the ball within [0, 1].

    Behind a front it is the box of what the front makes of them, moved outwards by what float32 may round there.
    """
    low, high = (x.double() - eps - BALL).clamp(min=0), (x.double() + eps + BALL).clamp(max=1)
    if before:
        low, high = before(low), before(high)
        low, high = low - 4 * FLOAT32 * low.abs(), high + 4 * FLOAT32 * high.abs()
    middle, half = (low + high) / 2, (high - low) / 2
    return middle.transpose(1, 2)[:, None], half.transpose(1, 2)[:, None]
