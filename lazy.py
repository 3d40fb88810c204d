"""Tables of lazy names: `"module:Name"` strings, imported when first used, and the nearest name for a typing error.

Every family of interchangeable things (methods, formats, kernels) is a plain dict from the name a user writes to such a
string. Listing them costs no import, so help stays fast, and a missing optional library breaks only what needs it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from importlib import import_module
from typing import Any

from aerogel.errors import BadInput


def load(reference: str) -> Any:
    """The object that `"package.module:Name"` names; imports the module. Raises what the import raises."""
    module, _, name = reference.partition(":")
    return getattr(import_module(module), name)


def nearest(word: str, known: Iterable[str]) -> str:
    """`"; did you mean 'gptq'?"` when a known name is close to `word`, else `"; known: a, b, c"`. Ready to append."""
    names = {name.lower(): name for name in sorted(known)}
    close = get_close_matches(word.lower(), names, n=1, cutoff=0.6)
    return f"; did you mean '{names[close[0]]}'?" if close else f"; known: {', '.join(names.values()) or 'none'}"


def lookup(table: Mapping[str, str], name: str, what: str) -> Any:
    """The loaded entry `name` of a table of lazy names. Raises `BadInput` that names the nearest entry."""
    if name not in table:
        raise BadInput(f"unknown {what} '{name}'{nearest(name, table)}")
    return load(table[name])
