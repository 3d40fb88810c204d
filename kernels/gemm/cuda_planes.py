"""The matmul with bit planes on NVIDIA GPUs: one product for all planes of a weight.

    y_MN = x_MK @ W_NK.T,    W[n, k] = offset[n, g] + sum_i a_i[n, g] (+1 or -1)

The q signs of a weight are a code of q bits into the table of its group, which the kernels of `cuda` make in registers from
the group's numbers (kernels/cuda/planes.cuh, `plane_tables`). They read q bits for each weight, and a product is one for all
planes. Blocks of eight columns that many rows share, as ShiftAddLLM's, have ready tables.

Groups of another size that is no multiple of 16 are filled up, and x follows by one small launch (`cuda_spread`). More than
four planes lie side by side as two weights [N, 2 L], and x is repeated for them.

Error, relative Frobenius norm: that of a dense weight in the activations' type, at most 3e-3 in bfloat16 and 4e-4 in float16,
with four planes and an offset 4e-3 and 5e-4; stored numbers that this type does not hold are rounded to it first, which adds
2e-3 and 3e-4.

Shape legend: M tokens, N out features, K in features, B blocks of outputs, G groups, q planes, L >= K columns of one copy.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import ClassVar

import torch
from torch import Tensor

from aerogel.kernels.beside.ref import Beside
from aerogel.kernels.gemm.cuda import Cuda
from aerogel.kernels.gemm.cuda_around import AroundCuda
from aerogel.kernels.gemm.cuda_spread import STEP, Spread, spread_out
from aerogel.kernels.gemm.plane_rows import BitGrid, planes_of, stored_scales
from aerogel.kernels.gemm.plane_tables import (
    COLUMNS,
    MOST_PLANES,
    numbers_of_rows,
    own_names,
    renamed,
    rows_of_numbers,
    tables_of_blocks,
)
from aerogel.kernels.problem import Layout, Pieces, Problem, Tuned
from aerogel.pack.nibbles import pack_nibbles, unpack_nibbles
from aerogel.pack.tiles import COLUMNS as TILE_COLUMNS
from aerogel.pack.tiles import ROWS
from aerogel.quantize.codes import Codes
from aerogel.quantize.planes import PlaneGrid


class CudaPlanes(AroundCuda):
    """Planes as codes into tables of groups, in the tile layout."""

    rows: ClassVar[int] = 0  # what is stored beside the layout goes by blocks of rows
    shared: ClassVar[frozenset[str]] = frozenset()
    about: ClassVar[str] = "bit planes as codes into tables of their groups' sums, on the CUDA kernels compiled at run time"

    @staticmethod
    def inner(problem: Problem) -> Problem:
        """The matmul of the laid out weight."""
        return _inner(problem)

    @staticmethod
    def refuses(problem: Problem) -> str | None:
        """Anything but planes, and what the kernels for integers refuse."""
        return problem.needs_numbers(PlaneGrid) or Cuda.refuses(_inner(problem))

    @staticmethod
    def pack(codes: Codes, problem: Problem) -> dict[str, Tensor]:
        """tile_codes, tile_scale and tile_zero of the laid out weight; and what is stored, where they are no exact copy."""
        grid, N, blocks = planes_of(problem), codes.values_NK.shape[0], _in_blocks(planes_of(problem))
        layout = {"tile_codes": pack_nibbles(_codes_of_copies(codes.values_NK, problem), _planes(grid), by_columns=blocks)}
        alpha_BGq, offset_BG = grid.numbers(codes)
        if blocks:
            layout["tile_scale"] = tables_of_blocks(alpha_BGq, offset_BG, grid.block_rows, N, problem.dtype)
        else:
            alpha, offset = (x.repeat_interleave(grid.block_rows, 0)[:N] for x in (alpha_BGq, offset_BG))
            alpha = torch.nn.functional.pad(alpha, (0, _copies(grid) * _planes(grid) - grid.bits))
            alpha = torch.cat(alpha.chunk(_copies(grid), -1), 1)
            offset = torch.nn.functional.pad(offset, (0, alpha.shape[1] - offset.shape[1]))
            layout |= numbers_of_rows(alpha, None if grid.offset_dtype is None else offset, problem.dtype)
        if blocks or not _exact_scales(problem):
            layout["stored_scale"] = codes.scale_NG
        if codes.zero_NG is not None and (blocks or grid.offset_dtype != problem.dtype):
            layout["stored_offset"] = codes.zero_NG
        return layout

    @classmethod
    def pieces(cls, problem: Problem) -> Pieces:
        """Rows that share numbers stay together."""
        return Pieces(rows=math.lcm(ROWS, planes_of(problem).block_rows))

    @staticmethod
    def lay_beside(beside: Beside, layout: Layout, problem: Problem, place_K: Tensor | None = None) -> dict[str, Tensor] | None:
        """As `Cuda`, among the columns of the first copy."""
        spread = _spread(problem)
        return Cuda.lay_beside(
            beside, layout, _inner(problem), place_K if spread is None else spread.moved(place_K, beside.device)
        )

    @staticmethod
    def unpack(layout: Layout, problem: Problem) -> Codes:
        """The same planes, scales and offsets."""
        grid, inner, blocks = planes_of(problem), _inner(problem), _in_blocks(planes_of(problem))
        copies = unpack_nibbles(layout["tile_codes"], _planes(grid), problem.N, inner.K, by_columns=blocks)
        values = _codes_of(copies, problem)
        scale, offset = layout.get("stored_scale"), layout.get("stored_offset")
        if not blocks:
            held = rows_of_numbers(layout["tile_scale"], layout.get("tile_zero"), problem.N, _planes(grid), problem.dtype)
            first = slice(None, None, grid.block_rows)
            alpha = torch.cat(held[0][first].chunk(_copies(grid), 1), -1)[..., : grid.bits]
            scale = stored_scales(grid, alpha) if scale is None else scale
            if grid.offset_dtype is not None and offset is None:
                offset = held[1][first, : alpha.shape[1]].contiguous()
        if scale is None:
            raise KeyError("a layout of blocks lacks stored_scale, which pack always puts there")
        return Codes(values_NK=values, scale_NG=scale, zero_NG=offset, grid=grid)

    @classmethod
    def tune(cls, problem: Problem, tokens: Sequence[int]) -> Tuned | None:
        """See `Kernel.tune`; x as it is spread counts for nothing here."""
        from aerogel.kernels.gemm.cuda_tune import random_planes, tune_and_keep

        grid, inner = planes_of(problem), _inner(problem)
        size, offset = inner.grid.group_size or inner.K, grid.offset != "none"
        return tune_and_keep(
            lambda: random_planes(inner.N, inner.K, inner.grid.bits, size, "cuda", offset=offset, blocks=_in_blocks(grid)),
            tokens,
        )

    @staticmethod
    def operand(x_MK: Tensor, layout: Layout, problem: Problem) -> Tensor:
        """x spread out and repeated where the weight is."""
        spread = _spread(problem)
        return x_MK if spread is None else spread_out(x_MK, spread)


def _copies(grid: PlaneGrid) -> int:
    """Weights that lie side by side."""
    return -(-grid.bits // MOST_PLANES)


def _planes(grid: PlaneGrid) -> int:
    """Planes of each of them."""
    return -(-grid.bits // _copies(grid))


def _in_blocks(grid: PlaneGrid) -> bool:
    """Whether row tiles have tables of eight columns, which have eight numbers: of four planes only half of the sums."""
    fits = grid.bits < MOST_PLANES or (grid.bits == MOST_PLANES and grid.offset == "none")
    return fits and grid.group_size == COLUMNS and grid.block_rows % ROWS == 0


def _spread(problem: Problem) -> Spread | None:
    """Where the columns of x lie that is spread out; None where it is as it was."""
    grid = planes_of(problem)
    if _in_blocks(grid) or (_copies(grid) == 1 and (grid.group_size or STEP) % STEP == 0):
        return None
    one = Spread(K=problem.K, group=grid.group_size or problem.K, copies=1, columns=0)
    return replace(one, copies=_copies(grid), columns=_copies(grid) * one.stretch)


def _inner(problem: Problem) -> Problem:
    """The matmul of the laid out weight; its grid says how many bits and columns of a group there are."""
    grid, spread = planes_of(problem), _spread(problem)
    if _in_blocks(grid):
        size = 2 * COLUMNS
    elif spread is not None:
        size = spread.filled
    else:  # one group of all columns is one of whole tiles: no sum is scaled at its end
        size = grid.group_size or -(-problem.K // TILE_COLUMNS) * TILE_COLUMNS
    inner = BitGrid(bits=_planes(grid), group_size=size, scale_dtype=problem.dtype)
    return replace(problem, grid=inner, K=problem.K if spread is None else spread.columns)


def _codes_of_copies(values_NK: Tensor, problem: Problem) -> Tensor:
    """Codes as the kernels have them, uint8 [N, inner K]: the planes of each copy, filled up below."""
    grid, spread = planes_of(problem), _spread(problem)
    each, copies = _planes(grid), _copies(grid)
    if spread is not None:
        values_NK = values_NK.index_select(1, spread.sources(values_NK.device))
    wide = values_NK << (copies * each - grid.bits)
    parts = [wide >> each * (copies - 1 - copy) & ((1 << each) - 1) for copy in range(copies)]
    values = torch.cat(parts, 1) if copies > 1 else parts[0]
    return renamed(values) if each == MOST_PLANES else values


def _codes_of(copies_NL: Tensor, problem: Problem) -> Tensor:
    """The inverse of `_codes_of_copies`."""
    grid, spread = planes_of(problem), _spread(problem)
    each, copies = _planes(grid), _copies(grid)
    parts = (own_names(copies_NL) if each == MOST_PLANES else copies_NL).chunk(copies, 1)
    values = parts[0]
    for part in parts[1:]:
        values = values << each | part
    values = values >> (copies * each - grid.bits)
    return values if spread is None else values.index_select(1, spread.places(values.device))


def _exact_scales(problem: Problem) -> bool:
    """Whether the activations' type holds the scales as they are stored. bfloat16 has all powers of two that a byte has."""
    grid = planes_of(problem)
    return problem.dtype == (torch.bfloat16 if grid.power_of_two else grid.scale_dtype)
