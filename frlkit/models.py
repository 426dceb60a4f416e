"""Networks. All take images as floats in [0, 1], shape (N, channels, height, width), and return logits (N, C)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from frlkit import KitError


class LeNet5(nn.Module):
    """The report's LeNet-5: tanh, 2x2 average pooling, convolutions 1-6-16-120 (5x5), linear 120-84-10.

    61,706 parameters for ten classes. Images are (N, 1, 32, 32) floats in [0, 1]; a wrong shape raises `KitError`.
    """

    image_shape = (1, 32, 32)

    def __init__(self, num_classes: int = 10) -> None:
        super().__init__()
        if isinstance(num_classes, bool) or not isinstance(num_classes, int) or num_classes < 2:
            raise KitError(f"num_classes = {num_classes!r}: a network needs a whole number of classes, 2 or more")
        self.conv1 = nn.Conv2d(1, 6, 5)
        self.conv2 = nn.Conv2d(6, 16, 5)
        self.conv3 = nn.Conv2d(16, 120, 5)
        self.fc1 = nn.Linear(120, 84)
        self.fc2 = nn.Linear(84, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        check_images(images, self.image_shape)
        x = nn.functional.avg_pool2d(self.conv1(images).tanh(), 2)  # (N, 6, 14, 14)
        x = nn.functional.avg_pool2d(self.conv2(x).tanh(), 2)  # (N, 16, 5, 5)
        x = self.conv3(x).tanh().flatten(1)  # (N, 120)
        return self.fc2(self.fc1(x).tanh())


def check_images(images: Tensor, shape: tuple[int, int, int]) -> None:
    """Refuse a batch that is not (N, *shape) floating point, saying what came instead."""
    if images.ndim != 4 or tuple(images.shape[1:]) != shape or not images.is_floating_point():
        raise KitError(
            f"images of shape {tuple(images.shape)} and type {images.dtype} do not fit this network: "
            f"it takes floats in [0, 1] of shape (N, {', '.join(map(str, shape))})"
        )


MODELS = {"lenet5": LeNet5}


def build(name: str, num_classes: int = 10, seed: int | None = None) -> nn.Module:
    """Build a network by name, with its weights drawn from `seed` alone (the global random state is left as it was).

    Raises `KitError` for an unknown name or class count.
    """
    if name not in MODELS:
        raise KitError(f"model = {name!r} is unknown: use one of {', '.join(MODELS)}")
    with torch.random.fork_rng(devices=[], enabled=seed is not None):
        if seed is not None:
            torch.manual_seed(seed)
        return MODELS[name](num_classes)
