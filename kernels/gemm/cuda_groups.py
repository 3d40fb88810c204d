"""The matmul with groups that are no multiple of 16 on NVIDIA GPUs: each group is filled up to whole steps.

    y_MN = spread(x)_ML @ spread(W)_NL.T          group after group, 72 columns in the place of 80, 8 in that of 16

The columns between are those of zeros in x, so they say nothing whatever their codes are (a copy of a column of their group,
since tables have codes that are no number). All kernels of `cuda` then run the weight, for 11 % more bytes of codes with groups
of 72, 20 % with 40, and twice as many with 8, which should be another grouping. Before the matmul x is spread by one small
launch (`cuda_spread`).

Shape legend: M tokens, N out features, K in features, G groups along K, L columns of the laid out weight, a multiple of 128.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from aerogel.kernels.beside.ref import Beside
from aerogel.kernels.gemm.cuda import Cuda
from aerogel.kernels.gemm.cuda_around import AroundCuda
from aerogel.kernels.gemm.cuda_spread import STEP, Spread, filled, spread_out
from aerogel.kernels.problem import Layout, Problem
from aerogel.pack import tiles
from aerogel.quantize.codes import Codes
from aerogel.quantize.grids import IntGrid
from aerogel.quantize.tables import TableGrid


class CudaGroups(AroundCuda):
    """Integers and tables in groups that are filled up, in the tile layout."""

    about: ClassVar[str] = "groups of any size, filled up to multiples of 16, on the CUDA kernels compiled at run time"

    @staticmethod
    def inner(problem: Problem) -> Problem:
        """The matmul of the laid out weight."""
        grid: Any = problem.grid
        return replace(problem, grid=replace(grid, group_size=filled(grid.group_size)), K=_spread(problem).columns)

    @staticmethod
    def refuses(problem: Problem) -> str | None:
        """Other grids, groups that need no filling, and what the kernels refuse."""
        if problem.needs_groups(STEP) is None:
            return f"fills up groups that are no multiple of {STEP}"
        return problem.needs_numbers(IntGrid, TableGrid) or Cuda.refuses(CudaGroups.inner(problem))

    @staticmethod
    def pack(codes: Codes, problem: Problem) -> dict[str, Tensor]:
        """The tensors of the laid out weight [N, L], see `Cuda.pack`."""
        inner, spread = CudaGroups.inner(problem), _spread(problem)
        device = codes.values_NK.device
        rest = spread.columns - spread.stretch
        columns = torch.nn.functional.pad(spread.sources(device), (0, rest))
        groups = torch.arange(inner.grid.groups(inner.K), device=device).clamp(max=spread.groups - 1)
        return Cuda.pack(_cut(codes, columns, groups, inner.grid), inner)

    @staticmethod
    def lay_beside(beside: Beside, layout: Layout, problem: Problem, place_K: Tensor | None = None) -> dict[str, Tensor] | None:
        """As `Cuda`, where the columns lie now."""
        return Cuda.lay_beside(beside, layout, CudaGroups.inner(problem), _spread(problem).moved(place_K, beside.device))

    @staticmethod
    def unpack(layout: Layout, problem: Problem) -> Codes:
        """The inverse of `pack`, exactly."""
        spread, codes = _spread(problem), Cuda.unpack(layout, CudaGroups.inner(problem))
        device = codes.values_NK.device
        return _cut(codes, spread.places(device), torch.arange(spread.groups, device=device), problem.grid)

    @staticmethod
    def operand(x_MK: Tensor, layout: Layout, problem: Problem) -> Tensor:
        """x spread."""
        return spread_out(x_MK, _spread(problem))


def _spread(problem: Problem) -> Spread:
    """Where the columns lie."""
    group = problem.grid.group_size or problem.K
    columns = -(-problem.K // group) * filled(group)
    return Spread(K=problem.K, group=group, copies=1, columns=-(-columns // tiles.COLUMNS) * tiles.COLUMNS)


def _cut(codes: Codes, columns: Tensor, groups: Tensor, grid: Any) -> Codes:
    """The codes of these columns, in these groups."""

    def of_groups(tensor: Tensor) -> Tensor:
        raw = tensor.view(torch.uint8) if tensor.element_size() == 1 else tensor
        return raw.index_select(1, groups).view(tensor.dtype)

    return replace(
        codes,
        values_NK=codes.values_NK.index_select(1, columns),
        scale_NG=of_groups(codes.scale_NG),
        zero_NG=None if codes.zero_NG is None else of_groups(codes.zero_NG),
        pick_NG=None if codes.pick_NG is None else of_groups(codes.pick_NG),
        grid=grid,
    )
