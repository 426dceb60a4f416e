"""Files written whole or not at all, and a run's state after every epoch: nested tensors, numbers, text and lists.

A state is written to a temporary file in the same folder, flushed to disk and renamed, and the generation before it is
kept, so a crash at any moment leaves a whole file. It carries a digest of its own content, so damage is noticed, and is
read with ``weights_only=True``, so that a file from a stranger cannot run code.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import pickle
import secrets
import warnings
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from frlkit import KitError, disk, models
from frlkit.disk import ReadError, exists, not_written
from frlkit.values import first_line

#: Called with every file that was written or, then no longer there, removed; a copy elsewhere follows (`drive.mirror`).
followers: list[Callable[[Path], None]] = []


def digest(state: Any) -> str:
    """SHA-256 of a state's content: key names, values, and tensors bit for bit."""
    total = hashlib.sha256()

    def add(value: Any) -> None:
        if isinstance(value, Tensor):
            flat = value.detach().cpu().contiguous()
            total.update(f"{flat.dtype}{tuple(flat.shape)}".encode())
            total.update(flat.view(-1).view(torch.uint8).numpy().tobytes() if flat.numel() else b"")
        elif isinstance(value, Mapping):
            for key in value:
                total.update(f"{{{key!r}:".encode())
                add(value[key])
            total.update(b"}")
        elif isinstance(value, (list, tuple)):
            total.update(f"[{len(value)}".encode())
            for item in value:
                add(item)
        else:
            total.update(f"{value!r};".encode())

    add(state)
    return total.hexdigest()


def write_atomically(path: Path, content: bytes | Iterable[bytes], *, keep: Path | None = None) -> None:
    """Write a whole file or nothing: temporary file beside it, fsync, rename. `keep` is where the old file goes.

    Temporary files of this name that a kill left go first. Raises `WriteError` where the disk is full, read-only, gone.
    """
    draft = path.with_name(f"{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        disk.sweep_up(path.parent, path.name)
        with open(draft, "xb") as file:
            disk.lock(file.fileno())  # nobody takes it for a dead process's
            for block in [content] if isinstance(content, bytes) else content:
                file.write(block)
            file.flush()
            os.fsync(file.fileno())
            if os.name == "nt":  # which renames no open file
                file.close()
            if keep is not None and exists(path):
                os.replace(path, keep)
            os.replace(draft, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            draft.unlink(missing_ok=True)
        if isinstance(error, OSError) and not isinstance(error, KitError):
            raise not_written(path, error) from None
        raise
    for follow in followers:
        follow(path)


def remove(path: Path) -> None:
    """Delete a checkpoint and the generation before it, in copies too. Raises `WriteError` where that fails."""
    for file in (path, previous(path)):
        try:
            file.unlink(missing_ok=True)
        except OSError as error:
            raise not_written(file, error) from None
        for follow in followers:
            follow(file)


def write_json(path: Path, value: Any) -> None:
    """`write_atomically` for JSON; NaN and infinity are refused rather than written as invalid JSON."""
    write_atomically(path, (json.dumps(value, indent=1, allow_nan=False) + "\n").encode())


def save(path: Path, state: Mapping[str, Any]) -> None:
    """Write a state to `path`; the file that was there becomes `previous(path)`."""
    buffer = io.BytesIO()
    torch.save({**state, "digest": digest(state)}, buffer)
    write_atomically(path, buffer.getvalue(), keep=previous(path))


def previous(path: Path) -> Path:
    """Where the generation before `path` is kept."""
    return path.with_name(f"{path.stem}.previous{path.suffix}")


def read(path: Path) -> dict[str, Any]:
    """Read a file that `save` wrote. Raises `KitError` where it is damaged, foreign, or more than plain data."""
    state = load_plain(path)
    if not isinstance(state, dict) or "digest" not in state:
        raise KitError(f"{path} is no checkpoint of this kit: it carries no digest of its content")
    found = state.pop("digest")
    try:
        whole = digest(state) == found
    except (RuntimeError, NotImplementedError):  # tensors without plain content, lists that hold themselves: not ours
        whole = False
    if not whole:
        raise KitError(f"{path} is damaged: its content does not match its own digest")
    return state


def load_plain(path: Path) -> Any:
    """What ``torch.save`` wrote: tensors, numbers, text and containers, no code (``weights_only=True``), on the CPU.

    Raises `KitError` where it is missing, damaged or something else, `ReadError` where the disk does not give it.
    """
    content = disk.content(path, "file", "give the path of a file that torch.save wrote")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch on odd pickle protocols: the file is refused or harmless
            return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file can raise anything; of code in one, torch explains how to run it
        reason = "" if isinstance(error, pickle.UnpicklingError) else f" ({first_line(error)[:150]})"
        raise KitError(f"{path} is no whole file of plain tensors, so it was not loaded{reason}") from None


def resume(path: Path, config: Mapping[str, Any]) -> dict[str, Any] | None:
    """The newest whole generation, or None where there is none.

    A damaged file, one that is no run's checkpoint, or one whose weights are not finite is moved aside (``*.damaged``)
    with a warning, and the generation before it is used. Raises `KitError` where the checkpoint was made under another
    configuration, naming the fields that differ, and `ReadError` or `WriteError` where the disk refuses.
    """
    for candidate in (path, previous(path)):
        if not exists(candidate):
            continue
        try:
            state = read(candidate)
            if "epoch" not in state:
                raise KitError(f"{candidate} is no checkpoint of a run: it names no epoch to go on from")
            for part in ("model", "average"):
                if isinstance(weights := state.get(part), Mapping) and (name := models.nonfinite(weights)):
                    raise KitError(f"{candidate} is of no use: NaN or infinity in {part}.{name}")
        except ReadError:
            raise
        except KitError as error:
            aside = candidate.with_name(candidate.name + ".damaged")
            try:
                os.replace(candidate, aside)
            except OSError as trouble:
                raise not_written(candidate, trouble) from None
            warnings.warn(f"{error}; kept as {aside.name}, going on from the generation before it", stacklevel=2)
            continue
        refuse_other(candidate, state.get("config", {}), config)
        return state
    return None


def refuse_other(path: Path, found: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Raise `KitError` naming each configuration field in which a run's file differs from the run that is asked for."""
    names = [name for name in {**found, **wanted} if found.get(name) != wanted.get(name)]
    if names:
        fields = ", ".join(f"{name} is {found.get(name)!r} there and {wanted.get(name)!r} here" for name in names)
        raise KitError(f"{path} belongs to another run: {fields}; choose another folder, or delete that one")
