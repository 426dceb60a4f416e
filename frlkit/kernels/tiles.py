"""The portable path for LeNet-5: plain PyTorch, the images of a batch innermost, a convolution as one matrix product.

Layout. Activations are (channels, rows, columns, images): whatever happens to a pixel happens to a whole contiguous
row of images. A 5x5 convolution, its tanh and the 2x2 mean pooling behind it work on 6x6 tiles that overlap by four:
one tile holds all that four neighbouring outputs, one pooled value, see. Copied out, the tiles of a stage are the
columns of a (channels * 36, tiles * images) matrix, and the convolution is ONE product with a (4 * outputs,
channels * 36) matrix that holds each 5x5 filter at its four offsets. Pooling is then the mean of four blocks of rows.
That is 1.4 times the multiplications of a convolution, in products large enough to run at the machine's full speed.

The gradient of the images is written out by hand, so no graph is recorded in an attack. tanh(z) is taken as
2 sigmoid(2z) - 1, which PyTorch vectorises better on CPU. benchmarks/epoch.py measures it with FRLKIT_KERNEL=off.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

if TYPE_CHECKING:
    from frlkit.models import LeNet5

OFFSETS = ((0, 0), (0, 1), (1, 0), (1, 1))  # of the four outputs of a tile


def spread(weight: Tensor) -> Tensor:
    """A filter bank (out, in, 5, 5) at the four offsets of 6x6 tiles: (4 * out, in * 36)."""
    padded = [F.pad(weight, (column, 1 - column, row, 1 - row)) for row, column in OFFSETS]
    return torch.stack(padded).flatten(2).flatten(0, 1)


def gather(weights: Tensor, shape: torch.Size) -> Tensor:
    """The adjoint of `spread`: from the gradient of (4 * out, in * 36) to that of (out, in, 5, 5)."""
    blocks = weights.view(4, shape[0], shape[1], 6, 6)
    return sum(blocks[k, :, :, r : r + 5, c : c + 5] for k, (r, c) in enumerate(OFFSETS))


def tiles(x: Tensor) -> Tensor:
    """Copy the overlapping 6x6 tiles of (channels, side, side, N) into columns: (channels * 36, tiles * N)."""
    channels, side, _, count = x.shape
    half = (side - 4) // 2
    strides = (side * side * count, side * count, count, 2 * side * count, 2 * count, 1)
    return x.contiguous().as_strided((channels, 6, 6, half, half, count), strides).reshape(channels * 36, -1)


def untile(columns: Tensor, channels: int, side: int) -> Tensor:
    """The adjoint of `tiles`: add every tile's values where they came from, (channels, side, side, N)."""
    half, cells = (side - 4) // 2, side // 2
    pairs = columns.view(channels, 3, 2, 3, 2, half, half, -1)  # a tile is 3x3 cells of 2x2 pixels
    x = columns.new_zeros(channels, cells, 2, cells, 2, pairs.shape[-1])
    for row in range(3):
        for column in range(3):
            place = x[:, row : row + half, :, column : column + half]  # (channels, half, 2, half, 2, N)
            place.add_(pairs[:, row, :, column].permute(0, 3, 1, 4, 2, 5))
    return x.view(channels, side, side, -1)


def tanh_(x: Tensor) -> Tensor:
    return x.mul_(2).sigmoid_().mul_(2).sub_(1)


class Stage:
    """Convolution, tanh and mean pooling, forward and backward, for weights that stay as they are meanwhile.

    With s = sigmoid(2z), tanh(z) is 2s - 1 and its slope 4 s (1 - s): the constants vanish into weights and pooling.
    """

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        self.out = len(bias)
        self.weight = spread(weight.detach())
        self.doubled = 2 * self.weight, 2 * bias.detach().repeat(4)[:, None]

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(channels, side, side, N) -> pooled (out, half, half, N); and columns and sigmoids, for the gradients."""
        half = (x.shape[1] - 4) // 2
        columns = tiles(x)
        weight, bias = self.doubled
        sigmoids = torch.addmm(bias, weight, columns).sigmoid_()
        one, two, three, four = sigmoids.view(4, -1)
        pooled = (one + two).add_(three).add_(four).mul_(0.5).sub_(1)
        return pooled.view(self.out, half, half, -1), columns, sigmoids

    def before_tanh(self, pooled_gradient: Tensor, sigmoids: Tensor) -> Tensor:
        """From the gradient of the pooled values to that of the values before tanh, (4 * out, tiles * N)."""
        wide = torch.ops.aten.sigmoid_backward(pooled_gradient.reshape(1, -1), sigmoids.view(4, -1))  # g s (1 - s)
        return wide.view(sigmoids.shape)


class Network:
    """LeNet-5 with the images innermost: (32 * 32, N) to logits (classes, N), and back to the images' gradient."""

    def __init__(self, model: LeNet5) -> None:
        self.stages = [Stage(layer.weight, layer.bias) for layer in (model.conv1, model.conv2)]
        layers = (model.conv3, model.fc1, model.fc2)
        self.linear = [(layer.weight.detach().flatten(1), layer.bias.detach()[:, None]) for layer in layers]

    def forward(self, images: Tensor) -> tuple[Tensor, list[Any]]:
        """Logits (classes, N), and what `backward` needs."""
        first, _, sigmoids1 = self.stages[0].forward(images.view(1, 32, 32, -1))
        second, _, sigmoids2 = self.stages[1].forward(first)
        hidden = [second.flatten(0, 2)]  # (400, N)
        for weight, bias in self.linear[:2]:
            hidden.append(tanh_(torch.addmm(bias, weight, hidden[-1])))
        weight, bias = self.linear[2]
        return torch.addmm(bias, weight, hidden[-1]), [sigmoids1, sigmoids2, *hidden[1:]]

    def backward(self, gradient: Tensor, kept: list[Any]) -> Tensor:
        """From the gradient of the logits to that of the images, (32 * 32, N)."""
        sigmoids1, sigmoids2, *hidden = kept
        for (weight, _), h in zip(self.linear[:0:-1], reversed(hidden), strict=True):
            gradient = (weight.T @ gradient).mul_(h.mul_(h).sub_(1)).neg_()
        gradient = self.linear[0][0].T @ gradient  # (400, N)
        gradient = untile(self.stages[1].weight.T @ self.stages[1].before_tanh(gradient, sigmoids2), 6, 14)
        gradient = self.stages[0].weight.T @ self.stages[0].before_tanh(gradient, sigmoids1)
        return untile(gradient, 1, 32).view(32 * 32, -1)


@torch.no_grad()
def pgd(
    model: LeNet5, images: Tensor, start: Tensor, targets: Tensor, eps: Tensor, step_size: Tensor, steps: int, loss: str
) -> Tensor:
    """What `frlkit.kernels.pgd` does, on any device and in any floating type, for any number of classes."""
    network = Network(model)
    clean, x = (batch.flatten(1).T.contiguous() for batch in (images, start))  # (1024, N)
    low, high = (clean - eps).clamp_(min=0), (clean + eps).clamp_(max=1)
    if loss != "kl":
        targets = F.one_hot(targets, len(model.fc2.bias))
    targets = targets.T.to(x.dtype)
    for _ in range(steps):
        logits, kept = network.forward(x)
        if loss == "margin":
            rival = logits.masked_fill(targets > 0, -torch.inf).argmax(0, keepdim=True)
            gradient = torch.zeros_like(logits).scatter_(0, rival, 1) - targets
        else:
            gradient = logits.softmax(0) - targets
        x = torch.addcmul(x, step_size, network.backward(gradient, kept).sign_())
        x = torch.minimum(torch.maximum(x, low), high)
    return x.T.reshape(images.shape)


def features(model: LeNet5, images: Tensor) -> Tensor:
    """What `frlkit.kernels.features` does, on any device and in any floating type."""
    return _Features.apply(images, model.conv1.weight, model.conv1.bias, model.conv2.weight, model.conv2.bias)


class _Features(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, images: Tensor, *parameters: Tensor) -> Tensor:
        context.stages = Stage(*parameters[:2]), Stage(*parameters[2:])
        first, *kept1 = context.stages[0].forward(images.flatten(1).T.reshape(1, 32, 32, -1))
        second, *kept2 = context.stages[1].forward(first)
        context.save_for_backward(*kept1, *kept2, *parameters)
        return second.flatten(0, 2).T.contiguous()  # (N, 400)

    @staticmethod
    @once_differentiable
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        columns1, sigmoids1, columns2, sigmoids2, weight1, _, weight2, _ = context.saved_tensors
        stage1, stage2 = context.stages
        gradient = stage2.before_tanh(gradient.T, sigmoids2)
        own2 = gather(gradient @ columns2.T, weight2.shape), gradient.sum(1).view(4, -1).sum(0)
        gradient = stage1.before_tanh(untile(stage2.weight.T @ gradient, 6, 14), sigmoids1)
        own1 = gather(gradient @ columns1.T, weight1.shape), gradient.sum(1).view(4, -1).sum(0)
        return None, *own1, *own2
