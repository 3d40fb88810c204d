"""The integer grid and the FP8 grid; `codes` says what any grid is, `tables` holds all others. Only grids round.

A grid knows how codes become weights and weights become codes; it knows no file, no device and no solver. A solver knows
no number format: it talks to a grid through `fit` (choose scales), `rounder` (snap one column while solving), `encode`
and `decode`. A new format joins by offering the same few methods.

Integers:  W = (q - z) * s, with q a signed b-bit code, z an integer of the same range (0 when symmetric) and s one scale
for `group_size` consecutive inputs of one output. The scale is rounded to the type it is stored in *before* any code is
chosen, so what a file decodes to is bit for bit what the solver saw.
Floats:    W = f * s, with f an e4m3 value (largest 448) and s one scale per output, per 128x128 block or per tensor.

Inside, a weight is looked at as [G, g, n]: groups, members of a group, outputs. Outputs lie last, so that every step
is one vectorised operation over many groups, and a short last group is padded with zeros, which every grid represents
exactly. Rows are taken in chunks: the extra memory is a few MB whatever the size of the matrix.

Shape legend: N out features, K in features, G groups along K, g members of a group, n outputs of a chunk.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from aerogel.errors import BadInput
from aerogel.quantize.codes import (
    Codes,
    Grid,
    Params,
    check_group_size,
    grouped,
    grouped_importance,
    quantized,
    row_chunks,
    row_slices,
    rows_of,
)
from aerogel.quantize.ranges import Search, Step, curvature_blocks, search_steps
from aerogel.quantize.rounder import Rounder
from aerogel.quantize.scales import check_wide, rounded

if TYPE_CHECKING:
    from aerogel.kernels.rounding.columns import Columns

__all__ = [
    "BLOCK",
    "E4M3_MAX",
    "Codes",
    "Fp8Grid",
    "Grid",
    "IntGrid",
    "Params",
    "grouped",
    "quantized",
    "row_chunks",
    "rows_of",
]


@dataclass(frozen=True, kw_only=True)
class IntGrid:
    """Signed integers of 2 to 8 bits, codes -2^(b-1) .. 2^(b-1)-1, one scale per group and output.

    group_size: inputs that share a scale; null for one scale per output.
    symmetric: no zero point; else an integer zero point per scale, so that 0 is always represented exactly.
    scale_dtype: type that scales are stored in, and rounded to before use.
    """

    bits: int
    group_size: int | None = None
    symmetric: bool = True
    scale_dtype: torch.dtype = torch.float32

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 8:
            one = "; one bit needs a floating zero point, write affine in the place of int" if self.bits == 1 else ""
            raise BadInput(f"bits must lie between 2 and 8, found {self.bits}{one}")
        check_group_size(self.group_size)
        check_wide(self.scale_dtype)

    @property
    def shared_rows(self) -> int:
        """Every output has its own scale."""
        return 1

    @property
    def q_min(self) -> int:
        """The smallest code."""
        return -(1 << (self.bits - 1))

    @property
    def q_max(self) -> int:
        """The largest code."""
        return (1 << (self.bits - 1)) - 1

    def groups(self, K: int) -> int:
        """ceil(K / group_size), 1 per channel."""
        return -(-K // (self.group_size or K))

    def fit(
        self,
        w_NK: Tensor,
        importance: Tensor | None = None,
        mask_NK: Tensor | None = None,
        search: Search | str = "minmax",
        curvature_KK: Tensor | None = None,
    ) -> Params:
        """Scales (and zero points) for `w_NK`; see `ranges.Search` for what is minimised.

        importance weighs the squared error of each input, [K] (diagonal of the second moment), or of each weight, [N, K];
        curvature_KK replaces it by the full quadratic form inside each group. Pruned weights (mask_NK False) count as the
        exact zeros they are.
        """
        step = searched_step(self, w_NK, importance, mask_NK, Search.of(search), curvature_KK)
        return self.params(step, *w_NK.shape)

    def step_of_range(self, low: Tensor, high: Tensor) -> Step:
        """Symmetric: scale absmax / ((2^b - 1) / 2). Else (high - low) / (2^b - 1) with the zero point rounded."""
        if self.symmetric:
            scale = torch.maximum(high, -low) / ((2**self.bits - 1) / 2)
            return Step(self.store(scale), float(self.q_min), float(self.q_max))
        scale = self.store((high - low) / (2**self.bits - 1))
        zero = (self.q_min - low / scale).round_().clamp_(self.q_min, self.q_max)
        return Step(scale, self.q_min - zero, self.q_max - zero)

    def neighbours(self, step: Step) -> list[Step]:
        """The zero points beside the present ones, each with a slightly finer, the same, and a coarser scale."""
        if not isinstance(step.low, Tensor) or not isinstance(step.high, Tensor):
            return []
        width = self.q_max - self.q_min
        found = []
        for move in (-1.0, 1.0):
            low = (step.low + move).clamp_(-width, 0)
            found += [Step(self.store(step.scale * factor), low, low + width) for factor in (0.93, 1.0, 1.07)]
        return found

    def store(self, scale: Tensor) -> Tensor:
        """Scales as stored; 0 becomes 1 (nothing but zeros to represent), underflow the smallest value of the type."""
        return rounded(scale, self.scale_dtype)

    def snap(self, w: Tensor, step: Step, out: Tensor | None = None) -> Tensor:
        """s * clamp(round(w / s), low, high), ties to even."""
        units = torch.div(w, step.scale, out=out).round_()
        torch.clamp(units, step.low, step.high, out=units)  # type: ignore[arg-type]
        return units.mul_(step.scale)

    def integer_shift(self, shift: Tensor, step: Step) -> Tensor:
        """The whole number nearest to `shift` by which zero points can move without leaving the code range."""
        zero = self.q_min - step.low
        return (zero + shift.round()).clamp_(self.q_min, self.q_max) - zero

    def params(self, step: Step, N: int, K: int) -> Params:
        """Scales [G, N] as they are stored, [N, G]."""
        zero = (self.q_min - step.low).T.contiguous().to(torch.int8) if isinstance(step.low, Tensor) else None
        return Params(scale_NG=step.scale.T.contiguous().to(self.scale_dtype), zero_NG=zero)

    def step(self, params: Params, dtype: torch.dtype = torch.float32) -> Step:
        """Scales in use, [G, N]."""
        scale = params.scale_NG.T.to(dtype).contiguous()
        if params.zero_NG is None:
            return Step(scale, float(self.q_min), float(self.q_max))
        zero = params.zero_NG.T.to(dtype).contiguous()
        return Step(scale, self.q_min - zero, self.q_max - zero)

    def rounder(self, params: Params, N: int, K: int, dtype: torch.dtype = torch.float32) -> Rounder:
        """Column-wise rounding with these scales."""
        return IntRounder(self, self.step(params, dtype), N, K)

    def encode(self, w_NK: Tensor, params: Params) -> Tensor:
        """Nearest codes, int8 [N, K]."""
        q_NK = torch.empty(w_NK.shape, dtype=torch.int8, device=w_NK.device)
        for rows, w, scale, zero in self._chunks(w_NK, params):
            units = (w.float() / scale).round_()
            units = units if zero is None else units.add_(zero)
            q_NK[rows] = units.clamp_(self.q_min, self.q_max).to(torch.int8)
        return q_NK

    def decode(self, q_NK: Tensor, params: Params) -> Tensor:
        """(q - z) * s, float32 [N, K]."""
        w_NK = torch.empty(q_NK.shape, dtype=torch.float32, device=q_NK.device)
        for rows, q, scale, zero in self._chunks(q_NK, params):
            units = q.float()
            w_NK[rows] = (units if zero is None else units.sub_(zero)).mul_(scale)
        return w_NK

    def _chunks(self, x_NK: Tensor, params: Params) -> Iterator[tuple[slice, Tensor, Tensor, Tensor | None]]:
        """Rows of a matrix with their scales and zero points spread over the columns."""
        K = x_NK.shape[1]
        size = min(self.group_size or K, K)
        for rows in row_slices(x_NK):
            scale = params.scale_NG[rows].float().repeat_interleave(size, 1)[:, :K]
            zero = None if params.zero_NG is None else params.zero_NG[rows].float().repeat_interleave(size, 1)[:, :K]
            yield rows, x_NK[rows], scale, zero


def searched_step(
    grid: Grid,
    w_NK: Tensor,
    importance: Tensor | None,
    mask_NK: Tensor | None,
    how: Search,
    curvature_KK: Tensor | None,
) -> Step:
    """The scales that a search finds for a grid whose outputs have scales of their own, [G, N]; see `IntGrid.fit`."""
    K = w_NK.shape[1]
    size = min(grid.group_size or K, K)
    weights = grouped_importance(importance, w_NK, size)
    curvature = None if curvature_KK is None else curvature_blocks(curvature_KK.float(), size)
    chunks = zip(row_chunks(w_NK, mask_NK), weights, strict=True)
    parts = [search_steps(grouped(rows.T, size), grid, how, weight, curvature) for rows, weight in chunks]
    return Step.join(parts, lambda chunks: torch.cat(chunks, 1))


class IntRounder(Rounder):
    """Snaps columns to integers times their scales."""

    def at_once(self, order: Sequence[int], mask_KN: Tensor | None) -> Columns | None:
        """As in `Rounder`."""
        return self._columns(order, mask_KN)


@dataclass(frozen=True, kw_only=True)
class Fp8Grid:
    """e4m3 floats (largest 448) with one scale per output, per 128x128 block or for the whole tensor.

    strategy: `channel`, `block` or `tensor`.
    scale_dtype: type that scales are stored in, and rounded to before use.
    """

    strategy: Literal["channel", "block", "tensor"] = "channel"
    scale_dtype: torch.dtype = torch.float32

    def __post_init__(self) -> None:
        if self.strategy not in ("channel", "block", "tensor"):
            raise BadInput(f"strategy must be channel, block or tensor, found {self.strategy!r}")
        check_wide(self.scale_dtype)

    @property
    def bits(self) -> int:
        """Bits of one stored value."""
        return 8

    @property
    def group_size(self) -> int | None:
        """Inputs that share a scale; None for all."""
        return BLOCK if self.strategy == "block" else None

    @property
    def shared_rows(self) -> int | None:
        """Outputs that share a scale; None for all."""
        return {"channel": 1, "block": BLOCK, "tensor": None}[self.strategy]

    def groups(self, K: int) -> int:
        """Groups along K."""
        return -(-K // (self.group_size or K))

    def fit(
        self,
        w_NK: Tensor,
        importance: Tensor | None = None,
        mask_NK: Tensor | None = None,
        search: Search | str = "minmax",
        curvature_KK: Tensor | None = None,
    ) -> Params:
        """Scales absmax / 448. A float grid gains nothing from a smaller range, so every `search` gives this one."""
        N, K = w_NK.shape
        tall = min(self.shared_rows or N, N)
        wide = min(self.group_size or K, K)
        kept = w_NK if mask_NK is None else w_NK * mask_NK
        peak = torch.nn.functional.max_pool2d(kept.abs().float()[None], (tall, wide), ceil_mode=True)[0]
        return Params(scale_NG=self.store(peak / E4M3_MAX).to(self.scale_dtype))

    def step_of_range(self, low: Tensor, high: Tensor) -> Step:
        """The scale that puts the larger end at 448."""
        return Step(self.store(torch.maximum(high, -low) / E4M3_MAX), -E4M3_MAX, E4M3_MAX)

    def neighbours(self, step: Step) -> list[Step]:
        """None: there is no zero point."""
        return []

    def store(self, scale: Tensor) -> Tensor:
        """Scales as stored; 0 becomes 1."""
        return rounded(scale, self.scale_dtype)

    def snap(self, w: Tensor, step: Step, out: Tensor | None = None) -> Tensor:
        """s * e4m3(w / s), saturating."""
        units = torch.div(w, step.scale, out=out).clamp_(-E4M3_MAX, E4M3_MAX)
        return units.copy_(units.to(torch.float8_e4m3fn)).mul_(step.scale)

    def params(self, step: Step, N: int, K: int) -> Params:
        """One row of scales for every run of outputs that share it."""
        rows = step.scale.T[:: self.shared_rows or N]
        return Params(scale_NG=rows.contiguous().to(self.scale_dtype))

    def rounder(self, params: Params, N: int, K: int, dtype: torch.dtype = torch.float32) -> Rounder:
        """Column-wise rounding with these scales."""
        scale = self._by_row(params, N).T.to(dtype).contiguous()
        return Rounder(self, Step(scale, -E4M3_MAX, E4M3_MAX), N, K)

    def encode(self, w_NK: Tensor, params: Params) -> Tensor:
        """Nearest e4m3 values, saturating, float8_e4m3fn [N, K]."""
        units = w_NK.float() / self._spread(params, *w_NK.shape)
        return units.clamp_(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)

    def decode(self, q_NK: Tensor, params: Params) -> Tensor:
        """f * s, float32 [N, K]."""
        return q_NK.float().mul_(self._spread(params, *q_NK.shape))

    def _by_row(self, params: Params, N: int) -> Tensor:
        return params.scale_NG.float().repeat_interleave(self.shared_rows or N, 0)[:N]

    def _spread(self, params: Params, N: int, K: int) -> Tensor:
        return self._by_row(params, N).repeat_interleave(self.group_size or K, 1)[:, :K]


E4M3_MAX = 448.0
BLOCK = 128
