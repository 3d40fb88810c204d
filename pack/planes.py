"""`planes`: every bit plane in a tensor of its own, so that a reader may leave the last ones on the disk.

    weight_packed, weight_packed_1, ...   int32 [N, ceil(K/32)]     signs, 1 for +; bit k % 32 of word k / 32
    weight_scale, weight_scale_1, ...     [B, G]                    in the type of the scales; powers of two as uint8, the
                                                                    exponent field of a float32; B = ceil(N / block_rows)
    weight_offset                         [B, G]                    only with offsets, in their type
    weight_shape                          int64 [2]                 N, K

    W[n, k] = offset + sum over planes of scale * sign              float32, in the order of the planes

The first plane bears the names that every packed weight has. Planes fall in size: the first k of them, with the offset, are
the weight at k bits. Only aerogel reads it. Cost: q (1 + scale bits / group) + offset bits / group per weight.

Shape legend: N out features, B runs of outputs that share scales, K in features, G groups along K, q planes.
"""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import fields
from typing import Any, ClassVar

import torch
from torch import Tensor

from aerogel.errors import BadInput
from aerogel.pack import bits
from aerogel.pack.format import MATMUL_TOLERANCE, Activations, Format, Grid, Shapes, Tolerance, take, with_bias
from aerogel.pack.scheme import weight_only
from aerogel.quantize.codes import Codes
from aerogel.quantize.planes import PlaneGrid
from aerogel.quantize.scales import TYPES, name_of

MOST_PLANES = 8


def plane(local: str, index: int) -> str:
    """The tensor `local` of one plane: `weight_packed`, `weight_packed_1`, ..."""
    return f"{local}_{index}" if index else local


class Planes(Format):
    """Bit planes, each a tensor of its own; see the module's text for the exact tensors."""

    name: ClassVar[str] = "planes"
    tolerance: ClassVar[Tolerance] = MATMUL_TOLERANCE
    standard: ClassVar[bool] = False
    names: ClassVar[frozenset[str]] = frozenset(
        {plane(local, i) for local in ("weight_packed", "weight_scale") for i in range(MOST_PLANES)}
        | {"weight_offset", "weight_shape"}
    )

    @staticmethod
    def refuses(grid: Grid, activations: Activations = "none") -> str | None:
        """Only planes, and only weight-only."""
        if not isinstance(grid, PlaneGrid):
            return "planes stores sums of signs; use pack-quantized for integers, float-quantized for fp8"
        return weight_only("planes", activations)

    @staticmethod
    def encode(codes: Codes) -> dict[str, Tensor]:
        """The tensors of the file. Raises `BadInput` for codes that are not planes."""
        grid = _planes(codes.grid)
        N, K = codes.values_NK.shape
        tensors = {"weight_shape": torch.tensor([N, K], dtype=torch.int64, device=_shape_device(codes.values_NK))}
        for i in range(grid.bits):
            tensors[plane("weight_packed", i)] = bits.pack((codes.values_NK >> (grid.bits - 1 - i)) & 1, 1)
            tensors[plane("weight_scale", i)] = codes.scale_NG[..., i].contiguous()
        if codes.zero_NG is not None:
            tensors["weight_offset"] = codes.zero_NG.contiguous()
        return tensors

    @staticmethod
    def to_codes(tensors: Mapping[str, Tensor], grid: Grid) -> Codes:
        """The codes back; tensors of further planes are not looked at. Raises `BadInput` when shapes or dtypes do not agree
        with the grid."""
        grid = _planes(grid)
        N, K = (int(size) for size in take(tensors, "weight_shape", (2,), (torch.int64,)))
        found = {name: take(tensors, name, shape, (dtype,)) for name, (shape, dtype) in Planes.shapes(N, K, grid).items()}
        values_NK = torch.zeros(N, K, dtype=torch.uint8, device=found["weight_packed"].device)
        for i in range(grid.bits):
            values_NK |= bits.unpack(found[plane("weight_packed", i)], 1, K) << (grid.bits - 1 - i)
        return Codes(
            values_NK=values_NK,
            scale_NG=torch.stack([found[plane("weight_scale", i)] for i in range(grid.bits)], -1),
            zero_NG=found.get("weight_offset"),
            grid=grid,
        )

    @staticmethod
    def shapes(N: int, K: int, grid: Grid, has_bias: bool = False, dtype: torch.dtype | None = None) -> Shapes:
        """Names, shapes and dtypes of `encode`'s tensors for an [N, K] weight; no data is touched."""
        grid = _planes(grid)
        B, G = -(-N // grid.block_rows), grid.groups(K)
        found: Shapes = {"weight_shape": ((2,), torch.int64)}
        for i in range(grid.bits):
            found[plane("weight_packed", i)] = ((N, bits.words(K, 1)), torch.int32)
            found[plane("weight_scale", i)] = ((B, G), grid.alpha_dtype)
        if grid.offset_dtype is not None:
            found["weight_offset"] = ((B, G), grid.offset_dtype)
        return with_bias(found, N, has_bias, dtype or torch.float32)

    @staticmethod
    def rows(tensors: Mapping[str, Tensor], grid: Grid, start: int, stop: int) -> dict[str, Tensor]:
        """The tensors of output rows start..stop, as views."""
        shared = _planes(grid).block_rows
        N, K = (int(size) for size in tensors["weight_shape"])
        stop = min(stop, N)
        scales = slice(start // shared, -(-stop // shared))
        part = {
            name: tensor[start:stop] if name.startswith("weight_packed") else tensor[scales]
            for name, tensor in tensors.items()
            if name in Planes.names and name != "weight_shape"
        }
        return {**part, "weight_shape": torch.tensor([stop - start, K])}

    @classmethod
    def describe(cls, grid: Grid) -> dict[str, Any]:
        """In the shape of compressed-tensors', with the options of the grid."""
        options = {f.name: getattr(grid, f.name) for f in fields(_planes(grid))}
        options["scale_dtype"] = name_of(grid.scale_dtype)
        return {"num_bits": grid.bits, "type": "planes", "options": options}

    @staticmethod
    def parse(weights: Mapping[str, Any]) -> Grid:
        """The grid of a config group's weights. `num_bits` counts, so that a config can ask for fewer planes."""
        options = dict(weights.get("options") or {})
        options["scale_dtype"] = TYPES[str(options.get("scale_dtype"))]
        return PlaneGrid(**{**options, "bits": int(weights["num_bits"])})


def narrowed(config: Mapping[str, Any], bits: int) -> dict[str, Any]:
    """A `quantization_config` that reads at most `bits` planes of every weight stored as planes.

    Raises:
        BadInput: nothing in it is stored as planes, or `bits` is no number of planes.
    """
    if not 1 <= bits <= MOST_PLANES:
        raise BadInput(f"bits must lie between 1 and {MOST_PLANES}, found {bits}")
    found = deepcopy(dict(config))
    groups = [group for group in (found.get("config_groups") or {}).values() if group.get("format") == Planes.name]
    if not groups:
        raise BadInput("no weight of this checkpoint is stored as bit planes, so it has one width only; leave bits out")
    for group in groups:
        group["weights"]["num_bits"] = min(bits, int(group["weights"]["num_bits"]))
    return found


def _shape_device(values: Tensor) -> torch.device:
    """Where `weight_shape` lives: with the codes, but on the CPU for meta codes, whose shape is known all the same."""
    return torch.device("cpu") if values.is_meta else values.device


def _planes(grid: Grid) -> PlaneGrid:
    if not isinstance(grid, PlaneGrid):
        raise BadInput(f"planes stores sums of signs, not {type(grid).__name__}; write format: pack-quantized")
    return grid
