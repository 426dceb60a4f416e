"""Anyone's weights, in one of the kit's networks."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from frlkit import KitError, checkpoint, disk


def load_weights(model: nn.Module, path: Path) -> None:
    """Fill a network from anyone's file of plain tensors, under the same names or, failing that, in the same order.

    The file may hold the tensors directly or under ``model`` or ``state_dict``. It is one of
    safetensors, or of ``torch.save``, read with ``weights_only=True``: it cannot run code.

    Raises
    ------
    KitError
        No such file, more than plain tensors in it, shapes or kinds that differ (the first is named), or values that
        are not finite.
    """
    tensors = _tensors(_content(path))
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


def _content(path: Path) -> Any:
    if path.suffix != ".safetensors":
        return checkpoint.load_plain(path)
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except FileNotFoundError:
        raise KitError(f"there is no file {path}: give the path of a file of weights") from None
    except OSError as error:
        raise disk.not_read(path, error) from None
    except Exception as error:  # a damaged file can raise anything
        raise KitError(f"{path} is no whole file of safetensors ({error})") from None


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
