"""The layout of the CPU's kernel for tables: sixteen codes of one row lie together. Exactly invertible, 2 to 4 bits.

    codes   uint8 [strips, tiles, 64 * bits]    strips = ceil(N / 4), tiles = ceil(K / 128); see `pack/native.py`. Groups are
                                                filled up to multiples of 16 columns, with codes 0
    scale   [strips, G, 4]                      in the stored type, in bfloat16 where `scales.readable` says so
    pick    uint8 [strips, G, 4]                where tables are chosen per group
    number  uint8 [T, 4, 16]                    byte p of the float32 number of each code; T as in the codes, or the rows
                                                filled up to whole strips
    fixed   uint8 [T, 2, 16]                    low and high byte of an integer q within +-16383, number = q * unit
    unit    float32 [T]                         the same for all tables where they are chosen per group
    factor  float32 [1]

Why bytes: the lookup that every machine has takes 16 bytes of table, so a number is put together from its bytes. The
integers are what the kernel multiplies when activations are 16 bits wide. The unit is the largest number over an integer
from 8192 to 16383, the one that fits best: tables on a grid (floats of 4 bits, integers) are then represented exactly, and what
all integers are multiples of is taken out of them. The smaller they are, the longer a sum of products fits in 32 bits.

Shape legend: N out features, K in features, G groups along K, T tables, E entries of a table.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from aerogel.errors import BadInput
from aerogel.pack import native
from aerogel.quantize.codes import Codes, Grid
from aerogel.quantize.scales import readable, unread

STRIP, STEP, ENTRIES, LARGEST = 4, 16, 16, 16383
FEW_TABLES = 64
"""Above that many tables every unit is the largest number over 16383, without a search."""


def tensors_of(codes: Codes) -> dict[str, Tensor]:
    """Codes [N, K] into tables as the layout's tensors. Raises `BadInput` without a table or where code 0 is no number."""
    table_TE, bits = codes.table_TE, codes.grid.bits
    if table_TE is None or bits not in (2, 3, 4):
        raise BadInput(f"the CPU's table layout holds codes of 2 to 4 bits that point into a table, found {bits} bits")
    if not bool(torch.isfinite(table_TE[:, 0]).all()):
        raise BadInput("code 0 of a table must be a number, since columns beyond the last hold it; put another code first")
    N = codes.values_NK.shape[0]
    filled_TE = torch.nn.functional.pad(table_TE, (0, ENTRIES - table_TE.shape[1], 0, -N % STRIP if codes.table_per_row else 0))
    integers_TE, unit_T = integers_of(filled_TE, alike=codes.pick_NG is not None)
    scale_NG = readable(codes.scale_NG)
    byte = scale_NG.element_size() == 1  # torch knows few operations on such types
    scale = native.pack_factors(scale_NG.view(torch.uint8) if byte else scale_NG, STRIP).view(scale_NG.dtype)
    filled_NK = native.fill(codes.values_NK, codes.grid.group_size or 0, STEP)
    signed_NK = (filled_NK.to(torch.int16) - (1 << (bits - 1))).to(torch.int8)
    layout = {
        "codes": native.pack_codes(signed_NK, bits, STRIP),
        "scale": scale,
        "number": _planes(filled_TE.contiguous()),
        "fixed": _planes(integers_TE),
        "unit": unit_T,
        "factor": torch.ones(1) if codes.factor is None else codes.factor.float().reshape(1),
    }
    if codes.pick_NG is not None:
        layout["pick"] = native.pack_factors(codes.pick_NG, STRIP)
    return layout


def codes_of(layout: dict[str, Tensor], grid: Grid, N: int, K: int, per_row: bool, has_factor: bool) -> Codes:
    """The inverse of `tensors_of`. per_row: every output has its own table. has_factor: a factor is part of the codes."""
    scale = layout["scale"]
    byte = scale.element_size() == 1
    scale_NG = native.unpack_factors(scale.view(torch.uint8) if byte else scale, N).view(scale.dtype)
    pick = layout.get("pick")
    number = layout["number"]
    table_TE = number.transpose(1, 2).contiguous().view(torch.float32)[..., 0][:, : 1 << grid.bits]
    group = grid.group_size or 0
    filled_NK = native.unpack_codes(layout["codes"], grid.bits, N, native.columns(K, group, STEP), STRIP)
    signed_NK = native.unfill(filled_NK, K, group, STEP)
    return Codes(
        values_NK=(signed_NK.to(torch.int16) + (1 << (grid.bits - 1))).to(torch.uint8),
        scale_NG=unread(scale_NG, grid.scale_dtype),
        table_TE=(table_TE[:N] if per_row else table_TE).contiguous(),
        pick_NG=None if pick is None else native.unpack_factors(pick, N),
        factor=layout["factor"][0] if has_factor else None,
        grid=grid,
    )


def integers_of(table_TE: Tensor, alike: bool) -> tuple[Tensor, Tensor]:
    """int16 [T, E] and units [T] whose product is the table, the nearest there is; `alike` gives all tables one unit."""
    numbers_TE = table_TE.double().nan_to_num(nan=0.0)
    peak_T = numbers_TE.abs().amax(1).clamp_min(1e-300)
    peak_T = peak_T.amax().expand_as(peak_T) if alike else peak_T
    most_T = torch.full_like(peak_T, LARGEST)
    if len(peak_T) <= FEW_TABLES:
        tried_C = torch.arange(LARGEST, LARGEST // 2, -1, dtype=torch.float64)
        scaled_TCE = numbers_TE[:, None] * (tried_C[:, None] / peak_T[:, None, None])
        error_TC = (scaled_TCE - scaled_TCE.round()).abs().amax(-1) / tried_C
        most_T = tried_C[(error_TC.amax(0, keepdim=True).expand_as(error_TC) if alike else error_TC).argmin(1)]
    unit_T = peak_T / most_T
    integers_TE = (numbers_TE / unit_T[:, None]).round().to(torch.int16)
    if alike or len(peak_T) == 1:
        common = max(1, math.gcd(*integers_TE.flatten().tolist()))
        integers_TE, unit_T = integers_TE // common, unit_T * common
    return integers_TE, unit_T.float()


def _planes(numbers_TE: Tensor) -> Tensor:
    """The bytes of numbers of any type: [T, bytes of the type, E]."""
    T, E = numbers_TE.shape
    return numbers_TE.contiguous().view(torch.uint8).reshape(T, E, -1).transpose(1, 2).contiguous()
