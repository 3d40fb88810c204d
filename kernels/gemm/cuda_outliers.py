"""Sparse outliers as the CUDA kernels take them: by row for a few tokens, by tile for many. 4 bytes an outlier either way.

    by row     column k in the lower 16 bits, the value in the upper ones; in quads (`by_rows`)  `outliers.cuh`
    by sheet   the value, and its place in the sheet as the matrix instruction wants it          `tile_outliers.cuh`

A few tokens look up or gather their inputs, which costs little more than the bytes; with many tokens an outlier is put where
its code says nothing, and multiplied with it. A sheet is 64 rows x 64 columns; a place counts bytes of its numbers of 16 bits
in fragments; `unit` is what sums of codes are multiplied with in the end, 1 but beside scales of a byte
(`block_scales.unit_of_sums`; a power of two for weights that were quantized here, else a value is rounded once more):

    word = value / unit | sheet % 8 << 16 | place << 19
    place = 2048 * (row tile % 4) + 512 * (s % 4) + 16 * (4 * g + t) + 4 * i + 2 * e      the letters as in `pack/tiles.py`

Shape legend: N out features, K in features, E outliers, C k tiles, T pairs of sheets (64 rows x 128 columns), row by row,
S sheets, F of them with few outliers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor

from aerogel.errors import BadInput
from aerogel.kernels.beside.ref import Beside
from aerogel.kernels.gemm import cuda_apart, cuda_patches
from aerogel.pack import tiles

MOST_COLUMNS = (1 << 16) - tiles.COLUMNS
QUAD = 4
SHEET_ROWS = SHEET_COLUMNS = 64
SHEET_BYTES = 2 * SHEET_ROWS * SHEET_COLUMNS
LINE, MOST_LINES = 64, 16
"""Words that are copied at once, and how many times that ahead. Those of two lines are looked at beyond the last sheet's."""
SHEET_NUMBERS, LEAST = 8, 10
"""Words know their sheets modulo so many, and every sheet has so many: of 64 in a row none is taken for another's."""
NAMES = ("tile_outlier_rows", "tile_outlier_by_row", "tile_outlier_tiles", "tile_outlier_by_sheet")
PATCH_NAMES = ("tile_outlier_patches", "tile_outlier_by_patch")
APART_NAMES = ("tile_outlier_groups", "tile_outlier_units", "tile_outlier_group_rows")
"""Under which the tensors stand beside a layout's, in the order of `TileOutliers`, and those of its `Patches` and `Apart`."""


@dataclass(frozen=True, slots=True)
class Apart:
    """Outliers as blocks of their own take them. start_G1, unit_U, row_G: see `cuda_apart.units`."""

    start_G1: Tensor
    unit_U: Tensor
    row_G: Tensor


@dataclass(frozen=True, slots=True)
class Patches:
    """Outliers as they are added while inputs come. start_P1, word_U: see `cuda_patches.patches`."""

    start_P1: Tensor
    word_U: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class TileOutliers:
    """Outliers of one weight, on its device.

    start_N1: int32 [N + 1], at which quad the outliers of each row begin. by_row_E: int32 [4 * quads].
    start_T1: int32 [T + 1], which word is each pair's first. by_sheet_E: int32, the words sheet by sheet, and two
    lines more. patches, apart: None where no cut takes them.
    """

    start_N1: Tensor
    by_row_E: Tensor
    start_T1: Tensor
    by_sheet_E: Tensor
    patches: Patches | None = None
    apart: Apart | None = None

    @classmethod
    def of(
        cls,
        beside: Beside,
        N: int,
        K: int,
        dtype: torch.dtype,
        place_K: Tensor | None = None,
        unit: Tensor | None = None,
        apart: bool = False,
        patches: bool = False,
    ) -> Self | None:
        """What stands beside a weight, kept columns among the outliers: they are as many bytes as in that form. None where a
        column does not fit 16 bits or a value not `dtype`, the activations' type, to which values are rounded.

        N, K: of the weight that the kernels see. place_K: which of its columns each input is; None for its own. unit: what sums
        of codes are multiplied with in the end, float32 scalar; None for 1.
        apart, patches: once more for blocks of their own, and for adding them as inputs come.
        """
        row_E, column_E, value_E = entries(beside)
        column_E = column_E if place_K is None else place_K[column_E]
        key_E, which_E = torch.unique(row_E * K + column_E, return_inverse=True)
        exact_E = torch.zeros(len(key_E), device=key_E.device).index_add_(0, which_E, value_E)
        value_E, among_codes_E = exact_E.to(dtype), (exact_E if unit is None else exact_E / unit).to(dtype)
        if K > MOST_COLUMNS or not bool((value_E.isfinite() & among_codes_E.isfinite()).all()):
            return None
        row_E, column_E = key_E // K, key_E % K
        quads = by_rows(row_E, column_E, value_E.view(torch.int16).int() << 16 | column_E.int(), N, K)
        sheets = by_sheets(row_E, column_E, among_codes_E.view(torch.int16).int(), N, K)
        bits_E = value_E.view(torch.int16)
        patched = cuda_patches.patches(row_E, column_E, bits_E, N, K) if patches and K <= cuda_patches.MOST_COLUMNS else ()
        more = cuda_apart.units(row_E, column_E, bits_E, N, K) if apart else ()
        return cls.given([*quads, *sheets, *patched, *more])

    @classmethod
    def among(cls, tensors: Mapping[str, Tensor]) -> Self | None:
        """The inverse of `named`, among a layout's tensors; None where there are none."""
        return cls.given(cls.listed(tensors))

    @classmethod
    def given(cls, tensors: Sequence[Tensor] | None) -> Self | None:
        """From the list that an operator is called with; None for None."""
        if tensors is None:
            return None
        start_N1, by_row_E, start_T1, by_sheet_E, *more = tensors
        patches = Patches(*more[:2]) if len(more) in (2, 5) else None
        apart = Apart(*more[-3:]) if len(more) in (3, 5) else None
        return cls(start_N1=start_N1, by_row_E=by_row_E, start_T1=start_T1, by_sheet_E=by_sheet_E, patches=patches, apart=apart)

    @classmethod
    def listed(cls, tensors: Mapping[str, Tensor]) -> list[Tensor] | None:
        """What an operator is called with, among a layout's tensors; None where there are none."""
        return [tensors[name] for name in (*NAMES, *PATCH_NAMES, *APART_NAMES) if name in tensors] or None

    def tensors(self) -> list[Tensor]:
        """What an operator is called with; `given` takes it back."""
        patches = () if self.patches is None else (self.patches.start_P1, self.patches.word_U)
        apart = () if self.apart is None else (self.apart.start_G1, self.apart.unit_U, self.apart.row_G)
        return [self.start_N1, self.by_row_E, self.start_T1, self.by_sheet_E, *patches, *apart]

    def named(self) -> dict[str, Tensor]:
        """The tensors by `NAMES`, `PATCH_NAMES` and `APART_NAMES`."""
        names = (*NAMES, *(() if self.patches is None else PATCH_NAMES), *(() if self.apart is None else APART_NAMES))
        return dict(zip(names, self.tensors(), strict=True))

    def rows(self, start: int, stop: int, C: int) -> Self:
        """Those of rows start..stop as views; `start` is a multiple of SHEET_ROWS."""
        if start % SHEET_ROWS:
            raise BadInput(f"rows with outliers are cut at multiples of {SHEET_ROWS}, found {start}")
        first, last = start // SHEET_ROWS, -(-stop // SHEET_ROWS)
        return replace(
            self,
            patches=None,
            apart=None,
            start_N1=self.start_N1[start : stop + 1],
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
    """Where in its sheet a number is, in bytes."""
    lane = row % 8 * 4 + column % 8 // 2
    register = row // 8 % 2 + column // 8 % 2 * 2
    return row // tiles.ROWS % 4 * 2048 + column // 16 % 4 * 512 + lane * 16 + register * 4 + column % 2 * 2


def by_sheets(row_E: Tensor, column_E: Tensor, bits_E: Tensor, N: int, K: int) -> tuple[Tensor, Tensor]:
    """`start_T1` and the words, which ascend by sheet and place; sheets of fewer than LEAST get zeros where no outlier is."""
    C = tiles.tile_counts(N, K)[1]
    S = 2 * -(-N // SHEET_ROWS) * C
    sheet_E, place_E = row_E // SHEET_ROWS * 2 * C + column_E // SHEET_COLUMNS, places(row_E, column_E)
    few_F, free_FP = free_places(sheet_E, place_E, S)
    added = (torch.arange(LEAST, device=row_E.device) < LEAST - torch.bincount(sheet_E, minlength=S)[few_F, None]).nonzero()
    sheet_E, place_E = torch.cat([sheet_E, few_F[added[:, 0]]]), torch.cat([place_E, free_FP[added[:, 0], added[:, 1]]])
    bits_E = torch.cat([bits_E, bits_E.new_zeros(len(added))])
    word_E = bits_E & 0xFFFF | (place_E << 3 | sheet_E % SHEET_NUMBERS).int() << 16
    start_T1 = torch.zeros(S // 2 + 1, dtype=torch.int64, device=row_E.device)
    start_T1[1:] = torch.bincount(sheet_E // 2, minlength=S // 2).cumsum(0)
    beyond = word_E.new_full((2 * LINE,), S % SHEET_NUMBERS << 16)
    return start_T1.int(), torch.cat([word_E[(sheet_E * SHEET_BYTES + place_E).argsort()], beyond])


def free_places(sheet_E: Tensor, place_E: Tensor, S: int) -> tuple[Tensor, Tensor]:
    """Sheets with fewer than LEAST outliers, and LEAST places in each where none is, int64 [F, LEAST]."""
    few_F = (torch.bincount(sheet_E, minlength=S) < LEAST).nonzero()[:, 0]
    which_S = torch.full((S,), -1, device=sheet_E.device)
    which_S[few_F] = torch.arange(len(few_F), device=sheet_E.device)
    near_E = (which_S[sheet_E] >= 0) & (place_E < 4 * LEAST)
    taken = torch.zeros(len(few_F), 2 * LEAST, dtype=torch.int8, device=sheet_E.device)
    taken[which_S[sheet_E[near_E]], place_E[near_E] // 2] = 1
    return few_F, 2 * taken.argsort(stable=True, dim=1)[:, :LEAST]


def by_rows(row_E: Tensor, column_E: Tensor, outlier_E: Tensor, N: int, K: int) -> tuple[Tensor, Tensor]:
    """`start_N1` and the outliers, of ascending rows, in quads: each row filled up with 0 times the column behind the last
    k tile, where the kernels see zeros.

    Pairs of columns lie in four kinds of banks. Four places of two quads are looked up together, the even ones or the odd ones
    of both; a row's outliers are dealt to these fours kind by kind, so that a four has few of one kind. Each pair of quads
    begins with another of its places, since the first places of all quads are looked up together as well.
    """
    device = row_E.device
    order_E = (row_E * 4 + column_E // 2 % 4).sort(stable=True).indices
    row_E, outlier_E = row_E[order_E], outlier_E[order_E]
    count_N = torch.bincount(row_E, minlength=N)
    quads_N = (count_N + QUAD - 1) // QUAD
    start_N1 = torch.zeros(N + 1, dtype=torch.int64, device=device)
    start_N1[1:] = quads_N.cumsum(0)
    inside_E = torch.arange(len(row_E), device=device) - (count_N.cumsum(0) - count_N)[row_E]
    four_E, turn_E = inside_E % quads_N[row_E], inside_E // quads_N[row_E]
    pair_E, alone_E = four_E // 2, four_E == quads_N[row_E] - quads_N[row_E] % 2
    turn_E = (turn_E + pair_E) % QUAD
    paired_E = 2 * QUAD * pair_E + turn_E // 2 * QUAD + turn_E % 2 * 2 + four_E % 2
    place_E = torch.where(alone_E, QUAD * four_E + turn_E, paired_E)
    nothing = tiles.tile_counts(N, K)[1] * tiles.COLUMNS
    quads_E = torch.full((QUAD * int(start_N1[-1]),), nothing, dtype=torch.int32, device=device)
    quads_E[QUAD * start_N1[row_E] + place_E] = outlier_E
    return start_N1.int(), quads_E
