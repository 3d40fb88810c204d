"""One factor for all weights of a block on the same grid with two levels of scales (NVFP4).

Servers load q, k and v as one matrix, gate and up as one, and a layer's experts as one, and then need one factor for all of
its parts. Which weights those are differs between architectures and servers, so all of a block share one: eight-bit scales
span a range of 2^17, the weights of a block do not, and a power of two rounds nothing.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from torch import Tensor

from aerogel.quantize.tables import TableGrid
from aerogel.recipes.stages import StageSpec

HEADROOM = 2.0
"""Solvers move weights, and pruning's refit may enlarge them: the largest scale is put this far below the type's end."""

Factors = dict[TableGrid, float]


def two_level_grid(stages: Iterable[StageSpec]) -> TableGrid | None:
    """The grid of these stages where it has two levels of scales."""
    grids = (getattr(spec.stage, "grid", None) for spec in stages if spec.kind == "quantize")
    return next((grid for grid in grids if isinstance(grid, TableGrid) and grid.two_level), None)


def shared_factors(weights: Iterable[tuple[TableGrid, Tensor]]) -> Factors:
    """The factor of each grid for all the weights that are rounded to it."""
    peaks: dict[TableGrid, float] = {}
    for grid, weight in weights:
        peaks[grid] = max(peaks.get(grid, 0.0), float(weight.abs().max()))
    factors = {grid: grid.factor_for(peak * HEADROOM) for grid, peak in peaks.items()}
    return {grid: factor for grid, factor in factors.items() if factor is not None}


def with_factor(spec: StageSpec, factors: Factors) -> StageSpec:
    """The stage with the factor of its grid decided, where there is one."""
    grid = two_level_grid([spec])
    if grid is None or grid not in factors:
        return spec
    pinned = grid.pinned(factors[grid])
    stage = spec.stage.on(pinned) if hasattr(spec.stage, "on") else replace(spec.stage, grid=pinned)
    return replace(spec, stage=stage)
