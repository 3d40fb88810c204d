"""`--set path.to.key=value`: one value of a recipe changed on the command line.

The path is dotted, with list indices counted from 0 (`stages.1.quantize.bits=3`). Where exactly one stage is of a
kind, its index may be left out (`quantize.bits=3`). The value is YAML: a scalar, or a flow list or mapping such as
`[1, 16]`. An override only places the value; whether the key exists and the value fits is the schema's business,
which then blames the override instead of a line of the file.
"""

from __future__ import annotations

from collections.abc import Iterable

from aerogel.errors import BadInput
from aerogel.recipes import files
from aerogel.recipes.files import Document, Key, Plain

STAGE_KINDS = ("prune", "scale", "quantize")


def apply(document: Document, overrides: Iterable[str]) -> None:
    """Changes `document` in place by each `path=value` in order. Raises `BadInput` for a path that leads nowhere."""
    for text in overrides:
        path, equals, value = text.partition("=")
        label = f"--set {text}"
        if not equals or not path.strip():
            raise BadInput(f"{label}: expected path.to.key=value, for instance --set calibration.samples=16")
        if not value.strip():
            raise BadInput(f"{label}: no value behind '='; write {path}=null for none")
        key = _resolve(document, path.strip().split("."), label)
        _place(document, key, files.value(value, label), label)


def _resolve(document: Document, parts: list[str], label: str) -> Key:
    """The full key for the words of a path, with the short form of a stage completed."""
    if "" in parts:
        raise BadInput(f"{label}: the path has an empty part; write it as path.to.key=value")
    if parts[0] not in STAGE_KINDS:
        return tuple(parts)
    kind = parts[0]
    stages = document.tree.get("stages")
    listed = stages if isinstance(stages, list) else []
    found = [i for i, stage in enumerate(listed) if isinstance(stage, dict) and kind in stage]
    if not found:
        raise BadInput(f"{label}: {document.name} has no {kind} stage; see its stages with `aerogel list recipes`")
    if len(found) > 1:
        choices = " or ".join(f"stages.{i}.{'.'.join(parts)}" for i in found)
        raise BadInput(f"{label}: {len(found)} stages are of kind {kind}; say which: {choices}")
    return ("stages", str(found[0]), *parts)


def _place(document: Document, key: Key, value: Plain, label: str) -> None:
    """Walks down `key`, creating mappings that are absent, and puts `value` there."""
    here: Plain = document.tree
    done: list[str | int] = []
    for depth, part in enumerate(key):
        last = depth == len(key) - 1
        where = ".".join(str(p) for p in done)
        if isinstance(here, list):
            index = _index(str(part), len(here), where, label)
            done.append(index)
            if last:
                here[index] = value
            here = here[index]
        elif isinstance(here, dict):
            word = str(part)
            done.append(word)
            if last:
                here[word] = value
            elif here.get(word) is None:
                here[word] = {}
                document.origins[tuple(done)] = label
            here = here[word]
        else:
            raise BadInput(f"{label}: {where} is {files.describe(here)}, so it has no key '{part}'; set {where} itself")
    _forget(document, tuple(done))
    document.origins[tuple(done)] = label


def _index(part: str, length: int, where: str, label: str) -> int:
    """`part` as an index of a list of `length` items."""
    if not part.isascii() or not part.isdigit() or int(part[:9]) >= length:
        valid = f"0 to {length - 1}" if length else "nothing: the list is empty"
        raise BadInput(f"{label}: {where} is a list of {length}; its index must be {valid}, found '{part}'")
    return int(part)


def _forget(document: Document, key: Key) -> None:
    """Drops the lines of what stood below `key`: it was replaced."""
    for old in [known for known in document.origins if known[: len(key)] == key]:
        del document.origins[old]
