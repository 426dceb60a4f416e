"""The native path for LeNet-5 on CPU: found, built and checked on first use, and never needed.

``lenet5.cpp`` holds the arithmetic; this module builds it with the machine's C++ compiler (a few seconds, kept in the
user's cache), compares it with autograd, and offers it to `frlkit.attacks` and `frlkit.models`. Where it cannot be
built or loaded, or computes anything else than autograd, one warning says so and plain PyTorch runs.
``FRLKIT_KERNEL=off`` switches it off. It works with as many threads as `torch.get_num_threads` says.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from frlkit import KitError
from frlkit.kernels import cells

if TYPE_CHECKING:
    from frlkit.models import LeNet5

SOURCE = Path(__file__).with_name("lenet5.cpp")
LAYERS: dict[str, tuple[type[nn.Module], tuple[int, ...]]] = {  # each with the shape of its weight
    "conv1": (nn.Conv2d, (6, 1, 5, 5)),
    "conv2": (nn.Conv2d, (16, 6, 5, 5)),
    "conv3": (nn.Conv2d, (120, 16, 5, 5)),
    "fc1": (nn.Linear, (84, 120)),
    "fc2": (nn.Linear, (10, 84)),
}
LOSSES = ("ce", "kl", "margin")
FLAGS = ("-O3", "-std=c++20", "-shared", "-fPIC", "-pthread")
TARGETS = {  # what torch calls this processor -> images side by side, compiler's name for the instructions
    "AVX2": ("-DFRLKIT_LANES=8", "-march=x86-64-v3"),
    "AVX512": ("-DFRLKIT_LANES=16", "-march=x86-64-v4"),
}

_INT, _POINTER = ctypes.c_int, ctypes.c_void_p
_HEAD = (ctypes.c_int64, _INT, _POINTER)  # images, threads, network
SIGNATURES = {
    "frlkit_pgd": (*_HEAD, *[_POINTER] * 5, _INT, _INT, _POINTER),
    "frlkit_features": (*_HEAD, *[_POINTER] * 2),
    "frlkit_features_backward": (*_HEAD, *[_POINTER] * 4),
}

_library: ctypes.CDLL | None = None
_asked = False  # whether the one attempt of this process has been made


def available(model: nn.Module) -> bool:
    """Whether the native path serves this model: a ten-class LeNet-5 of float32 on CPU, a kernel that passed its check.

    The first call of a process builds and checks the kernel; later ones take some 30 microseconds. Where layers were
    replaced, pruned or reparametrised, or have hooks, the answer is no. Raises `KitError` where ``FRLKIT_KERNEL`` is
    neither auto nor off.
    """
    setting = os.environ.get("FRLKIT_KERNEL", "auto")
    if setting not in ("auto", "off"):
        raise KitError(f"FRLKIT_KERNEL = {setting!r}: use auto (the default) or off")
    from frlkit.models import LeNet5  # here, because `models` imports this module

    return setting == "auto" and type(model) is LeNet5 and _fits(model) and _load() is not None


def fast(model: nn.Module, image_gradient: bool = False) -> ModuleType | None:
    """What serves this model: this module, `cells` for any other intact LeNet-5, or None, plain autograd.

    Both modules have `pgd` and `features`. Only the features of `cells` have a gradient in the images.
    """
    if not image_gradient and available(model):
        return sys.modules[__name__]
    from frlkit.models import LeNet5

    return cells if type(model) is LeNet5 and _intact(model) else None


def describe(model: nn.Module) -> str:
    """Which path serves this model, for records: "native" or "portable"."""
    return "native" if available(model) else "portable"


def pgd(
    model: LeNet5, images: Tensor, start: Tensor, targets: Tensor, eps: Tensor, step_size: Tensor, steps: int, loss: str
) -> Tensor:
    """All steps of projected gradient descent for a batch: what `frlkit.attacks.pgd` does after its start.

    Each step is ``x <- clip(x + step_size * sign(d loss / d x))`` onto [images - eps, images + eps] and [0, 1], with
    sign(0) = 0.

    Parameters
    ----------
    model : one that `available` accepts
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
    network = _network([p for name in LAYERS for p in (getattr(model, name).weight, getattr(model, name).bias)])
    library.frlkit_pgd(count, torch.get_num_threads(), network, *inputs, steps, loss == "margin", result.data_ptr())
    return result


def features(model: LeNet5, images: Tensor) -> Tensor:
    """Both convolutional stages, ``pool(tanh(conv2(pool(tanh(conv1(images))))))``, each image's result flattened.

    Differentiable, once, in the weights and biases of conv1 and conv2 only.

    Parameters
    ----------
    model : one that `available` accepts
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


def _intact(model: nn.Module) -> bool:
    """Whether the model is what its class builds: no layer replaced, pruned or reparametrised, no hook on any."""
    hooks = "_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks"
    if any(getattr(part, kind) for part in model.modules() for kind in hooks):
        return False
    for name, (kind, _) in LAYERS.items():
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


def _fits(model: nn.Module) -> bool:
    """Whether the model's layers are what the native code takes them for."""
    if not _intact(model):
        return False
    for name, (_, shape) in LAYERS.items():
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
    return (ctypes.c_void_p * (2 * len(LAYERS)))(*(parameter.data_ptr() for parameter in parameters))


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
            _library = _build()
            with torch.inference_mode(False), torch.enable_grad():  # wherever the first call comes from
                fault = _self_check()
            if fault:
                raise RuntimeError(fault)
        except (OSError, RuntimeError, ValueError, AttributeError, subprocess.SubprocessError) as error:
            _library = None
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            warnings.warn(f"no native LeNet-5 kernel ({reason}): the portable PyTorch path runs", stacklevel=3)
    return _library


def _build() -> ctypes.CDLL:
    """Compile where no library of this source, compiler and processor is cached, and load it."""
    capability = torch.backends.cpu.get_cpu_capability()
    if platform.machine() not in ("x86_64", "AMD64") or capability not in TARGETS:
        raise RuntimeError(f"it needs an x86-64 processor with AVX2, this is {platform.machine()} with {capability}")
    compiler = shlex.split(os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++") or "")
    if not compiler:
        raise RuntimeError("there is no C++ compiler (c++ or g++) on the PATH")
    version = subprocess.run([*compiler, "--version"], capture_output=True, check=True, timeout=60).stdout
    flags = (*FLAGS, *TARGETS[capability])
    key = hashlib.sha256(b"\0".join([SOURCE.read_bytes(), version, *map(str.encode, flags)])).hexdigest()[:16]
    name = f"lenet5-{key}.so"
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "frlkit"
    if _is_whole(folder / name):
        return _open(folder / name)
    command = [*compiler, *flags, str(SOURCE)]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        return _compile(command, folder, name)
    except OSError:  # no cache to write to: build for this process alone; once loaded, the file may go
        with tempfile.TemporaryDirectory(prefix="frlkit-") as private:
            return _compile(command, Path(private), name)


def _compile(command: list[str], folder: Path, name: str) -> ctypes.CDLL:
    with tempfile.TemporaryDirectory(dir=folder) as scratch:  # rename at the end: two processes may build at once
        draft = Path(scratch) / name
        done = subprocess.run([*command, "-o", str(draft)], capture_output=True, timeout=300)
        if done.returncode != 0 or not draft.exists():
            said = done.stderr.decode(errors="replace").splitlines()
            reason = next((line for line in said if "error" in line), f"exit status {done.returncode}")
            raise RuntimeError(f"{command[0]} failed: {reason}")
        content = draft.read_bytes()
        draft.write_bytes(content + hashlib.sha256(content).digest())
        os.replace(draft, folder / name)
    return _open(folder / name)


def _is_whole(path: Path) -> bool:
    """Whether the file ends in its own SHA-256: loading a library cut short would kill the process, not raise."""
    try:
        content = path.read_bytes()
    except OSError:
        return False
    return hashlib.sha256(content[:-32]).digest() == content[-32:]


def _open(path: Path) -> ctypes.CDLL:
    library = ctypes.CDLL(str(path))
    for name, arguments in SIGNATURES.items():
        function = getattr(library, name)
        function.argtypes, function.restype = arguments, None
    return library


def _self_check() -> str:
    """Compare one attack step and the weights' gradient with autograd on random numbers; what is wrong, or nothing."""
    generator = torch.Generator().manual_seed(0)
    with torch.random.fork_rng(devices=[]):  # the layers' own initialisation draws from the user's random numbers
        model = _Reference(generator)
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
        moved = pgd(model, images, images, labels, steps, steps, 1, loss)  # type: ignore[arg-type]
        clear = gradient.abs() > 1e-4 * gradient.abs().max()
        expected = (images + 0.1 * gradient.sign()).clamp(0, 1)
        if not torch.allclose(moved[clear], expected[clear], atol=1e-6):
            return f"its {loss} attack differs from autograd's"
    weights = torch.rand(count, 400, generator=generator)
    parameters = [*model.conv1.parameters(), *model.conv2.parameters()]
    ours = torch.autograd.grad((features(model, images) * weights).sum(), parameters)  # type: ignore[arg-type]
    theirs = torch.autograd.grad((model.stages(images) * weights).sum(), parameters)
    if not all(
        torch.allclose(a, b, rtol=1e-3, atol=1e-3 * float(b.abs().max())) for a, b in zip(ours, theirs, strict=True)
    ):
        return "its weight gradients differ from autograd's"
    return ""


class _Reference(nn.Module):
    """LeNet-5 once more, in PyTorch's own layers: what the kernel must agree with, whatever `models` does."""

    def __init__(self, generator: torch.Generator) -> None:
        super().__init__()
        for name, (kind, shape) in LAYERS.items():
            layer = kind(shape[1], shape[0], *shape[2:3])
            fan_in = torch.tensor(shape[1:]).prod()
            layer.weight = nn.Parameter(torch.randn(shape, generator=generator) / fan_in.sqrt())
            layer.bias = nn.Parameter(torch.randn(shape[0], generator=generator) / 10)
            setattr(self, name, layer)

    def stages(self, images: Tensor) -> Tensor:
        x = F.avg_pool2d(self.conv1(images).tanh(), 2)
        return F.avg_pool2d(self.conv2(x).tanh(), 2).flatten(1)

    def forward(self, images: Tensor) -> Tensor:
        x = self.conv3(self.stages(images).view(-1, 16, 5, 5)).tanh().flatten(1)
        return self.fc2(self.fc1(x).tanh())
