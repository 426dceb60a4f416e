"""One way to say what a value may be: limits stand at the field (pydantic), complaints are one sentence (`KitError`).

::

    @checked
    class Attack:
        steps: Annotated[int, Field(ge=0, le=10**6)] = 20

    Attack(steps=-1)  # KitError: steps = -1 is not allowed: use a whole number from 0 to 1,000,000
"""

from __future__ import annotations

import functools
import re
import reprlib
import types
from typing import Annotated, Any, Literal, TypeVar, Union, dataclass_transform, get_args, get_origin

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass
from pydantic.fields import FieldInfo

from frlkit import KitError

T = TypeVar("T")
STRICT = ConfigDict(strict=True, allow_inf_nan=False, extra="forbid")

Share = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[float, Field(gt=0, le=1)]
Size = Annotated[float, Field(ge=0, le=1e6)]
Pixels = Annotated[float, Field(ge=0, le=255)]  # a radius or a step, in 1/255
Count = Annotated[int, Field(ge=1, le=10**6)]
Seed = Annotated[int, Field(ge=0, le=2**31)]


@dataclass_transform(frozen_default=True, field_specifiers=(Field,))
def checked(cls: type[T]) -> type[T]:
    """A frozen dataclass that checks its fields strictly; a value that does not fit raises `KitError`."""
    made = dataclass(cls, frozen=True, config=STRICT)
    build = made.__init__

    @functools.wraps(build)
    def init(self: Any, *values: Any, **named: Any) -> None:
        try:
            build(self, *values, **named)
        except ValidationError as error:
            raise KitError(sentence(error, fields_of(made), cls.__name__)) from None

    made.__init__ = init  # type: ignore[method-assign]
    return made


def fields_of(cls: type) -> dict[str, FieldInfo]:
    """The fields of a `checked` class by name, in order."""
    return cls.__pydantic_fields__  # type: ignore[attr-defined]


def from_text(name: str, text: str, field: FieldInfo) -> Any:
    """A field's value from text, such as a part of a recipe's name; raises `KitError` where it does not fit."""
    if field.annotation is bool and text not in ("True", "False"):  # pydantic also takes yes, on, 1
        raise KitError(f"{name} = {text!r} is not allowed: use {allowed(field)}")
    kind = Annotated[(field.annotation, *field.metadata)] if field.metadata else field.annotation
    try:
        return TypeAdapter(kind, config=ConfigDict(allow_inf_nan=False)).validate_strings(text)
    except ValidationError as error:
        raise KitError(sentence(error, {name: field}, "", name)) from None


def to_text(value: Any) -> str:
    """The one spelling of a value in a recipe's name: 5.0 is 5, -0.0 is 0."""
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


def sentence(error: ValidationError, fields: dict[str, FieldInfo], owner: str, name: str = "") -> str:
    """pydantic's first complaint in one sentence: the name, the value, what is allowed."""
    first = error.errors(include_url=False)[0]
    cause = first.get("ctx", {}).get("error")
    if isinstance(cause, KitError):  # a field's own rule, which has said it all
        return str(cause)
    if not name:  # a field is named, or counted where values were given in order
        part = first["loc"][0]
        name = str(part) if not isinstance(part, int) else [*fields, f"value number {part + 1}"][min(part, len(fields))]
    if name not in fields:
        return f"{name!r} is no field of {owner}: use {', '.join(fields)}"
    if first["type"] == "missing":
        return f"{name} is missing: give {allowed(fields[name])}"
    word = "unknown" if first["type"] == "literal_error" else "not allowed"
    return f"{name} = {shown(first['input'])} is {word}: use {allowed(fields[name])}"


_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 300


def shown(value: Any) -> str:
    """A value as a sentence shows it: cut where it is long or deep."""
    try:
        return _SHORT.repr(value)
    except ValueError:  # Python's own limit of 4,300 digits
        return "a number of thousands of digits"


def allowed(field: FieldInfo) -> str:
    """What a field takes, in words, from its own declaration."""
    return _in_words(field.annotation, field.metadata)


def _in_words(kind: Any, metadata: list[Any]) -> str:
    if get_origin(kind) is Annotated:
        kind, *inner = get_args(kind)
        return _in_words(kind, [*metadata, *_limits(inner)])
    if get_origin(kind) is Literal:
        return f"one of {', '.join(map(str, get_args(kind)))}"
    if get_origin(kind) in (Union, types.UnionType):
        return " or ".join(_in_words(part, metadata) for part in get_args(kind))
    if get_origin(kind) is list:
        return f"a list whose items are each {_in_words(*get_args(kind), [])}"
    if kind in (int, float):
        return ("a whole number" if kind is int else "a number") + _range(metadata)
    if pattern := next((item.pattern for item in metadata if hasattr(item, "pattern")), ""):
        return re.sub(r"\[0-9a-f\]\{(\d+)\}", r" and \1 hexadecimal digits", pattern.strip("^$"))
    return {bool: "True or False", str: "text", type(None): "nothing"}.get(kind, getattr(kind, "__name__", str(kind)))


def _limits(metadata: list[Any]) -> list[Any]:
    return [part for item in metadata for part in (item.metadata if isinstance(item, FieldInfo) else [item])]


def _range(metadata: list[Any]) -> str:
    found = {key: getattr(item, key) for item in metadata for key in ("ge", "gt", "le", "lt") if hasattr(item, key)}
    low = (
        f" from {_number(found['ge'])}" if "ge" in found else f" above {_number(found['gt'])}" if "gt" in found else ""
    )
    join = " to " if "ge" in found else " and at most " if low else " of at most "
    high = (
        f"{join}{_number(found['le'])}" if "le" in found else f" below {_number(found['lt'])}" if "lt" in found else ""
    )
    return low + high


def _number(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) or not float(value).is_integer() else f"{int(value):,}"


def plain(name: str) -> str:
    """A class's or method's name on one line, whatever its folder was called."""
    return " ".join(str(name).split())


def first_line(error: Exception) -> str:
    """The first line of what an error says, or its kind where it says nothing."""
    return (str(error).splitlines() or [""])[0] or type(error).__name__
