"""Quantized weights as data: codes, and the few numbers that turn codes into weights.

    integers    W = (q - z) * s                          q, z int8
    floats      W = f * s                                f float8_e4m3fn
    tables      W = table[t][u] * (s * factor)           u uint8 in [0, 2^bits)
    planes      W = o + sum of a_i * (+-1)               u uint8, bits of the signs (`planes`)

What is neither an integer, a plain float8 nor a sum of planes is a table: 2^bits numbers that a code points into. Which of
the T tables holds for a weight is said by `pick` (one per group), or follows from T: one for all, or one per output. Scales are
of any type in `scales.TYPES`; `factor` is one float32 for the whole weight, for formats with two levels of scales.
The arithmetic is float32 in exactly the order written: first s * factor, then the product with the table's number.
Solvers, files and kernels share it, so that they agree bit for bit.

Shape legend: N out features, K in features, G groups along K, T tables of E = 2^bits numbers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from aerogel.errors import BadInput
from aerogel.quantize.ranges import Search, Step
from aerogel.quantize.rounder import Rounder
from aerogel.quantize.scales import scale_values

CHUNK = 1 << 17
"""Elements of a chunk: two float32 work buffers of this size stay in the L2 cache of a current core."""
GPU_CHUNK = 1 << 22
"""The same on a GPU, where a chunk costs a hundred launches whatever its size."""


@dataclass(frozen=True, kw_only=True)
class Params:
    """What turns the codes of one weight into numbers.

    scale_NG: [N, G] in a type of `scales.TYPES`. A grid that shares a scale among outputs stores fewer rows: [ceil(N / 128),
        G] per block, [1, 1] per tensor. Planes have one each, [N, G, planes].
    zero_NG: int8 [N, G], None when symmetric or a table; the offsets of planes, in a float type.
    table_TE: float32 [T, E], None for integers and plain floats. T is 1 (for all), or N (one per output), or any number up
        to 256 with `pick_NG`.
    pick_NG: uint8, shaped like the scales: the table of each group. None unless tables are chosen per group.
    factor: float32 scalar that multiplies every scale, None for 1.
    """

    scale_NG: Tensor
    zero_NG: Tensor | None = None
    table_TE: Tensor | None = None
    pick_NG: Tensor | None = None
    factor: Tensor | None = None

    @property
    def table_per_row(self) -> bool:
        """Whether every output has a table of its own."""
        return self.table_TE is not None and self.pick_NG is None and len(self.table_TE) > 1

    def effective_scale(self) -> Tensor:
        """The scales as float32 numbers, `factor` included, shaped like `scale_NG`."""
        scale = scale_values(self.scale_NG)
        return scale if self.factor is None else scale * self.factor.to(scale.device)


class Grid(Protocol):
    """What solvers and formats may ask of any number grid."""

    @property
    def bits(self) -> int:
        """Bits of one code."""

    @property
    def group_size(self) -> int | None:
        """Inputs that share a scale, None for all of them."""

    @property
    def scale_dtype(self) -> torch.dtype:
        """The type that scales are rounded to before use."""

    @property
    def shared_rows(self) -> int | None:
        """Outputs that share a scale, None for all of them."""

    def groups(self, K: int) -> int:
        """How many groups K inputs make; the last may be short."""

    def fit(
        self,
        w_NK: Tensor,
        importance: Tensor | None = None,
        mask_NK: Tensor | None = None,
        search: Search | str = "minmax",
        curvature_KK: Tensor | None = None,
    ) -> Params:
        """Scales for a weight."""

    def encode(self, w_NK: Tensor, params: Params) -> Tensor:
        """Nearest codes."""

    def decode(self, q_NK: Tensor, params: Params) -> Tensor:
        """The weight that codes stand for, float32 [N, K]."""

    def step_of_range(self, low: Tensor, high: Tensor) -> Step:
        """Scales whose grid spans [low, high], rounded as they are stored."""

    def neighbours(self, step: Step) -> list[Step]:
        """Other scales near these that a search should try, none where the scale itself is all there is to vary."""

    def store(self, scale: Tensor) -> Tensor:
        """Scales rounded to what can be stored, as float of the same dtype, never 0."""

    def snap(self, w: Tensor, step: Step, out: Tensor | None = None) -> Tensor:
        """The nearest values of the grid. `step` broadcasts over `w`; `out` may be `w` itself."""

    def rounder(self, params: Params, N: int, K: int, dtype: torch.dtype = torch.float32) -> Rounder:
        """The column-wise view of the grid that sweeping solvers work with."""

    def params(self, step: Step, N: int, K: int) -> Params:
        """What is stored for scales [G, N] in use; the inverse of the step that `rounder` begins with."""


@dataclass(frozen=True, kw_only=True)
class Codes(Params):
    """A quantized weight: values [N, K] (int8, float8_e4m3fn, or uint8 into a table) with their params and grid."""

    values_NK: Tensor
    grid: Grid

    @staticmethod
    def of(values_NK: Tensor, params: Params, grid: Grid) -> Codes:
        """Values with their params."""
        return Codes(
            values_NK=values_NK,
            scale_NG=params.scale_NG,
            zero_NG=params.zero_NG,
            table_TE=params.table_TE,
            pick_NG=params.pick_NG,
            factor=params.factor,
            grid=grid,
        )

    def decode(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight, [N, K]: the formula at the head of this file in float32, rounded once to `dtype`."""
        return self.grid.decode(self.values_NK, self).to(dtype)

    def rows(self, rows: slice) -> Codes:
        """The codes of some outputs; where outputs share scales, `rows` must begin at a shared run."""
        return Codes.of(self.values_NK[rows], rows_of(self.grid, self, rows), self.grid)

    def to(self, device: torch.device | str) -> Codes:
        """All tensors on another device."""
        moved: dict[str, Any] = {name: tensor.to(device) for name, tensor in vars(self).items() if isinstance(tensor, Tensor)}
        return replace(self, **moved)


def quantized(grid: Grid, w_NK: Tensor, params: Params) -> Codes:
    """The nearest codes of a weight under given params."""
    return Codes.of(grid.encode(w_NK, params), params, grid)


def rows_of(grid: Grid, params: Params, rows: slice) -> Params:
    """The params of some outputs; where outputs share scales, `rows` must begin at a shared run."""
    shared = grid.shared_rows
    part = slice(None) if shared is None else slice(rows.start // shared, -(-rows.stop // shared))
    return Params(
        scale_NG=params.scale_NG[part],
        zero_NG=None if params.zero_NG is None else params.zero_NG[part],
        table_TE=params.table_TE[rows] if params.table_per_row and params.table_TE is not None else params.table_TE,
        pick_NG=None if params.pick_NG is None else params.pick_NG[part],
        factor=params.factor,
    )


def stacked(parts: Sequence[Params]) -> Params | None:
    """The params of several weights on one grid, one below the other; None where they cannot be one weight's.

    Each output must have its own scales. One table for all must be the same in all parts, and so must the factor.
    """
    first = parts[0]
    per_row = any(part.table_per_row for part in parts)
    tables = [part.table_TE for part in parts if part.table_TE is not None]
    factors = [part.factor for part in parts if part.factor is not None]
    # By their bits: a table may hold NaN for codes that are not used.
    if not per_row and any(not torch.equal(table.view(torch.int32), tables[0].view(torch.int32)) for table in tables):
        return None
    if any(not torch.equal(factor, factors[0]) for factor in factors) or len(factors) not in (0, len(parts)):
        return None

    def joined(found: list[Tensor | None]) -> Tensor | None:
        held = [tensor for tensor in found if tensor is not None]
        return torch.cat(held) if held else None

    return Params(
        scale_NG=torch.cat([part.scale_NG for part in parts]),
        zero_NG=joined([part.zero_NG for part in parts]),
        table_TE=torch.cat(tables) if per_row else first.table_TE,
        pick_NG=joined([part.pick_NG for part in parts]),
        factor=first.factor,
    )


def row_slices(w_NK: Tensor) -> Iterator[slice]:
    """Runs of rows of about `CHUNK` elements, on a GPU `GPU_CHUNK`."""
    N, K = w_NK.shape
    rows = max(16, (CHUNK if w_NK.device.type == "cpu" else GPU_CHUNK) // max(K, 1))
    return (slice(start, min(N, start + rows)) for start in range(0, N, rows))


def no_zeros(numbers: str) -> BadInput:
    """What a format says whose numbers do not include 0 when single weights are to be 0. Such a grid has `without_zero`, the
    name of its numbers, so that a recipe can be refused before it runs."""
    return BadInput(
        f"{numbers} cannot hold single weights at zero, as pruning, outliers and columns want; write another format, or"
        " leave those out"
    )


def refuse_zeros(mask_NK: Tensor | None, numbers: str) -> None:
    """Raises `no_zeros` for a mask with zeros in it."""
    if mask_NK is not None and not bool(mask_NK.all()):
        raise no_zeros(numbers)


def row_chunks(w_NK: Tensor, mask_NK: Tensor | None) -> Iterator[Tensor]:
    """Rows as float32, zero where pruned."""
    for rows in row_slices(w_NK):
        yield w_NK[rows].float() if mask_NK is None else w_NK[rows].float() * mask_NK[rows]


def grouped_importance(importance: Tensor | None, w_NK: Tensor, size: int) -> Iterator[Tensor | None]:
    """Importances for each of `row_slices`: [G, size, 1] of inputs [K] for all, [G, size, n] of weights [N, K], or None."""
    if importance is not None and importance.dim() == 2:
        yield from (grouped(importance[rows].float().T, size) for rows in row_slices(w_NK))
        return
    shared = None if importance is None else grouped(importance.float()[:, None], size)
    yield from (shared for _ in row_slices(w_NK))


def grouped(x_Kn: Tensor, size: int) -> Tensor:
    """[K, n] as contiguous [G, size, n]; a short last group is padded with zeros."""
    K = x_Kn.shape[0]
    pad = -K % size
    return torch.nn.functional.pad(x_Kn, (0, 0, 0, pad)).reshape(-1, size, x_Kn.shape[1]).contiguous()


def check_group_size(group_size: int | None) -> None:
    """Raises `BadInput` for a group size below 1."""
    if group_size is not None and group_size < 1:
        raise BadInput(f"group_size must be positive, or null for one scale per output, found {group_size}")
