"""What every notebook's set-up and parameter cells need: strict parameters, paths from any working directory.

Papermill only warns about a misspelt parameter and passes ``-p FLAG true`` on as text, so the notebook itself checks:
`parameters` refuses unknown names, wrong types and values out of range, in one sentence, before anything is computed.
"""

from __future__ import annotations

import ast
import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Any, Literal, get_args, get_origin

from pydantic import AfterValidator, Field, PlainValidator, TypeAdapter, ValidationError, WrapValidator
from pydantic.fields import FieldInfo

from frlkit import PROJECT, KitError, __version__, data, values
from frlkit.drive import mirror, mounted
from frlkit.recipes import BASE


class ParameterError(KitError):
    """A notebook parameter that is unknown, of the wrong type or out of range."""


def _distinct(items: list[Any]) -> list[Any]:
    if not items or any(item in items[:place] for place, item in enumerate(items)):
        raise ValueError("a non-empty list without repeats")
    return items


def _natural_first(recipes: list[str]) -> list[str]:
    if _distinct(recipes)[0] != "natural" or len(recipes) < 2:
        raise ValueError("a list that begins with 'natural', the reference, and has another")
    return recipes


Seeds = Annotated[list[values.Seed], AfterValidator(_distinct)]
# Checked as a float, kept as it is: recipes are named after it, and 1 is no 1.0 there.
Strength = Annotated[float, Field(ge=0, le=1000), WrapValidator(lambda value, check: (check(value), value)[1])]

#: Every parameter of every notebook, so that one profile can serve them all, and what it may be. A notebook's own cell
#: names those that it has, with type and help for papermill; a new parameter is declared here and there.
PARAMETERS: dict[str, Any] = {
    "DATASET": Annotated[str, PlainValidator(data.check_name)],
    "RECIPES": Annotated[list[Literal[tuple(BASE)]], AfterValidator(_natural_first)],  # type: ignore[misc]
    "SEEDS": Seeds,
    "EPOCHS": Annotated[int, Field(ge=1, le=10**5)],
    "BATCH_SIZE": values.Count,
    "FRL_SEEDS": Seeds,
    "FRL_EPOCHS": Annotated[int, Field(ge=0, le=10**5)],  # 0: each recipe's own
    "REPORT_SEEDS": Seeds,
    "ALPHAS": Annotated[list[Strength], AfterValidator(_distinct)],
    "GRID_SEEDS": Seeds,
    "ATTACKED": Annotated[int, Field(ge=0, le=10**6)],
    "IMAGES": values.Count,
    "RADII": Annotated[list[Annotated[float, Field(gt=0, le=255)]], AfterValidator(_distinct)],
    "ROUNDS": Annotated[int, Field(ge=0, le=100)],
    "WEIGHTS": str,
    "MODEL": str,  # `configure` says which there are
    "NETWORK": str,  # `readings.read` says which there are
    # of one's own model, as are its neighbours: no profile sets it
    "DATA": Annotated[str, PlainValidator(data.check_name)],
    "RETRAIN_SEEDS": Seeds,
    "RETRAIN_EPOCHS": Annotated[int, Field(ge=0, le=10**5)],
    "CUT_IMAGES": Annotated[int, Field(ge=0, le=10**6)],
    "SECONDS": Annotated[float, Field(ge=0, le=86400)],
    "SEED": values.Seed,
    "SAMPLES": Annotated[int, Field(ge=1000, le=10**6)],
    "GD_STEPS": Annotated[int, Field(ge=10, le=10**5)],
    "DEVICE": Literal["auto", "cpu", "cuda"],
    "RUNS": str,
    "FIGURES": str,
    "DRIVE": bool,
}
#: How papermill is told, by the kind of value.
HINTS = {
    bool: " (with papermill: -p {} True, capital T)",
    list: ' (with papermill: -y "{}: [a, b]")',
    str: " in quotes",
}


def parameters(namespace: Mapping[str, Any]) -> SimpleNamespace:
    """Check a notebook's parameters and return them as attributes.

    `namespace` is the notebook's ``globals()``. The notebook's own parameters are those that its ``# Parameters`` cell
    annotates; what each may be is declared in `PARAMETERS`. Names that another ``# Parameters`` cell set since, as
    papermill's does, but that no notebook has are refused; one that only another notebook has is named in a printed
    line and otherwise ignored, for a profile serves all notebooks. Raises `ParameterError`: name, value, allowed ones.
    """
    own, others = _named(namespace.get("In", []))
    own = own or [name for name in PARAMETERS if name in namespace]  # run as a script, without IPython's history
    if unknown := sorted({*own, *others} - set(PARAMETERS)):
        raise ParameterError(f"unknown parameter {', '.join(map(repr, unknown))}: this notebook has {', '.join(own)}")
    if unused := sorted(others - set(own)):
        print(f"not used by this notebook: {', '.join(unused)}")
    if missing := [name for name in own if name not in namespace] if own else ["DATASET"]:
        raise ParameterError(f"parameter {missing[0]} is not set: run the cell that begins with '# Parameters' first")
    checked = {name: _checked(name, namespace[name]) for name in own}
    seeds, reports = (checked.get(name, []) for name in ("FRL_SEEDS", "REPORT_SEEDS"))
    if seeds and not set(reports) <= set(seeds):
        raise ParameterError(f"parameter REPORT_SEEDS = {reports} is not allowed: use seeds among FRL_SEEDS = {seeds}")
    return SimpleNamespace(**checked)


def _named(history: Sequence[str]) -> tuple[list[str], set[str]]:
    """Names that the newest '# Parameters' cell with annotations annotates, and those that such cells set since;
    `history` is IPython's: one source for each cell that ran, the running one last."""
    others: set[str] = set()
    for source in reversed(history[:-1]):
        if source.lstrip().startswith("# Parameters"):
            tree = ast.parse(source)
            names = [node for node in ast.walk(tree) if isinstance(node, ast.Name)]
            others |= {name.id for name in names if isinstance(name.ctx, ast.Store)}
            if own := [node.target.id for node in tree.body if isinstance(node, ast.AnnAssign)]:
                return own, others
    return [], others


def _checked(name: str, value: Any) -> Any:
    """A parameter's value, if it is what `PARAMETERS` allows; else raises `ParameterError`."""
    kind = PARAMETERS[name]
    try:
        return TypeAdapter(kind, config=values.STRICT).validate_python(value)
    except ValidationError as error:
        rule = error.errors(include_url=False)[0].get("ctx", {}).get("error")  # a function's above, in its own words
        words = rule or values.allowed(FieldInfo.from_annotation(kind))
        said = f"parameter {name} = {value!r} is not allowed: use {words}"
        if isinstance(rule, KitError):  # of a data set's name
            said = str(rule).replace("dataset", f"parameter {name}", 1)
    plain = get_args(kind)[0] if get_origin(kind) is Annotated else kind
    plain = get_origin(plain) or plain  # int, list, ...
    hint = HINTS.get(plain, ", without quotes" if plain is int and isinstance(value, str) else "").format(name)
    right_type = plain is Literal or isinstance(value, plain)
    raise ParameterError(said if right_type else said + hint)


def folder(path: str, default: str, *, drive: bool = False) -> Path:
    """The folder a parameter names: relative to the working directory; empty means `default` in the project.

    With `drive`, Google Drive is mounted and its ``frlkit`` folder holds a copy of everything that is written there,
    so that runs outlive a Colab session; what it holds already is taken over first (see `drive.mirror`). Raises
    `ParameterError` where the text cannot be a path or Drive is asked for too, and `KitError` where there is no Drive.
    """
    if path and drive:
        raise ParameterError(f"DRIVE = True with the folder {path!r} is not allowed: leave RUNS empty, or DRIVE False")
    if path:
        try:
            return Path(path).expanduser().resolve()
        except (OSError, RuntimeError, ValueError) as error:  # of another user who is unknown, with a null character
            raise ParameterError(f"{path!r} is no folder ({error}): name another, or leave it empty") from None
    if drive:
        mirror(PROJECT / default, mounted() / "frlkit" / default)
    return PROJECT / default


def load_data(dataset: str, device: str) -> tuple[data.Dataset | None, str, str]:
    """The data set, a label for tables and titles, and one for file names. Where it cannot be found or downloaded,
    prints why and returns None with labels that say so: a study is then drawn from the shipped records."""
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
