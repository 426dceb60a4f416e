"""Networks. All take images as floats in [0, 1], shape (N, channels, height, width), and return logits (N, C)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from frlkit import KitError, checkpoint, kernels


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
        if not images.requires_grad and (path := kernels.fast(self)):
            x = path.features(self, images)  # (N, 400)
        else:
            x = F.avg_pool2d(self.conv1(images).tanh(), 2)  # (N, 6, 14, 14)
            x = F.avg_pool2d(self.conv2(x).tanh(), 2).flatten(1)  # (N, 400)
        # conv3's 5x5 windows cover the whole 5x5 map: it is a linear layer, (N, 120)
        x = F.linear(x, self.conv3.weight.flatten(1), self.conv3.bias).tanh()
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


def load_weights(model: nn.Module, path: Path) -> None:
    """Fill a network from anyone's file of plain tensors, under the same names or, failing that, in the same order.

    The file may hold the tensors directly or under ``model`` or ``state_dict``. It is read with ``weights_only=True``.

    Raises
    ------
    KitError
        No such file, more than plain tensors in it, shapes or kinds that differ (the first is named), or values that
        are not finite.
    """
    content = checkpoint.load_plain(path)
    tensors = _tensors(content)
    wanted = model.state_dict()
    if set(tensors) != set(wanted):
        tensors = dict(zip(wanted, tensors.values(), strict=False)) if len(tensors) == len(wanted) else tensors
    if len(tensors) != len(wanted):
        raise KitError(f"{path} holds {len(tensors)} tensors: {type(model).__name__} has {len(wanted)}")
    for name, target in wanted.items():
        if tensors[name].shape != target.shape:
            found, shape = tuple(tensors[name].shape), tuple(target.shape)
            raise KitError(
                f"{path} does not fit {type(model).__name__}: {name} has shape {shape}, the file's is {found}"
            )
        if not _plain(tensors[name]) or tensors[name].is_floating_point() != target.is_floating_point():
            raise KitError(
                f"{path} has a tensor of type {tensors[name].dtype} that is not plain for {name}: save floats"
            )
        if not bool(tensors[name].isfinite().all()):
            raise KitError(f"{path} has NaN or infinite values in the tensor that stands for {name}")
    model.load_state_dict(tensors)


def _plain(tensor: Tensor) -> bool:
    return tensor.layout == torch.strided and not tensor.is_meta


def _tensors(content: Any) -> dict[str, Tensor]:
    """The tensors of a loaded file, in order; empty where it holds something else."""
    if not isinstance(content, Mapping):
        return {}
    for key in ("model", "state_dict"):
        if isinstance(content.get(key), Mapping):
            content = content[key]
    return {name: value for name, value in content.items() if isinstance(value, Tensor)}
