"""Sparse outliers as the CUDA kernels take them: by row for a few tokens, by tile for many. 4 bytes an outlier either way.

    by row     column k in the lower 16 bits, the value in the upper ones; ascending columns      `outliers.cuh`
    by tile    its place in the tile as the matrix instruction wants it, and the value            `tile_outliers.cuh`

A few tokens look their inputs up, which costs no more than the bytes; with many tokens an outlier is put into the tile where
its code says nothing, and multiplied with it. The place counts bytes of a tile of 16 x 128 numbers of 16 bits in fragments:

    place = 512 * s + 16 * (4 * g + t) + 4 * i + 2 * e           the letters as in `pack/tiles.py`

Shape legend: N out features, K in features, E outliers, R row tiles, C k tiles.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from aerogel.kernels.beside.ref import Beside
from aerogel.pack import tiles

MOST_COLUMNS = 1 << 16
TILE_BYTES = 2 * tiles.ROWS * tiles.COLUMNS
NAMES = ("tile_outlier_rows", "tile_outlier_by_row", "tile_outlier_tiles", "tile_outlier_by_tile")
"""Under which the tensors stand beside a layout's, in the order of `TileOutliers`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TileOutliers:
    """Outliers of one weight, on its device.

    start_N1: int32 [N + 1], where the outliers of each row begin. by_row_E: int32 [E].
    start_T1: int32 [R * C + 1], the same for tiles. by_tile_E: int32 [E].
    """

    start_N1: Tensor
    by_row_E: Tensor
    start_T1: Tensor
    by_tile_E: Tensor

    @classmethod
    def of(cls, beside: Beside, N: int, K: int, dtype: torch.dtype, place_K: Tensor | None = None) -> Self | None:
        """What stands beside a weight, kept columns among the outliers: they are as many bytes as in that form. None where a
        column does not fit 16 bits or a value not `dtype`, the activations' type, to which values are rounded.

        N, K: of the weight that the kernels see. place_K: which of its columns each input is; None for its own.
        """
        row_E, column_E, value_E = entries(beside)
        column_E = column_E if place_K is None else place_K[column_E]
        key_E, which_E = torch.unique(row_E * K + column_E, return_inverse=True)
        value_E = torch.zeros(len(key_E), device=key_E.device).index_add_(0, which_E, value_E).to(dtype)
        if K > MOST_COLUMNS or not bool(torch.isfinite(value_E).all()):
            return None
        row_E, column_E = key_E // K, key_E % K
        bits_E, C = value_E.view(torch.int16).int() << 16, tiles.tile_counts(N, K)[1]
        tile_E = row_E // tiles.ROWS * C + column_E // tiles.COLUMNS
        place_E = places(row_E % tiles.ROWS, column_E % tiles.COLUMNS)
        by_tile = (tile_E * TILE_BYTES + place_E).argsort()
        return cls(
            start_N1=_starts(row_E, N),
            by_row_E=bits_E | column_E.int(),
            start_T1=_starts(tile_E, -(-N // tiles.ROWS) * C),
            by_tile_E=(bits_E | place_E.int())[by_tile],
        )

    @classmethod
    def among(cls, tensors: Mapping[str, Tensor]) -> Self | None:
        """The inverse of `named`, among a layout's tensors; None where there are none."""
        return cls.given([tensors[name] for name in NAMES]) if NAMES[0] in tensors else None

    @classmethod
    def given(cls, tensors: Sequence[Tensor] | None) -> Self | None:
        """From the list that an operator is called with; None for None."""
        return None if tensors is None else cls(**dict(zip(cls.__slots__, tensors, strict=True)))

    def tensors(self) -> list[Tensor]:
        """What an operator is called with; `given` takes it back."""
        return [getattr(self, field) for field in self.__slots__]

    def named(self) -> dict[str, Tensor]:
        """The tensors by `NAMES`."""
        return dict(zip(NAMES, self.tensors(), strict=True))

    def rows(self, start: int, stop: int, C: int) -> Self:
        """Those of rows start..stop as views; `start` is a multiple of 16."""
        first, last = start // tiles.ROWS, -(-stop // tiles.ROWS)
        return type(self)(
            start_N1=self.start_N1[start : stop + 1],
            by_row_E=self.by_row_E,
            start_T1=self.start_T1[first * C : last * C + 1],
            by_tile_E=self.by_tile_E,
        )

    @property
    def each(self) -> int:
        """Outliers of a tile, on average, rounded up."""
        return -(-self.by_tile_E.numel() // max(self.start_T1.numel() - 1, 1))


def entries(beside: Beside) -> tuple[Tensor, Tensor, Tensor]:
    """Row, column (int64) and value (float32) of every weight that stands there, whatever kind it is."""
    parts = []
    if beside.start_N1 is not None and beside.column_E is not None and beside.value_E is not None:
        count_N = beside.start_N1.long().diff()
        row_E = torch.arange(len(count_N), device=count_N.device).repeat_interleave(count_N)
        parts.append((row_E, beside.column_E.long(), beside.value_E.float()))
    if beside.index_C is not None and beside.kept_NC is not None:
        N, C = beside.kept_NC.shape
        row_E = torch.arange(N, device=beside.kept_NC.device).repeat_interleave(C)
        parts.append((row_E, beside.index_C.long().repeat(N), beside.kept_NC.float().flatten()))
    row_E, column_E, value_E = (torch.cat(part) for part in zip(*parts, strict=True))
    return row_E, column_E, value_E


def places(row: Tensor, column: Tensor) -> Tensor:
    """Where in its tile a number is, in bytes."""
    lane = row % 8 * 4 + column % 8 // 2
    register = row // 8 + column // 8 % 2 * 2
    return column // 16 * 512 + lane * 16 + register * 4 + column % 2 * 2


def _starts(which_E: Tensor, count: int) -> Tensor:
    start = torch.zeros(count + 1, dtype=torch.int32, device=which_E.device)
    start[1:] = torch.bincount(which_E, minlength=count).cumsum(0)
    return start
