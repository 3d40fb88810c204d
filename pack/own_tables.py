"""The CPU's layout for weights whose rows have tables of their own, for all columns or for each group of them.

    codes   uint8 [strips, tiles, 64 * bits]    strips of 4 rows, tiles of 128 columns; see `pack/native.py`
    table   uint8 [strips, G, 64 or 128]        the bfloat16 numbers of every row and group, scales multiplied in:
                                                [row][byte][8] up to 3 bits, [byte][row][16] of 4
            uint8 [runs, ceil(K / 16), 32 or 64]  where runs of rows share them, see `shared_rows`:
                                                [byte][first or last 8 columns][8 or 16]

and, so that nothing is lost, `stored_scale`, `stored_number` and `stored_offset` as the codes have them. A codebook fitted to a
row is such a table; the planes of a group add up to 2^planes numbers, which are one. Numbers are rounded to bfloat16 once,
about 1e-3 of the result's norm. Cost beside the codes: 16 bytes for each row and group, 32 with 4 bits; twice that for each 16
columns of a run of rows.

Of five to eight planes a table would be too long to be looked up in. They are laid out in two halves as a weight of twice the
columns (`halved`), which meets its inputs twice: W x = [first planes, last planes] [x, x].

Shape legend: N out features, K in features, G groups along K, E = 2^bits numbers of a table.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from aerogel.errors import BadInput
from aerogel.pack import native
from aerogel.pack.lookup import STRIP
from aerogel.quantize.codes import Codes, Grid, Params
from aerogel.quantize.planes import PlaneGrid, sums_of

STEP = 16
"""Columns of a step of the kernel, and of the tables that rows share; half of them have one."""
MOST_BITS = 4
"""Of codes whose numbers are looked up at once."""


def shared_rows(grid: Grid, K: int) -> int:
    """Outputs whose tables are stored once, with tables for every eight inputs; 0 where each output has its own.

    A run of outputs that share scales may have either; it has what takes fewer bytes, and only the shared kind where groups are
    smaller than a step. Both need groups that end with their tables' columns (`refused`).
    """
    if not isinstance(grid, PlaneGrid) or grid.group_size is None or grid.group_size >= K:
        return 0
    rows, group = grid.block_rows, grid.group_size
    wanted = group % STEP != 0 or group <= STEP // 2 * rows
    return rows if wanted and rows % STRIP == 0 and group % (STEP // 2) == 0 else 0


def refused(grid: Grid, K: int) -> str | None:
    """Why the groups have no place in this layout, or None where they have."""
    grid, K = laid(grid, K)
    size = grid.group_size
    if size is None or size % STEP == 0 or size >= K or shared_rows(grid, K):
        return None
    return f"group_size must be a multiple of {STEP}, of {STEP // 2} where {STRIP} outputs share scales, or null, found {size}"


def laid(grid: Grid, K: int) -> tuple[Grid, int]:
    """The grid and the columns of the weight that is laid out: those given, or of more than four planes their halves side by
    side, each filled up to whole groups and steps."""
    if grid.bits <= MOST_BITS or not isinstance(grid, PlaneGrid):
        return grid, K
    group = -(-K // STEP) * STEP if grid.group_size is None or grid.group_size >= K else grid.group_size
    step = math.lcm(group, STEP)
    return replace(grid, bits=-(-grid.bits // 2), group_size=group), 2 * -(-K // step) * step


def halved(codes: Codes) -> Codes:
    """Codes of five to eight planes as codes of half as many and twice the columns; one that fills up has scales 0."""
    K = codes.values_NK.shape[1]
    grid, columns = laid(codes.grid, K)
    if not isinstance(grid, PlaneGrid) or grid is codes.grid:
        raise TypeError(f"only more than {MOST_BITS} bit planes have halves, these are codes on {codes.grid}")
    first, last = grid.bits, codes.grid.bits - grid.bits
    halves = codes.values_NK >> last, (codes.values_NK & ((1 << last) - 1)) << (first - last)
    filled = [torch.nn.functional.pad(half, (0, columns // 2 - K)) for half in halves]
    groups = columns // 2 // (grid.group_size or columns)
    scale = torch.nn.functional.pad(codes.scale_NG, (0, 0, 0, groups - codes.scale_NG.shape[1]))
    low = torch.nn.functional.pad(scale[..., first:], (0, first - last))
    params = Params(scale_NG=torch.cat([scale[..., :first], low], 1))
    if codes.zero_NG is not None:
        offset = torch.nn.functional.pad(codes.zero_NG, (0, groups - codes.zero_NG.shape[1]))
        params = replace(params, zero_NG=torch.cat([offset, torch.zeros_like(offset)], 1))
    return Codes.of(torch.cat(filled, 1), params, grid)


def twice(x_MK: Tensor, columns: int) -> Tensor:
    """[x, x] as halves meet it, each filled up with zeros to half of the columns."""
    x_M2h = x_MK.new_zeros(len(x_MK), 2, columns // 2)
    x_M2h[..., : x_MK.shape[1]] = x_MK[:, None]
    return x_M2h.flatten(1)


def tensors_of(codes: Codes) -> dict[str, Tensor]:
    """Codes [N, K] as the layout's tensors. Raises `BadInput` for codes without tables of their own."""
    stored = {"stored_scale": codes.scale_NG}
    if codes.table_TE is not None:
        stored["stored_number"] = codes.table_TE
    if codes.zero_NG is not None:
        stored["stored_offset"] = codes.zero_NG
    if laid(codes.grid, codes.values_NK.shape[1])[0] is not codes.grid:
        codes = halved(codes)
    bits = codes.grid.bits
    signed_NK = (codes.values_NK.to(torch.int16) - (1 << (bits - 1))).to(torch.int8)
    shared = shared_rows(codes.grid, codes.values_NK.shape[1])
    table = _shared_bytes(codes) if shared else _bytes(numbers_of(codes), bits)
    return {"codes": native.pack_codes(signed_NK, bits, STRIP), "table": table, **stored}


def codes_of(layout: Mapping[str, Tensor], grid: Grid, N: int, K: int) -> Codes:
    """The inverse of `tensors_of`."""
    held, columns = laid(grid, K)
    signed_NK = native.unpack_codes(layout["codes"], held.bits, N, columns, STRIP)
    values_NK = (signed_NK.to(torch.int16) + (1 << (held.bits - 1))).to(torch.uint8)
    if held is not grid:
        last = grid.bits - held.bits
        first_NK, last_NK = values_NK[:, :K], values_NK[:, columns // 2 :][:, :K]
        values_NK = first_NK << last | last_NK >> (held.bits - last)
    return Codes(
        values_NK=values_NK,
        scale_NG=layout["stored_scale"],
        zero_NG=layout.get("stored_offset"),
        table_TE=layout.get("stored_number"),
        grid=grid,
    )


def numbers_of(codes: Codes) -> Tensor:
    """What the codes of each row and group stand for, float32 [N, G, E]."""
    N = codes.values_NK.shape[0]
    if isinstance(codes.grid, PlaneGrid):
        return sums_of(*codes.grid.numbers(codes)).repeat_interleave(codes.grid.block_rows, 0)[:N]
    if codes.table_TE is None or (not codes.table_per_row and N > 1):
        raise BadInput("this layout has tables for each output, these codes have none")
    return codes.table_TE[:, None] * codes.effective_scale()[..., None]


def _bytes(numbers_NGE: Tensor, bits: int) -> Tensor:
    """bfloat16 numbers in the order in which the kernel loads them, uint8 [strips, G, 64 or 128]."""
    N, G, E = numbers_NGE.shape
    size = 8 if bits <= 3 else 16
    filled = torch.nn.functional.pad(numbers_NGE.bfloat16(), (0, size - E, 0, 0, 0, -N % STRIP)).contiguous()
    byte_NGbE = filled.view(torch.uint8).reshape(-1, G, size, 2).transpose(2, 3)
    strips = byte_NGbE.reshape(-1, STRIP, G, 2, size).transpose(1, 2)
    return (strips if bits <= 3 else strips.transpose(2, 3)).flatten(2).contiguous()


def _shared_bytes(codes: Codes) -> Tensor:
    """The same where runs of rows share their numbers, uint8 [runs, ceil(K / 16), 32 or 64]."""
    grid, K = codes.grid, codes.values_NK.shape[1]
    if not isinstance(grid, PlaneGrid) or grid.group_size is None:
        raise TypeError(f"shared tables are made of bit planes in groups, not of {grid}")
    numbers_RGE = sums_of(*grid.numbers(codes)).bfloat16()
    half, size = STEP // 2, 8 if grid.bits <= 3 else 16
    steps = -(-K // STEP)
    # One table for every eight columns; those behind the last group meet inputs that are zero.
    eights = numbers_RGE.repeat_interleave(grid.group_size // half, 1)[:, : 2 * steps]
    filled = torch.nn.functional.pad(eights, (0, size - numbers_RGE.shape[2], 0, 2 * steps - eights.shape[1])).contiguous()
    byte_RSheb = filled.view(torch.uint8).reshape(-1, steps, 2, size, 2)
    return byte_RSheb.permute(0, 1, 4, 2, 3).flatten(2).contiguous()
