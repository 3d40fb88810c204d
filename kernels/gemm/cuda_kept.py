"""Columns kept beside integers whose inputs are rounded to bytes (LLM.int8()), as the CUDA kernels take them.

    y_MN = x8 @ w8.T * scales + x_MC @ kept_NC.T

The kernel that rounds x leaves the kept columns out of a token's scale, gives them the code 0 and writes their inputs side by
side. The matmul adds their product at its end, 16 columns a step (`few_kept.cuh`, `kept_columns.cuh`). More than 16 tokens on
other GPUs than Hopper's meet them otherwise: they stay as they are in the rounded x, and their weights are added as outliers
are.

Shape legend: M tokens, N out features, K in features, C kept columns, R row tiles.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from aerogel.kernels.beside.ref import Beside
from aerogel.kernels.gemm.cuda_outliers import NAMES as OUTLIERS
from aerogel.kernels.gemm.cuda_outliers import TileOutliers
from aerogel.pack import tiles

KEPT = ("kept_index", "kept_mask", "kept_fragments", *OUTLIERS)
"""Under which the tensors of a `KeptOperand` stand beside a layout's, in its order."""


@dataclass(frozen=True, slots=True, kw_only=True)
class KeptColumns:
    """Which columns are kept. index_C: int32 [C]. mask: int16, a bit for each column of `Quantizer.columns`."""

    index_C: Tensor
    mask: Tensor

    @classmethod
    def of(cls, index_C: Tensor, columns: int) -> Self:
        """From the columns kept among so many."""
        bits = torch.zeros(columns, dtype=torch.int32, device=index_C.device)
        bits[index_C.long()] = 1
        powers = 1 << torch.arange(16, dtype=torch.int32, device=index_C.device)
        return cls(index_C=index_C.int(), mask=(bits.reshape(-1, 16) * powers).sum(1).to(torch.int32).to(torch.int16))

    @property
    def columns(self) -> int:
        """Of what they are: whole steps of 16."""
        return -(-len(self.index_C) // 16) * 16


@dataclass(frozen=True, slots=True, kw_only=True)
class KeptOperand:
    """Columns kept beside the codes, whose codes are 0.

    columns: which. fragments: their weights, [R, steps of 16 columns, 32 lanes, 8] in the activations' type. outliers: the
    same for numbers of tokens where they are added as such.
    """

    columns: KeptColumns
    fragments: Tensor
    outliers: TileOutliers

    @classmethod
    def of(cls, beside: Beside, N: int, K: int, dtype: torch.dtype, place_K: Tensor | None = None) -> Self | None:
        """Of a weight [N, K]; None where there are outliers too, which want their inputs as they are, or no columns. Arguments
        as `TileOutliers.of`."""
        if beside.start_N1 is not None or beside.index_C is None or beside.kept_NC is None or 0 in beside.kept_NC.shape:
            return None
        outliers = TileOutliers.of(beside, N, K, dtype, place_K)
        index_C = beside.index_C if place_K is None else place_K[beside.index_C.long()]
        columns = KeptColumns.of(index_C, tiles.COLUMNS * tiles.tile_counts(N, K)[1])
        if outliers is None:
            return None
        return cls(columns=columns, fragments=fragments_of(beside.kept_NC.to(dtype)), outliers=outliers)

    def tensors(self) -> list[Tensor]:
        """In the order of `KEPT`."""
        return [self.columns.index_C, self.columns.mask, self.fragments, *self.outliers.tensors()]

    @classmethod
    def given(cls, tensors: list[Tensor] | None) -> Self | None:
        """The inverse of `tensors`; None for None."""
        if tensors is None:
            return None
        index_C, mask, fragments, *outliers = tensors
        columns, found = KeptColumns(index_C=index_C, mask=mask), TileOutliers.given(outliers)
        return None if found is None else cls(columns=columns, fragments=fragments, outliers=found)


def fragments_of(kept_NC: Tensor) -> Tensor:
    """Weights [N, C] of 16 bits as the left factors of matrix instructions: [R, ceil(C / 16), 32, 8]; zeros beyond N and C."""
    N, C = kept_NC.shape
    padded = torch.nn.functional.pad(kept_NC, (0, -C % 16, 0, -N % 16))
    axes = padded.reshape(-(-N // 16), 2, 8, -(-C // 16), 2, 4, 2)  # row tile, i0, g, step, i1, t, e
    return axes.permute(0, 3, 2, 5, 4, 1, 6).reshape(-(-N // 16), -(-C // 16), 32, 8).contiguous()
