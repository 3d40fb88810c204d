"""The keys that a method accepts are the fields of its dataclass: read from the class, never written down twice.

A method (`quantize/gptq.py`, `prune/wanda.py`, ...) is a frozen dataclass that is its own configuration. Its fields
become a closed pydantic model here, which checks a recipe strictly: no unknown key, no text where a number belongs.
What a quantizing method rounds to is a grid, another dataclass, whose fields are keys of the same stage (`bits`,
`group_size`).
"""

from __future__ import annotations

import sys
from dataclasses import MISSING, Field, fields
from types import SimpleNamespace
from typing import Annotated, Any, Literal, get_type_hints

import pydantic
from pydantic import BaseModel, ConfigDict

ScaleType = Literal["auto", "float16", "bfloat16", "float32", "e4m3", "e8m0", "ue5m3"]
"""The type that scales are rounded to before use; `auto` is the type the checkpoint is written in."""

LIMITS: dict[str, dict[str, Any]] = {
    "bits": {"ge": 1, "le": 8},
    "group_size": {"ge": 1},
    "sparsity": {"gt": 0, "lt": 1},
}
"""Bounds that hold for a key of this name in every method."""

STRICT = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False, protected_namespaces=())


def options(cls: type, *, without: frozenset[str] = frozenset()) -> dict[str, tuple[Any, Any]]:
    """Name -> (type with its bounds, default or ...) for each field of a dataclass that can be written in a recipe."""
    return {field.name: _option(cls, field) for field in fields(cls) if field.init and field.name not in without}


def option_model(name: str, options: dict[str, tuple[Any, Any]]) -> type[BaseModel]:
    """The closed, strict pydantic model that has exactly these options."""
    return pydantic.create_model(name, __config__=STRICT, **options)  # type: ignore[call-overload, no-any-return]


def _option(cls: type, field: Field[Any]) -> tuple[Any, Any]:
    """Type and default of one field. Only this annotation is resolved: others may be for type checkers only."""
    if field.name == "scale_dtype":
        return _scale_type(field)
    default = field.default
    if default is MISSING:
        default = ... if field.default_factory is MISSING else field.default_factory()
    holder = SimpleNamespace(__annotations__={field.name: field.type})
    kind = get_type_hints(holder, vars(sys.modules[cls.__module__]))[field.name]
    if field.name in LIMITS:
        kind = Annotated[kind, pydantic.Field(**LIMITS[field.name])]
    return kind, default


def _scale_type(field: Field[Any]) -> tuple[Any, Any]:
    """A grid whose default is an eight-bit type has a type of its own; else it is the checkpoint's unless written."""
    from aerogel.quantize.scales import WIDE, name_of

    own = field.default if field.default not in (MISSING, *WIDE) else None
    return ScaleType, "auto" if own is None else name_of(own)
