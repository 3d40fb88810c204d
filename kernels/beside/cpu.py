"""What stands beside a packed weight, on a CPU: one compiled loop (kernels/native/beside.h), in a matmul or after any product.

It reads what is stored, 4 bytes per outlier. Beside 4-bit codes of 4096 x 4096 weights, 1 % of outliers are 8 % more bytes.
For up to four tokens a matmul reads the same numbers sorted into tiles, made when the weight is loaded.

Shape legend: M tokens, N out features, K in features, C kept columns, E outliers.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from aerogel.kernels.beside.ref import Beside
from aerogel.kernels.native import library

TYPES = library.TYPES
MOST_TILED = 64 << 16
"""Inputs whose blocks of 64 are counted in 16 bits."""


def fits(N: int, beside: Beside) -> bool:
    """Whether the compiled loop takes these tensors for a weight of N rows: their types, their shapes, and that they are
    contiguous in main memory."""
    start, column, value, index, kept = beside.all()
    given = [tensor for tensor in beside.all() if tensor is not None]
    whole = all(tensor.is_contiguous() and tensor.device.type == "cpu" for tensor in given)
    if start is not None and column is not None and value is not None:
        whole = whole and start.dtype == torch.int32 and start.shape == (N + 1,) and column.shape == value.shape
        whole = whole and column.dtype in (torch.int16, torch.int32) and value.dtype in TYPES
    if index is not None and kept is not None:
        whole = whole and index.dtype == torch.int32 and kept.shape == (N, len(index)) and kept.dtype in TYPES
    return whole


def part_of_weight(beside: Beside) -> library.Beside:
    """The struct of what belongs to the weight, for tensors that fit: valid while they live."""
    start, column, value, index, kept = beside.all()
    made = library.Beside(column_bytes=2, threads=1)
    if start is not None and column is not None and value is not None:
        made.start, made.column, made.value = start.data_ptr(), column.data_ptr(), value.data_ptr()
        made.outliers, made.column_bytes, made.value_type = value.numel(), column.element_size(), TYPES[value.dtype]
        if beside.tiles is not None:
            made.tiles, made.tiles_bytes = beside.tiles.data_ptr(), beside.tiles.nbytes
    if index is not None and kept is not None:
        made.index, made.kept_value = index.data_ptr(), kept.data_ptr()
        made.kept, made.kept_type = index.numel(), TYPES[kept.dtype]
    return made


def tiles_of(beside: Beside, N: int, K: int, dtype: torch.dtype) -> Tensor | None:
    """Outliers that fit, sorted for calls of up to four tokens (kernels/native/outlier_tiles.h), or None where nothing would
    read them: without columns beside them, for values and activations in bfloat16 on a processor that multiplies it.

    Raises:
        BadInput: columns that do not ascend within their row, or lie outside the weight.
    """
    start, column, value, index, _ = beside.all()
    if start is None or column is None or value is None or index is not None or value.dtype != torch.bfloat16 or K > MOST_TILED:
        return None
    if dtype != torch.bfloat16 or library.best("exact") not in library.BFLOAT16_PATHS:
        return None
    made, tiles = part_of_weight(Beside(start, column, value)), torch.empty(0, dtype=torch.uint8)
    made.rows, made.columns, made.threads = N, K, library.threads()
    while True:
        needed = library.library().aerogel_native_outlier_tiles(ctypes.byref(made), tiles.data_ptr(), tiles.nbytes)
        library.check(max(0, -needed), f"the outliers of a weight [{N}, {K}]")
        if needed <= tiles.nbytes:
            return tiles
        tiles = torch.empty(needed, dtype=torch.uint8)


def struct_of(y_MN: Tensor, x_MK: Tensor, out_MN: Tensor, beside: Beside) -> library.Beside:
    """The struct of one addition to a product; `out_MN` may be `y_MN`. All contiguous, of one of the library's types."""
    made = part_of_weight(beside)
    made.x, made.y, made.out = x_MK.data_ptr(), y_MN.data_ptr(), out_MN.data_ptr()
    (made.tokens, made.columns), made.rows = x_MK.shape, y_MN.shape[1]
    made.type, made.threads = TYPES[x_MK.dtype], library.threads()
    return made


def add(y_MN: Tensor, x_MK: Tensor, beside: Beside) -> Tensor:
    """As `ref.add`, for tensors that fit."""
    out_MN = torch.empty_like(y_MN)
    made = struct_of(y_MN, x_MK, out_MN, beside)
    library.check(library.library().aerogel_native_beside(ctypes.byref(made)), "what stands beside a packed weight")
    return out_MN
