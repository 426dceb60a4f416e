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

from collections import defaultdict
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

if TYPE_CHECKING:
    from frlkit.models import LeNet5

GROUP = 128  # images attacked together: more leave the cache, fewer waste the overhead of a call
OFFSETS = ((0, 0), (0, 1), (1, 0), (1, 1))  # of the four outputs of a tile
KEPT = 8  # stages whose arrays are kept for the next of the same size: a training step has four at a time

_spare: defaultdict[tuple[Any, ...], list[tuple[Tensor, ...]]] = defaultdict(list)


def spread(weight: Tensor) -> Tensor:
    """A filter bank (out, in, 5, 5) at the four offsets of 6x6 tiles: (4 * out, in * 36)."""
    padded = [F.pad(weight, (column, 1 - column, row, 1 - row)) for row, column in OFFSETS]
    return torch.stack(padded).flatten(2).flatten(0, 1)


def gather(weights: Tensor, shape: torch.Size) -> Tensor:
    """The adjoint of `spread`: from the gradient of (4 * out, in * 36) to that of (out, in, 5, 5)."""
    blocks = weights.view(4, shape[0], shape[1], 6, 6)
    return sum(blocks[k, :, :, r : r + 5, c : c + 5] for k, (r, c) in enumerate(OFFSETS))


def tiles(x: Tensor, out: Tensor | None = None) -> Tensor:
    """Copy the overlapping 6x6 tiles of (channels, side, side, N) into columns: (channels * 36, tiles * N)."""
    channels, side, _, count = x.shape
    half = (side - 4) // 2
    strides = (side * side * count, side * count, count, 2 * side * count, 2 * count, 1)
    overlapping = x.contiguous().as_strided((channels, 6, 6, half, half, count), strides)
    out = x.new_empty(channels * 36, half * half * count) if out is None else out
    out.view(overlapping.shape).copy_(overlapping)
    return out


def untile(columns: Tensor, channels: int, side: int, out: Tensor | None = None) -> Tensor:
    """The adjoint of `tiles`: add every tile's values where they came from, (channels, side, side, N)."""
    half, cells = (side - 4) // 2, side // 2
    pairs = columns.view(channels, 3, 2, 3, 2, half, half, -1)  # a tile is 3x3 cells of 2x2 pixels
    out = columns.new_empty(channels, side, side, pairs.shape[-1]) if out is None else out
    x = out.zero_().view(channels, cells, 2, cells, 2, -1)
    for row in range(3):
        for column in range(3):
            place = x[:, row : row + half, :, column : column + half]  # (channels, half, 2, half, 2, N)
            place.add_(pairs[:, row, :, column].permute(0, 3, 1, 4, 2, 5))
    return out


def tanh_(x: Tensor) -> Tensor:
    return x.mul_(2).sigmoid_().mul_(2).sub_(1)


class Stage:
    """Convolution, tanh and mean pooling, forward and backward, for weights that stay as they are meanwhile.

    With s = sigmoid(2z), tanh(z) is 2s - 1 and its slope 4 s (1 - s): the constants vanish into weights and pooling.
    Its large arrays pass from a stage that dies to the next of its size: fresh memory costs a page fault for every
    1,024 numbers, a third of a training step.
    """

    def __init__(self, weight: Tensor, bias: Tensor, side: int, count: int) -> None:
        self.out, self.channels = weight.shape[:2]
        self.side, self.half = side, (side - 4) // 2
        self.weight = spread(weight.detach())
        self.doubled = 2 * self.weight, 2 * bias.detach().repeat(4)[:, None]
        width = self.half * self.half * count
        rows = self.channels * 36, 4 * self.out, 4 * self.out
        shapes = (*((row, width) for row in rows), (self.channels, side, side, count))
        self.size = shapes, weight.dtype, weight.device
        try:
            self.arrays = _spare[self.size].pop()
        except IndexError:
            self.arrays = tuple(torch.empty(shape, dtype=weight.dtype, device=weight.device) for shape in shapes)
        self.columns, self.sigmoids, self.wide, self.input_gradient = self.arrays

    def __del__(self) -> None:
        if sum(map(len, _spare.values())) >= KEPT:
            _spare.clear()
        _spare[self.size].append(self.arrays)

    def forward(self, x: Tensor) -> Tensor:
        """(channels, side, side, N) -> pooled (out, half, half, N); keeps columns and sigmoids for the gradients."""
        weight, bias = self.doubled
        torch.addmm(bias, weight, tiles(x, self.columns), out=self.sigmoids).sigmoid_()
        one, two, three, four = self.sigmoids.view(4, -1)
        pooled = (one + two).add_(three).add_(four).mul_(0.5).sub_(1)
        return pooled.view(self.out, self.half, self.half, -1)

    def before_tanh(self, pooled_gradient: Tensor) -> Tensor:
        """From the gradient of the pooled values to that of the values before tanh, (4 * out, tiles * N)."""
        s, wide = self.sigmoids.view(4, -1), self.wide.view(4, -1)
        torch.ops.aten.sigmoid_backward(pooled_gradient.reshape(1, -1), s, grad_input=wide)  # g s (1 - s)
        return self.wide

    def of_input(self, wide: Tensor) -> Tensor:
        """From the gradient before tanh to that of the stage's input, (channels, side, side, N); columns are spent."""
        torch.mm(self.weight.T, wide, out=self.columns)
        return untile(self.columns, self.channels, self.side, self.input_gradient)


def both_stages(parameters: Sequence[Tensor], count: int) -> tuple[Stage, Stage]:
    """LeNet-5's two stages, from the weights and biases of conv1 and conv2, for batches of `count` images."""
    weight1, bias1, weight2, bias2 = parameters
    return Stage(weight1, bias1, 32, count), Stage(weight2, bias2, 14, count)


class Network:
    """LeNet-5 with the images innermost: (32 * 32, N) to logits (classes, N), and back to the images' gradient."""

    def __init__(self, model: LeNet5, count: int) -> None:
        self.stages = both_stages((*model.conv1.parameters(), *model.conv2.parameters()), count)
        layers = (model.conv3, model.fc1, model.fc2)
        self.linear = [(layer.weight.detach().flatten(1), layer.bias.detach()[:, None]) for layer in layers]
        self.hidden: list[Tensor] = []
        self.count = count

    def forward(self, images: Tensor) -> Tensor:
        """Logits (classes, N); keeps what `backward` needs."""
        x = self.stages[1].forward(self.stages[0].forward(images.view(1, 32, 32, -1))).flatten(0, 2)  # (400, N)
        self.hidden = []
        for weight, bias in self.linear[:2]:
            x = tanh_(torch.addmm(bias, weight, x))
            self.hidden.append(x)
        weight, bias = self.linear[2]
        return torch.addmm(bias, weight, x)

    def backward(self, gradient: Tensor) -> Tensor:
        """From the gradient of the logits to that of the images, (32 * 32, N), of the last `forward`."""
        first, second = self.stages
        for (weight, _), h in zip(self.linear[:0:-1], reversed(self.hidden), strict=True):
            gradient = (weight.T @ gradient).mul_(h.mul_(h).sub_(1)).neg_()
        gradient = second.of_input(second.before_tanh(self.linear[0][0].T @ gradient))
        return first.of_input(first.before_tanh(gradient)).view(32 * 32, -1)


@torch.no_grad()
def pgd(
    model: LeNet5, images: Tensor, start: Tensor, targets: Tensor, eps: Tensor, step_size: Tensor, steps: int, loss: str
) -> Tensor:
    """What `frlkit.kernels.pgd` does, on any device and in any floating type, for any number of classes."""
    if loss != "kl":
        targets = F.one_hot(targets, len(model.fc2.bias)).to(images.dtype)
    batches = zip(*(tensor.split(GROUP) for tensor in (images, start, targets, eps, step_size)), strict=True)
    network = Network(model, min(GROUP, len(images)))
    parts = []
    for clean, adversarial, target, radius, step in batches:
        if len(clean) != network.count:  # the last group
            network = Network(model, len(clean))
        parts.append(_pgd(network, clean, adversarial, target, radius, step, steps, loss))
    return torch.cat(parts) if parts else images.clone()


def _pgd(
    network: Network, clean: Tensor, start: Tensor, target: Tensor, eps: Tensor, step: Tensor, steps: int, loss: str
) -> Tensor:
    centre, x = (batch.flatten(1).T.contiguous() for batch in (clean, start))  # (1024, N)
    low, high, target = (centre - eps).clamp_(min=0), (centre + eps).clamp_(max=1), target.T
    for _ in range(steps):
        logits = network.forward(x)
        if loss == "margin":
            rival = logits.masked_fill(target > 0, -torch.inf).argmax(0, keepdim=True)
            gradient = torch.zeros_like(logits).scatter_(0, rival, 1) - target
        else:
            gradient = logits.softmax(0) - target
        x = torch.addcmul(x, step, network.backward(gradient).sign_())
        x = torch.minimum(torch.maximum(x, low), high)
    return x.T.reshape(clean.shape)


def features(model: LeNet5, images: Tensor) -> Tensor:
    """What `frlkit.kernels.features` does, on any device and in any floating type."""
    parameters = (*model.conv1.parameters(), *model.conv2.parameters())
    return torch.cat([_Features.apply(group, *parameters) for group in images.split(GROUP)])


class _Features(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, images: Tensor, *parameters: Tensor) -> Tensor:
        first, second = both_stages(parameters, len(images))
        pooled = second.forward(first.forward(images.flatten(1).T.reshape(1, 32, 32, -1)))
        context.stages = first, second
        context.save_for_backward(*parameters)  # torch then refuses where they changed since
        return pooled.flatten(0, 2).T.contiguous()  # (N, 400)

    @staticmethod
    @once_differentiable
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        weight1, _, weight2, _ = context.saved_tensors
        first, second = context.stages
        wide = second.before_tanh(gradient.T)
        of_second = gather(wide @ second.columns.T, weight2.shape), wide.sum(1).view(4, -1).sum(0)
        wide = first.before_tanh(second.of_input(wide))
        of_first = gather(wide @ first.columns.T, weight1.shape), wide.sum(1).view(4, -1).sum(0)
        del context.stages  # its columns are spent
        return None, *of_first, *of_second
