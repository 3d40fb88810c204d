"""The CPU kernels' layout for weights whose codes point into tables: the codes of `pack/native.py`, and the tables beside them.

    codes   uint8 [strips, tiles, 64 * bits]    strips of 16 rows, tiles of 32 columns; see `pack/native.py`
    scale   [strips, G, 16]                     one for every row, in the stored type or as `scales.readable` has it
    pick    int16 [strips, G]                   where tables are chosen per group: bit i says which of two row i has
    number  float32 [T, E]                      the tables
    table   float32 [T, E]                      number * unit, which is what is multiplied
    unit    float32 [1]
    factor  float32 [1]                         of all scales

Plain floats of up to 8 bits are numbers that bfloat16 holds exactly, and their unit is 1. Other tables (NF4) are rounded
where the processor multiplies bfloat16; the unit is the one of `UNITS` with which they err least. e4m3 in bytes is a table of
256 like any other. Blocks of rows that share a scale have it once for every row: 32 bits for 128 weights.

Of tables that are another with the other sign (BitMoD's four) two are kept (`mirrored_tables`), and scales have the sign: the
32 numbers of two tables of 4 bits are one register, and one lookup finds them. A scale that was below zero may come back as
one above zero with the mirrored table, which is the same weight.

Shape legend: N out features, K in features, G groups along K, T tables, E entries of a table.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from aerogel.errors import BadInput
from aerogel.pack import native
from aerogel.pack.mirrored_tables import SIGN, from_kept, mirrored, to_kept
from aerogel.quantize.codes import Codes, Grid
from aerogel.quantize.grids import Fp8Grid
from aerogel.quantize.scales import numbers_of_byte, readable, unread
from aerogel.quantize.tables import TableGrid

UNITS = 1024
"""Units that are tried, from 1 to 2: others round alike."""


def table_of(grid: Grid) -> Tensor:
    """The tables of a grid that are kept, float32 [T, E]. Raises `BadInput` for one without."""
    if isinstance(grid, TableGrid) and not grid.learned:
        return grid.tables[mirrored(grid).kept] if len(grid.largest) > 1 else grid.tables
    if isinstance(grid, Fp8Grid):
        return numbers_of_byte(torch.float8_e4m3fn)[None]
    raise BadInput(f"{type(grid).__name__} has no table that all outputs share")


def exact(table_TE: Tensor) -> bool:
    """Whether bfloat16 holds every number."""
    return torch.equal(table_TE.bfloat16().float().nan_to_num(), table_TE.nan_to_num())


def unit_of(table_TE: Tensor) -> float:
    """The number from 1 to 2 that a table is multiplied with so that bfloat16 holds it best, by the mean square error."""
    if exact(table_TE):
        return 1.0
    units_C = 1 + torch.arange(UNITS, dtype=torch.float64) / UNITS
    tried_CN = table_TE.double().nan_to_num().flatten() * units_C[:, None]
    error_C = ((tried_CN.float().bfloat16().double() - tried_CN) / units_C[:, None]).square().sum(1)
    return float(units_C[error_C.argmin()])


def tensors_of(codes: Codes) -> dict[str, Tensor]:
    """Codes [N, K] into shared tables as the layout's tensors. Raises `BadInput` without one or where code 0 is no number."""
    grid, group = codes.grid, codes.grid.group_size or 0
    if codes.table_per_row:
        raise BadInput("this layout has tables for all outputs, these codes have one for each")
    N, K = codes.values_NK.shape
    byte_NK, scale_NG, picks = codes.values_NK.view(torch.uint8), readable(codes.scale_NG, codes.pick_NG is not None), {}
    table_TE = codes.table_TE if codes.table_TE is not None and codes.pick_NG is None else table_of(grid)
    if codes.pick_NG is not None:
        byte_NK, pick_NG = to_kept(_tables(grid), byte_NK, codes.pick_NG, group or K)
        scale_NG = _with_sign(scale_NG, pick_NG >= SIGN)
        picks["pick"] = native.pack_bits(pick_NG & (SIGN - 1))
    if not bool(torch.isfinite(table_TE[:, 0]).all()):
        raise BadInput("code 0 of a table must be a number, since columns beyond the last hold it; put another code first")
    signed_NK = (native.fill(byte_NK, group).to(torch.int16) - (1 << (grid.bits - 1))).to(torch.int8)
    unit = unit_of(table_TE)
    return {
        "codes": native.pack_codes(signed_NK, grid.bits),
        "scale": _by_row(scale_NG, grid, N),
        "number": table_TE.clone(),
        "table": (table_TE.double() * unit).float(),
        "unit": torch.tensor([unit], dtype=torch.float32),
        "factor": torch.ones(1) if codes.factor is None else codes.factor.float().reshape(1),
        **picks,
    }


def codes_of(layout: Mapping[str, Tensor], grid: Grid, N: int, K: int) -> Codes:
    """The inverse of `tensors_of`."""
    group, plain = grid.group_size or 0, isinstance(grid, Fp8Grid)
    signed_NK = native.unpack_codes(layout["codes"], grid.bits, N, native.columns(K, group))
    byte_NK = (native.unfill(signed_NK, K, group).to(torch.int16) + (1 << (grid.bits - 1))).to(torch.uint8)
    scale_NG, table_TE, pick_NG = _once(layout["scale"], grid, N), layout["number"], None
    if "pick" in layout:
        negative = _negative(scale_NG)
        kept_NG = native.unpack_bits(layout["pick"], N)
        is_mirror = negative & torch.isin(kept_NG | SIGN, mirrored(_tables(grid)).pick)
        byte_NK, pick_NG = from_kept(_tables(grid), byte_NK, torch.where(is_mirror, kept_NG | SIGN, kept_NG), group or K)
        scale_NG, table_TE = _with_sign(scale_NG, is_mirror), _tables(grid).tables
    return Codes(
        values_NK=byte_NK.view(torch.float8_e4m3fn) if plain else byte_NK,
        scale_NG=unread(scale_NG, grid.scale_dtype),
        table_TE=None if plain else table_TE.clone(),
        pick_NG=pick_NG,
        factor=layout["factor"][0] if getattr(grid, "two_level", False) else None,
        grid=grid,
    )


def _tables(grid: Grid) -> TableGrid:
    """A grid whose groups pick tables."""
    if isinstance(grid, TableGrid):
        return grid
    raise BadInput(f"{type(grid).__name__} has no tables to pick from")


def _with_sign(scale_NG: Tensor, changed_NG: Tensor) -> Tensor:
    """Scales, the sign of some of them changed."""
    if scale_NG.element_size() == 1:  # e4m3: torch knows few operations on it
        byte = scale_NG.view(torch.uint8)
        return torch.where(changed_NG, byte ^ 0x80, byte).view(scale_NG.dtype)
    return torch.where(changed_NG, -scale_NG, scale_NG)


def _negative(scale_NG: Tensor) -> Tensor:
    """Where scales have a minus, be they zero or no number."""
    return scale_NG.view(torch.uint8) >= 0x80 if scale_NG.element_size() == 1 else torch.signbit(scale_NG)


def _by_row(scale_BG: Tensor, grid: Grid, N: int) -> Tensor:
    """Scales of blocks of rows -> [strips, G, 16], each row with its own."""
    kind = scale_BG.dtype
    # Bytes, since torch knows few operations on small floats.
    plain = scale_BG.view(torch.uint8) if scale_BG.element_size() == 1 else scale_BG
    shared = grid.shared_rows or N
    return native.pack_factors(plain.repeat_interleave(shared, 0)[:N] if shared > 1 else plain).view(kind)


def _once(packed: Tensor, grid: Grid, N: int) -> Tensor:
    """The inverse of `_by_row`."""
    plain = packed.view(torch.uint8) if packed.element_size() == 1 else packed
    return native.unpack_factors(plain, N)[:: grid.shared_rows or N].contiguous().view(packed.dtype)
