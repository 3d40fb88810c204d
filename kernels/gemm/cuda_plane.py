"""The matmul with a single bit plane on NVIDIA GPUs: integers of one bit, which need no decoding.

    W[n, k] = a[n, g] (+1 or -1) = 2 a (u[n, k] - 1/2),    u in {0, 1}

The kernels of `cuda` multiply such bits as places of a sparse factor (kernels/cuda/few_tokens.cuh), a fifth faster than
looking them up as `cuda_planes` does. A float zero point is 1/2 everywhere.

Shape legend: M tokens, N out features, K in features, G groups.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import ClassVar

import torch
from torch import Tensor

from aerogel.kernels.beside.ref import Beside
from aerogel.kernels.gemm.cuda import Cuda
from aerogel.kernels.gemm.plane_rows import BitGrid, planes_of, stored_scales
from aerogel.kernels.problem import Kernel, Layout, Problem
from aerogel.pack import tiles
from aerogel.quantize.codes import Codes
from aerogel.quantize.planes import PlaneGrid


class CudaPlane(Kernel):
    """One plane as one-bit integers in the tile layout."""

    about: ClassVar[str] = "a single bit plane as one-bit integers, on the CUDA kernels compiled at run time"

    @staticmethod
    def refuses(problem: Problem) -> str | None:
        """Anything but one plane without an offset, and what the kernels for integers refuse."""
        grid = problem.grid
        if not isinstance(grid, PlaneGrid) or grid.bits != 1 or grid.offset != "none":
            return "runs a single bit plane without an offset only"
        return Cuda.refuses(_inner(problem))

    @staticmethod
    def pack(codes: Codes, problem: Problem) -> dict[str, Tensor]:
        """tile_codes, tile_scale and tile_zero of the one-bit weight."""
        grid, N = planes_of(problem), codes.values_NK.shape[0]
        scale_NG = 2 * grid.numbers(codes)[0][..., 0].repeat_interleave(grid.block_rows, 0)[:N]
        scale = tiles.pack_rows_of_tiles(scale_NG.to(_inner(problem).grid.scale_dtype))
        return {
            "tile_codes": tiles.pack_tiles(codes.values_NK, 1),
            "tile_scale": scale,
            "tile_zero": torch.full_like(scale, 0.5),
        }

    @staticmethod
    def lay_beside(beside: Beside, problem: Problem, place_K: Tensor | None = None) -> dict[str, Tensor] | None:
        """As `Cuda`."""
        return Cuda.lay_beside(beside, _inner(problem), place_K)

    @staticmethod
    def unpack(layout: Layout, problem: Problem) -> Codes:
        """The same plane and scales."""
        grid = planes_of(problem)
        values_NK = tiles.unpack_tiles(layout["tile_codes"], 1, problem.N, problem.K)
        scale_NG = tiles.unpack_rows_of_tiles(layout["tile_scale"], problem.N)
        alpha = stored_scales(grid, scale_NG[:: grid.block_rows, :, None] / 2)
        return Codes(values_NK=values_NK, scale_NG=alpha, zero_NG=None, grid=grid)

    @staticmethod
    def warm(weights: Sequence[tuple[Layout, Problem]], tokens: Sequence[int]) -> None:
        """See `Kernel.warm`."""
        Cuda.warm([(layout, _inner(problem)) for layout, problem in weights], tokens)

    @staticmethod
    def run(x_MK: Tensor, layout: Layout, problem: Problem, bias_N: Tensor | None = None) -> Tensor:
        """One call of the operator."""
        return Cuda.run(x_MK, layout, _inner(problem), bias_N)


def _inner(problem: Problem) -> Problem:
    """The matmul with one-bit integers; twice a float16 may be too large for one."""
    grid = planes_of(problem)
    exact = grid.power_of_two or grid.scale_dtype == torch.bfloat16
    kind = torch.bfloat16 if exact else torch.float32
    return replace(problem, grid=BitGrid(group_size=grid.group_size, scale_dtype=kind))
