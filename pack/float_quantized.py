"""`float-quantized`: FP8 e4m3 weights, one byte each, one scale per output channel, per 128x128 block, or per tensor.

    weight        float8_e4m3fn [N, K]
    weight_scale  [N, 1] per channel | [ceil(N/128), ceil(K/128)] per block | [1] per tensor

    W[n, k] = f8[n, k] * scale

With `activations: fp8` the input is rounded to e4m3 too, at run time: one scale per token, or per token and 128 columns
where the weight has blocks. Cost: 8 bits per weight and next to nothing for scales.

Shape legend: N out features, K in features.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from aerogel.errors import BadInput
from aerogel.pack.arguments import fp8_arguments
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
from aerogel.pack.scheme import parse_fp8
from aerogel.quantize.grids import BLOCK, Codes, Fp8Grid


class FloatQuantized(Format):
    """e4m3 weights per output, block or tensor, a layout of compressed-tensors; see the module's text for the exact tensors."""

    name: ClassVar[str] = "float-quantized"
    tolerance: ClassVar[Tolerance] = MATMUL_TOLERANCE

    @staticmethod
    def refuses(grid: Grid, activations: Activations = "none") -> str | None:
        """Only e4m3 grids; activations none or fp8, static ones only without blocks."""
        if not isinstance(grid, Fp8Grid):
            return "float-quantized stores e4m3 values, this grid is integer; use pack-quantized or int-quantized"
        if activations.startswith("int8"):
            return f"float-quantized multiplies fp8 with fp8; activations: {activations} needs format: int"
        if activations == "fp8-static" and grid.strategy == "block":
            return "weights in blocks go with inputs in blocks; write activations: fp8, or another strategy"
        return None

    @staticmethod
    def encode(codes: Codes) -> dict[str, Tensor]:
        """The tensors of the file. Raises `BadInput` for codes that are not e4m3."""
        grid = _float(codes.grid)
        scale = codes.scale_NG.contiguous()
        return {
            "weight": codes.values_NK.contiguous(),
            "weight_scale": scale.reshape(1) if grid.strategy == "tensor" else scale,
        }

    @staticmethod
    def to_codes(tensors: Mapping[str, Tensor], grid: Grid) -> Codes:
        """The codes back. Raises `BadInput` when shapes or dtypes do not agree with the grid."""
        grid = _float(grid)
        weight = tensors.get("weight")
        if weight is None or weight.dtype != torch.float8_e4m3fn or weight.ndim != 2:
            raise BadInput("a float-quantized linear needs an e4m3 matrix 'weight'; the config does not belong to this file")
        scale = take(tensors, "weight_scale", _scale_shape(weight.shape[0], weight.shape[1], grid), SCALE_DTYPES)
        scale = scale.reshape(1, 1) if grid.strategy == "tensor" else scale
        return Codes(values_NK=weight, scale_NG=scale, zero_NG=None, grid=grid)

    @staticmethod
    def shapes(N: int, K: int, grid: Grid, has_bias: bool = False, dtype: torch.dtype | None = None) -> Shapes:
        """Names, shapes and dtypes of `encode`'s tensors for an [N, K] weight; no data is touched."""
        grid = _float(grid)
        found: Shapes = {
            "weight": ((N, K), torch.float8_e4m3fn),
            "weight_scale": (_scale_shape(N, K, grid), grid.scale_dtype),
        }
        return with_bias(found, N, has_bias, dtype or grid.scale_dtype)

    @staticmethod
    def rows(tensors: Mapping[str, Tensor], grid: Grid, start: int, stop: int) -> dict[str, Tensor]:
        """The tensors of output rows start..stop, as views; a block's scales go with its rows."""
        strategy = _float(grid).strategy
        first, last = (start // BLOCK, -(-stop // BLOCK)) if strategy == "block" else (start, stop)
        scale = tensors["weight_scale"]
        return {
            "weight": tensors["weight"][start:stop],
            "weight_scale": scale if strategy == "tensor" else scale[first:last],
        }

    @classmethod
    def describe(cls, grid: Grid) -> dict[str, Any]:
        """e4m3, strategy channel, block or tensor."""
        return fp8_arguments(_float(grid))

    @staticmethod
    def parse(weights: Mapping[str, Any]) -> Grid:
        """The grid of a config group's weights."""
        return parse_fp8(weights)


def _scale_shape(N: int, K: int, grid: Fp8Grid) -> tuple[int, ...]:
    if grid.strategy == "tensor":
        return (1,)
    return (N, 1) if grid.strategy == "channel" else (-(-N // BLOCK), -(-K // BLOCK))


def _float(grid: Grid) -> Fp8Grid:
    if not isinstance(grid, Fp8Grid):
        raise BadInput(f"float-quantized stores e4m3 values, not {type(grid).__name__}; write format: pack-quantized")
    return grid
