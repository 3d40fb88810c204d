"""Grids that are a table: 2^b numbers that a code points into, times a scale. A number format as data.

    W[n, k] = table[t][u[n, k]] * (s[n, g] * factor)         t = 0, or the group's pick, or the output n

A format gives its numbers (`numbers`), its bits and its defaults, and inherits everything that solvers, files and kernels
ask for: the search for scales, the choice of a table per group, column-wise rounding, encoding and decoding. Floats of few
bits, NF4, the microscaling formats and BitMoD are such tables (`quantize/formats/`); what is special about one is an
override of a few lines there.

Two levels of scales: with an eight-bit `scale_dtype` a float32 `factor` per weight keeps the scales in range. It is a
power of two, so that nothing is rounded by it, and weights that a server loads as one can be given the same one (`pinned`).

Shape legend: N out features, K in features, G groups along K, g members of a group, n outputs of a chunk, T tables of E
numbers.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, cached_property
from typing import TYPE_CHECKING, Self

import torch
from torch import Tensor

from aerogel.errors import BadInput
from aerogel.quantize.codes import Codes, Grid, Params, check_group_size, grouped, row_slices
from aerogel.quantize.levels import Levels
from aerogel.quantize.ranges import Search, Step, curvature_blocks, group_cost, search_steps
from aerogel.quantize.rounder import Rounder
from aerogel.quantize.scales import DIGITS, as_stored, name_of, numbers_of_byte, rounded

if TYPE_CHECKING:
    from aerogel.kernels.rounding.columns import Columns

BLOCK = 128
"""Outputs and inputs that share a scale where scales are per block."""


@dataclass(frozen=True, kw_only=True)
class TableGrid:
    """The parent of all table formats. A subclass defines `bits` and `numbers`, and the defaults of its fields.

    group_size: inputs that share a scale; null for one scale per output.
    scale_dtype: type that scales are stored in, and rounded to before use.
    """

    group_size: int | None = None
    scale_dtype: torch.dtype = torch.float32
    factor: float | None = field(default=None, init=False, compare=False, repr=False)
    """The factor when it is decided before fitting, see `pinned`; never a part of the format."""

    def __post_init__(self) -> None:
        check_group_size(self.group_size)
        name_of(self.scale_dtype)

    @property
    def two_level(self) -> bool:
        """Whether a float32 factor per weight keeps eight-bit scales in range. Powers of two have range enough."""
        return self.scale_dtype in (torch.float8_e4m3fn, torch.uint8)

    @property
    def learned(self) -> bool:
        """Whether every output's table is fitted to it, so that a file must hold the tables."""
        return False

    @property
    def pick_bits(self) -> int:
        """Bits that say which table a group has; 0 where there is no choice."""
        return 0 if self.learned else (len(self.largest) - 1).bit_length()

    # ---- what a format says ----------------------------------------------------------------------------------------

    @property
    def bits(self) -> int:
        """Bits of one code."""
        raise NotImplementedError

    def numbers(self) -> tuple[tuple[float, ...], ...]:
        """The T tables, each of 2^bits numbers in the order of their codes; NaN for a code that is not used."""
        raise NotImplementedError

    @property
    def shared_rows(self) -> int | None:
        """Outputs that share a scale: 1, or `BLOCK` in blocks."""
        return 1

    # ---- tables and scales -----------------------------------------------------------------------------------------

    @cached_property
    def tables(self) -> Tensor:
        """The tables, float32 [T, E]."""
        return torch.tensor(self.numbers(), dtype=torch.float64).float()

    @cached_property
    def largest(self) -> tuple[float, ...]:
        """The largest magnitude of each table."""
        return tuple(max(abs(x) for x in table if not math.isnan(x)) for table in self.numbers())

    def groups(self, K: int) -> int:
        """ceil(K / group_size), 1 per channel."""
        return -(-K // (self.group_size or K))

    def pinned(self, factor: float | None) -> Self:
        """The same grid with the factor of all weights it fits decided."""
        grid = copy.copy(self)
        object.__setattr__(grid, "factor", factor)
        return grid

    def factor_for(self, peak: float) -> float | None:
        """The factor for a weight whose largest magnitude is `peak`: a power of two that brings the largest scale into
        the upper half of what its type holds. None where there is one level of scales only."""
        if not self.two_level:
            return None
        most = float(numbers_of_byte(self.scale_dtype).nan_to_num(nan=0).max())
        need = peak / max(self.largest) / most
        return 2.0 ** math.ceil(math.log2(need)) if need > 2.0**-120 else 2.0**-120

    def store(self, scale: Tensor) -> Tensor:
        """Effective scales as stored, `factor` included."""
        if self.factor is None:
            return rounded(scale, self.scale_dtype)
        return rounded(scale / self.factor, self.scale_dtype) * self.factor

    def step_of_range(self, low: Tensor, high: Tensor) -> Step:
        """The scale that puts the larger end at the first table's largest number."""
        return self._step(torch.maximum(high, -low), 0)

    def _step(self, peak: Tensor, table: int) -> Step:
        most = self.largest[table]
        return Step(self.store(peak / most), -most, most, torch.full_like(peak, table, dtype=torch.int64))

    def neighbours(self, step: Step) -> list[Step]:
        """Where scales are coarse, the next finer and the next coarser one."""
        digits = DIGITS.get(self.scale_dtype)
        if digits is None:
            return []
        return [step._replace(scale=self.store(step.scale * ratio)) for ratio in (1 + 2.0**-digits, 1 / (1 + 2.0**-digits))]

    # ---- fitting ---------------------------------------------------------------------------------------------------

    def fit(
        self,
        w_NK: Tensor,
        importance: Tensor | None = None,
        mask_NK: Tensor | None = None,
        search: Search | str = "minmax",
        curvature_KK: Tensor | None = None,
    ) -> Params:
        """Scales, and the table of each group where there are several; see `ranges.Search` for what is minimised.

        importance weighs the squared error of each input, [K], or of each weight, [N, K]; curvature_KK replaces it by the
        full quadratic form inside each group. Pruned weights (mask_NK False) count as the exact zeros they are.
        """
        how = Search.of(search)
        if self.two_level and self.factor is None:
            kept = w_NK if mask_NK is None else w_NK * mask_NK
            grid = self.pinned(self.factor_for(float(kept.abs().max())))
            return grid.fit(w_NK, importance, mask_NK, search, curvature_KK)
        N, K = w_NK.shape
        size = min(self.group_size or K, K)
        tall = min(self.shared_rows or N, N)
        weight = None
        if importance is not None and importance.dim() == 1:
            weight = grouped(importance.float()[:, None], size).repeat(1, tall, 1)
        curvature = None if curvature_KK is None or tall > 1 else curvature_blocks(curvature_KK.float(), size)
        own = None if importance is None or importance.dim() == 1 else _blocks(importance, None, size, tall)
        parts = [
            self._search(chunk, how, weight if own is None else next(own), curvature)
            for chunk in _blocks(w_NK, mask_NK, size, tall)
        ]
        step = Step.join(parts, lambda chunks: torch.cat(chunks, 1))
        return self._params(step)

    def _search(self, w_Ggn: Tensor, how: Search, weight: Tensor | None, curvature: Tensor | None) -> Step:
        """The best scale and table of every group."""
        best: Step | None = None
        cost = w_Ggn.new_empty(0)
        for table in range(len(self.largest)):
            step = search_steps(w_Ggn, _OneTable(self, table), how, weight, curvature)
            if len(self.largest) == 1:
                return step
            new_cost = group_cost(w_Ggn, self, how, step, weight, curvature)
            wins = new_cost < cost if best is not None else torch.ones_like(new_cost, dtype=torch.bool)
            best = step if best is None else best.where(wins, step)
            cost = new_cost if cost.numel() == 0 else torch.where(wins, new_cost, cost)
        if best is None:
            raise BadInput(f"{type(self).__name__} has no tables")
        return best

    def snap(self, w: Tensor, step: Step, out: Tensor | None = None) -> Tensor:
        """The nearest values of the table of each group."""
        units = torch.div(w, step.scale, out=out)
        tables = [_levels_on(self, t, w.device, w.dtype) for t in range(len(self.largest))]
        if len(tables) == 1:
            return units.copy_(tables[0].nearest(units)).mul_(step.scale)
        found = torch.empty_like(units)
        for number, levels in enumerate(tables):
            torch.where(torch.as_tensor(step.pick, device=w.device) == number, levels.nearest(units), found, out=found)
        return units.copy_(found).mul_(step.scale)

    # ---- stored and back -------------------------------------------------------------------------------------------

    def params(self, step: Step, N: int, K: int) -> Params:
        """Scales [G, N] as they are stored, [N, G]; one row for every run of outputs that share them."""
        return self._params(step.each(lambda x: x[:, :: self.shared_rows or N]))

    def _params(self, step: Step) -> Params:
        scale = step.scale.T.contiguous().float()
        several = isinstance(step.pick, Tensor) and len(self.largest) > 1
        device = scale.device
        return Params(
            scale_NG=as_stored(scale if self.factor is None else scale / self.factor, self.scale_dtype),
            table_TE=self.tables.to(device),
            pick_NG=step.pick.T.contiguous().to(torch.uint8) if several and isinstance(step.pick, Tensor) else None,
            factor=None if self.factor is None else torch.tensor(self.factor, dtype=torch.float32, device=device),
        )

    def rounder(self, params: Params, N: int, K: int, dtype: torch.dtype = torch.float32) -> Rounder:
        """Column-wise rounding with these scales and tables."""
        grid = self.pinned(None if params.factor is None else float(params.factor))
        return TableRounder(grid, params, N, K, dtype)

    def encode(self, w_NK: Tensor, params: Params) -> Tensor:
        """Nearest codes, uint8 [N, K]."""
        N, K = w_NK.shape
        size = min(self.group_size or K, K)
        q_NK = torch.empty(N, K, dtype=torch.uint8, device=w_NK.device)
        for rows in row_slices(w_NK):
            levels = Levels.of(self._levels(params, rows, N))
            values = _in_groups(w_NK[rows].float(), size)
            q_NK[rows] = levels.nearest_codes(values).flatten(1)[:, :K]
        return q_NK

    def decode(self, q_NK: Tensor, params: Params) -> Tensor:
        """table[u] * (s * factor), float32 [N, K]."""
        N, K = q_NK.shape
        size = min(self.group_size or K, K)
        w_NK = torch.empty(N, K, dtype=torch.float32, device=q_NK.device)
        for rows in row_slices(q_NK):
            levels_nGE = self._levels(params, rows, N)
            codes = _in_groups(q_NK[rows].long(), size)
            w_NK[rows] = levels_nGE.gather(-1, codes).flatten(1)[:, :K]
        return w_NK

    def _levels(self, params: Params, rows: slice, N: int) -> Tensor:
        """The numbers that the codes of some outputs stand for, float32 [n, G, E]."""
        shared = self.shared_rows or N
        index = torch.arange(rows.start, rows.stop, device=params.scale_NG.device) // shared
        scale_nG1 = params.effective_scale()[index][..., None]
        table_TE = params.table_TE
        if table_TE is None:
            raise BadInput(f"codes on a {type(self).__name__} need their table, and there is none")
        if params.pick_NG is not None:
            return table_TE[params.pick_NG[index].long()] * scale_nG1
        return (table_TE[rows][:, None] if params.table_per_row else table_TE[:, None]) * scale_nG1


@dataclass(frozen=True)
class _OneTable:
    """One of several tables, as the search for scales sees it."""

    grid: TableGrid
    table: int

    def step_of_range(self, low: Tensor, high: Tensor) -> Step:
        if self.table == 0:
            return self.grid.step_of_range(low, high)
        return self.grid._step(torch.maximum(high, -low), self.table)

    def neighbours(self, step: Step) -> list[Step]:
        return self.grid.neighbours(step)

    def store(self, scale: Tensor) -> Tensor:
        return self.grid.store(scale)

    def snap(self, w: Tensor, step: Step, out: Tensor | None = None) -> Tensor:
        units = torch.div(w, step.scale, out=out)
        return units.copy_(_levels_on(self.grid, self.table, w.device, w.dtype).nearest(units)).mul_(step.scale)


class TableRounder(Rounder):
    """Snaps columns to the numbers of their group's table; what it gives is bit for bit what the codes decode to."""

    def __init__(self, grid: TableGrid, params: Params, N: int, K: int, dtype: torch.dtype) -> None:
        table_TE = params.table_TE
        if table_TE is None:
            raise BadInput("rounding to a table needs the table, and there is none")
        spread = torch.arange(N, device=params.scale_NG.device) // (grid.shared_rows or N)
        scale_GN = params.effective_scale()[spread].T.contiguous().to(dtype)
        pick_GN: Tensor | int = 0 if params.pick_NG is None else params.pick_NG[spread].T.long().contiguous()
        super().__init__(grid, Step(scale_GN, 0.0, 0.0, pick_GN), N, K)
        self._given, self._learned = params, grid.learned
        self._tables = Levels.of(table_TE[0] if len(table_TE) == 1 else table_TE).to(table_TE.device, dtype)

    def column(self, column: int, w_N: Tensor, out: Tensor) -> Tensor:
        """Nearest numbers of one column, written to `out`. The product is taken in float32, as decoding does."""
        step = self._steps[column // self.size]
        units_N = w_N / step.scale
        if self._tables.numbers.dim() == 1:
            nearest_N = self._tables.nearest(units_N)
        else:
            held = self._tables if isinstance(step.pick, int) else self._tables.pick(step.pick)
            nearest_N = held.nearest(units_N[:, None])[:, 0]
        return out.copy_(nearest_N.float() * step.scale.float())

    def at_once(self, order: Sequence[int], mask_KN: Tensor | None) -> Columns | None:
        """As in `Rounder`."""
        return self._columns(order, mask_KN, self._tables, per_row=self._learned)

    def replace(self, group: int, step_N: Step) -> None:
        """Other scales for one group. Raises `BadInput` for fitted tables, which have none."""
        if self._learned:
            raise BadInput("fitted tables cannot be changed group by group; write groups: static")
        super().replace(group, step_N)

    def rescale(self, group: int, gain_N: Tensor, stiffness_N: Tensor) -> Tensor | None:
        """As in `Rounder`; None for fitted tables, which have no scale."""
        return None if self._learned else super().rescale(group, gain_N, stiffness_N)

    def params(self) -> Params:
        """The scales in use, as they are stored, with the tables as they were given."""
        if self._learned:
            return self._given
        found = super().params()
        given = self._given
        return Params(scale_NG=found.scale_NG, table_TE=given.table_TE, pick_NG=found.pick_NG, factor=given.factor)


def _in_groups(x_nK: Tensor, size: int) -> Tensor:
    """[n, K] as [n, G, size], a short last group filled up with zeros."""
    n, K = x_nK.shape
    return torch.nn.functional.pad(x_nK, (0, -K % size)).reshape(n, -(-K // size), size)


def _blocks(w_NK: Tensor, mask_NK: Tensor | None, size: int, tall: int) -> Iterator[Tensor]:
    """Weights as [G, members, n] where the members of a group are `size` inputs of `tall` outputs."""
    N, K = w_NK.shape
    step = max(row.stop - row.start for row in row_slices(w_NK))
    step = -(-step // tall) * tall
    for start in range(0, N, step):
        rows = w_NK[start : start + step].float()
        if mask_NK is not None:
            rows = rows * mask_NK[start : start + step]
        if tall == 1:
            yield grouped(rows.T, size)
            continue
        padded = torch.nn.functional.pad(rows, (0, -K % size, 0, -len(rows) % tall))
        yield padded.reshape(-1, tall, padded.shape[1] // size, size).permute(2, 1, 3, 0).flatten(1, 2).contiguous()


@cache
def _levels_on(grid: TableGrid, table: int, device: torch.device, dtype: torch.dtype) -> Levels:
    """One table of a grid, ready for lookups on a device."""
    return Levels.of(grid.tables[table]).to(device, dtype)


def without_factor(codes: Codes, grid: Grid) -> Codes:
    """The same weight, bit for bit, with its factor multiplied into scales of float32.

    Raises:
        BadInput: `grid` is not the codes' own with `scale_dtype` float32.
    """
    if not isinstance(codes.grid, TableGrid) or grid != replace(codes.grid, scale_dtype=torch.float32):
        raise BadInput(f"{codes.grid} with its factor in its scales is not {grid}")
    return replace(codes, scale_NG=codes.effective_scale().float(), factor=None, grid=grid)
