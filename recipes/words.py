"""A stage of a recipe in a few words, as plans and reports say it of a tensor: `gptq nf4, groups of 32, e4m3 scales`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from aerogel.lazy import load
from aerogel.quantize import GRIDS
from aerogel.recipes.options import options
from aerogel.recipes.stages import StageSpec

WITH_BITS = ("bitmod", "kmeans", "bipolar", "planes", "affine")
"""Formats of several widths whose name says nothing of them."""


def words(spec: StageSpec, K: int | None = None) -> str:
    """The method, what it rounds to, and what stands beside the codes; for K inputs also how many a short last group has."""
    said = spec.options
    if spec.kind != "quantize":
        pattern, sparsity = said.get("pattern"), said.get("sparsity")
        zero = "" if sparsity is None else f"{_percent(sparsity)} zero"
        return " ".join(filter(None, [spec.method_name, zero if pattern in (None, "unstructured") else pattern]))
    fitted = {"fisher": "fitted by gradients", "none": "whole range"}.get(said.get("clip", ""), "")
    parts = [_numbers(said), _scales(said, spec.stage.grid.group_size, K), fitted, *_beside(said)]
    if spec.activations != "none":
        parts.append(f"inputs {spec.activations}")
    return f"{spec.method_name} {', '.join(filter(None, parts))}"


def _numbers(said: Mapping[str, Any]) -> str:
    """The format with its width or kind; integers are known by their bits alone."""
    name = said["format"]
    if name == "int":
        return f"{said['bits']} bits" + ("" if said["symmetric"] else " with zero points")
    if name in WITH_BITS:
        return f"{name} {said['bits']} bits" + (" of powers of two" if said.get("power_of_two") else "")
    return f"{name} {said['kind']}" if "kind" in said else str(name)


def _scales(said: Mapping[str, Any], size: int | None, K: int | None) -> str:
    """What shares a scale, and the scale's type where it is not the format's own."""
    name = said["format"]
    if name == "complex":
        return "two scales"
    if said.get("scales") == "tensor":
        return "one scale"
    if name == "fp8" or said.get("block"):
        return f"per {said.get('strategy', 'block')}"
    if said.get("granularity", "fixed") != "fixed":
        groups = f"groups by worth from {size}" if said["granularity"] == "worth" else f"adaptive groups from {size}"
    elif name == "kmeans":
        groups = "a table per channel"
    elif size is None:
        groups = "per channel"
    else:
        rest = 0 if K is None or size > K else K % size
        groups = f"groups of {size}" + (f", the last of {rest}" if rest else "")
    rows, kind = said.get("block_rows", 1), said["scale_dtype"]
    own = options(load(GRIDS[name]))["scale_dtype"][1]
    return groups + (f" for {rows} outputs" if rows > 1 else "") + (f", {kind} scales" if kind not in ("auto", own) else "")


def _beside(said: Mapping[str, Any]) -> list[str]:
    """Outliers, columns, rows of more bits and a rotation."""
    found = []
    if said["outliers"] != "none":
        found.append(f"outliers by {said['outliers']} up to {_percent(said['outlier_share'])}")
    if said["columns"] == "dynamic":
        found.append(f"inputs above {said['column_threshold']:g} kept")
    elif said["columns"] != "none":
        found.append(f"columns by {said['columns']} up to {_percent(said['column_share'])}")
    if said["rows"] != "none":
        found.append(f"{_percent(said['row_share'])} of the weights at {said['row_bits']} bits")
    if said["transform"] != "none":
        found.append(f"{said['transform']} in blocks of {said['transform_block']}")
    return found


def _percent(share: float) -> str:
    return f"{100 * share:.3g} %"
