"""What the decoder of a weight is compiled with on CUDA, and how many bytes it wants in shared memory.

`decode.cuh` and `tables.cuh` hold the decoders; every kernel that reads packed weights in tiles includes them and asks here.

Shape legend: tiles of 16 rows x 128 columns.
"""

from __future__ import annotations

import torch

from aerogel.kernels.gemm.block_scales import E5M3, E8M0
from aerogel.kernels.gemm.cuda_weight import TileWeight
from aerogel.kernels.gemm.plane_tables import OF_BLOCKS, OF_ROWS

PAIR_BYTES, ROW_NUMBERS_BYTES = 32 << 10, 24 * 32
"""Of a table's pairs of numbers, or of a table of 256; of the numbers of a row tile's tables beside what is looked up. See
tables.cuh, entries.cuh and decode.cuh."""
SCALE_NUMBER = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2, E5M3: 3, E8M0: 4, OF_ROWS: 5, OF_BLOCKS: 6}


def decoder_defines(weight: TileWeight, dtype: torch.dtype) -> dict[str, int]:
    """The macros that decode.cuh wants to know about a weight."""
    zero = 0 if weight.zero is None else 1 if weight.zero.dtype == torch.uint8 else 2
    return {
        "BITS": weight.bits,
        "FP16": int(dtype == torch.float16),
        "SCALE": SCALE_NUMBER[weight.scale.dtype],
        "ZERO": zero,
        "TABLE": table_kind(weight),
        "TABLES": weight.table.shape[0] if weight.table is not None and table_kind(weight) != 2 else 1,
        "FLOATS": weight.floats,
        "GROUP": weight.group_size,
    }


def table_kind(weight: TileWeight) -> int:
    """0 no table, 1 one for all, 2 one per row, 3 picked per group."""
    if weight.table is None:
        return 0
    return 3 if weight.pick is not None else 1 if weight.table.shape[0] == 1 else 2


def by_rows(weight: TileWeight) -> bool:
    """Whether each row has a table of 16 numbers."""
    return weight.bits == 4 and table_kind(weight) == 2


def table_bytes(weight: TileWeight, row_tiles: int) -> int:
    """Bytes of the tables that a block of so many row tiles needs, as numbers of 16 bits."""
    kind = table_kind(weight)
    if weight.table is None or kind == 0:
        return 0
    return (row_tiles * 16 if kind == 2 else weight.table.shape[0]) * (2 << weight.bits)


def paired(weight: TileWeight) -> int:
    """Tables of which the kernels have a copy for every lane: up to two of 16 numbers, as all their pairs (tables.cuh), or one
    of 256 (entries.cuh). 0 where there are none, or too many."""
    if weight.table is None or table_kind(weight) == 2:
        return 0
    most = 2 if weight.bits == 4 else 1 if weight.pick is None else 0
    return len(weight.table) if len(weight.table) <= most else 0


def table_room(weight: TileWeight, row_tiles: int, copies: int = 1) -> int:
    """Bytes of the tables that a block of so many row tiles keeps, laid out for looking up; of those of rows so many copies."""
    if by_rows(weight):
        return row_tiles * (eight_bytes(copies) + ROW_NUMBERS_BYTES)
    return paired(weight) * PAIR_BYTES or table_bytes(weight, row_tiles)


def eight_bytes(copies: int) -> int:
    """Bytes of the tables of half of a row tile's rows: copies of all pairs, or with none of them the numbers one by one."""
    return copies * (8 << 10) if copies else 2 << 10


def made_room(weight: TileWeight, row_tiles: int) -> int:
    """Bytes of the tables of bit planes that a warp makes for one tile of each of so many row tiles."""
    run = next(size for size in (128, 64, 32, 16) if weight.group_size % size == 0)
    return row_tiles * (128 // run) * 256 if weight.scale.dtype == OF_ROWS else 0


def side_bytes(weight: TileWeight, columns: int) -> int:
    """Bytes beside the codes for one row tile of `columns` columns."""
    zero = 0 if weight.zero is None else weight.zero.element_size()
    each = weight.scale.element_size() + zero + (weight.pick is not None)
    return group_run(weight.group_size, columns) * 16 * each


def group_run(group_size: int, columns: int) -> int:
    """Groups that `columns` aligned columns may touch, as `Side` in the source counts them."""
    if group_size == 0 or group_size % columns == 0:
        return 1
    return columns // group_size + (0 if columns % group_size == 0 else 2)
