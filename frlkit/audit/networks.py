"""The networks that a file of weights may belong to: the kit's, LeNet-5 as people build it, torchvision's, your own.

`candidates` fills each with the file's tensors. Where a file cannot say which of them it is (a ReLU has no weights),
there are several: `frlkit.audit.choice` tells them apart.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import inspect
import itertools
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from frlkit import KitError, models
from frlkit.audit.weights import COUNTER, UNUSED, Weights, fit
from frlkit.values import first_line

ACTIVATIONS = {"tanh": torch.tanh, "ReLU": torch.relu, "sigmoid": torch.sigmoid}
POOLINGS = {"average": F.avg_pool2d, "max": F.max_pool2d}
#: The commonest pairs first.
PAIRS = (
    *(("tanh", "average"), ("ReLU", "max"), ("sigmoid", "average")),
    *(("ReLU", "average"), ("tanh", "max"), ("sigmoid", "max")),
)
#: Of torchvision's, those that a file's names are compared with where nobody says which it is.
COMMON = ("resnet18", "resnet34", "resnet50", "vgg11", "vgg16", "vgg16_bn", "mobilenet_v2", "densenet121", "alexnet")
Numbers = tuple[float, ...]
_BLOCK = re.compile(r"(?:layer|block)(\d+)\.(?:layer\.)?(\d+)\.(.+)")


@dataclass(frozen=True)
class Network:
    """A network with weights in it, the images that it takes, and whether it normalises them by itself."""

    title: str
    module: nn.Module
    size: int | None = None  # None takes any
    channels: int | None = None
    border: int = 0  # black pixels to put around the images first
    normalises: bool = False


class LeNet(nn.Module):
    """LeNet-5 as people build it: two 5x5 convolutions with 2x2 pooling, three linear layers, any activation.

    Images are (N, channels, side, side) floats; `padding` is the first convolution's.
    """

    def __init__(self, classes: int, channels: int, side: int, padding: int, activation: str, pool: str) -> None:
        super().__init__()
        self.activation, self.pool = activation, pool
        self.conv1, self.conv2 = nn.Conv2d(channels, 6, 5, padding=padding), nn.Conv2d(6, 16, 5)
        last = ((side + 2 * padding - 4) // 2 - 4) // 2
        self.fc1, self.fc2, self.fc3 = nn.Linear(16 * last**2, 120), nn.Linear(120, 84), nn.Linear(84, classes)

    def forward(self, images: Tensor) -> Tensor:
        active, pool = ACTIVATIONS[self.activation], POOLINGS[self.pool]
        x = pool(active(self.conv1(images)), 2)
        x = pool(active(self.conv2(x)), 2).flatten(1)
        return self.fc3(active(self.fc2(active(self.fc1(x)))))


class Prepared(nn.Module):
    """A network behind its preprocessing: a black border, then (x - mean) / std; takes images in [0, 1]."""

    def __init__(self, network: nn.Module, mean: Numbers, std: Numbers, border: int = 0) -> None:
        super().__init__()
        self.network, self.border = network, border
        for name, values in (("mean", mean), ("std", std)):
            self.register_buffer(name, torch.tensor(values).view(1, -1, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        return self.network((F.pad(images, (self.border,) * 4) - self.mean) / self.std)


def candidates(name: str, weights: Weights | None, classes: int) -> list[Network]:
    """The networks that a file may be, its likeliest reading first; more than one only for LeNet-5.

    Parameters
    ----------
    name : one of the kit's `models.MODELS`, of torchvision's classifiers, ``module:factory`` or ``file.py:factory``; ""
        looks for one whose tensors are the file's
    weights : what is in the file; None for a factory of your own that loads them itself
    classes : of the data set

    Raises
    ------
    KitError
        An unknown name, a file that does not fit, or a factory that fails: says which and why.
    """
    if ":" in name:
        return [_own(name, weights, classes)]
    if weights is None:
        raise KitError(f"model = {name!r} needs a file of weights: only a factory, module:factory, may do without")
    if weights.own in models.MODELS and name in ("", weights.own):
        return [_kit(weights.own, weights, classes)]
    if not name:
        return _recognised(weights, classes)
    if name == "lenet5":
        return list(_lenets(weights, classes))
    if name not in models.MODELS:
        return [_torchvision(name, weights, classes)]
    try:
        return [_kit(name, weights, classes)]
    except KitError as error:  # the kit's ResNets have names of torchvision's, and other layers
        with contextlib.suppress(KitError):
            return [_torchvision(name, weights, classes)]
        raise error from None


def image_shape(name: str) -> tuple[int | None, int | None]:
    """Side and channels of the images that a kit's network takes, by its name; None for what may vary."""
    if name not in models.MODELS or name == "lenet5":
        return None, None
    channels, side, _ = getattr(models.MODELS[name], "func", models.MODELS[name]).image_shape
    return side, channels


def _recognised(weights: Weights, classes: int) -> list[Network]:
    if not weights.tensors:
        raise KitError(f"{weights.path} holds no named tensors: save model.state_dict()")
    for name in models.MODELS:
        try:
            return candidates(name, weights, classes)
        except KitError:
            continue
    import torchvision

    for name in COMMON:
        with torch.device("meta"):
            wanted = torchvision.models.get_model(name, num_classes=classes).state_dict()
        needed = {key: tensor.shape for key, tensor in wanted.items() if not key.endswith(COUNTER)}
        if all(key in weights.tensors and weights.tensors[key].shape == shape for key, shape in needed.items()):
            return [_torchvision(name, weights, classes)]
    last = next(reversed(weights.tensors.values()), torch.empty(classes))
    if last.ndim in (1, 2) and all(len(tensor) != classes for tensor in weights.tensors.values() if tensor.ndim):
        raise KitError(f"{weights.path} ends with {len(last)} outputs, and the data set has {classes} classes")
    raise KitError(
        f"{weights.path} is none of {', '.join(models.MODELS)}, nor torchvision's {', '.join(COMMON)}: say with "
        "--model which network it is, a name of torchvision's, or file.py:factory, a function of yours that builds it"
    )


def _lenets(weights: Weights, classes: int) -> Iterator[Network]:
    """The kit's own first; then every activation and pooling, at each size that the third layer allows."""
    shapes = [tensor.shape for tensor in weights.tensors.values() if tensor.ndim > 1]
    channels = next((shape[1] for shape in shapes if len(shape) == 4 and shape[0] == 6), 1)
    small = (120, 256) in shapes
    geometries = [(28, 0, 0)] if small else [(32, 0, 0), (28, 2, 0), (28, 0, 2)]  # side, first padding, black border
    if channels == 1 and not small:
        own = models.build("lenet5", classes)
        normalises = fit(own, weights)
        yield Network("LeNet-5, tanh, average pooling, 32x32", own, 32, 1, 0, normalises)
    for (side, padding, border), (active, pool) in itertools.product(geometries, PAIRS):
        if (side, active, pool, channels) == (32, "tanh", "average", 1):
            continue
        module = LeNet(classes, channels, side + 2 * border, padding, active, pool)
        normalises = fit(module, weights)
        around = " padded by 2" if padding else " in a black border of 2" if border else ""
        title = f"LeNet-5, {active}, {pool} pooling, {side}x{side}{around}"
        yield Network(title, module, side, channels, border, normalises)


def _kit(name: str, weights: Weights, classes: int) -> Network:
    """One of the kit's networks, from files that name its layers as the kit does or as public code does."""
    module, title = models.build(name, classes), models.TITLES[name]
    side, channels = image_shape(name)
    if isinstance(module, models.ResNet):
        preactivation = isinstance(module.stem_bn, nn.Identity)
        tensors = _renamed(weights.tensors, preactivation)
        weights = replace(weights, named=tensors, tensors=tensors)
        if preactivation and not any(key.startswith("last_bn.") for key in tensors):
            if not any(key.startswith("stem.") for key in tensors):
                raise KitError(f"{weights.path} does not fit {title}: its layers have other names")
            module.last_bn, module.last_relu = nn.Identity(), False  # as the paper's code, and that which it took over
            title = f"{title}, without a last batch norm and ReLU"
    return Network(title, module, side, channels, 0, fit(module, weights))


def _renamed(tensors: dict[str, Tensor], preactivation: bool) -> dict[str, Tensor]:
    """Tensors of a residual network under the kit's names: of public CIFAR ResNets, and of TRADES' Wide ResNets."""
    found = [match for name in tensors if not name.startswith(UNUSED) and (match := _BLOCK.fullmatch(name))]
    groups = sorted({int(match[1]) for match in found})
    count = {group: 1 + max(int(match[2]) for match in found if int(match[1]) == group) for group in groups}
    start = {group: sum(count[other] for other in groups if other < group) for group in groups}
    shortcut = {"convShortcut": "shortcut", "downsample": "shortcut"}
    shortcut |= {"shortcut.0": "shortcut"} if preactivation else {}
    tops = {"conv1": "stem", "bn1": "last_bn" if preactivation else "stem_bn", "bn": "last_bn", "fc": "linear"}

    def ours(name: str) -> str:
        if match := _BLOCK.fullmatch(name):
            rest = match[3]
            for theirs, own in shortcut.items():
                rest = own + rest.removeprefix(theirs) if rest.startswith(theirs + ".") else rest
            return f"blocks.{start[int(match[1])] + int(match[2])}.{rest}"
        layer, _, parameter = name.rpartition(".")
        return f"{tops.get(layer, layer)}.{parameter}"

    return {ours(name): tensor for name, tensor in tensors.items() if not name.startswith(UNUSED)}


def _torchvision(name: str, weights: Weights, classes: int) -> Network:
    import torchvision

    if name not in torchvision.models.list_models(module=torchvision.models):
        raise KitError(
            f"model = {name!r} is unknown: use one of {', '.join(models.MODELS)}, a name of torchvision's classifiers, "
            "such as resnet18, or module:factory or file.py:factory, a function of yours"
        )
    module = torchvision.models.get_model(name, weights=None, num_classes=classes)
    return Network(f"torchvision's {name}", module, None, 3, 0, fit(module, weights))


def _own(name: str, weights: Weights | None, classes: int) -> Network:
    """What a user's own factory returns, or a network that stands ready under that name; its code is trusted."""
    words, sys.argv = sys.argv, sys.argv[:1]  # its own parser is not to read ours
    try:
        module = _made(name, classes)
    except KitError:
        raise
    except (Exception, SystemExit) as error:  # it is the user's own code: anything
        absent = isinstance(error, ModuleNotFoundError)
        mend = "install it, go where it lies, or give file.py:factory" if absent else "repair it"
        raise KitError(f"model = {name!r} failed ({type(error).__name__}: {first_line(error)}): {mend}") from None
    finally:
        sys.argv = words
    if not isinstance(module, nn.Module):
        raise KitError(f"model = {name!r} returns {type(module).__name__}: return a torch.nn.Module")
    return Network(name, module, normalises=fit(module, weights) if weights else False)


def _made(name: str, classes: int) -> Any:
    """What ``module:factory`` gives, called with ``num_classes=`` where it takes that, and with nothing else."""
    place, _, attribute = name.rpartition(":")
    code = _module(place)
    if not hasattr(code, attribute):
        there = [key for key, value in vars(code).items() if getattr(value, "__module__", "") == code.__name__]
        listed = f"use one of {', '.join(there)}" if there else "define it there"
        raise KitError(f"model = {name!r}: there is no {attribute!r} in {place}: {listed}")
    factory = getattr(code, attribute)
    if isinstance(factory, nn.Module) or not callable(factory):
        return factory
    takes = inspect.signature(factory).parameters
    needed = [
        key
        for key, of in takes.items()
        if of.default is of.empty and of.kind not in (of.VAR_POSITIONAL, of.VAR_KEYWORD)
    ]
    if missing := [key for key in needed if key != "num_classes"]:
        raise KitError(
            f"model = {name!r} takes {', '.join(missing)}, which nobody gives: name a function of yours that takes "
            "nothing, or num_classes alone, and returns the network"
        )
    return factory(num_classes=classes) if "num_classes" in takes else factory()


def _module(place: str) -> Any:
    """A Python module by name, from the working directory too, or by its file, which may import its neighbours."""
    is_file, before = place.endswith(".py"), list(sys.path)
    if is_file and not Path(place).is_file():
        raise KitError(f"model: there is no file {place}: give the path of a Python file, then :factory")
    sys.path[:0] = [str(Path(place).resolve().parent), str(Path.cwd())] if is_file else [str(Path.cwd())]
    try:
        return _from_file(place) if is_file else importlib.import_module(place)
    finally:
        sys.path[:] = before


def _from_file(place: str) -> Any:
    spec = importlib.util.spec_from_file_location(Path(place).stem, place)
    if spec is None or spec.loader is None:
        raise ImportError(f"{place} cannot be imported")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses and pickles look for it there
    spec.loader.exec_module(module)
    return module
