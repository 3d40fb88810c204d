"""`pack-quantized`: integers of 2 to 8 bits as one dense bit stream per row. The default format for weight-only codes.

    weight_packed      int32 [N, ceil(K*b/32)]   u = q + 2^(b-1), little-endian along K (see `bits.py`)
    weight_scale       [N, G]                    in the scale's dtype; G = 1 per channel, else ceil(K / group)
    weight_zero_point  int32 [ceil(N*b/32), G]   only when asymmetric: z + 2^(b-1), packed along N
    weight_shape       int64 [2]                 N, K

    W[n, k] = (q[n, k] - z[n, g(k)]) * scale[n, g(k)]

compressed-tensors defines it; transformers, vLLM and SGLang load it as it is when K is a multiple of the group. A short
last group, which our codes allow, is stored the same way but only aerogel reads it, and the checkpoint's `quant_method` says
so (`model/servers.py`). Cost: b + (16 [+ b]) / group bits per weight.

Shape legend: N out features, K in features, G groups along K.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from aerogel.errors import BadInput
from aerogel.pack import bits
from aerogel.pack.arguments import integer_arguments
from aerogel.pack.format import (
    MATMUL_TOLERANCE,
    SCALE_DTYPES,
    Activations,
    Format,
    Grid,
    Shapes,
    Tolerance,
    take,
    with_bias,
)
from aerogel.pack.scheme import parse_integers
from aerogel.quantize.grids import Codes, IntGrid


class PackQuantized(Format):
    """Integers packed at their own width, a layout of compressed-tensors; see the module's text for the exact tensors."""

    name: ClassVar[str] = "pack-quantized"
    tolerance: ClassVar[Tolerance] = MATMUL_TOLERANCE
    names: ClassVar[frozenset[str]] = frozenset({"weight_packed", "weight_scale", "weight_zero_point", "weight_shape"})

    @staticmethod
    def refuses(grid: Grid, activations: Activations = "none") -> str | None:
        """Only integer grids; int8 activations only where int-quantized does not store the weight (`w4` with A8)."""
        if not isinstance(grid, IntGrid):
            return "pack-quantized stores integers, this grid is fp8; use float-quantized"
        if activations.startswith("fp8"):
            return f"pack-quantized multiplies integers; activations: {activations} needs format: fp8"
        if activations.startswith("int8") and grid.bits == 8 and grid.group_size is None and grid.symmetric:
            return "pack-quantized leaves 8 bits per channel with int8 activations to int-quantized"
        return None

    @staticmethod
    def encode(codes: Codes) -> dict[str, Tensor]:
        """The tensors of the file: dict of local name to tensor, on the codes' device.

        Raises:
            BadInput: codes that are not on an integer grid.
        """
        grid = _integer(codes.grid)
        N, K = codes.values_NK.shape
        unsigned = bits.signed_to_unsigned(codes.values_NK, grid.bits)
        tensors = {
            "weight_packed": bits.pack(unsigned, grid.bits),
            "weight_scale": codes.scale_NG.contiguous(),
            "weight_shape": torch.tensor([N, K], dtype=torch.int64, device=_shape_device(codes.values_NK)),
        }
        if codes.zero_NG is not None:
            tensors["weight_zero_point"] = bits.pack_rows(bits.signed_to_unsigned(codes.zero_NG, grid.bits), grid.bits)
        return tensors

    @staticmethod
    def to_codes(tensors: Mapping[str, Tensor], grid: Grid) -> Codes:
        """The codes back, value for value.

        Args:
            tensors: as `encode` gives them (a `bias` beside them is ignored).
            grid: the integer grid that the config describes.

        Raises:
            BadInput: a missing tensor, or one whose shape does not agree with `weight_shape` and the grid.
        """
        grid = _integer(grid)
        N, K = (int(size) for size in take(tensors, "weight_shape", (2,), (torch.int64, torch.int32)))
        groups = grid.groups(K)
        packed = take(tensors, "weight_packed", (N, bits.words(K, grid.bits)), (torch.int32,))
        zero = None
        if not grid.symmetric:
            stored = take(tensors, "weight_zero_point", (bits.words(N, grid.bits), groups), (torch.int32,))
            zero = bits.unsigned_to_signed(bits.unpack_rows(stored, grid.bits, N), grid.bits)
        return Codes(
            values_NK=bits.unsigned_to_signed(bits.unpack(packed, grid.bits, K), grid.bits),
            scale_NG=take(tensors, "weight_scale", (N, groups), SCALE_DTYPES),
            zero_NG=zero,
            grid=grid,
        )

    @staticmethod
    def shapes(N: int, K: int, grid: Grid, has_bias: bool = False, dtype: torch.dtype | None = None) -> Shapes:
        """Names, shapes and dtypes of `encode`'s tensors for an [N, K] weight; no data is touched."""
        grid = _integer(grid)
        groups = grid.groups(K)
        found: Shapes = {
            "weight_packed": ((N, bits.words(K, grid.bits)), torch.int32),
            "weight_scale": ((N, groups), grid.scale_dtype),
            "weight_shape": ((2,), torch.int64),
        }
        if not grid.symmetric:
            found["weight_zero_point"] = ((bits.words(N, grid.bits), groups), torch.int32)
        return with_bias(found, N, has_bias, dtype or grid.scale_dtype)

    @staticmethod
    def rows(tensors: Mapping[str, Tensor], grid: Grid, start: int, stop: int) -> dict[str, Tensor]:
        """The tensors of output rows start..stop; 32 rows fill whole words of the packed zero points."""
        width = _integer(grid).bits
        N, K = (int(size) for size in tensors["weight_shape"])
        stop = min(stop, N)
        part = {
            "weight_packed": tensors["weight_packed"][start:stop],
            "weight_scale": tensors["weight_scale"][start:stop],
            "weight_shape": torch.tensor([stop - start, K]),
        }
        if "weight_zero_point" in tensors:
            part["weight_zero_point"] = tensors["weight_zero_point"][bits.words(start, width) : bits.words(stop, width)]
        return part

    @classmethod
    def describe(cls, grid: Grid) -> dict[str, Any]:
        """Integers, strategy group or channel."""
        return integer_arguments(_integer(grid))

    @staticmethod
    def parse(weights: Mapping[str, Any]) -> Grid:
        """The grid of a config group's weights."""
        return parse_integers(weights)


def _integer(grid: Grid) -> IntGrid:
    if not isinstance(grid, IntGrid):
        raise BadInput(f"pack-quantized stores integer codes, not {type(grid).__name__}; write format: float-quantized")
    return grid


def _shape_device(values: Tensor) -> torch.device:
    """Where `weight_shape` lives: with the codes, but on the CPU for meta codes, whose shape is known all the same."""
    return torch.device("cpu") if values.is_meta else values.device
