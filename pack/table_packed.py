"""`table-packed`: codes into a table of numbers as one bit stream per row. Where no standard expresses a format.

    weight_packed   int32 [N, ceil(K*b/32)]        codes 0 .. 2^b - 1, little-endian along K (see `bits.py`)
    weight_scale    [N, G]                         in the scale's type; e8m0 and ue5m3 as uint8; [ceil(N/128), G] in blocks;
                                                   not where tables are learned, which hold the numbers themselves
    weight_pick     int32 [ceil(N*p/32), G]        only when tables are chosen per group: their numbers in p bits, along N
    weight_table    [N, 2^b]                       only when tables are learned: one per output, in the scale's type
    weight_factor   float32 [1]                    only with two levels of scales
    weight_shape    int64 [2]                      N, K

    W[n, k] = table[t][code[n, k]] * (scale[n, g(k)] * factor)

A fixed table is not stored: the config names the grid (a key of `aerogel.quantize.GRIDS`) with its options, and the grid
knows its numbers. So a new grid needs nothing here. Only aerogel reads it. Cost: b + (scale bits + p) / group per weight.

Shape legend: N out features, K in features, G groups along K.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any, ClassVar

import torch
from torch import Tensor

from aerogel.errors import BadInput
from aerogel.lazy import load
from aerogel.pack import bits
from aerogel.pack.format import MATMUL_TOLERANCE, Activations, Format, Grid, Shapes, Tolerance, take, with_bias
from aerogel.pack.scheme import NOT_SERVED, NotServed, weight_only
from aerogel.quantize import GRIDS
from aerogel.quantize.codes import Codes
from aerogel.quantize.scales import TYPES, WIDE, name_of
from aerogel.quantize.tables import TableGrid


class TablePacked(Format):
    """Codes into tables: all other floats, and codebooks; see the module's text for the exact tensors."""

    name: ClassVar[str] = "table-packed"
    tolerance: ClassVar[Tolerance] = MATMUL_TOLERANCE
    standard: ClassVar[bool] = False
    names: ClassVar[frozenset[str]] = frozenset(
        {"weight_packed", "weight_scale", "weight_pick", "weight_table", "weight_factor", "weight_shape"}
    )

    @staticmethod
    def refuses(grid: Grid, activations: Activations = "none") -> str | None:
        """Only tables, and only weight-only."""
        if not isinstance(grid, TableGrid):
            return "table-packed stores codes into tables; use pack-quantized for integers, float-quantized for fp8"
        return weight_only("table-packed", activations)

    @staticmethod
    def encode(codes: Codes) -> dict[str, Tensor]:
        """The tensors of the file. Raises `BadInput` for codes that are not on a table."""
        grid = _table(codes.grid)
        N, K = codes.values_NK.shape
        tensors = {
            "weight_packed": bits.pack(codes.values_NK, grid.bits),
            "weight_shape": torch.tensor([N, K], dtype=torch.int64, device=codes.values_NK.device),
        }
        if not grid.learned:
            tensors["weight_scale"] = bytes_of(codes.scale_NG)
        if codes.pick_NG is not None:
            tensors["weight_pick"] = bits.pack_rows(codes.pick_NG, grid.pick_bits)
        if grid.learned and codes.table_TE is not None:
            tensors["weight_table"] = codes.table_TE.to(grid.scale_dtype)
        if codes.factor is not None:
            tensors["weight_factor"] = codes.factor.reshape(1)
        return tensors

    @staticmethod
    def to_codes(tensors: Mapping[str, Tensor], grid: Grid) -> Codes:
        """The codes back. Raises `BadInput` when shapes or dtypes do not agree with the grid."""
        grid = _table(grid)
        N, K = take(tensors, "weight_shape", (2,), (torch.int64,)).tolist()
        expected = TablePacked.shapes(N, K, grid)
        found = {name: take(tensors, name, shape, (dtype,)) for name, (shape, dtype) in expected.items()}
        device = found["weight_packed"].device
        pick, factor = found.get("weight_pick"), found.get("weight_factor")
        return Codes(
            values_NK=bits.unpack(found["weight_packed"], grid.bits, K),
            scale_NG=_scales(found, N, grid),
            table_TE=found["weight_table"].float() if grid.learned else grid.tables.to(device),
            pick_NG=None if pick is None else bits.unpack_rows(pick, grid.pick_bits, N),
            factor=None if factor is None else factor.reshape(()),
            grid=grid,
        )

    @staticmethod
    def shapes(N: int, K: int, grid: Grid, has_bias: bool = False, dtype: torch.dtype | None = None) -> Shapes:
        """Names, shapes and dtypes of `encode`'s tensors for an [N, K] weight; no data is touched."""
        grid = _table(grid)
        G = grid.groups(K)
        rows = -(-N // (grid.shared_rows or N))
        scale_type = grid.scale_dtype if grid.scale_dtype in (*WIDE, torch.float8_e4m3fn) else torch.uint8
        found: Shapes = {
            "weight_packed": ((N, bits.words(K, grid.bits)), torch.int32),
            "weight_shape": ((2,), torch.int64),
        }
        if not grid.learned:
            found["weight_scale"] = ((rows, G), scale_type)
        if grid.pick_bits:
            found["weight_pick"] = ((bits.words(N, grid.pick_bits), G), torch.int32)
        if grid.learned:
            found["weight_table"] = ((N, 1 << grid.bits), grid.scale_dtype)
        if grid.two_level:
            found["weight_factor"] = ((1,), torch.float32)
        return with_bias(found, N, has_bias, dtype or torch.float32)

    @staticmethod
    def rows(tensors: Mapping[str, Tensor], grid: Grid, start: int, stop: int) -> dict[str, Tensor]:
        """The tensors of output rows start..stop, as views."""
        grid = _table(grid)
        shared = grid.shared_rows or stop
        K = int(tensors["weight_shape"][1])
        words = slice(bits.words(start, grid.pick_bits), bits.words(stop, grid.pick_bits))
        cut = {"weight_packed": slice(start, stop), "weight_table": slice(start, stop), "weight_pick": words}
        cut["weight_scale"] = slice(start // shared, -(-stop // shared))
        part = {name: tensor[cut[name]] if name in cut else tensor for name, tensor in tensors.items()}
        part["weight_shape"] = torch.tensor([part["weight_packed"].shape[0], K], dtype=torch.int64)
        return part

    @classmethod
    def describe(cls, grid: Grid) -> dict[str, Any]:
        """In the shape of compressed-tensors', with the grid's name and its options."""
        options = {f.name: getattr(grid, f.name) for f in fields(_table(grid)) if f.init}
        options["scale_dtype"] = name_of(grid.scale_dtype)
        return {"num_bits": grid.bits, "type": "table", "grid": _grid_name(grid), "options": options}

    @staticmethod
    def parse(weights: Mapping[str, Any]) -> Grid:
        """The grid that the config names."""
        name = str(weights.get("grid"))
        if name not in GRIDS:
            raise NotServed(f"the number format {name!r} is {NOT_SERVED}; it knows {', '.join(sorted(GRIDS))}")
        options = dict(weights.get("options") or {})
        options["scale_dtype"] = TYPES[str(options.get("scale_dtype"))]
        grid: Grid = load(GRIDS[name])(**options)
        return grid


def bytes_of(scale: Tensor) -> Tensor:
    """Scales as a file holds them: eight-bit types other than e4m3 as plain bytes."""
    return scale.contiguous() if scale.dtype in (*WIDE, torch.float8_e4m3fn) else scale.contiguous().view(torch.uint8)


def _scales(found: Mapping[str, Tensor], N: int, grid: TableGrid) -> Tensor:
    if grid.learned:
        return torch.ones(N, 1, dtype=grid.scale_dtype, device=found["weight_packed"].device)
    stored = found["weight_scale"]
    return stored if stored.dtype == grid.scale_dtype else stored.view(grid.scale_dtype)


def _grid_name(grid: Grid) -> str:
    return next(name for name, place in GRIDS.items() if load(place) is type(grid))


def _table(grid: Grid) -> TableGrid:
    if not isinstance(grid, TableGrid):
        raise BadInput(f"table-packed stores codes into tables, not {type(grid).__name__}; write format: pack-quantized")
    return grid
