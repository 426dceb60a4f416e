"""Colour networks, faster under attack: batch normalisation as a part of the convolutions, images in their layout."""

from __future__ import annotations

import copy

import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from frlkit.kernels.cells import intact
from frlkit.models import BasicBlock, ConvNet, PreActivationBlock, ResNet

_OWN = {ResNet, BasicBlock, PreActivationBlock, nn.Sequential, nn.Conv2d, nn.BatchNorm2d, nn.Identity, nn.Linear}
_OWN |= {ConvNet, nn.ModuleList}
_FOLDED = {  # a part's convolutions, and the batch normalisation that follows each
    ResNet: (("stem", "stem_bn"),),
    BasicBlock: (("conv1", "bn1"), ("conv2", "bn2")),
    PreActivationBlock: (("conv1", "bn2"),),
    nn.Sequential: (("0", "1"),),  # a shortcut
}


def as_built(model: nn.Module) -> bool:
    """Whether it is a colour network of the kit's, as its class builds it: no other layer, no hook on any."""
    return type(model) in (ConvNet, ResNet) and intact(model) and {type(part) for part in model.modules()} <= _OWN


def folded(model: nn.Module) -> nn.Module:
    """A copy that computes the same in eval mode, but for rounding, with less batch normalisation; for attacks.

    Where one follows a convolution of a `ResNet` it becomes part of its weights. Any other model, and one whose layers
    were replaced, pruned or reparametrised, comes back as it is.
    """
    if type(model) is not ResNet or not as_built(model):
        return model
    copied = copy.deepcopy(model)
    for part in list(copied.modules()):
        for before, after in _FOLDED.get(type(part), ()):
            names = dict(part.named_children())
            if before in names and after in names and isinstance(names[after], nn.BatchNorm2d):
                _fold(names[before], names[after])
                setattr(part, after, nn.Identity())
    return copied


def _fold(convolution: nn.Conv2d, norm: nn.BatchNorm2d) -> None:
    statistics = (norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias)
    weights = fuse_conv_bn_weights(convolution.weight, convolution.bias, *statistics)
    convolution.weight, convolution.bias = weights


def layout(model: nn.Module) -> torch.memory_format:
    """The layout of the images that this model is fastest with: that of its convolutions' weights."""
    last = any(weight.ndim == 4 and not weight.is_contiguous() for weight in model.parameters())
    return torch.channels_last if last else torch.preserve_format
