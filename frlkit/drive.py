"""A copy on Google Drive of every file that is written, so that runs outlive a Colab session.

Drive's writes lag and its mount drops: work goes on in the session's own folder, and a copy that fails is tried again
with the next one.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import time
import warnings
from pathlib import Path

from frlkit import KitError, checkpoint
from frlkit.disk import exists, not_read

_mirrors: dict[Path, Path] = {}  # folder -> the slower, less reliable one that receives a copy of every file
_waiting: set[Path] = set()  # files whose copy has failed so far


def mounted() -> Path:
    """Google Drive's own folder, mounted. Raises `KitError` outside Colab and where access is denied."""
    try:
        from google.colab import drive
    except ImportError:
        raise KitError("DRIVE = True needs Google Colab: leave it False, or name a folder with RUNS") from None
    mount = os.environ.get("FRLKIT_DRIVE", "/content/drive")
    try:
        drive.mount(mount)
    except Exception as error:  # Colab raises its own kinds, private ones among them
        why = str(error).partition("\n")[0] or type(error).__name__
        raise KitError(f"Google Drive was not mounted ({why}): run again and allow it, or set DRIVE = False") from None
    return Path(mount) / "MyDrive"


def mirror(folder: Path, remote: Path) -> None:
    """From now on copy every file written under `folder` to `remote` too, after taking over what `remote` holds.

    Damaged files of `remote` are left there with a warning. A second call changes nothing: what is local is newer by
    then.
    """
    if _mirrors.get(folder.resolve()) == remote:
        return
    try:
        found = sorted(path for path in remote.rglob("*") if path.is_file())
    except OSError as error:
        raise not_read(remote, error) from None
    for source in found:
        target = folder / source.relative_to(remote)
        try:
            if source.suffix == ".copy":  # a killed session's
                source.unlink()
                continue
            if source.suffix == ".pt":
                checkpoint.read(source)
            elif source.suffix == ".json":
                json.loads(source.read_text(encoding="utf-8"))
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, target)
        except (OSError, ValueError) as error:
            warnings.warn(f"{source} was not taken over: {error}", stacklevel=2)
    _mirrors[folder.resolve()] = remote
    if _follow not in checkpoint.followers:
        checkpoint.followers.append(_follow)


def _follow(path: Path) -> None:
    """Copy a written file, and those whose copy failed before, to the mirror of their folder; or remove its copy."""
    if (target := _mirror_of(path)) is not None:
        if exists(path):
            _waiting.add(path)
        else:
            with contextlib.suppress(OSError):
                target.unlink(missing_ok=True)
    for file in sorted(_waiting):
        target = _mirror_of(file)
        if target is None or not exists(file):
            _waiting.discard(file)
            continue
        for wait in (0.0, 0.1, 0.5):
            time.sleep(wait)
            try:
                _copy(file, target)
                _waiting.discard(file)
                break
            except OSError as error:
                trouble = f"{target} could not be written ({error.strerror or error})"
    if _waiting:
        warnings.warn(
            f"{trouble}: {len(_waiting)} files are kept here alone for now and copied with the next one", stacklevel=4
        )


def _copy(file: Path, target: Path) -> None:
    """Copy under another name, compare, rename; the generation before stays as `previous`."""
    target.parent.mkdir(parents=True, exist_ok=True)
    draft = target.with_name(f"{target.name}.copy")
    try:
        shutil.copyfile(file, draft)
        if draft.read_bytes() != file.read_bytes():
            raise OSError("the copy differs")
        if target.name == "checkpoint.pt" and target.exists():
            os.replace(target, checkpoint.previous(target))
        os.replace(draft, target)
    finally:
        with contextlib.suppress(OSError):
            draft.unlink(missing_ok=True)


def _mirror_of(path: Path) -> Path | None:
    for folder, remote in _mirrors.items():
        if path.resolve().is_relative_to(folder):
            return remote / path.resolve().relative_to(folder)
    return None
