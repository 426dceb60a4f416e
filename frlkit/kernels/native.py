"""The native path for LeNet-5 on CPU: the arithmetic is C++ (``lenet5.cpp``), built, checked and called from here.

The library is built on first use and compared with autograd. Where it cannot be built or loaded, or computes anything
else, one warning says so and `cells` serves in its place. It works with `torch.get_num_threads` threads.
"""

from __future__ import annotations

import ctypes
import subprocess
import warnings
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from frlkit import KitError
from frlkit.kernels import build, cells
from frlkit.models import LeNet5, check_images

SHAPES = {  # of the weights that the native code takes
    "conv1": (6, 1, 5, 5),
    "conv2": (16, 6, 5, 5),
    "conv3": (120, 16, 5, 5),
    "fc1": (84, 120),
    "fc2": (10, 84),
}
LOSSES = ("ce", "kl", "margin")

_library: ctypes.CDLL | None = None
_asked = False  # whether the one attempt of this process has been made


def serves(model: nn.Module) -> bool:
    """Whether this is a model that the native code can take, and the code is there and right."""
    return _fits(model) and _load() is not None


def pgd(
    model: LeNet5, images: Tensor, start: Tensor, targets: Tensor, eps: Tensor, step_size: Tensor, steps: int, loss: str
) -> Tensor:
    """All steps of projected gradient descent for a batch: what `frlkit.attacks.pgd` does after its start.

    Each step is ``x <- clip(x + step_size * sign(d loss / d x))`` onto [images - eps, images + eps] and [0, 1], with
    sign(0) = 0.

    Parameters
    ----------
    model : one that `serves` accepts
    images, start : (N, 1, 32, 32), float32 in [0, 1]; the start lies in the ball
    targets : (N,), int64 labels; for ``loss="kl"`` float32 probabilities, (N, 10)
    eps, step_size : (N,), float32 in [0, 1]
    steps : number of steps, 0 or more
    loss : "ce" cross-entropy; "kl" KL(targets || softmax of the logits); "margin" largest other logit less the label's

    Returns
    -------
    Tensor
        (N, 1, 32, 32), float32, inside the ball and [0, 1].

    Raises
    ------
    KitError
        The model, a shape, a type, a label, the steps or the loss does not fit: the native code trusts its input.
    """
    library = _library_for(model)
    count = images.shape[:1].numel()
    if loss not in LOSSES:
        raise KitError(f"loss = {loss!r} is unknown: use one of {', '.join(LOSSES)}")
    if isinstance(steps, bool) or not isinstance(steps, int) or not 0 <= steps < 2**31:
        raise KitError(f"steps = {steps!r}: use a whole number, 0 or more")
    if loss != "kl":  # cross-entropy is KL(one-hot || p) up to a constant; the margin reads the label off it
        targets = _one_hot(targets, count)
    images, start = _plain("images", images, (count, 1, 32, 32)), _plain("start", start, (count, 1, 32, 32))
    targets = _plain("targets", targets, (count, 10))
    eps, step_size = _plain("eps", eps, (count,)), _plain("step_size", step_size, (count,))
    result = torch.empty_like(images)
    inputs = [tensor.data_ptr() for tensor in (images, start, targets, eps, step_size)]
    network = _network([p for name in SHAPES for p in (getattr(model, name).weight, getattr(model, name).bias)])
    library.frlkit_pgd(count, torch.get_num_threads(), network, *inputs, steps, loss == "margin", result.data_ptr())
    return result


def forward(model: LeNet5, images: Tensor) -> Tensor:
    """Logits (N, 10) of images (N, 1, 32, 32), float32: differentiable, once, in every weight, not in the images.

    Raises `KitError` where `features` does.
    """
    check_images(images, model.image_shape)
    return cells.classified(model, features(model, images))


def features(model: LeNet5, images: Tensor) -> Tensor:
    """Both convolutional stages, ``pool(tanh(conv2(pool(tanh(conv1(images))))))``, each image's result flattened.

    Differentiable, once, in the weights and biases of conv1 and conv2 only.

    Parameters
    ----------
    model : one that `serves` accepts
    images : (N, 1, 32, 32), float32

    Returns
    -------
    Tensor
        (N, 400), float32, in [-1, 1]; the order is that of ``flatten(1)`` on (N, 16, 5, 5).

    Raises
    ------
    KitError
        The model, shape or type does not fit, or `images` asks for a gradient, which this path does not give.
    """
    library = _library_for(model)
    if images.requires_grad:
        raise KitError("images require a gradient: the native features are differentiable in the weights only")
    images = _plain("images", images, (images.shape[:1].numel(), 1, 32, 32))
    return _Features.apply(library, images, *model.conv1.parameters(), *model.conv2.parameters())


class _Features(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, library: ctypes.CDLL, images: Tensor, *parameters: Tensor) -> Tensor:
        context.library = library
        context.save_for_backward(images, *parameters)
        result = images.new_empty(len(images), 400)
        head = (len(images), torch.get_num_threads(), _network(parameters))
        library.frlkit_features(*head, images.data_ptr(), result.data_ptr())
        return result

    @staticmethod
    @once_differentiable
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        images, *parameters = context.saved_tensors  # as they were in forward: torch refuses if they changed since
        sizes = [parameter.numel() for parameter in parameters]
        groups = -(-len(images) // context.library.frlkit_lanes())
        scratch, total = images.new_empty(groups, sum(sizes)), images.new_empty(sum(sizes))
        gradient = _plain("gradient", gradient, (len(images), 400))
        head = (len(images), torch.get_num_threads(), _network(parameters))
        buffers = [tensor.data_ptr() for tensor in (images, gradient, scratch, total)]
        context.library.frlkit_features_backward(*head, *buffers)
        parts = zip(total.split(sizes), parameters, strict=True)
        return None, None, *(part.view_as(parameter) for part, parameter in parts)


def _fits(model: nn.Module) -> bool:
    """Whether the model's layers are what the native code takes them for."""
    if not cells.serves(model):
        return False
    for name, shape in SHAPES.items():
        layer = getattr(model, name)
        for tensor, wanted in ((layer.weight, shape), (layer.bias, shape[:1])):
            if tensor.device.type != "cpu" or tensor.dtype is not torch.float32:
                return False
            if tensor.shape != wanted or not tensor.is_contiguous():
                return False
    return True


def _plain(name: str, tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
    if tensor.shape != shape or tensor.dtype != torch.float32 or tensor.device.type != "cpu":
        found = f"shape {tuple(tensor.shape)}, {tensor.dtype} on {tensor.device}"
        raise KitError(f"{name} of {found}: the native kernel takes shape {shape}, torch.float32 on cpu")
    return tensor.detach().contiguous()


def _one_hot(labels: Tensor, count: int) -> Tensor:
    if labels.shape != (count,) or labels.dtype != torch.int64:
        raise KitError(f"targets of shape {tuple(labels.shape)}, {labels.dtype}: give {count} int64 labels")
    unknown = labels[(labels < 0) | (labels > 9)]
    if len(unknown):
        raise KitError(f"targets holds the label {int(unknown[0])}: this network's labels are 0 to 9")
    return F.one_hot(labels, 10).float()


def _network(parameters: Sequence[Tensor]) -> Any:
    """The C++ ``Network`` of contiguous parameters in their order; null for the layers after the last one given."""
    return (ctypes.c_void_p * (2 * len(SHAPES)))(*(parameter.data_ptr() for parameter in parameters))


def _library_for(model: nn.Module) -> ctypes.CDLL:
    library = _load() if _fits(model) else None
    if library is None:
        raise KitError("the native kernel does not serve this model here: ask kernels.available(model) first")
    return library


def _load() -> ctypes.CDLL | None:
    """The checked library, built on the first call of the process; after one failure, None for good."""
    global _library, _asked
    if not _asked:
        _asked = True
        try:
            _library = build.build()
            with torch.inference_mode(False), torch.enable_grad():  # wherever the first call comes from
                fault = _self_check()
            if fault:
                raise RuntimeError(fault)
        except (OSError, RuntimeError, ValueError, AttributeError, subprocess.SubprocessError) as error:
            _library = None
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            warnings.warn(f"no native LeNet-5 kernel ({reason}): the portable PyTorch path runs", stacklevel=4)
    return _library


def _self_check() -> str:
    """Compare one attack step and the weights' gradients with autograd on random numbers; what is wrong, or nothing."""
    generator = torch.Generator().manual_seed(0)
    with torch.random.fork_rng(devices=[]):  # the layers' own initialisation draws from the user's random numbers
        model = LeNet5()
    with torch.no_grad():  # larger than at birth: gradients that differ from pixel to pixel
        for p in model.parameters():
            p.normal_(std=0.1 if p.ndim == 1 else p[0].numel() ** -0.5, generator=generator)
    count = 19  # no multiple of a register's width
    images = torch.rand(count, 1, 32, 32, generator=generator)
    labels = torch.arange(count) % 10
    for loss in ("ce", "margin"):
        pixels = images.clone().requires_grad_()
        logits = model(pixels)
        own = logits.gather(1, labels[:, None])
        rival = logits.scatter(1, labels[:, None], -torch.inf).amax(1)
        objective = F.cross_entropy(logits, labels, reduction="sum") if loss == "ce" else (rival - own[:, 0]).sum()
        (gradient,) = torch.autograd.grad(objective, pixels)
        steps = torch.full((count,), 0.1)
        moved = pgd(model, images, images, labels, steps, steps, 1, loss)
        clear = gradient.abs() > 1e-4 * gradient.abs().max()
        expected = (images + 0.1 * gradient.sign()).clamp(0, 1)
        if not torch.allclose(moved[clear], expected[clear], atol=1e-6):
            return f"its {loss} attack differs from autograd's"
    weights, parameters = torch.rand(count, 10, generator=generator), list(model.parameters())
    ours, theirs = (
        torch.autograd.grad((z * weights).sum(), parameters) for z in (forward(model, images), model(images))
    )
    if not all(
        torch.allclose(a, b, rtol=1e-3, atol=1e-3 * float(b.abs().max())) for a, b in zip(ours, theirs, strict=True)
    ):
        return "its weight gradients differ from autograd's"
    return ""
