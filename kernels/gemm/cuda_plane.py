"""The matmul with a single bit plane on NVIDIA GPUs: signs, which need no decoding.

    W[n, k] = a[n, g] (2 u[n, k] - 1),    u in {0, 1}

The kernels of `cuda` multiply up to 8 tokens by such bits as places of a sparse factor (kernels/cuda/few_tokens.cuh), a fifth
faster than looking them up as `cuda_planes` does; else a sign is put into the scale or into one. To them a sign is a float of
one bit (`small_floats.mantissa_bits`): they read a bit for each weight and a scale for each group, and have no zero points.

Shape legend: M tokens, N out features, K in features, G groups.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import ClassVar

import torch
from torch import Tensor

from aerogel.kernels.beside.ref import Beside
from aerogel.kernels.cuda.sources import Wanted
from aerogel.kernels.gemm.cuda import Cuda
from aerogel.kernels.gemm.plane_rows import BitGrid, planes_of, stored_scales
from aerogel.kernels.problem import Kernel, Layout, Pieces, Problem
from aerogel.pack import tiles
from aerogel.quantize.codes import Codes
from aerogel.quantize.planes import PlaneGrid


class CudaPlane(Kernel):
    """One plane as signs in the tile layout."""

    about: ClassVar[str] = "a single bit plane as signs, on the CUDA kernels compiled at run time"

    @staticmethod
    def refuses(problem: Problem) -> str | None:
        """Anything but one plane without an offset, and what the kernels for integers refuse."""
        grid = problem.grid
        if not isinstance(grid, PlaneGrid) or grid.bits != 1 or grid.offset != "none":
            return "runs a single bit plane without an offset only"
        return Cuda.refuses(_inner(problem))

    @staticmethod
    def pack(codes: Codes, problem: Problem) -> dict[str, Tensor]:
        """tile_codes and tile_scale of the one-bit weight."""
        grid, N = planes_of(problem), codes.values_NK.shape[0]
        scale_NG = grid.numbers(codes)[0][..., 0].repeat_interleave(grid.block_rows, 0)[:N]
        scale = scale_NG.to(_inner(problem).grid.scale_dtype)
        return {"tile_codes": tiles.pack_tiles(codes.values_NK, 1), "tile_scale": tiles.pack_rows_of_tiles(scale)}

    @classmethod
    def pieces(cls, problem: Problem) -> Pieces:
        """Rows that share scales stay together."""
        return Pieces(rows=math.lcm(tiles.ROWS, planes_of(problem).block_rows))

    @staticmethod
    def lay_beside(beside: Beside, layout: Layout, problem: Problem, place_K: Tensor | None = None) -> dict[str, Tensor] | None:
        """As `Cuda`."""
        return Cuda.lay_beside(beside, layout, _inner(problem), place_K)

    @staticmethod
    def unpack(layout: Layout, problem: Problem) -> Codes:
        """The same plane and scales."""
        grid = planes_of(problem)
        values_NK = tiles.unpack_tiles(layout["tile_codes"], 1, problem.N, problem.K)
        scale_NG = tiles.unpack_rows_of_tiles(layout["tile_scale"], problem.N)
        alpha = stored_scales(grid, scale_NG[:: grid.block_rows, :, None])
        return Codes(values_NK=values_NK, scale_NG=alpha, zero_NG=None, grid=grid)

    @staticmethod
    def wanted(weights: Sequence[tuple[Layout, Problem]], tokens: Sequence[int], device: torch.device) -> list[Wanted]:
        """See `Kernel.wanted`."""
        return Cuda.wanted(weights, tokens, device)

    @staticmethod
    def run(x_MK: Tensor, layout: Layout, problem: Problem, bias_N: Tensor | None = None) -> Tensor:
        """One call of the operator."""
        return Cuda.run(x_MK, layout, problem, bias_N)


def _inner(problem: Problem) -> Problem:
    """The matmul with one-bit integers in such groups, which is refused where this one is. bfloat16 has all powers of two that
    a byte has."""
    grid = planes_of(problem)
    kind = torch.bfloat16 if grid.power_of_two else grid.scale_dtype
    return replace(problem, grid=BitGrid(group_size=grid.group_size, scale_dtype=kind))
