"""`complex-packed`: weights in {1, i, -1, -i}, two bits for each block of 2 x 2 real weights (`quantize/formats/complex.py`).

    weight_packed  int32 [N/2, ceil(2 (K/2) / 32)]    codes 0, 1, 2, 3 for 1, i, -1, -i: a bit stream along K
    weight_scale   float32 [2]                        of the real and of the imaginary axis
    weight_shape   int64 [2]                          N, K

Only aerogel reads it. Cost: half a bit per real weight.

Shape legend: N out features, K in features, both real and even.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from aerogel.errors import BadInput
from aerogel.pack import bits
from aerogel.pack.format import MATMUL_TOLERANCE, Activations, Format, Grid, Shapes, Tolerance, take, with_bias
from aerogel.pack.scheme import weight_only
from aerogel.quantize.codes import Codes
from aerogel.quantize.formats.complex import Complex, codes_of, signs_of


class ComplexPacked(Format):
    """Complex codes, two bits for 2 x 2 weights; see the module's text for the exact tensors."""

    name: ClassVar[str] = "complex-packed"
    tolerance: ClassVar[Tolerance] = MATMUL_TOLERANCE
    standard: ClassVar[bool] = False
    names: ClassVar[frozenset[str]] = frozenset({"weight_packed", "weight_scale", "weight_shape"})

    @staticmethod
    def refuses(grid: Grid, activations: Activations = "none") -> str | None:
        """Only complex codes, and only weight-only."""
        if not isinstance(grid, Complex):
            return "complex-packed stores {1, i, -1, -i}; use pack-quantized for integers, table-packed for tables"
        return weight_only("complex-packed", activations)

    @staticmethod
    def encode(codes: Codes) -> dict[str, Tensor]:
        """The tensors of the file. Raises `BadInput` for other codes."""
        _complex(codes.grid)
        device = torch.device("cpu") if codes.values_NK.is_meta else codes.values_NK.device
        return {
            "weight_packed": bits.pack(codes_of(codes.values_NK), 2),
            "weight_scale": codes.scale_NG.reshape(2),
            "weight_shape": torch.tensor(codes.values_NK.shape, dtype=torch.int64, device=device),
        }

    @staticmethod
    def to_codes(tensors: Mapping[str, Tensor], grid: Grid) -> Codes:
        """The codes back. Raises `BadInput` when shapes or dtypes do not agree."""
        _complex(grid)
        N, K = (int(size) for size in take(tensors, "weight_shape", (2,), (torch.int64,)))
        shapes = ComplexPacked.shapes(N, K, grid)
        found = {name: take(tensors, name, shape, (dtype,)) for name, (shape, dtype) in shapes.items()}
        values = bits.unpack(found["weight_packed"], 2, K // 2)
        return Codes(values_NK=signs_of(values), scale_NG=found["weight_scale"][None], grid=grid)

    @staticmethod
    def shapes(N: int, K: int, grid: Grid, has_bias: bool = False, dtype: torch.dtype | None = None) -> Shapes:
        """Names, shapes and dtypes of `encode`'s tensors for an [N, K] weight. Raises `BadInput` for odd sizes."""
        _complex(grid)
        if N % 2 or K % 2:
            raise BadInput(f"complex codes take pairs of outputs and of inputs, found a [{N}, {K}] weight")
        found: Shapes = {
            "weight_packed": ((N // 2, bits.words(K // 2, 2)), torch.int32),
            "weight_scale": ((2,), torch.float32),
            "weight_shape": ((2,), torch.int64),
        }
        return with_bias(found, N, has_bias, dtype or torch.float32)

    @staticmethod
    def rows(tensors: Mapping[str, Tensor], grid: Grid, start: int, stop: int) -> dict[str, Tensor]:
        """The tensors of output rows start..stop, as views; both are even, or stop is the last."""
        packed = tensors["weight_packed"][start // 2 : -(-stop // 2)]
        shape = torch.tensor([2 * len(packed), int(tensors["weight_shape"][1])])
        return {"weight_packed": packed, "weight_scale": tensors["weight_scale"], "weight_shape": shape}

    @classmethod
    def describe(cls, grid: Grid) -> dict[str, Any]:
        """In the shape of compressed-tensors'."""
        return {"num_bits": 2, "type": "complex"}

    @staticmethod
    def parse(weights: Mapping[str, Any]) -> Grid:
        """There is one grid."""
        return Complex()


def _complex(grid: Grid) -> None:
    if not isinstance(grid, Complex):
        raise BadInput(f"complex-packed stores complex codes, not {type(grid).__name__}; write pack: {{format: auto}}")
