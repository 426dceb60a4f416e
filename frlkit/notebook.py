"""What every notebook's set-up and parameter cells need: strict parameters, and paths that do not depend on the
working directory.

Papermill only warns about a misspelt parameter and passes ``-p FLAG true`` on as text, so the notebook itself checks:
`parameters` refuses unknown names, wrong types and values out of range, in one sentence, before anything is computed.
"""

from __future__ import annotations

import ast
import os
import platform
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from frlkit import PROJECT, KitError, __version__, checkpoint, data


class ParameterError(KitError):
    """A notebook parameter that is unknown, of the wrong type or out of range."""


#: Every parameter of every notebook, so that one profile can serve them all (a test keeps this complete).
ALL_PARAMETERS = {
    *("DATASET", "RECIPES", "SEEDS", "EPOCHS", "BATCH_SIZE", "DEVICE", "RUNS", "FIGURES", "DRIVE"),
    *("SEED", "SAMPLES", "GD_STEPS"),  # the theory's
    *("FRL_SEEDS", "FRL_EPOCHS", "REPORT_SEEDS", "ALPHAS", "GRID_SEEDS", "ATTACKED"),  # Fair Robust Learning's
}

Rule = Callable[[Any], Any]  # returns the value to use, or raises ValueError with what is allowed


def one_of(*allowed: str) -> Rule:
    """Text, one of `allowed`."""

    def check(value: Any) -> str:
        if not isinstance(value, str) or value not in allowed:
            raise ValueError(f"one of {', '.join(map(repr, allowed))}")
        return value

    return check


def dataset() -> Rule:
    """A data set's name: one of `data.READERS`, or ``folder:PATH``."""

    def check(value: Any) -> str:
        try:
            data.check_name(value)
        except KitError:
            raise ValueError(f"one of {', '.join(map(repr, data.READERS))}, or 'folder:PATH'") from None
        return value

    return check


def number(low: float, high: float, *, whole: bool = False) -> Rule:
    """A finite number in [low, high]; `whole` asks for an int. True, False and text are no numbers."""

    def check(value: Any) -> float:
        kinds = int if whole else (int, float)
        right_type = isinstance(value, kinds) and not isinstance(value, bool)
        if not right_type or not low <= value <= high:  # NaN compares false
            raise ValueError(f"a {'whole ' if whole else ''}number from {low:g} to {high:g}, without quotes")
        return value

    return check


def flag() -> Rule:
    """True or False, not text (papermill turns ``-p NAME true`` into text; ``-p NAME True`` arrives as a boolean)."""

    def check(value: Any) -> bool:
        if not isinstance(value, bool):
            raise ValueError("True or False (with papermill: -p NAME True, capital T)")
        return value

    return check


def text() -> Rule:
    """Any text, for instance a path."""

    def check(value: Any) -> str:
        if not isinstance(value, str):
            raise ValueError("text in quotes")
        return value

    return check


def list_of(rule: Rule) -> Rule:
    """A non-empty list without repeats whose items all pass `rule` (with papermill: -y "NAME: [a, b]")."""

    def check(value: Any) -> list[Any]:
        repeats = isinstance(value, list) and any(item in value[:place] for place, item in enumerate(value))
        if not isinstance(value, list) or not value or repeats:
            raise ValueError('a non-empty list without repeats (with papermill: -y "NAME: [a, b]")')
        try:
            return [rule(item) for item in value]
        except ValueError as error:
            raise ValueError(f"a list whose items are each {error}") from None

    return check


def parameters(namespace: Mapping[str, Any], **rules: Rule) -> SimpleNamespace:
    """Check a notebook's parameters and return them as attributes.

    `namespace` is the notebook's ``globals()``; `rules` names every parameter and what it may be. Names assigned in the
    ``# Parameters`` cells that ran directly before this one (the notebook's own, and the one papermill injects) but
    missing from `rules` are refused, as are wrong types and values. A profile serves all notebooks, so a parameter that
    only another notebook has is named in a printed line and otherwise ignored.

    Raises
    ------
    ParameterError
        One sentence: the name, the value, what is allowed.
    """
    others = _assigned_names(namespace.get("In", [])) - set(rules)
    if unknown := sorted(others - ALL_PARAMETERS):
        raise ParameterError(f"unknown parameter {', '.join(map(repr, unknown))}: this notebook has {', '.join(rules)}")
    if others:
        print(f"not used by this notebook: {', '.join(sorted(others))}")
    checked = {}
    for name, rule in rules.items():
        if name not in namespace:
            raise ParameterError(f"parameter {name} is not set: run the cell that begins with '# Parameters' first")
        try:
            checked[name] = rule(namespace[name])
        except ValueError as error:
            raise ParameterError(f"parameter {name} = {namespace[name]!r} is not allowed: use {error}") from None
    return SimpleNamespace(**checked)


def _assigned_names(history: list[str]) -> set[str]:
    """Names assigned by the run of '# Parameters' cells just before the running cell (the history's last entry)."""
    names: set[str] = set()
    for source in reversed(history[:-1]):
        if not source.lstrip().startswith("# Parameters"):
            break
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                names.add(node.id)
    return names


def folder(path: str, default: str, *, drive: bool = False) -> Path:
    """The folder a parameter names: relative to the working directory; empty means `default` in the project.

    With `drive`, Google Drive is mounted and its ``frlkit`` folder holds a copy of everything that is written there,
    so that runs outlive a Colab session; what it holds already is taken over first (see `checkpoint.mirror`). Raises
    `ParameterError` where the text cannot be a path, and `KitError` where there is no Drive.
    """
    if path:
        try:
            return Path(path).expanduser().resolve()
        except (OSError, RuntimeError, ValueError) as error:  # of another user who is unknown, with a null character
            raise ParameterError(f"{path!r} is no folder ({error}): name another, or leave it empty") from None
    if drive:
        try:
            from google.colab import drive as google_drive
        except ImportError:
            raise KitError("DRIVE = True needs Google Colab: leave it False, or name a folder with RUNS") from None
        mount = os.environ.get("FRLKIT_DRIVE", "/content/drive")
        google_drive.mount(mount)
        checkpoint.mirror(PROJECT / default, Path(mount) / "MyDrive" / "frlkit" / default)
    return PROJECT / default


def load_data(dataset: str, device: str) -> tuple[data.Dataset | None, str, str]:
    """The data set, a label for tables and titles, and one for file names.

    Where it cannot be found or downloaded, prints why and returns None with labels that say so: a study is then drawn
    from the shipped records.
    """
    name = data.folder_name(dataset)
    try:
        return data.load(dataset, device=data.pick_device(device)), dataset, name
    except data.DataUnavailableError as error:
        print(error)
        return None, f"{dataset} (shipped records, not recomputed)", f"{name}_shipped_records"


def versions(*packages: str) -> str:
    """One line of versions, for the top of a notebook."""
    listed = [f"{name} {version(name)}" for name in packages]
    return f"frlkit {__version__} · Python {platform.python_version()} · " + " · ".join(listed)
