"""Sparse outliers as the CUDA kernels take them: by row for a few tokens, by tile for many. 4 bytes an outlier either way.

    by row     column k in the lower 16 bits, the value in the upper ones; in quads (`by_rows`)  `outliers.cuh`
    by unit    its place in the unit as the matrix instruction wants it, and the value            `tile_outliers.cuh`

A few tokens look their inputs up, which costs no more than the bytes; with many tokens an outlier is put where its code says
nothing, and multiplied with it. A unit is four row tiles, one below the other; a place counts bytes of its 64 x 128 numbers of
16 bits in fragments, step by step:

    place = 2048 * s + 512 * (row tile % 4) + 16 * (4 * g + t) + 4 * i + 2 * e           the letters as in `pack/tiles.py`

Shape legend: N out features, K in features, E outliers, C k tiles, T units of 64 rows x 128 columns, row by row.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor

from aerogel.errors import BadInput
from aerogel.kernels.beside.ref import Beside
from aerogel.pack import tiles

MOST_COLUMNS = (1 << 16) - tiles.COLUMNS
QUAD = 4
UNIT_ROWS = 4 * tiles.ROWS
UNIT_BYTES = 2 * UNIT_ROWS * tiles.COLUMNS
STEPS = tiles.COLUMNS // 16
HEAD = 4
"""Words in front of a list."""
PIECE = 4
"""Words of 16 bytes, which the copy engine takes: lists begin at multiples of so many."""
ROOM_STEP, MOST_ROOM = 32, 512
NAMES = ("tile_outlier_rows", "tile_outlier_by_row", "tile_outlier_units", "tile_outlier_by_unit")
"""Under which the tensors stand beside a layout's, in the order of `TileOutliers`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TileOutliers:
    """Outliers of one weight, on its device.

    start_H1: int32 [2 N + 1], at which quad the outliers of each row's two halves begin. by_row_E: int32 [4 * quads].
    start_T1: int32 [T + 1], where each unit's list begins. by_unit_E: int32, the lists: HEAD words that say how many outliers a
    unit has up to the end of each step, as 16-bit numbers; the outliers; and zeros up to a whole piece.
    room: words that hold nearly every list where outliers stand at random; in steps, so that few kernels are compiled.
    """

    start_H1: Tensor
    by_row_E: Tensor
    start_T1: Tensor
    by_unit_E: Tensor
    room: int

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
        unit_E = row_E // UNIT_ROWS * C + column_E // tiles.COLUMNS
        place_E = places(row_E % UNIT_ROWS, column_E % tiles.COLUMNS)
        by_unit = (unit_E * UNIT_BYTES + place_E).argsort()
        T = -(-N // UNIT_ROWS) * C
        lists = lists_of(unit_E[by_unit], (bits_E | place_E.int())[by_unit], heads(unit_E, place_E, T))
        return cls.given([*by_rows(row_E, column_E, bits_E | column_E.int(), N, K), *lists])

    @classmethod
    def among(cls, tensors: Mapping[str, Tensor]) -> Self | None:
        """The inverse of `named`, among a layout's tensors; None where there are none."""
        return cls.given([tensors[name] for name in NAMES]) if NAMES[0] in tensors else None

    @classmethod
    def given(cls, tensors: Sequence[Tensor] | None) -> Self | None:
        """From the list that an operator is called with; None for None."""
        if tensors is None:
            return None
        start_H1, by_row_E, start_T1, by_unit_E = tensors
        each = max(by_unit_E.numel() // max(start_T1.numel() - 1, 1) - HEAD - PIECE + 1, 0)
        room = min(-(-(each + 5 * math.isqrt(each) + 1) // ROOM_STEP) * ROOM_STEP, MOST_ROOM)
        return cls(start_H1=start_H1, by_row_E=by_row_E, start_T1=start_T1, by_unit_E=by_unit_E, room=room)

    def tensors(self) -> list[Tensor]:
        """What an operator is called with; `given` takes it back."""
        return [self.start_H1, self.by_row_E, self.start_T1, self.by_unit_E]

    def named(self) -> dict[str, Tensor]:
        """The tensors by `NAMES`."""
        return dict(zip(NAMES, self.tensors(), strict=True))

    def rows(self, start: int, stop: int, C: int) -> Self:
        """Those of rows start..stop as views; `start` is a multiple of UNIT_ROWS."""
        if start % UNIT_ROWS:
            raise BadInput(f"rows with outliers are cut at multiples of {UNIT_ROWS}, found {start}")
        first, last = start // UNIT_ROWS, -(-stop // UNIT_ROWS)
        return replace(
            self,
            start_H1=self.start_H1[2 * start : 2 * stop + 1],
            start_T1=self.start_T1[first * C : last * C + 1],
        )


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
    """Where in its unit a number is, in bytes."""
    lane = row % 8 * 4 + column % 8 // 2
    register = row // 8 % 2 + column // 8 % 2 * 2
    return column // 16 * 2048 + row // tiles.ROWS * 512 + lane * 16 + register * 4 + column % 2 * 2


def lists_of(unit_E: Tensor, word_E: Tensor, head_TH: Tensor) -> tuple[Tensor, Tensor]:
    """`TileOutliers.start_T1` and `by_unit_E` from words in the order of their units, and heads."""
    T, device = len(head_TH), unit_E.device
    length_T = torch.bincount(unit_E, minlength=T)
    start_T1 = torch.zeros(T + 1, dtype=torch.int64, device=device)
    start_T1[1:] = (HEAD + (length_T + PIECE - 1) // PIECE * PIECE).cumsum(0)
    inside_E = torch.arange(len(unit_E), device=device) - (length_T.cumsum(0) - length_T)[unit_E]
    filled = torch.zeros(len(unit_E) + (HEAD + PIECE - 1) * T, dtype=torch.int32, device=device)
    filled[start_T1[:-1, None] + torch.arange(HEAD, device=device)] = head_TH
    filled[start_T1[unit_E] + HEAD + inside_E] = word_E
    return start_T1.int(), filled


def heads(unit_E: Tensor, place_E: Tensor, T: int) -> Tensor:
    """How many outliers each unit has up to the end of each step, two in a word: int32 [T, HEAD]."""
    ends_TS = torch.bincount(unit_E * STEPS + place_E // (UNIT_BYTES // STEPS), minlength=T * STEPS).reshape(T, STEPS).cumsum(1)
    return ends_TS.to(torch.int16).view(torch.int32)


def by_rows(row_E: Tensor, column_E: Tensor, outlier_E: Tensor, N: int, K: int) -> tuple[Tensor, Tensor]:
    """`start_H1` and the outliers, which ascend by row and column, in quads: each row's in the first half of the k tiles,
    and in the second, filled up with 0 times the column behind the last k tile, where the kernels see zeros.

    Inputs of eight tokens lie four banks of shared memory apart, so those of the four rows that a warp reads at once are in
    different banks if their pairs of columns differ modulo 4. What is at place j of row n has n + j there, where there is such.
    """
    C, device = tiles.tile_counts(N, K)[1], row_E.device
    half_E = 2 * row_E + (column_E >= -(-C // 2) * tiles.COLUMNS)
    count_H = torch.bincount(half_E, minlength=2 * N)
    start_H1 = torch.zeros(2 * N + 1, dtype=torch.int64, device=device)
    start_H1[1:] = ((count_H + QUAD - 1) // QUAD).cumsum(0)
    bank_E = column_E // 2 % 4
    place_E = 4 * _ranks(4 * half_E + bank_E, 8 * N) + (bank_E - row_E) % 4
    kept_E = place_E < count_H[half_E]
    place_E = QUAD * start_H1[half_E] + place_E
    free = torch.zeros(QUAD * int(start_H1[-1]), dtype=torch.bool, device=device)
    free[QUAD * start_H1[half_E] + _ranks(half_E, 2 * N)] = True
    free[place_E[kept_E]] = False
    place_E[~kept_E] = free.nonzero()[:, 0]  # as many of each run, in the same order
    quads_E = torch.full((len(free),), C * tiles.COLUMNS, dtype=torch.int32, device=device)
    quads_E[place_E] = outlier_E
    return start_H1.int(), quads_E


def _ranks(which_E: Tensor, count: int) -> Tensor:
    """How many of the same come before each."""
    order, count_W = which_E.argsort(stable=True), torch.bincount(which_E, minlength=count)
    rank_E = torch.empty_like(which_E)
    rank_E[order] = torch.arange(len(which_E), device=which_E.device) - (count_W.cumsum(0) - count_W)[which_E[order]]
    return rank_E
