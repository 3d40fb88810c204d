"""The `quantization_config` of compressed-tensors: written from what was done, and matched against layer names.

One scheme for everything becomes one group with the target "Linear"; several become several groups that name their
layers, since a class name cannot tell two linears apart. An output head is named in any case: to servers it is no linear,
and without its name they expect it dense. The top-level `format` is what older readers look at: it is
"mixed-precision" only when the groups differ in their *format*; two widths of integers are both pack-quantized.

A target, and an entry of `ignore`, is an exact layer name, a class name, or `re:` and a regular expression that is matched
at the start of the layer name.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from aerogel.errors import BadInput
from aerogel.lazy import load
from aerogel.pack import FORMATS
from aerogel.pack.format import Activations, Format, Grid

VERSION = "0.18.0"
"""The first compressed-tensors release whose layout this is; before, widths that do not divide 32 left bits of a word empty."""


def format_of(name: str) -> type[Format]:
    """The format class called `name`. Raises `BadInput` for an unknown one."""
    if name not in FORMATS:
        raise BadInput(f"unknown format {name!r}; known are {', '.join(sorted(FORMATS))}")
    found: type[Format] = load(FORMATS[name])
    return found


def choose_format(grid: Grid, activations: Activations = "none", wanted: str = "auto") -> type[Format]:
    """The format that stores `grid`: `wanted`, or with "auto" the first that does not refuse.

    Integers without quantized activations become pack-quantized at every width, 8 bits included.

    Raises:
        BadInput: the wanted format refuses, or none fits; with the reason.
    """
    formats = [format_of(name) for name in (FORMATS if wanted == "auto" else [wanted])]
    reasons = [fmt.refuses(grid, activations) for fmt in formats]
    if None in reasons:
        return formats[reasons.index(None)]
    # Of many refusals the one to tell is that of the format whose numbers these are, and which lacks only the rounded inputs.
    near = [str(reason) for fmt, reason in zip(formats, reasons, strict=True) if fmt.refuses(grid) is None]
    raise BadInput(
        near[0] if near else f"no format stores {grid}; see `aerogel list formats`" if wanted == "auto" else str(reasons[0])
    )


def quantization_config(
    assignments: Sequence[tuple[str, Grid, Activations]],
    ignore: Iterable[str] = (),
    *,
    heads: Iterable[str] = (),
    wanted: str = "auto",
    method: str = "compressed-tensors",
) -> dict[str, Any]:
    """The `quantization_config` for config.json.

    Args:
        assignments: every quantized layer: its name in the checkpoint (without `.weight`), its grid, its activations.
        ignore: names of the linears that were kept, `lm_head` too when it was.
        heads: names of quantized layers outside the blocks, the output head.
        wanted: the recipe's `pack.format`: a format name or "auto".
        method: `quant_method`; "aerogel" for what only aerogel loads (such as transposed Conv1D weights). Formats that no
            standard knows make it "aerogel" by themselves.

    Returns:
        Plain JSON values; the same input gives the same dict, key order included.

    Raises:
        BadInput: no assignments, or a grid that no format stores.
    """
    if not assignments:
        raise BadInput("nothing was quantized, so there is no quantization config; add a quantize stage that matches a layer")
    groups: dict[str, tuple[dict[str, Any], list[str]]] = {}
    for name, grid, activations in assignments:
        group = choose_format(grid, activations, wanted).config(grid, activations)
        groups.setdefault(repr(group), (group, []))[1].append(name)
    single = len(groups) == 1
    config_groups = {
        f"group_{index}": {**group, "targets": ["Linear", *heads] if single else names}
        for index, (group, names) in enumerate(groups.values())
    }
    if not all(format_of(group["format"]).standard for group in config_groups.values()):
        method = "aerogel"
    formats = sorted({group["format"] for group in config_groups.values()})
    return {
        "config_groups": config_groups,
        "format": formats[0] if len(formats) == 1 else "mixed-precision",
        "global_compression_ratio": None,
        "ignore": sorted(set(ignore)),
        "kv_cache_scheme": None,
        "quant_method": method,
        "quantization_status": "compressed",
        "sparsity_config": {},
        "transform_config": {},
        "version": VERSION,
    }


def matches(patterns: Iterable[str], name: str, class_names: Sequence[str] = ("Linear",)) -> int:
    """How well a layer fits the best of `patterns`: 3 its exact name, 2 a `re:` pattern, 1 its class, 0 not at all."""
    best = 0
    for pattern in patterns:
        if pattern == name:
            return 3
        if pattern.startswith("re:"):
            best = max(best, 2 if _compiled(pattern[3:]).match(name) else 0)
        elif pattern in class_names:
            best = max(best, 1)
    return best


def find_group(
    groups: Mapping[str, Mapping[str, Any]], names: Sequence[str], class_names: Sequence[str] = ("Linear",)
) -> Mapping[str, Any] | None:
    """The config group that claims a layer, or None. Exact names beat patterns, patterns beat classes.

    Args:
        groups: `config_groups`.
        names: names the layer goes by (on disk, in the model).
        class_names: what it is.
    """
    best, found = 0, None
    for group in groups.values():
        score = max(matches(group.get("targets") or (), name, class_names) for name in names)
        if score > best:
            best, found = score, group
    return found


def _compiled(expression: str) -> re.Pattern[str]:
    try:
        return re.compile(expression)
    except re.error as error:
        raise BadInput(f"the pattern 're:{expression}' is not a regular expression ({error}); correct it") from error
