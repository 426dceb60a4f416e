"""Result records: one JSON file a model, with one schema; written, read and compared here.

A record has the data set, the weights' hash, ``natural`` and, in ``attacks``, one entry per attack with ``robust``,
``boundary`` and ``confusion``, and what made it. Beside it, ``outcomes.npz`` keeps a bit an image and attack.
"""

from __future__ import annotations

import io
import json
import platform
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from pydantic import AfterValidator, ConfigDict, Field, TypeAdapter, ValidationError
from torch import nn
from typing_extensions import NotRequired, TypedDict

from frlkit import KitError, __version__, checkpoint, disk, kernels
from frlkit.data import Dataset
from frlkit.evaluation import STANDARD, Attack, ClassErrors, class_errors
from frlkit.values import Share, plain

OUTCOMES = "outcomes.npz"


def standard(dataset: str, *, preliminary: bool = False) -> tuple[Attack, ...]:
    """`evaluation.STANDARD`; for GTSRB the paper's radius, 12/255; for the preliminary study its second, 4/255."""
    more = (12.0,) if dataset.startswith("gtsrb") else ()
    second = (4.0,) if preliminary else ()
    return (*STANDARD, *(Attack(eps_255=eps_255) for eps_255 in more + second))


def _is_attack(value: dict[str, Any]) -> dict[str, Any]:
    """Every field is said: a default would make it another attack's errors."""
    if missing := asdict(Attack(**value)).keys() - value.keys():
        raise ValueError(f"it does not say its {min(missing)}")
    return value


_Errors = Annotated[list[Share], Field(min_length=2)]
OPEN = ConfigDict(strict=True, extra="allow", allow_inf_nan=False)  # of a file, and so of what is in it
_Images = Annotated[int, Field(ge=0, le=10**9)]


class _Entry(TypedDict):
    attack: Annotated[dict[str, Any], AfterValidator(_is_attack)]
    robust: _Errors
    boundary: list[float]
    confusion: list[list[_Images]]


class _Config(TypedDict):
    dataset: NotRequired[str]
    seed: NotRequired[Annotated[int, Field(ge=0)]]


def _same_classes(record: dict[str, Any]) -> dict[str, Any]:
    """Every list has one entry a class, and no two classes share a name."""
    names, attacks = record["class_names"], record["attacks"]
    lists = [record[key] for key in ("natural", "class_counts", "training_counts") if key in record]
    for entry in attacks:
        lists += [entry["robust"], entry["boundary"], entry["confusion"]]
    if any(len(values) != len(names) for values in lists):
        raise ValueError(f"its lists do not all have {len(names)} classes")
    if len(set(map(plain, names))) < len(names):
        raise ValueError("two of its classes have one name")
    if attacks and not {"natural", "class_counts"} <= set(record):
        raise ValueError("it has attacks, and no natural errors or counts of images")
    if not sum(record.get("training_counts", [1])):
        raise ValueError("it has no training images")
    return record


class _Record(TypedDict):
    __pydantic_config__ = OPEN
    dataset: str
    class_names: Annotated[list[str], Field(min_length=2)]
    weights_sha256: NotRequired[str]
    images: NotRequired[Annotated[int, Field(ge=1, le=10**9)]]
    natural: NotRequired[_Errors]
    class_counts: NotRequired[list[Annotated[_Images, Field(ge=1)]]]
    training_counts: NotRequired[list[_Images]]
    attacks: list[_Entry]
    config: NotRequired[_Config]


class _Validation(TypedDict):
    natural: _Errors
    robust: _Errors


class _Epoch(TypedDict):
    lr: Annotated[float, Field(ge=0)]
    loss: float
    seconds: Annotated[float, Field(ge=0)]
    validation: _Validation


class _History(TypedDict):
    __pydantic_config__ = OPEN
    config: _Config
    threads: Annotated[int, Field(ge=1, le=10**4)]
    epochs: Annotated[list[_Epoch], Field(min_length=1)]


def _one_study(history: dict[str, Any]) -> dict[str, Any]:
    """Every epoch measured the same classes."""
    if len({len(errors) for epoch in history["epochs"] for errors in epoch["validation"].values()}) > 1:
        raise ValueError("its epochs do not all have the same number of classes")
    return history


_RECORD: TypeAdapter[Any] = TypeAdapter(Annotated[_Record, AfterValidator(_same_classes)])
_HISTORY: TypeAdapter[Any] = TypeAdapter(Annotated[_History, AfterValidator(_one_study)])


def read(path: Path) -> dict[str, Any]:
    """Read a record; raises `KitError` where it is missing, no JSON, or not what a record is."""
    return read_as(path, _RECORD, "record")


def read_history(path: Path) -> dict[str, Any]:
    """Read a run's history; raises `KitError` where it is missing, no JSON, or not what a history is."""
    return read_as(path, _HISTORY, "history")


def read_as(path: Path, schema: TypeAdapter[Any], kind: str) -> dict[str, Any]:
    """Read JSON of a schema; raises `KitError` naming the kind of file where it is missing or something else."""
    content = disk.content(path, kind, "give the path of one")
    try:
        return schema.validate_python(json.loads(content.decode()))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(map(str, first["loc"]))
        reason = f"{place + ': ' if place else ''}{first['msg']}"
    except (ValueError, RecursionError) as error:
        reason = str(error) or type(error).__name__
    raise KitError(f"the {kind} {path} cannot be read ({reason}): delete it to have it made again") from None


def device(history: Mapping[str, Any]) -> str:
    """Where a run computed: "CPU", its GPU's name, or "a GPU" for the first ones there, whose torch alone tells it."""
    made = history.get("versions")
    unnamed = isinstance(made, dict) and made.get("torch") == "2.11.0+cu130"  # what no shipped run on a CPU had
    return str(history.get("kernel", "")).partition(", ")[2] or ("a GPU" if unnamed else "CPU")


def versions() -> dict[str, str]:
    """What a record says about the software that made it."""
    return {
        "frlkit": __version__,
        "python": platform.python_version(),
        "torch": str(torch.__version__),  # its own class, which a checkpoint would refuse to load
        "torchvision": version("torchvision"),  # importing it takes longer than torch
    }


def evaluate(
    model: nn.Module,
    data: Dataset,
    attacks: Iterable[Attack] | None = None,
    *,
    path: Path | None = None,
    about: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Errors on the whole test split as a record: plain data, ready for JSON.

    With `path`, a record there of the same weights and data is reused, only missing attacks are computed, and the
    result is written back, outcomes beside it. `about` is stored in it. The attacks are those of `standard` unless
    given. Raises `KitError` where a class has no test image.
    """
    if missing := set(range(len(data.class_names))) - set(data.test.labels.unique().tolist()):
        raise KitError(f"class {min(missing)} has no image in the test split: its error is undefined")
    record: dict[str, Any] = {
        **(about or {}),
        "dataset": data.name,
        "data_sha256": data.fingerprint,
        "split": "test",
        "class_names": list(data.class_names),
        "training_counts": data.class_counts["train"],
        "weights_sha256": checkpoint.digest(dict(model.state_dict())),
        "attacks": [],
    }
    if path is not None and disk.exists(path):
        found = read(path)
        found.setdefault("data_sha256", data.fingerprint)  # the first runs kept none
        found.setdefault("training_counts", record["training_counts"])
        if all(found.get(key) == record[key] for key in record if key != "attacks"):
            record = found
    done = [Attack(**entry["attack"]) for entry in record["attacks"]]
    for attack in standard(data.name) if attacks is None else attacks:
        if attack in done:
            continue
        errors = class_errors(model, data.test, attack)
        record |= {"images": int(errors.counts.sum()), "class_counts": errors.counts.tolist()}
        record["natural"] = errors.natural.tolist()
        entry = {"attack": asdict(attack), "robust": errors.robust.tolist(), "boundary": errors.boundary.tolist()}
        entry |= {"confusion": errors.confusion.tolist(), "kernel": kernels.describe(model), "versions": versions()}
        record["attacks"].append(entry)
        if path is not None:
            _keep_outcomes(path.with_name(OUTCOMES), record["weights_sha256"], attack, errors)
            checkpoint.write_json(path, record)
    return record


def _keep_outcomes(path: Path, weights: str, attack: Attack, errors: ClassErrors) -> None:
    """Add an attack's outcomes to those of the same weights."""
    found = {**outcomes(path, weights), "clean": errors.right, str(attack): errors.stands}
    kept = {name: np.packbits(values) for name, values in found.items()}
    kept |= {"images": np.array(len(errors.right)), "weights_sha256": np.array(weights)}
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **kept)
    checkpoint.write_atomically(path, buffer.getvalue())


def outcomes(path: Path, weights: str | None = None) -> dict[str, np.ndarray]:
    """Whether each test image is right, clean (``"clean"``) and under each attack: arrays (N,) of bool by name.

    Empty where there is no such file, or, with `weights`, where it is of other weights than those of that hash.
    """
    try:
        with open(path, "rb") as file, np.load(file, allow_pickle=False) as found:  # np.load leaves damaged files open
            if weights is not None and str(found["weights_sha256"]) != weights:
                return {}
            names = [name for name in found.files if name not in ("images", "weights_sha256")]
            return {name: np.unpackbits(found[name], count=int(found["images"])).astype(bool) for name in names}
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise disk.not_read(path, error) from None
    except Exception as error:  # a damaged archive can raise anything
        fix = "delete them and the record beside them, and both are made again"
        raise KitError(f"the outcomes {path} cannot be read ({error}): {fix}") from None
