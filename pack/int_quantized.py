"""`int-quantized`: 8-bit integer weights as plain int8, one scale per output channel; the W8A8 format.

    weight             int8 [N, K]
    weight_scale       [N, 1]
    weight_zero_point  int8 [N, 1]   only when asymmetric (read, and written when asked for; servers want symmetric)

    W[n, k] = (q[n, k] - z[n]) * scale[n]

With `activations: int8` the input of the linear is rounded to int8 too, one scale per token taken at run time, and the
product is an exact integer matmul: y[m, n] = sum_k qx[m, k] qw[n, k] * sx[m] * sw[n]. Cost: 8 + 16 / K bits per weight.

Shape legend: N out features, K in features.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from aerogel.errors import BadInput
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


class IntQuantized(Format):
    """int8 weights, stored one per byte; grouped scales are read too (`naive-quantized` files have them)."""

    name: ClassVar[str] = "int-quantized"
    tolerance: ClassVar[Tolerance] = MATMUL_TOLERANCE

    @staticmethod
    def refuses(grid: Grid, activations: Activations = "none") -> str | None:
        """Integer grids of 8 bits per channel; activations none or int8, per token or static."""
        if not isinstance(grid, IntGrid) or grid.bits != 8:
            return "int-quantized stores 8-bit integers; use pack-quantized for fewer bits, float-quantized for fp8"
        if grid.group_size is not None:
            return f"int-quantized is per channel, group_size is {grid.group_size}; use pack-quantized or group_size: null"
        if activations.startswith("fp8"):
            return f"int-quantized multiplies int8 with int8; activations: {activations} needs format: fp8"
        return None

    @staticmethod
    def encode(codes: Codes) -> dict[str, Tensor]:
        """The tensors of the file. Raises `BadInput` for codes that are not integers."""
        _integer(codes.grid)
        tensors = {"weight": codes.values_NK.contiguous(), "weight_scale": codes.scale_NG.contiguous()}
        if codes.zero_NG is not None:
            tensors["weight_zero_point"] = codes.zero_NG.contiguous()
        return tensors

    @staticmethod
    def to_codes(tensors: Mapping[str, Tensor], grid: Grid) -> Codes:
        """The codes back. Raises `BadInput` when shapes or dtypes do not agree with the grid."""
        grid = _integer(grid)
        weight = tensors.get("weight")
        if weight is None or weight.dtype != torch.int8 or weight.ndim != 2:
            raise BadInput("an int-quantized linear needs an int8 matrix 'weight'; the config does not belong to this file")
        N, K = weight.shape
        shape = (N, grid.groups(K))
        zero = None if grid.symmetric else take(tensors, "weight_zero_point", shape, (torch.int8,))
        scale = take(tensors, "weight_scale", shape, SCALE_DTYPES)
        return Codes(values_NK=weight, scale_NG=scale, zero_NG=zero, grid=grid)

    @staticmethod
    def shapes(N: int, K: int, grid: Grid, has_bias: bool = False, dtype: torch.dtype | None = None) -> Shapes:
        """Names, shapes and dtypes of `encode`'s tensors for an [N, K] weight; no data is touched."""
        grid = _integer(grid)
        scale = (N, grid.groups(K))
        found: Shapes = {"weight": ((N, K), torch.int8), "weight_scale": (scale, grid.scale_dtype)}
        if not grid.symmetric:
            found["weight_zero_point"] = (scale, torch.int8)
        return with_bias(found, N, has_bias, dtype or grid.scale_dtype)

    @staticmethod
    def rows(tensors: Mapping[str, Tensor], grid: Grid, start: int, stop: int) -> dict[str, Tensor]:
        """The tensors of output rows start..stop, as views."""
        return {name: tensor[start:stop] for name, tensor in tensors.items()}

    @classmethod
    def describe(cls, grid: Grid) -> dict[str, Any]:
        """int8, strategy channel."""
        return integer_arguments(_integer(grid))

    @staticmethod
    def parse(weights: Mapping[str, Any]) -> Grid:
        """The grid of a config group's weights."""
        return parse_integers(weights)


def _integer(grid: Grid) -> IntGrid:
    if not isinstance(grid, IntGrid):
        raise BadInput(f"int-quantized stores integer codes, not {type(grid).__name__}; write format: float-quantized")
    return grid
