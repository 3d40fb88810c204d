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

Shape legend: N out features, K in features, G groups along K, E = 2^bits numbers of a table.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from aerogel.errors import BadInput
from aerogel.pack import native
from aerogel.pack.lookup import STRIP
from aerogel.quantize.codes import Codes, Grid
from aerogel.quantize.planes import PlaneGrid, sums_of

STEP = 16
"""Columns of a step of the kernel, and of the tables that rows share; half of them have one."""


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
    size = grid.group_size
    if size is None or size % STEP == 0 or size >= K or shared_rows(grid, K):
        return None
    return f"group_size must be a multiple of {STEP}, of {STEP // 2} where {STRIP} outputs share scales, or null, found {size}"


def tensors_of(codes: Codes) -> dict[str, Tensor]:
    """Codes [N, K] of 1 to 4 bits as the layout's tensors. Raises `BadInput` for codes without tables of their own."""
    bits = codes.grid.bits
    signed_NK = (codes.values_NK.to(torch.int16) - (1 << (bits - 1))).to(torch.int8)
    shared = shared_rows(codes.grid, codes.values_NK.shape[1])
    layout = {
        "codes": native.pack_codes(signed_NK, bits, STRIP),
        "table": _shared_bytes(codes) if shared else _bytes(numbers_of(codes), bits),
        "stored_scale": codes.scale_NG,
    }
    if codes.table_TE is not None:
        layout["stored_number"] = codes.table_TE
    if codes.zero_NG is not None:
        layout["stored_offset"] = codes.zero_NG
    return layout


def codes_of(layout: Mapping[str, Tensor], grid: Grid, N: int, K: int) -> Codes:
    """The inverse of `tensors_of`."""
    signed_NK = native.unpack_codes(layout["codes"], grid.bits, N, K, STRIP)
    return Codes(
        values_NK=(signed_NK.to(torch.int16) + (1 << (grid.bits - 1))).to(torch.uint8),
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
