"""The native path for LeNet-5 on CPU: found, built and checked on first use, and never needed.

``lenet5.cpp`` holds the arithmetic; this module builds it with the machine's C++ compiler (under five seconds, kept in
the user's cache), compares it with autograd, and offers it to `frlkit.attacks` and `frlkit.models`. Where it cannot be
built or loaded, or computes anything else than autograd, one warning says so and plain PyTorch runs.
``FRLKIT_KERNEL=off`` switches it off.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from frlkit import KitError

if TYPE_CHECKING:
    from frlkit.models import LeNet5

SOURCE = Path(__file__).with_name("lenet5.cpp")
LAYERS = ("conv1", "conv2", "conv3", "fc1", "fc2")
SHAPES = ((6, 1, 5, 5), (16, 6, 5, 5), (120, 16, 5, 5), (84, 120), (10, 84))  # of the weights
LOSSES = ("ce", "kl", "margin")
FLAGS = ("-O3", "-std=c++20", "-shared", "-fPIC", "-pthread")
TARGETS = {  # what torch calls this processor -> images side by side, compiler's name for the instructions
    "AVX2": ("-DFRLKIT_LANES=8", "-march=x86-64-v3"),
    "AVX512": ("-DFRLKIT_LANES=16", "-march=x86-64-v4"),
}

_library: ctypes.CDLL | None = None
_asked = False  # whether the one attempt of this process has been made


def available(model: nn.Module) -> bool:
    """Whether the native path serves this model: a ten-class LeNet-5 of float32 on CPU, a kernel that passed its check.

    Raises `KitError` where ``FRLKIT_KERNEL`` is neither auto nor off.
    """
    setting = os.environ.get("FRLKIT_KERNEL", "auto")
    if setting not in ("auto", "off"):
        raise KitError(f"FRLKIT_KERNEL = {setting!r}: use auto (the default) or off")
    from frlkit.models import LeNet5  # here, because `models` imports this module

    return setting == "auto" and type(model) is LeNet5 and _fits(model) and _load() is not None


def describe(model: nn.Module) -> str:
    """Which path serves this model, for records: "native" or "portable"."""
    return "native" if available(model) else "portable"


def pgd(
    model: LeNet5, images: Tensor, start: Tensor, targets: Tensor, eps: Tensor, step_size: Tensor, steps: int, loss: str
) -> Tensor:
    """All steps of projected gradient descent for a batch: what `frlkit.attacks.pgd` does after its start.

    Parameters
    ----------
    images, start : (N, 1, 32, 32) floats in [0, 1]; the start lies in the ball
    targets : labels (N,), or for ``loss="kl"`` probabilities (N, 10)
    eps, step_size : (N,), in [0, 1]
    loss : "ce", "kl" or "margin", see `frlkit.attacks.pgd`

    Raises `KitError` where a shape, a label or the loss does not fit: the native code trusts its input.
    """
    count = len(images)
    if loss not in LOSSES:
        raise KitError(f"loss = {loss!r} is unknown: use one of {', '.join(LOSSES)}")
    if loss != "kl":  # cross-entropy is KL(one-hot || p) up to a constant; the margin reads the label off it
        if targets.dtype != torch.int64 or bool(((targets < 0) | (targets > 9)).any()):
            raise KitError(f"targets of type {targets.dtype}: loss {loss!r} takes int64 labels from 0 to 9")
        targets = F.one_hot(targets, 10)
    images, start = _plain(images, (count, 1, 32, 32)), _plain(start, (count, 1, 32, 32))
    targets = _plain(targets, (count, 10))
    eps, step_size = _plain(eps, (count,)), _plain(step_size, (count,))
    result = torch.empty_like(images)
    pointers = [_pointer(tensor) for tensor in (images, start, targets, eps, step_size)]
    network = _network(model)
    _need().frlkit_pgd(*_head(count, network), *pointers, steps, int(loss == "margin"), _pointer(result))
    return result


def features(model: LeNet5, images: Tensor) -> Tensor:
    """Both convolutional stages, (N, 1, 32, 32) -> (N, 400), differentiable in their weights and biases only.

    Raises `KitError` where the shape does not fit, or where `images` ask for a gradient, which this path does not give.
    """
    if images.requires_grad:
        raise KitError("images require a gradient: the native features are differentiable in the weights only")
    parameters = (model.conv1.weight, model.conv1.bias, model.conv2.weight, model.conv2.bias)
    return _Features.apply(model, _plain(images, (len(images), 1, 32, 32)), *parameters)


class _Features(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, model: LeNet5, images: Tensor, *parameters: Tensor) -> Tensor:
        context.model = model
        context.save_for_backward(images, *parameters)
        result = images.new_empty(len(images), 400)
        network = _network(model)
        _need().frlkit_features(*_head(len(images), network), _pointer(images), _pointer(result))
        return result

    @staticmethod
    @once_differentiable
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        images, *parameters = context.saved_tensors  # as they were in forward: torch refuses if they changed since
        sizes = [parameter.numel() for parameter in parameters]
        library = _need()
        groups = -(-len(images) // library.frlkit_lanes())
        scratch, total = images.new_empty(groups, sum(sizes)), images.new_empty(sum(sizes))
        gradient, network = _plain(gradient, (len(images), 400)), _network(context.model)
        pointers = [_pointer(tensor) for tensor in (images, gradient, scratch, total)]
        library.frlkit_features_backward(*_head(len(images), network), *pointers)
        parts = zip(total.split(sizes), parameters, strict=True)
        return None, None, *(part.view_as(parameter) for part, parameter in parts)


def _fits(model: nn.Module) -> bool:
    for name, shape in zip(LAYERS, SHAPES, strict=True):
        layer = getattr(model, name)
        for tensor, wanted in ((layer.weight, shape), (layer.bias, shape[:1])):
            plain = tensor.dtype is torch.float32 and tensor.device.type == "cpu" and tensor.is_contiguous()
            if not plain or tensor.shape != wanted:
                return False
    return True


def _plain(tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
    if tensor.shape != shape or tensor.device.type != "cpu":
        raise KitError(f"a tensor of shape {tuple(tensor.shape)} on {tensor.device}: the kernel needs {shape} on cpu")
    return tensor.detach().to(torch.float32).contiguous()


def _pointer(tensor: Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(tensor.data_ptr())


def _network(model: nn.Module) -> Any:
    """The C++ ``Network``: ten pointers, in the order of the parameters; they stay valid while the model lives."""
    layers = [getattr(model, name) for name in LAYERS]
    return (ctypes.c_void_p * 10)(*(p.data_ptr() for layer in layers for p in (layer.weight, layer.bias)))


def _head(count: int, network: Any) -> tuple[ctypes.c_int64, int, Any]:
    return ctypes.c_int64(count), torch.get_num_threads(), ctypes.byref(network)


def _need() -> ctypes.CDLL:
    library = _load()
    if library is None:
        raise KitError("the native kernel is not available here: ask kernels.available(model) first")
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
        except (OSError, RuntimeError, subprocess.SubprocessError) as error:
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
            raise RuntimeError(f"{command[0]} failed: {done.stderr.decode(errors='replace').strip()[-200:]}")
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
    for name in ("frlkit_pgd", "frlkit_features", "frlkit_features_backward"):
        getattr(library, name).restype = None
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
        for name, shape in zip(LAYERS, SHAPES, strict=True):
            layer = nn.Conv2d(1, 1, 1) if len(shape) == 4 else nn.Linear(1, 1)
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
