"""The matmul with bit planes on NVIDIA GPUs: every plane is one more stretch of columns of one-bit integers.

    y_MN = [x x ... x] @ [A_1 A_2 ... A_q].T,    A_i[n, k] = 2 alpha_i (u_i[n, k] - 1/2) = alpha_i * (+1 or -1)

The q planes of a weight [N, K] lie side by side as one weight [N, q K] of one bit with a scale and a zero point for each
group, so the kernels of `cuda` read q bits per weight, and all planes are summed in float32 before anything is rounded: planes
cancel, so their sums must not be rounded one by one. An offset moves the zero point of the first plane:

    2 alpha_1 (u - z) = alpha_1 * (+1 or -1) + offset    where z = 1/2 - offset / (2 alpha_1)

x beside itself is one small launch (`cuda_spread`), which also fills up groups that are no multiple of 16 columns.
Beyond `MOST_TOKENS` tokens q times the products cost more than decoding: the weight is decoded and cuBLAS multiplies.

Shape legend: M tokens, N out features, K in features, q planes, L >= K columns of a plane: G groups of whole steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import ClassVar

import torch
from torch import Tensor

from aerogel.kernels.beside.ref import Beside
from aerogel.kernels.gemm.cuda import Cuda, tile_weight
from aerogel.kernels.gemm.cuda_spread import Spread
from aerogel.kernels.gemm.plane_rows import BitGrid, planes_of, stored_scales
from aerogel.kernels.problem import Kernel, Layout, Problem
from aerogel.pack import tiles
from aerogel.quantize.codes import Codes
from aerogel.quantize.planes import PlaneGrid

MOST_TOKENS = 1024
NOTHING = 2.0**-100
"""The scale of a first plane that says nothing beside an offset; far below what any weight has."""


class CudaPlanes(Kernel):
    """Planes as columns of one-bit integers in the tile layout."""

    about: ClassVar[str] = "bit planes as columns of one-bit integers, on the CUDA kernels compiled at run time"

    @staticmethod
    def refuses(problem: Problem) -> str | None:
        """Anything but planes, and what the kernels for integers refuse."""
        if not isinstance(problem.grid, PlaneGrid):
            return "runs bit planes only"
        return Cuda.refuses(_inner(problem))

    @staticmethod
    def runs_stored(problem: Problem) -> bool:
        """Its own layout."""
        return False

    @staticmethod
    def pack(codes: Codes, problem: Problem) -> dict[str, Tensor]:
        """tile_codes, tile_scale and tile_zero of the one-bit weight [N, q L], and the offsets as they are stored."""
        inner, grid, N = _inner(problem), planes_of(problem), codes.values_NK.shape[0]
        alpha, offset = (x.repeat_interleave(grid.block_rows, 0)[:N] for x in grid.numbers(codes))
        values_NL = codes.values_NK.index_select(1, _spread(problem).sources(codes.values_NK.device))
        bits_NqL = torch.cat([(values_NL >> (grid.bits - 1 - i)) & 1 for i in range(grid.bits)], dim=1)
        scale_NqG = (2 * alpha).transpose(1, 2).contiguous()
        zero_NqG = torch.full_like(scale_NqG, 0.5)
        if grid.offset_dtype is not None:
            silent = (scale_NqG[:, 0] == 0) & (offset != 0)
            scale_NqG[:, 0][silent] = NOTHING
            zero_NqG[:, 0] -= torch.where(scale_NqG[:, 0] == 0, 0, offset / scale_NqG[:, 0])
        kind = inner.grid.scale_dtype
        layout = {
            "tile_codes": tiles.pack_tiles(bits_NqL, 1),
            "tile_scale": tiles.pack_rows_of_tiles(scale_NqG.flatten(1).to(kind)),
            "tile_zero": tiles.pack_rows_of_tiles(zero_NqG.flatten(1).to(kind)),
        }
        return layout if codes.zero_NG is None else {**layout, "stored_offset": codes.zero_NG}

    @staticmethod
    def lay_beside(beside: Beside, problem: Problem, place_K: Tensor | None = None) -> dict[str, Tensor] | None:
        """As `Cuda`, among the columns of the first plane."""
        return Cuda.lay_beside(beside, _inner(problem), _spread(problem).moved(place_K, beside.device))

    @staticmethod
    def unpack(layout: Layout, problem: Problem) -> Codes:
        """The same planes, scales and offsets."""
        inner, grid = _inner(problem), planes_of(problem)
        bits_NqL = tiles.unpack_tiles(layout["tile_codes"], 1, problem.N, inner.K)
        values, places = (
            torch.zeros(problem.N, problem.K, dtype=torch.uint8, device=bits_NqL.device),
            _places(problem, bits_NqL),
        )
        for i, plane in enumerate(torch.split(bits_NqL, inner.K // grid.bits, 1)):
            values |= plane[:, places] << (grid.bits - 1 - i)
        scale = tiles.unpack_rows_of_tiles(layout["tile_scale"], problem.N)
        scale = scale.masked_fill(scale == NOTHING, 0).reshape(problem.N, grid.bits, -1)
        alpha = scale[:: grid.block_rows].transpose(1, 2) / 2
        return Codes(values_NK=values, scale_NG=stored_scales(grid, alpha), zero_NG=layout.get("stored_offset"), grid=grid)

    @staticmethod
    def warm(weights: Sequence[tuple[Layout, Problem]], tokens: Sequence[int]) -> None:
        """See `Kernel.warm`."""
        Cuda.warm([(layout, _inner(problem)) for layout, problem in weights], [M for M in tokens if M <= MOST_TOKENS])

    @staticmethod
    def run(x_MK: Tensor, layout: Layout, problem: Problem, bias_N: Tensor | None = None) -> Tensor:
        """One call of the operator, on x beside itself once for each plane; or a decoded weight and torch's product."""
        inner, q = _inner(problem), planes_of(problem).bits
        if len(x_MK) > MOST_TOKENS:
            from aerogel.kernels.gemm.cuda_dense import dequantize

            planes_NqL = dequantize(tile_weight(layout, inner), x_MK.dtype).reshape(problem.N, q, -1)
            weight_NK = planes_NqL.sum(1, dtype=torch.float32)[:, _places(problem, x_MK)].to(x_MK.dtype)
            return torch.nn.functional.linear(x_MK, weight_NK, bias_N)
        x_ML = x_MK if inner.K == problem.K else _spread(problem)(x_MK)
        return Cuda.run(x_ML, layout, inner, bias_N)


def _spread(problem: Problem) -> Spread:
    """Where the columns of the planes lie."""
    grid = planes_of(problem)
    plane = Spread(K=problem.K, group=grid.group_size or problem.K, copies=1, columns=0)
    return replace(plane, copies=grid.bits, columns=grid.bits * plane.stretch)


def _places(problem: Problem, like: Tensor) -> Tensor:
    return _spread(problem).places(like.device)


def _inner(problem: Problem) -> Problem:
    """The matmul with all planes of the weight side by side, each filled up to whole groups and these to whole steps."""
    grid, spread = planes_of(problem), _spread(problem)
    exact = grid.offset_dtype is None and (grid.power_of_two or grid.scale_dtype == torch.bfloat16)
    # One scale for all inputs is one for each plane: a group as long as a plane.
    size = None if grid.group_size is None and grid.bits == 1 else spread.filled
    # Twice a float16 may be too large for one, and an offset over a scale wants more digits than bfloat16 has.
    bit = BitGrid(group_size=size, scale_dtype=torch.bfloat16 if exact else torch.float32)
    return replace(problem, grid=bit, K=spread.columns)
