"""Networks. All take images as floats in [0, 1], shape (N, channels, height, width), and return logits (N, C)."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from frlkit import KitError

SIZE = 32  # every network's input side in pixels
RESNET_WIDTHS = (64, 64, 128, 256, 512)


class LeNet5(nn.Module):
    """The report's LeNet-5: tanh, 2x2 average pooling, convolutions 1-6-16-120 (5x5), linear 120-84-10.

    61,706 parameters for ten classes. Images are (N, 1, 32, 32) floats in [0, 1]; a wrong shape raises `KitError`.
    """

    image_shape = (1, 32, 32)

    def __init__(self, num_classes: int = 10) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 6, 5)
        self.conv2 = nn.Conv2d(6, 16, 5)
        self.conv3 = nn.Conv2d(16, 120, 5)
        self.fc1 = nn.Linear(120, 84)
        self.fc2 = nn.Linear(84, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        check_images(images, self.image_shape)
        x = F.avg_pool2d(self.conv1(images).tanh(), 2)  # (N, 6, 14, 14)
        x = F.avg_pool2d(self.conv2(x).tanh(), 2).flatten(1)  # (N, 400)
        # conv3's 5x5 windows cover the whole 5x5 map: it is a linear layer, (N, 120)
        x = F.linear(x, self.conv3.weight.flatten(1), self.conv3.bias).tanh()
        return self.fc2(self.fc1(x).tanh())


class ConvNet(nn.Module):
    """The plain CNNs of the paper's GTSRB experiments: 3x3 convolutions with ReLU and 2x2 max pooling, then one linear.

    The paper gives the number of convolutions, 3 or 4, and no widths; here they double from 32. Images are
    (N, 3, 32, 32). 113,738 parameters for 3 convolutions and ten classes, 398,666 for four. ReLU follows the pooling,
    a quarter of the work: both are monotone, so values and gradients are those of the other order, bit for bit.
    """

    image_shape = (3, 32, 32)

    def __init__(self, num_classes: int, depth: int) -> None:
        super().__init__()
        widths = [self.image_shape[0], *(32 * 2**number for number in range(depth))]
        self.convolutions = nn.ModuleList(
            nn.Conv2d(before, after, 3, padding=1) for before, after in zip(widths, widths[1:], strict=False)
        )
        self.linear = nn.Linear(widths[-1] * (SIZE >> depth) ** 2, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        check_images(images, self.image_shape)
        for convolution in self.convolutions:
            images = F.max_pool2d(convolution(images), 2).relu()
        return self.linear(images.flatten(1))


class BasicBlock(nn.Module):
    """conv-BN-ReLU-conv-BN, plus the input, ReLU (He et al., 2016a)."""

    def __init__(self, before: int, after: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = _convolution(before, after, stride), nn.BatchNorm2d(after)
        self.conv2, self.bn2 = _convolution(after, after), nn.BatchNorm2d(after)
        self.shortcut = nn.Sequential()
        if stride > 1 or before != after:
            self.shortcut = nn.Sequential(nn.Conv2d(before, after, 1, stride, bias=False), nn.BatchNorm2d(after))

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(self.bn1(self.conv1(x)).relu()))
        return (y + self.shortcut(x)).relu()


class PreActivationBlock(nn.Module):
    """BN-ReLU-conv-BN-ReLU-conv, plus the input (He et al., 2016b); a new shape is projected after the first ReLU."""

    def __init__(self, before: int, after: int, stride: int) -> None:
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(before), _convolution(before, after, stride)
        self.bn2, self.conv2 = nn.BatchNorm2d(after), _convolution(after, after)
        self.shortcut = None
        if stride > 1 or before != after:
            self.shortcut = nn.Conv2d(before, after, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn1(x).relu()
        identity = x if self.shortcut is None else self.shortcut(y)
        return self.conv2(self.bn2(self.conv1(y)).relu()) + identity


class ResNet(nn.Module):
    """Residual networks for 32x32 images: a 3x3 convolution, groups of blocks that halve the side, mean, linear.

    `widths` has the first convolution's width and then each group's, `blocks` the number of blocks in each group.
    Attacks and evaluation run in eval mode, so that *training* batches alone move batch normalisation's statistics.
    """

    image_shape = (3, 32, 32)

    def __init__(
        self, num_classes: int, block: type[nn.Module], blocks: Sequence[int], widths: Sequence[int] = RESNET_WIDTHS
    ) -> None:
        super().__init__()
        self.stem = _convolution(self.image_shape[0], widths[0])
        self.preactivation = block is PreActivationBlock
        self.stem_bn = nn.Identity() if self.preactivation else nn.BatchNorm2d(widths[0])
        layers, before = [], widths[0]
        for group, (count, after) in enumerate(zip(blocks, widths[1:], strict=True)):
            for number in range(count):
                layers.append(block(before, after, stride=2 if group and not number else 1))
                before = after
        self.blocks = nn.Sequential(*layers)
        self.last_bn = nn.BatchNorm2d(before) if self.preactivation else nn.Identity()
        self.last_relu = self.preactivation
        self.linear = nn.Linear(before, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        check_images(images, self.image_shape)
        x = self.stem_bn(self.stem(images))
        x = self.last_bn(self.blocks(x if self.preactivation else x.relu()))
        return self.linear((x.relu() if self.last_relu else x).mean((2, 3)))


def _convolution(before: int, after: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(before, after, 3, stride, padding=1, bias=False)


def check_images(images: Tensor, shape: tuple[int, int, int]) -> None:
    """Refuse a batch that is not (N, *shape) floating point, saying what came instead."""
    if images.ndim != 4 or tuple(images.shape[1:]) != shape or not images.is_floating_point():
        raise KitError(
            f"images of shape {tuple(images.shape)} and type {images.dtype} do not fit this network: "
            f"it takes floats in [0, 1] of shape (N, {', '.join(map(str, shape))})"
        )


_preact, _basic = (partial(ResNet, block=block) for block in (PreActivationBlock, BasicBlock))
_W16 = (16, 16, 32, 64, 128)
#: Networks by name, in titles and as functions of the number of classes. All but LeNet-5 take colour images.
_NETWORKS: dict[str, tuple[str, Callable[[int], nn.Module]]] = {
    "lenet5": ("LeNet-5", LeNet5),
    "cnn3": ("3-layer CNN", partial(ConvNet, depth=3)),
    "cnn4": ("4-layer CNN", partial(ConvNet, depth=4)),
    "preact_resnet18": ("PreAct-ResNet-18", partial(_preact, blocks=(2, 2, 2, 2))),
    "preact_resnet18_w16": ("PreAct-ResNet-18 of width 16", partial(_preact, blocks=(2, 2, 2, 2), widths=_W16)),
    "resnet18": ("ResNet-18", partial(_basic, blocks=(2, 2, 2, 2))),
    "resnet34": ("ResNet-34", partial(_basic, blocks=(3, 4, 6, 3))),
    "wrn_28_10": ("WRN-28-10", partial(_preact, blocks=(4, 4, 4), widths=(16, 160, 320, 640))),
}
TITLES = {name: title for name, (title, _) in _NETWORKS.items()}
MODELS = {name: network for name, (_, network) in _NETWORKS.items()}
_lent: dict[str, nn.Module] = {}


def lend(name: str, model: nn.Module) -> str:
    """Let runs train copies of anyone's network, its weights included; returns the name that `build` has for them."""
    _lent[f"own:{name}"] = model
    return f"own:{name}"


def elsewhere(name: str) -> bool:
    """Whether this is the name of anyone's own network that is not lent here."""
    return name.startswith("own:") and name not in _lent


def known(name: str) -> str:
    """The name, where it is one of `MODELS` or lent; raises `KitError` for another."""
    if name not in MODELS and name not in _lent:
        lent = " (one's own has to be lent anew in every process)" if elsewhere(name) else ""
        raise KitError(f"model = {name!r} is unknown: use one of {', '.join(MODELS)}{lent}")
    return name


def build(name: str, num_classes: int = 10, seed: int | None = None) -> nn.Module:
    """A network by name, its weights drawn from `seed` alone: the global random state is left as it was.
    Raises `KitError` for an unknown name or class count."""
    if known(name) in _lent:
        return copy.deepcopy(_lent[name])
    if isinstance(num_classes, bool) or not isinstance(num_classes, int) or num_classes < 2:
        raise KitError(f"num_classes = {num_classes!r}: a network needs a whole number of classes, 2 or more")
    with torch.random.fork_rng(devices=[], enabled=seed is not None):
        if seed is not None:
            torch.manual_seed(seed)
        return MODELS[name](num_classes)


def nonfinite(weights: Mapping[str, Any]) -> str:
    """The first of these tensors by name that has NaN or infinity; "" where none has."""
    tensors = ((name, values) for name, values in weights.items() if isinstance(values, Tensor))
    return next((name for name, values in tensors if not bool(values.isfinite().all())), "")


def place(model: nn.Module, device: str | torch.device) -> nn.Module:
    """The model on a device; colour networks with channels last, the layout that convolutions of many channels want."""
    return model.to(device, memory_format=torch.preserve_format if isinstance(model, LeNet5) else torch.channels_last)
