"""Reading YAML that a stranger wrote: plain data, with the line of every key, and nothing else.

YAML can name Python objects (tags), repeat a node by reference (anchors: ten lines can mean a billion nodes) and
repeat a key (the last one silently wins). A recipe needs none of it, so all three are refused at the level of parser
events, before anything is built. Scalars follow the YAML 1.2 core schema instead of PyYAML's 1.1: `1e-3` is a number,
and `2:4`, `on` and `2024-01-01` are text.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from aerogel.errors import BadInput

Plain = None | bool | int | float | str | list["Plain"] | dict[str, "Plain"]
"""What a recipe is made of before it is validated."""

Key = tuple[str | int, ...]
"""Where a value stands in the tree: ("stages", 1, "quantize", "bits")."""

LIMIT_BYTES = 1_000_000
LIMIT_DEPTH = 16

INTEGER = re.compile(r"[-+]?[0-9]+\Z")
FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?\Z")
CONSTANTS: dict[str, Plain] = {
    **dict.fromkeys(("", "~", "null", "Null", "NULL")),
    **dict.fromkeys(("true", "True", "TRUE"), True),
    **dict.fromkeys(("false", "False", "FALSE"), False),
}


@dataclass
class Document:
    """A YAML tree and where each of its keys was written.

    name: what to call it in messages, such as `my.yaml` or `--set`.
    tree: the content.
    origins: for each key the place to blame, such as `my.yaml:7` or `--set quantize.bits=3`.
    """

    name: str
    tree: dict[str, Plain]
    origins: dict[Key, str] = field(default_factory=dict)

    def blame(self, key: Key) -> str:
        """The place of `key`, or of its nearest ancestor that was written somewhere."""
        while key and key not in self.origins:
            key = key[:-1]
        return self.origins.get(key, self.name)

    def problem(self, key: Key, message: str) -> BadInput:
        """The error to raise for `key`: place, dotted path, message."""
        path = ".".join(str(part) for part in key)
        return BadInput(f"{self.blame(key)}: {path}{': ' if path else ''}{message}")


def read(path: Path) -> Document:
    """The YAML file at `path` as a `Document`. Raises `BadInput` for anything that is not a small, plain mapping."""
    try:
        if path.is_dir():
            raise BadInput(f"recipe {path} is a folder; name a YAML file or a shipped recipe (aerogel list recipes)")
        with path.open("rb") as file:
            data = file.read(LIMIT_BYTES + 1)
    except FileNotFoundError:
        raise BadInput(f"recipe file {path} does not exist; `aerogel list recipes` shows the shipped ones") from None
    except OSError as error:
        raise BadInput(f"recipe file {path} cannot be read ({error.strerror}); check its permissions") from error
    if len(data) > LIMIT_BYTES:
        raise BadInput(f"recipe file {path} is larger than {LIMIT_BYTES} bytes; a recipe is a page of YAML")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise BadInput(f"{path}: byte {error.start} is not UTF-8; save the recipe as UTF-8 text") from None
    return parse(text, path.name)


def parse(text: str, name: str) -> Document:
    """A YAML text as a `Document`. The top level must be a mapping."""
    origins: dict[Key, str] = {}
    tree = _build(_compose(text, name), (), name, origins)
    if not isinstance(tree, dict):
        raise BadInput(f"{name}: a recipe is a mapping of keys, found {describe(tree)}; begin with `aerogel: 1`")
    return Document(name, tree, origins)


def value(text: str, name: str) -> Plain:
    """One value as it stands behind `--set key=`: a scalar or a flow collection such as `[1, 16]`."""
    return _build(_compose(text, name), (), name, {})


def describe(found: object) -> str:
    """A found value in words for a message: `'four' (text)`, `3 (a whole number)`, `a list of 2`."""
    if found is None:
        return "nothing (null)"
    if isinstance(found, bool):
        return f"{str(found).lower()} (true/false)"
    if isinstance(found, dict):
        return f"a mapping of {len(found)}"
    if isinstance(found, list | tuple):
        return f"a list of {len(found)}"
    shown = repr(found) if len(repr(found)) <= 60 else repr(found)[:57] + "..."
    kind = {int: "a whole number", float: "a number", str: "text"}.get(type(found), type(found).__name__)
    return f"{shown} ({kind})"


def _place(name: str, mark: Any) -> str:
    """`my.yaml:7`; an override has no lines."""
    return name if name.startswith("--") else f"{name}:{mark.line + 1}"


def _compose(text: str, name: str) -> yaml.Node | None:
    """The node graph of a text that has passed the checks on its events."""
    try:
        _refuse_unsafe(text, name)
        return yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = _place(name, mark) if mark else name
        raise BadInput(f"{place}: not valid YAML: {error.problem or error.context}") from None
    except yaml.YAMLError as error:
        raise BadInput(f"{name}: not valid YAML: {' '.join(str(error).split())}") from None


def _refuse_unsafe(text: str, name: str) -> None:
    """Raises `BadInput` at the first anchor, alias, tag, second document or level of nesting too many."""
    depth = documents = 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        place = _place(name, event.start_mark)
        anchor, tag = getattr(event, "anchor", None), getattr(event, "tag", None)
        if anchor:
            raise BadInput(f"{place}: anchors and aliases (&{anchor}) are not allowed; write the value out")
        if tag:
            raise BadInput(f"{place}: the YAML tag {tag} is not allowed; write plain values")
        documents += isinstance(event, yaml.DocumentStartEvent)
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > LIMIT_DEPTH:
            raise BadInput(f"{place}: nested deeper than {LIMIT_DEPTH} levels; a recipe needs four")
        if documents > 1:
            raise BadInput(f"{place}: a second YAML document begins here; keep one recipe per file")


def _build(node: yaml.Node | None, key: Key, name: str, origins: dict[Key, str]) -> Plain:
    """Plain data from a node; fills `origins`."""
    if isinstance(node, yaml.MappingNode):
        return {word: _build(child, (*key, word), name, origins) for word, child in _pairs(node, key, name, origins)}
    if isinstance(node, yaml.SequenceNode):
        for index, child in enumerate(node.value):
            origins[(*key, index)] = _place(name, child.start_mark)
        return [_build(child, (*key, index), name, origins) for index, child in enumerate(node.value)]
    if isinstance(node, yaml.ScalarNode):
        return _scalar(node, name)
    return None


def _pairs(node: yaml.MappingNode, key: Key, name: str, origins: dict[Key, str]) -> Iterator[tuple[str, yaml.Node]]:
    """The keys of a mapping with their nodes. Raises `BadInput` for a repeated key or one that is not text."""
    for word_node, child in node.value:
        place = _place(name, word_node.start_mark)
        if not isinstance(word_node, yaml.ScalarNode):
            raise BadInput(f"{place}: a key must be a word, found a list or a mapping; quote it if it is meant as text")
        word = word_node.value
        if (*key, word) in origins:
            path = ".".join(str(part) for part in (*key, word))
            raise BadInput(f"{place}: {path} is written twice (first at {origins[(*key, word)]}); keep one")
        origins[(*key, word)] = place
        yield word, child


def _scalar(node: yaml.ScalarNode, name: str) -> Plain:
    """The value of a scalar by the YAML 1.2 core schema; quoted scalars are text."""
    text: str = node.value
    if node.style in ("'", '"', "|", ">"):
        return text
    if text in CONSTANTS:
        return CONSTANTS[text]
    if INTEGER.match(text) and len(text) <= 20:
        return int(text)
    if FLOAT.match(text):
        number = float(text)
        if math.isinf(number):
            raise BadInput(f"{_place(name, node.start_mark)}: {text[:30]} is too large for a number; write a smaller one")
        return number
    return text
