"""Sparse outliers beside integers whose inputs are rounded to bytes, on Hopper: they meet inputs as they are.

    y_MN = x'_MK @ W_NK.T + x_MK @ S_NK.T        x' rounded, S sparse

Where 16 bits are multiplied, the matmul has both inputs. Up to `FEW_TOKENS` tokens it adds outliers as the weight-only
kernels do, but looks their inputs up in a place of their own. For more, a sheet of outliers (`tile_outliers.cuh`) is not
added to what codes decode to, but multiplied apart, with inputs that stand behind those of the codes in every stage: tensor
cores have the time while weights come. Where bytes are multiplied, outliers' sums are the first to be in y: `beside.cu` makes
them beside the rounding of x, and the matmul adds its product to what it finds there.

Shape legend: M tokens, N out features, K in features, E outliers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor

from aerogel.errors import RunFailed
from aerogel.kernels import gpu_here
from aerogel.kernels.beside import cuda as beside_cuda
from aerogel.kernels.beside.ref import Beside
from aerogel.kernels.gemm import cuda_few, cuda_few_plan, cuda_wgmma, cuda_wgmma_plan, cuda_wgmma_table
from aerogel.kernels.gemm.cuda_outliers import TileOutliers
from aerogel.kernels.gemm.cuda_table import config_for
from aerogel.kernels.gemm.cuda_weight import TileWeight
from aerogel.kernels.problem import Problem
from aerogel.pack import tiles

NAMES = ("added_start", "added_column", "added_value", "added_row_start", "added_by_row", "added_tiles", "added_by_sheet")
"""Under which the tensors of `Added` stand beside a layout's, in its order."""
FEW_TOKENS, MOST_WARPS = 8, 8
"""Tokens; and warps along K without a ring: with more, registers spill (4096 x 4096, 8 tokens: 12.6 us for 11.1)."""
SHEET_TOKENS = 128
"""Up to so many tokens sheets are multiplied in 16 bits, also where integers alone would be multiplied as bytes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Added:
    """Outliers as `Beside` has them, and once more as the matmuls of 16 bits take them."""

    beside: Beside
    laid: TileOutliers

    @classmethod
    def of(cls, beside: Beside, problem: Problem, place_K: Tensor | None = None) -> Self | None:
        """None for what is not sparse outliers alone, and where they are added behind the matmul. place_K: as
        `TileOutliers.of`."""
        start_N1, column_E, value_E = beside.start_N1, beside.column_E, beside.value_E
        if start_N1 is None or column_E is None or value_E is None or beside.index_C is not None:
            return None
        capability = torch.cuda.get_device_capability(value_E.device)
        if gpu_here.other_than_hopper(capability) or not beside_cuda.holds(problem.K, value_E.dtype, capability):
            return None
        laid = TileOutliers.of(beside, problem.N, problem.K, problem.dtype, place_K)
        if laid is None:
            return None
        column_E = column_E if place_K is None else place_K[column_E.long()].to(column_E.dtype)
        return cls(beside=Beside(start_N1, column_E, value_E), laid=laid)

    @classmethod
    def given(cls, tensors: list[Tensor] | None) -> Self | None:
        """From the list that an operator is called with; None for None."""
        laid = None if tensors is None else TileOutliers.given(tensors[3:])
        return None if tensors is None or laid is None else cls(beside=Beside(*tensors[:3]), laid=laid)

    @classmethod
    def among(cls, tensors: Mapping[str, Tensor]) -> list[Tensor] | None:
        """What `given` takes, among a layout's tensors."""
        return [tensors[name] for name in NAMES] if NAMES[0] in tensors else None

    def named(self) -> dict[str, Tensor]:
        """The tensors by `NAMES`."""
        stored = [tensor for tensor in self.beside.all() if tensor is not None]
        return dict(zip(NAMES, (*stored, *self.laid.tensors()), strict=True))

    def fill(self, y_MN: Tensor, x_MK: Tensor) -> None:
        """y = x S^T; see `beside.cuda.fill`."""
        beside_cuda.fill(y_MN, x_MK, self.beside)


Product = Callable[[Tensor, Tensor | None, Tensor, Tensor], None]
"""(x_MK rounded, bias_N or None, y_MN to be filled, x_MK as it was) on torch's current stream and device."""


def product(weight: TileWeight, added: Added, M: int, dtype: torch.dtype) -> Product:
    """The matmul of 16 bits for M tokens of a weight without what stands beside it."""
    exact = replace(weight, outliers=added.laid, exact=True)
    if min(FEW_TOKENS, cuda_few.most_outlier_tokens(exact, (9, 0))) >= M:
        few = config_for(exact, M)
        if not few.ring:
            few = replace(few, k_warps=min(few.k_warps, MOST_WARPS))
        return cuda_few_plan.Plan(exact, few, M, dtype)
    # Of sums that a row's scale waits for, outliers would be no part.
    whole = replace(exact, group_size=exact.group_size or tiles.COLUMNS * exact.codes.shape[1])
    whole.check()
    facts = torch.cuda.get_device_properties(weight.codes.device)
    cuts = cuda_wgmma_table.cuts_for(whole, M, facts.name)
    config = cuts[0][1] if len(cuts) == 1 else cuda_wgmma.choose_config(whole, M, facts.multi_processor_count)
    if config is None:
        raise RunFailed("no cut of the weight fits the multiprocessor, though integers without tables leave room for one")
    return cuda_wgmma_plan.Plan(whole, config, M, dtype)
