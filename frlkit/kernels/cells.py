"""The portable path for LeNet-5: plain PyTorch, in which pooling and its strides have become channels.

A value of LeNet-5's pooled map is the mean of four outputs of a 5x5 convolution, each behind a tanh; each of the four
comes from a convolution with stride 2 at an offset of its own. Cut the image into square cells and lay the pixels of a
cell side by side as channels: these convolutions then have no stride, and filters that hold each 5x5 filter at the
offsets of all outputs in a cell.

    images        (N, 1, 32, 32)  in 4x4 cells:        (N, 16, 8, 8)
    convolution 1 in 2x2 kernels, 4 offsets x 24:      (N, 96, 7, 7), the mean over the offsets (N, 24, 7, 7)
                                                       is the pooled map (N, 6, 14, 14) in 2x2 cells
    convolution 2 in 3x3 kernels, 4 offsets x 16:      (N, 64, 5, 5), the mean over the offsets (N, 16, 5, 5)

An attack step has 2.2 times the multiplications of the plain layers and takes a quarter of their time under autograd
(19 and 77 microseconds an image, two threads of an AVX-512 EPYC, batches of 128): PyTorch's convolutions are made for
channels by the dozen, not for one or six. And tanh(z) is 2 sigmoid(2z) - 1, which PyTorch computes on CPU in a tenth of
the time of its tanh; the twos and ones vanish into the weights around it (which costs half-precision types two or three
bits). Attacks have their gradient written out, so that no graph is recorded.
benchmarks/epoch.py measures the whole with FRLKIT_KERNEL=off.
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from frlkit.models import LeNet5, check_images

LAYERS = {"conv1": nn.Conv2d, "conv2": nn.Conv2d, "conv3": nn.Conv2d, "fc1": nn.Linear, "fc2": nn.Linear}

GROUP = 128  # images treated together on CPU: more leave the cache, fewer waste the overhead of a call
SIDE = 4  # of the images' cells, in pixels; those of the first stage's pooled map have 2, those of the second's 1

# Fresh memory costs a page fault for every 1,024 numbers, which doubles the time of a training step. glibc's malloc
# hands freed memory back as soon as it exceeds twice the largest block freed so far, and takes 32 MiB at most for such
# a block: having freed one of this size, it keeps what a batch needs. Other allocators are not impressed.
torch.empty(31 * 2**20, dtype=torch.uint8, device="cpu")

sigmoid_backward = torch.ops.aten.sigmoid_backward  # (g, s) -> g s (1 - s), in one pass


def intact(model: nn.Module) -> bool:
    """Whether no part of the model has a hook, or a ``forward`` of its own."""
    hooks = "_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks"
    return not any("forward" in vars(part) or any(getattr(part, kind) for kind in hooks) for part in model.modules())


def serves(model: nn.Module) -> bool:
    """Whether it is a LeNet-5 as its class builds it: no layer replaced, pruned or reparametrised, no hook on any."""
    if type(model) is not LeNet5 or not intact(model):
        return False
    for name, kind in LAYERS.items():
        layer = getattr(model, name, None)
        if type(layer) is not kind:
            return False
        if not all(isinstance(tensor, nn.Parameter) for tensor in (layer.weight, layer.bias)):
            return False  # pruning leaves a plain tensor
        if kind is nn.Conv2d and not _is_plain(layer):
            return False
    return True


def _is_plain(layer: nn.Conv2d) -> bool:
    """Whether it is a 5x5 convolution with stride 1 and no padding."""
    shape = layer.kernel_size, layer.stride, layer.dilation, layer.groups
    return shape == ((5, 5), (1, 1), (1, 1), 1) and layer.padding in ((0, 0), "valid")


def into_cells(images: Tensor) -> Tensor:
    """(N, 1, 32, 32) to (N, 16, 8, 8), as `F.pixel_unshuffle` does, which leaves an empty batch as it is."""
    return images.unflatten(3, (-1, SIDE)).unflatten(2, (-1, SIDE)).permute(0, 1, 3, 5, 2, 4).flatten(1, 3)


def into_images(cells: Tensor) -> Tensor:
    """The inverse of `into_cells`."""
    return cells.unflatten(1, (1, SIDE, SIDE)).permute(0, 1, 4, 2, 5, 3).flatten(4, 5).flatten(2, 3)


def spread(weight: Tensor, side: int) -> Tensor:
    """A filter bank (out, in, 5, 5), for inputs in cells of side x side pixels, at all offsets of the outputs in one.

    Returns (4 * (side / 2)^2 * out, side^2 * in, k, k) with k = (4 + side) / side. A pooled cell has side / 2 pixels a
    side. Output channels run over the four offsets within a pooled value, then the pooled cell's pixels, then `out`;
    input channels over the pixels of a cell, then `in`.
    """
    out, channels = weight.shape[:2]
    k = (4 + side) // side
    taps = weight.flatten(2) @ _placements(side, weight.dtype, weight.device)
    taps = taps.view(out, channels, side**2, side**2, k, k).permute(2, 0, 3, 1, 4, 5)
    return taps.reshape(side**2 * out, side**2 * channels, k, k)


@functools.cache
@torch.inference_mode(False)  # whoever asks first: later ones may want gradients
def _placements(side: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """For each of a filter's 25 taps, in one row, the places it takes in the windows at all side^2 offsets."""
    pooled, k, margin = side // 2, (4 + side) // side, side - 1
    filters = torch.eye(25, dtype=dtype, device=device).view(25, 5, 5)
    windows = F.pad(filters, (margin,) * 4).unfold(1, 4 + side, 1).unfold(2, 4 + side, 1)  # the filter moves backwards
    windows = windows.flip(1, 2).view(25, pooled, 2, pooled, 2, k, side, k, side)
    return windows.permute(0, 2, 4, 1, 3, 6, 8, 5, 7).reshape(25, -1)


def convolutions(model: LeNet5) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Weight and bias of both convolutions on cells; the sigmoid of the result s has tanh = 2s - 1.

    The second takes the *sum* of the first's sigmoids over the four offsets, whose half less one is the pooled tanh.
    """
    one, two = model.conv1, model.conv2
    first = spread(2 * one.weight, SIDE), 2 * one.bias.repeat(SIDE**2)
    bias = two.bias - two.weight.sum((1, 2, 3))
    return first, (spread(two.weight, SIDE // 2), 2 * bias.repeat((SIDE // 2) ** 2))


def linears(model: LeNet5) -> list[tuple[Tensor, Tensor]]:
    """Weight and bias of the three layers behind, in the same manner; the last one's are those of the logits."""
    layers = []
    for layer, of_input, of_output in ((model.conv3, 0.5, 2), (model.fc1, 2, 2), (model.fc2, 2, 1)):
        weight = layer.weight.flatten(1)  # the input is of_input * sigmoids - 1
        layers.append((of_input * of_output * weight, of_output * (layer.bias - weight.sum(1))))
    return layers


def by_offset(x: Tensor) -> Tensor:
    """(N, 4 * channels, height, width) as (N, 4, channels, height, width)."""
    return x.unflatten(1, (4, -1))


def features(model: LeNet5, images: Tensor) -> Tensor:
    """What `native.features` does, on any device and in any floating type, differentiable in all it takes."""
    (weight1, bias1), (weight2, bias2) = convolutions(model)
    parts = []
    for group in images.split(_group(images)):
        x = by_offset(F.conv2d(into_cells(group), weight1, bias1)).sigmoid().sum(1)
        x = by_offset(F.conv2d(x, weight2, bias2)).sigmoid().sum(1)
        parts.append(x.flatten(1) / 2 - 1)
    return torch.cat(parts)


def classified(model: LeNet5, features: Tensor) -> Tensor:
    """The layers behind the features (N, 400): logits (N, classes). conv3's windows cover the map: it is linear."""
    x = F.linear(features, model.conv3.weight.flatten(1), model.conv3.bias).tanh()
    return model.fc2(model.fc1(x).tanh())


def forward(model: LeNet5, images: Tensor) -> Tensor:
    """Logits (N, classes) of images (N, 1, 32, 32), on any device, with the gradient of all it takes.

    Raises `KitError` for images of another shape.
    """
    check_images(images, model.image_shape)
    return classified(model, features(model, images))


class Network:
    """LeNet-5 with its weights as they are now, from cells (N, 16, 8, 8) to logits, and back to the cells' gradient."""

    def __init__(self, model: LeNet5) -> None:
        self.convolutions, self.linears = convolutions(model), linears(model)
        self.adjoints = [weight.transpose(0, 1).flip(2, 3).contiguous() for weight, _ in self.convolutions]
        self.sigmoids: list[Tensor] = []

    def forward(self, cells: Tensor) -> Tensor:
        """Logits (N, classes); keeps what `backward` needs."""
        x, self.sigmoids = cells, []
        for weight, bias in self.convolutions:
            self.sigmoids.append(by_offset(F.conv2d(x, weight, bias)).sigmoid_())
            x = self.sigmoids[-1].sum(1)
        x = x.flatten(1)
        for weight, bias in self.linears[:2]:
            x = F.linear(x, weight, bias).sigmoid_()
            self.sigmoids.append(x)
        return F.linear(x, *self.linears[2])

    def backward(self, gradient: Tensor) -> Tensor:
        """From the gradient of the logits to that of the cells, (N, 16, 8, 8), of the last `forward`, which it spends.

        The gradient of a sum over offsets is the same for each of the four: broadcast. That of a convolution's input
        is a convolution with the transposed, turned filters and a margin of zeros.
        """
        first, second, third, fourth = self.sigmoids
        for (weight, _), s in zip(self.linears[:0:-1], (fourth, third), strict=True):
            gradient = sigmoid_backward(gradient @ weight, s, grad_input=s)
        gradient = (gradient @ self.linears[0][0]).view_as(second[:, 0])
        for weight, s in zip(self.adjoints[::-1], (second, first), strict=True):
            wide = sigmoid_backward(gradient[:, None], s, grad_input=s).flatten(1, 2)
            gradient = F.conv2d(wide, weight, padding=weight.shape[-1] - 1)
        return gradient


@torch.no_grad()
def pgd(
    model: LeNet5, images: Tensor, start: Tensor, targets: Tensor, eps: Tensor, step_size: Tensor, steps: int, loss: str
) -> Tensor:
    """What `native.pgd` does, on any device and in any floating type, for any number of classes."""
    if loss != "kl":
        targets = F.one_hot(targets, len(model.fc2.bias)).to(images.dtype)
    network = Network(model)
    tensors = (images, start, targets, eps.view(-1, 1, 1, 1), step_size.view(-1, 1, 1, 1))
    groups = zip(*(tensor.split(_group(images)) for tensor in tensors), strict=True)
    return torch.cat([_pgd(network, *group, steps, loss) for group in groups])


def _pgd(
    network: Network, clean: Tensor, start: Tensor, target: Tensor, eps: Tensor, step: Tensor, steps: int, loss: str
) -> Tensor:
    centre, x = into_cells(clean), into_cells(start)
    low, high = (centre - eps).clamp_(min=0), (centre + eps).clamp_(max=1)
    for _ in range(steps):
        logits = network.forward(x)
        if loss == "margin":
            rival = logits.masked_fill(target > 0, -torch.inf).argmax(1, keepdim=True)
            gradient = torch.zeros_like(logits).scatter_(1, rival, 1) - target
        else:
            gradient = logits.softmax(1) - target
        x = torch.addcmul(x, step, network.backward(gradient).sign_())
        x = torch.minimum(torch.maximum(x, low), high)
    return into_images(x)


def _group(images: Tensor) -> int:
    return GROUP if images.device.type == "cpu" else max(len(images), 1)
