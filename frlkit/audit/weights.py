"""Anyone's file of weights: its tensors, wherever in it they are, and what stands beside them (`find`, `fit`)."""

from __future__ import annotations

import contextlib
import json
import math
import os
import pickletools
import re
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from frlkit import KitError, checkpoint, disk

#: Keys under which people keep their weights, the likeliest first; any other key will do as well.
KEYS = ("model", "state_dict", "model_state_dict", "net", "network", "weights", "params", "module", "ema", "model_ema")
#: What the public Wide ResNets (TRADES, and the paper's) register twice, or register and never run.
UNUSED = ("layer_one.", "other_layers.", "sub_block1.")
COUNTER = "num_batches_tracked"  # of batch normalisation: no result depends on it, and older files have none
_NORMALISE = {"mean": "std", "mu": "sigma", "_mean": "_std", "image_mean": "image_std", "pixel_mean": "pixel_std"}
_NORMALISE |= {"new_mean": "new_std"}  # of the library robustness
#: What a training program registers beside its network: a second name of it, a loss with weights, a counter of hits.
_BESIDE = re.compile(
    r"(attacker|criterion|loss(_\w+)?|(\w+_)?(acc|accuracy|loss|metrics?|conf\w*mat\w*|f1\w*|auroc))\."
)
_AVERAGE = re.compile(r"(\w+_)?ema(_\w+)?(?=\.)")  # under which averaged weights lie among the others
_ACCURACY = re.compile(r"((best|test|val|clean|nat(ural)?)_?)*(acc|accuracy|acc1|prec1|top1)(_?(best|test|val))?")
_PLAIN = ("torch._utils.", "collections.OrderedDict", "torch.nn.parameter.Parameter")


@dataclass(frozen=True)
class Weights:
    """A file's tensors, and how they were found."""

    path: Path
    named: dict[str, Tensor]  # as the file names them
    tensors: dict[str, Tensor]  # without a Normalize's, and without the prefix that all others share
    key: str = ""  # of the wrapper, such as "state_dict", or "a.b" where they lie deeper
    prefix: str = ""  # such as "module."
    others: tuple[str, ...] = ()  # keys of other weights in the file
    mean: tuple[float, ...] | None = None  # of a Normalize in front, for images in [0, 1]: a number, or one a channel
    std: tuple[float, ...] | None = None
    error: float | None = None  # the natural error, a fraction, that the file says it has
    own: str = ""  # of a run of this kit, the network's name; its images are in [0, 1]


def find(path: Path, key: str = "") -> Weights:
    """The weights in a file of ``torch.save`` or of safetensors, read without running any code in it.

    They may lie at the top, or under any key (`key`, where there are several), their names behind ``module.``,
    ``_orig_mod.`` or any other common prefix. A file without tensors gives no tensors.

    Raises
    ------
    KitError
        No such file, one that is damaged, or that holds more than plain data: says what, and what to do.
    """
    if path.is_dir():
        raise KitError(f"{path} is a folder: name the file of weights in it, such as {path / 'weights.safetensors'}")
    content = _content(path)
    places = dict(_places(content))
    if key and key not in places:
        raise KitError(f"{path} has no weights under {key!r}: use one of {', '.join(map(repr, places)) or 'no key'}")
    chosen = key or min(places, key=lambda place: (_rank(place), -len(places[place])), default="")
    named, outer = _without_beside(places.get(chosen, {}))
    tensors, front = _normalisation({name.removeprefix(outer): tensor for name, tensor in named.items()})
    inner = _shared(tensors)
    tensors = {name.removeprefix(inner): tensor for name, tensor in tensors.items()}
    others = tuple(place for place in places if place not in ("", chosen))
    return Weights(path, named, tensors, chosen, outer + inner, others, *front, _said_error(content), _own(path))


def _without_beside(tensors: dict[str, Tensor]) -> tuple[dict[str, Tensor], str]:
    """The tensors that are a network's, under their own names, and the prefix that these share.

    A number beside it, such as the count that PyTorch's AveragedModel keeps, is none of them.
    """
    named = {key: v for key, v in tensors.items() if v.ndim or "." in key or v.is_floating_point()}
    outer = _shared(named)
    return {key: v for key, v in named.items() if not _BESIDE.match(key.removeprefix(outer))} or named, outer


def fit(model: nn.Module, weights: Weights) -> bool:
    """Fill a network with tensors of the same names or, failing that, of the same shapes, one by one or in order.

    A convolution whose window is the whole map may stand for a linear layer, and the other way round. The counters of
    batch normalisation may be missing. Returns whether a Normalize's tensors went into the network too, which then
    normalises by itself. Raises `KitError` where shapes or kinds differ (the first is named), or values are not finite.
    """
    wanted, path, kind = model.state_dict(), weights.path, type(model).__name__
    counted = {name: target for name, target in wanted.items() if not name.endswith(COUNTER)}
    whole = next((view for view in _views(weights.named) if set(_uncounted(view)) == set(counted)), None)
    source = weights.tensors if whole is None else whole
    tensors = _uncounted(source)
    if whole is None:
        tensors = _in_order({name: t for name, t in tensors.items() if not name.startswith(UNUSED)}, counted)
        if len(tensors) != len(counted):
            raise KitError(f"{path} holds {len(tensors)} tensors: {kind} has {len(counted)}")
        tensors = dict(zip(counted, tensors.values(), strict=True))
    tensors = {name: _fitted(tensors[name], target, name, path, kind) for name, target in counted.items()}
    model.load_state_dict({**wanted, **{name: source[name] for name in wanted if name in source}, **tensors})
    return whole is not None and weights.mean is not None


def _fitted(found: Tensor, target: Tensor, name: str, path: Path, kind: str) -> Tensor:
    """A file's tensor in the shape of the network's, or `KitError`."""
    if {found.ndim, target.ndim} == {2, 4} and len(found) == len(target) and found.numel() == target.numel():
        found = found.reshape(target.shape)
    if found.shape != target.shape:
        shape, theirs = tuple(target.shape), tuple(found.shape)
        raise KitError(f"{path} does not fit {kind}: {name} has shape {shape}, the file's is {theirs}")
    if not _plain(found) or found.is_floating_point() != target.is_floating_point():
        raise KitError(f"{path} has a tensor of type {found.dtype} that is not plain for {name}: save floats")
    if not bool(found.isfinite().all()):
        raise KitError(f"{path} has NaN or infinite values in the tensor that stands for {name}")
    return found


def _uncounted(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in tensors.items() if not name.endswith(COUNTER)}


def _in_order(tensors: dict[str, Tensor], wanted: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors in the order of a network's: by their sizes where all differ, as safetensors sorts names; else as is."""
    sizes = {tensor.numel(): name for name, tensor in tensors.items()}
    order = [sizes.get(target.numel()) for target in wanted.values()]
    if len(tensors) == len(wanted) == len(set(order)) and None not in order:
        return {name: tensors[name] for name in order if name is not None}
    return tensors


def _views(named: dict[str, Tensor]) -> Iterator[dict[str, Tensor]]:
    """Named tensors, as they are and behind each part of the prefix that they share."""
    yield named
    while prefix := _shared(named).partition(".")[0]:
        named = {name.removeprefix(f"{prefix}."): tensor for name, tensor in named.items()}
        yield named


def _content(path: Path) -> Any:
    if not _is_safetensors(path):
        try:
            return checkpoint.load_plain(path)
        except disk.ReadError:
            raise
        except KitError as error:
            if advice := _advice(path):
                raise KitError(f"{path} is no whole file of plain tensors, so it was not loaded: {advice}") from None
            raise KitError(
                f"{error}: give a file of torch.save or of safetensors; if it is one, download or save it again"
            ) from None
    try:
        return safetensors.torch.load_file(path)
    except OSError as error:
        raise disk.not_read(path, error) from None
    except Exception as error:  # a damaged file can raise anything
        raise KitError(f"{path} is no whole file of safetensors ({error})") from None


def _is_safetensors(path: Path) -> bool:
    """Whether a file is of safetensors, whatever it is called: a length, then JSON. A damaged one by its name."""
    try:
        with path.open("rb") as file:
            head = file.read(9)
    except FileNotFoundError:
        raise KitError(f"there is no file {path}: give the path of a file of weights") from None
    except OSError as error:
        raise disk.not_read(path, error) from None
    torch_wrote = head[:2] in (b"PK", b"\x80\x02")
    return head[8:] == b"{" or (path.suffix == ".safetensors" and not torch_wrote)


def _own(path: Path) -> str:
    """Which of the kit's networks a finished run's file holds, by its header; "" for any other file."""
    if not _is_safetensors(path):
        return ""
    with safetensors.safe_open(path, framework="pt") as file:
        head = file.metadata() or {}
    with contextlib.suppress(ValueError, TypeError, KeyError):
        return str(json.loads(head["config"])["model"]) if "frlkit" in head else ""
    return ""


def _advice(path: Path) -> str:
    """What a refused file is, in words, and what to do; "" where that cannot be told. Nothing in it is run."""
    with path.open("rb") as file:
        if file.read(100).lstrip().lower().startswith((b"version https://git-lfs", b"<!doctype", b"<html")):
            return "it is a web page or a pointer of Git LFS in place of the file: download that (git lfs pull)"
    try:
        with zipfile.ZipFile(path) as archive:
            names = {name.partition("/")[2] for name in archive.namelist()}
        if "constants.pkl" in names or "models/model.json" in names:
            kind = "TorchScript" if "constants.pkl" in names else "torch.export"
            return (
                f"it is a program of {kind}, and running it would be running its author's code; save "
                "model.state_dict() where the model is defined, or, if you trust it, load it in a function of your own"
            )
        needed = torch.serialization.get_unsafe_globals_in_checkpoint(str(path))
    except Exception:  # no file of torch since 1.6: an older one is a row of pickles
        needed = [name for name in _globals(path) if not name.startswith(_PLAIN) and not name.endswith("Storage")]
    needed = [name for name in needed if re.fullmatch(r"[\w.]+", name)]  # of a damaged file they can be anything
    if not needed:
        return ""
    said = ", ".join(sorted(needed)[:4]) + (", …" if len(needed) > 4 else "")
    if any(name.startswith(("torch.nn.", "torchvision.")) for name in needed):
        return f"it holds {said}, as a whole pickled model does: save model.state_dict() instead"
    return f"it holds {said} beside them; if you trust it, load it (weights_only=False) and save its tensors alone"


def _globals(path: Path) -> set[str]:
    """What a file of pickles would import, read without running it, as far as it can be read."""
    found: set[str] = set()
    with contextlib.suppress(Exception), path.open("rb") as file:
        while True:
            for code, value, _ in pickletools.genops(file):
                found |= {str(value).replace(" ", ".")} if code.name == "GLOBAL" else set()
    return found


def _plain(tensor: Tensor) -> bool:
    return tensor.layout == torch.strided and not tensor.is_meta


def _places(content: Any, path: str = "", depth: int = 0) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Every mapping with named tensors in it that may be a network's weights, by the keys that lead there."""
    if isinstance(content, (list, tuple)) and depth < 2:  # such as (model's, optimiser's)
        content = {str(place): value for place, value in enumerate(content) if isinstance(value, Mapping)}
    if not isinstance(content, Mapping) or depth > 5:
        return
    tensors = {name: value for name, value in content.items() if isinstance(value, Tensor) and isinstance(name, str)}
    heads = {name: match[0] if (match := _AVERAGE.match(name)) else "" for name in tensors}
    if all(heads.values()):  # averages alone: a prefix like any other
        heads = dict.fromkeys(heads, "")
    for head in dict.fromkeys(("", *heads.values())):
        group = {name: value for name, value in tensors.items() if heads[name] == head}
        if group and not (depth and len(group) == 1):
            yield f"{path}.{head}" if head else path, group
    for name, value in content.items():
        if isinstance(name, str) and "optim" not in name:
            yield from _places(value, f"{path}.{name}" if path else name, depth + 1)


def _rank(place: str) -> int:
    first = place.split(".")[0]
    return KEYS.index(first) if first in KEYS else len(KEYS)


def _shared(names: Iterable[str]) -> str:
    """The prefix, up to a dot, that all names share."""
    common = os.path.commonprefix(list(names))
    return common[: common.rfind(".") + 1]


Front = tuple[tuple[float, ...] | None, tuple[float, ...] | None]


def _normalisation(tensors: dict[str, Tensor]) -> tuple[dict[str, Tensor], Front]:
    """The tensors without a Normalize's, and its mean and deviation for images in [0, 1]."""
    for name, mean in tensors.items():
        head, dot, last = name.rpartition(".")
        other = f"{head}{dot}{_NORMALISE.get(last)}"
        std = tensors.get(other)
        if std is None or not {mean.numel(), std.numel()} <= {1, 3} or not (_plain(mean) and _plain(std)):
            continue
        values = tuple(map(float, mean.flatten())), tuple(map(float, std.flatten()))
        if min(values[1]) > 0 and all(map(math.isfinite, values[0] + values[1])):
            unit = 255 if max(values[0]) > 1.5 else 1  # of images in [0, 255]
            rest = {key: tensor for key, tensor in tensors.items() if key not in (name, other)}
            return rest, (tuple(v / unit for v in values[0]), tuple(v / unit for v in values[1]))
    return tensors, (None, None)


def _said_error(content: Any) -> float | None:
    """The natural error that a file's own entries say, such as ``best_acc: 91.2``; the smallest of several."""
    if not isinstance(content, Mapping):
        return None
    found = [
        float(value) / (100 if value > 1 else 1)
        for name, value in content.items()
        if isinstance(name, str) and _ACCURACY.fullmatch(name.lower()) and type(value) in (int, float)
        if 0 < value <= 100
    ]
    return 1 - max(found) if found else None
