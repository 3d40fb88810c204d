"""How one linear is quantized, and the words in which compressed-tensors says so.

A `Scheme` is what a config.json tells about one weight: the stored format, the grid, and what happens to activations.
`parse_group` reads it; `arguments.py` has the words that are written.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from aerogel.errors import BadInput
from aerogel.lazy import load
from aerogel.pack import FORMATS
from aerogel.pack.format import Activations, Grid
from aerogel.quantize.grids import BLOCK, Fp8Grid, IntGrid
from aerogel.quantize.tables import TableGrid

logger = logging.getLogger(__name__)

NOT_SERVED = "not among what aerogel runs"


class NotServed(BadInput):
    """A valid quantization config that aerogel's kernels do not run (yet); another loader may."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Scheme:
    """One linear's quantization.

    format: a key of `aerogel.pack.FORMATS`, the way the weight lies in memory once loaded.
    grid: the weight's numbers. Its `scale_dtype` is a guess until the file's header is seen (`with_scale_dtype`).
    activations: none, int8 or fp8, with a scale per token or (static) one that is stored.
    layout: the kernel layout that the file keeps it in (`kernels.layouts.LAYOUTS`); None for the format's own tensors.
    """

    format: str
    grid: Grid
    activations: Activations = "none"
    layout: str | None = None

    def with_scale_dtype(self, dtype: torch.dtype) -> Scheme:
        """The same scheme with scales of `dtype`, as the header of the file has them."""
        if not isinstance(self.grid, IntGrid | Fp8Grid):
            return self  # the config says the type of its scales
        return replace(self, grid=replace(self.grid, scale_dtype=dtype))


def weight_only(name: str, activations: Activations) -> str | None:
    """The refusal of a format that leaves activations as they are."""
    if activations == "none":
        return None
    wanted = "fp8" if activations.startswith("fp8") else "int"
    return f"{name} is weight-only, found activations: {activations}; leave them out, or write format: {wanted}"


def parse_group(group: Mapping[str, Any], default_format: str | None) -> Scheme:
    """The scheme that an entry of `config_groups` describes.

    Args:
        group: the entry, as the JSON has it.
        default_format: the config's top-level `format`, used when the group has none.

    Raises:
        NotServed: a format or numbers that aerogel does not run, with the reason.
        BadInput: an entry that makes no sense.
    """
    if not isinstance(group, Mapping) or not isinstance(group.get("weights"), Mapping):
        raise NotServed(f"a config group without 'weights' quantizes activations only, {NOT_SERVED}")
    if group.get("output_activations"):
        raise NotServed(f"quantized output activations are {NOT_SERVED}")
    name = group.get("format") or default_format
    weights = group["weights"]
    if weights.get("dynamic"):
        raise NotServed(f"weights quantized at run time (dynamic: {weights['dynamic']}) are {NOT_SERVED}")
    stored = str(name)
    if name == "naive-quantized":
        stored = "int-quantized" if weights.get("type", "int") == "int" else "float-quantized"
    if stored not in FORMATS:
        raise NotServed(f"format {name} with {weights.get('num_bits')}-bit {weights.get('type')} weights is {NOT_SERVED}")
    grid: Grid = load(FORMATS[stored]).parse(weights)
    activations = _activations(group.get("input_activations"), grid)
    if activations.startswith("fp8") and stored == "pack-quantized":
        raise NotServed(f"pack-quantized weights with {activations} activations are {NOT_SERVED}")
    return Scheme(format=stored, grid=grid, activations=activations)


def parsed_strategy(weights: Mapping[str, Any]) -> tuple[str, int | None]:
    """Strategy and group size of weight arguments; what is not written is implied."""
    group = weights.get("group_size")
    size = int(group) if group is not None and int(group) > 0 else None
    implied = "group" if size else "channel" if group == -1 else "tensor"
    return str(weights.get("strategy") or implied), size


def parse_integers(weights: Mapping[str, Any]) -> IntGrid:
    """The integer grid of weight arguments. Raises `NotServed`."""
    (strategy, size), bits = parsed_strategy(weights), int(weights.get("num_bits", 8))
    kind = weights.get("type", "int")
    if kind != "int" or strategy not in ("group", "channel", "tensor") or not 2 <= bits <= 8:
        raise NotServed(f"{bits}-bit {kind} weights with strategy {strategy} are {NOT_SERVED}")
    return IntGrid(bits=bits, group_size=size if strategy == "group" else None, symmetric=bool(weights.get("symmetric", True)))


def parse_fp8(weights: Mapping[str, Any]) -> Fp8Grid:
    """The e4m3 grid of weight arguments. Raises `NotServed`."""
    strategy: Any = parsed_strategy(weights)[0]
    kind, bits = weights.get("type", "int"), int(weights.get("num_bits", 8))
    if strategy == "block" and list(weights.get("block_structure") or []) != [BLOCK, BLOCK]:
        raise NotServed(f"fp8 blocks of {weights.get('block_structure')} are {NOT_SERVED}, only [128, 128]")
    if kind != "float" or bits != 8 or strategy not in ("channel", "block", "tensor"):
        raise NotServed(f"{bits}-bit {kind} weights with strategy {strategy} are {NOT_SERVED} as fp8")
    return Fp8Grid(strategy=strategy)


def _activations(inputs: Mapping[str, Any] | None, grid: Grid) -> Activations:
    if not inputs:
        return "none"
    if isinstance(grid, TableGrid):
        # As servers do on machines without 4-bit float units: the weights decide the size, inputs stay as they are.
        logger.warning(
            "the checkpoint asks for %s-bit inputs beside %s-bit weights; they are not rounded", *_widths(inputs, grid)
        )
        return "none"
    if inputs.get("dynamic") == "local" or int(inputs.get("num_bits", 8)) != 8:
        raise NotServed(f"narrow input activations are {NOT_SERVED}")
    strategy, kind = inputs.get("strategy"), inputs.get("type", "int")
    if not inputs.get("symmetric", True):
        raise NotServed(f"asymmetric input activations are {NOT_SERVED}")
    blocks = isinstance(grid, Fp8Grid) and grid.strategy == "block"
    if not inputs.get("dynamic"):
        if strategy in (None, "tensor") and not blocks and kind == ("float" if isinstance(grid, Fp8Grid) else "int"):
            return "fp8-static" if kind == "float" else "int8-static"
        raise NotServed(f"static {kind} input activations with strategy {strategy} on these weights are {NOT_SERVED}")
    if kind == "float" and isinstance(grid, Fp8Grid):
        if strategy == ("group" if blocks else "token") and (not blocks or inputs.get("group_size") == BLOCK):
            return "fp8"
    elif kind == "int" and isinstance(grid, IntGrid) and strategy == "token":
        return "int8"
    raise NotServed(f"{kind} input activations with strategy {strategy} on these weights are {NOT_SERVED}")


def _widths(inputs: Mapping[str, Any], grid: Grid) -> tuple[int, int]:
    return int(inputs.get("num_bits", 8)), grid.bits
