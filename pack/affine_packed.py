"""`affine-packed`: integers of 1 to 8 bits with floating zero points, as one dense bit stream per row.

    weight_packed      int32 [N, ceil(K*b/32)]    codes 0 .. 2^b - 1, little-endian along K (see `bits.py`)
    weight_scale       [N, G]                     float16, bfloat16 or float32
    weight_zero_point  [N, G]                     in the type of the scales
    weight_shape       int64 [2]                  N, K

    W[n, k] = (u[n, k] - zero[n, g(k)]) * scale[n, g(k)]

compressed-tensors knows integer zero points only, so only aerogel reads it. Cost: b + 2 * scale bits / group per weight.

Shape legend: N out features, K in features, G groups along K.
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
from aerogel.quantize.formats.affine import Affine
from aerogel.quantize.scales import TYPES, name_of


class AffinePacked(Format):
    """Integers with floating zero points; see the module's text for the exact tensors."""

    name: ClassVar[str] = "affine-packed"
    tolerance: ClassVar[Tolerance] = MATMUL_TOLERANCE
    standard: ClassVar[bool] = False
    names: ClassVar[frozenset[str]] = frozenset({"weight_packed", "weight_scale", "weight_zero_point", "weight_shape"})

    @staticmethod
    def refuses(grid: Grid, activations: Activations = "none") -> str | None:
        """Only floating zero points, and only weight-only."""
        if not isinstance(grid, Affine):
            return "affine-packed stores integers with floating zero points; use pack-quantized for other integers"
        return weight_only("affine-packed", activations)

    @staticmethod
    def encode(codes: Codes) -> dict[str, Tensor]:
        """The tensors of the file. Raises `BadInput` for other codes."""
        grid = _affine(codes.grid)
        if codes.zero_NG is None:
            raise BadInput("codes with floating zero points need them, and there are none")
        device = torch.device("cpu") if codes.values_NK.is_meta else codes.values_NK.device
        return {
            "weight_packed": bits.pack(codes.values_NK, grid.bits),
            "weight_scale": codes.scale_NG.contiguous(),
            "weight_zero_point": codes.zero_NG.contiguous(),
            "weight_shape": torch.tensor(codes.values_NK.shape, dtype=torch.int64, device=device),
        }

    @staticmethod
    def to_codes(tensors: Mapping[str, Tensor], grid: Grid) -> Codes:
        """The codes back. Raises `BadInput` when shapes or dtypes do not agree with the grid."""
        grid = _affine(grid)
        N, K = (int(size) for size in take(tensors, "weight_shape", (2,), (torch.int64,)))
        shapes = AffinePacked.shapes(N, K, grid)
        found = {name: take(tensors, name, shape, (dtype,)) for name, (shape, dtype) in shapes.items()}
        return Codes(
            values_NK=bits.unpack(found["weight_packed"], grid.bits, K),
            scale_NG=found["weight_scale"],
            zero_NG=found["weight_zero_point"],
            grid=grid,
        )

    @staticmethod
    def shapes(N: int, K: int, grid: Grid, has_bias: bool = False, dtype: torch.dtype | None = None) -> Shapes:
        """Names, shapes and dtypes of `encode`'s tensors for an [N, K] weight; no data is touched."""
        grid = _affine(grid)
        groups = grid.groups(K)
        found: Shapes = {
            "weight_packed": ((N, bits.words(K, grid.bits)), torch.int32),
            "weight_scale": ((N, groups), grid.scale_dtype),
            "weight_zero_point": ((N, groups), grid.scale_dtype),
            "weight_shape": ((2,), torch.int64),
        }
        return with_bias(found, N, has_bias, dtype or grid.scale_dtype)

    @staticmethod
    def rows(tensors: Mapping[str, Tensor], grid: Grid, start: int, stop: int) -> dict[str, Tensor]:
        """The tensors of output rows start..stop, as views."""
        N, K = (int(size) for size in tensors["weight_shape"])
        part = {name: tensors[name][start:stop] for name in ("weight_packed", "weight_scale", "weight_zero_point")}
        return {**part, "weight_shape": torch.tensor([min(stop, N) - start, K])}

    @classmethod
    def describe(cls, grid: Grid) -> dict[str, Any]:
        """In the shape of compressed-tensors', with the grid's options."""
        grid = _affine(grid)
        options = {"bits": grid.bits, "group_size": grid.group_size, "scale_dtype": name_of(grid.scale_dtype)}
        return {"num_bits": grid.bits, "type": "affine", "options": options}

    @staticmethod
    def parse(weights: Mapping[str, Any]) -> Grid:
        """The grid of a config group's weights."""
        options = dict(weights.get("options") or {})
        options["scale_dtype"] = TYPES[str(options.get("scale_dtype"))]
        return Affine(**options)


def _affine(grid: Grid) -> Affine:
    if not isinstance(grid, Affine):
        raise BadInput(f"affine-packed stores integers with floating zero points, not {type(grid).__name__}")
    return grid
