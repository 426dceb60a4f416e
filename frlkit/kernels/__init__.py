"""Networks, fast: for LeNet-5 two ways to the numbers of its plain layers, for attacks and for training.

`native` is C++ for one CPU, `cells` PyTorch rearranged for any device. Each has ``forward(model, images)``, the logits
with their gradients, and ``pgd``, all steps of an attack; `fast` says which of them serves a model. The core calls
`fast` for one, and what it calls is never needed: where neither serves, the model's own layers run. Colour networks are
`folded` for an attack, whose images have their `layout`; on a GPU the steps of training's attacks are replayed
(`graphs`).
"""

from __future__ import annotations

import os
from types import ModuleType

import torch
from torch import nn

from frlkit import KitError
from frlkit.kernels import cells, graphs, native
from frlkit.kernels.colour import folded, layout

__all__ = ["available", "describe", "fast", "folded", "graphs", "layout"]


def fast(model: nn.Module, image_gradient: bool = False) -> ModuleType | None:
    """What serves this model: `native`, or `cells` for any other intact LeNet-5, or None, plain autograd.

    Only the logits of `cells` have a gradient in the images.
    """
    if not image_gradient and available(model):
        return native
    return cells if cells.serves(model) else None


def available(model: nn.Module) -> bool:
    """Whether the native path serves this model: a ten-class LeNet-5 of float32 on CPU, a kernel that passed its check.

    The first call of a process builds and checks the kernel; later ones take some 30 microseconds. Where layers were
    replaced, pruned or reparametrised, or have hooks, the answer is no. Raises `KitError` where ``FRLKIT_KERNEL`` is
    neither auto nor off.
    """
    setting = os.environ.get("FRLKIT_KERNEL", "auto")
    if setting not in ("auto", "off"):
        raise KitError(f"FRLKIT_KERNEL = {setting!r}: use auto (the default) or off")
    return setting == "auto" and native.serves(model)


def describe(model: nn.Module) -> str:
    """Which path serves this model, for records: "native" or "portable", and on a GPU on which."""
    weights = next(model.parameters(), None)
    if weights is not None and weights.is_cuda:
        return f"portable, {torch.cuda.get_device_name(weights.device)}"
    return "native" if available(model) else "portable"
