"""The words in which compressed-tensors describes numbers (QuantizationArgs), as they stand in a config.json."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from aerogel.quantize.grids import BLOCK, Fp8Grid, Grid, IntGrid

if TYPE_CHECKING:
    from aerogel.pack.format import Activations


def integer_arguments(grid: IntGrid) -> dict[str, Any]:
    """Of integer weights."""
    return arguments(
        num_bits=grid.bits,
        type="int",
        strategy="channel" if grid.group_size is None else "group",
        symmetric=grid.symmetric,
        group_size=grid.group_size,
        observer="memoryless_minmax",
        zp_dtype=None if grid.symmetric else "torch.int8",
    )


def fp8_arguments(grid: Fp8Grid) -> dict[str, Any]:
    """Of e4m3 weights."""
    return arguments(
        num_bits=8,
        type="float",
        strategy=grid.strategy,
        block_structure=[BLOCK, BLOCK] if grid.strategy == "block" else None,
        observer="memoryless_minmax",
    )


def activation_arguments(grid: Grid, activations: Activations) -> dict[str, Any] | None:
    """Of input activations; None when they stay as they are."""
    if activations == "none":
        return None
    kind = "int" if activations.startswith("int8") else "float"
    if activations.endswith("-static"):
        return arguments(num_bits=8, type=kind, strategy="tensor", symmetric=True, observer="minmax")
    blocks = isinstance(grid, Fp8Grid) and grid.strategy == "block"
    return arguments(
        num_bits=8,
        type=kind,
        strategy="group" if blocks else "token",
        symmetric=True,
        group_size=BLOCK if blocks else None,
        dynamic=True,
    )


def arguments(**given: Any) -> dict[str, Any]:
    """All keys that compressed-tensors writes, in its order, with its defaults."""
    defaults: dict[str, Any] = {
        "actorder": None,
        "block_structure": None,
        "dynamic": False,
        "group_size": None,
        "num_bits": 8,
        "observer": None,
        "observer_kwargs": {},
        "scale_dtype": None,
        "strategy": None,
        "symmetric": True,
        "type": "int",
        "zp_dtype": None,
    }
    return {**defaults, **given}
