"""Sparse outliers beside integers whose inputs are rounded to bytes, on Hopper: they meet inputs as they are.

    y_MN = x'_MK @ W_NK.T + x_MK @ S_NK.T        x' rounded, S sparse

The matmul has both inputs. Up to `FEW_TOKENS` tokens it adds outliers as the weight-only kernels do, but looks their inputs up
in a place of their own. For more, a sheet of outliers (`tile_outliers.cuh`) is not added to what codes decode to, but
multiplied apart, in 16 bits, with inputs that stand behind those of the codes in every stage. The codes themselves are
multiplied as bytes (`cuda_int8`), which takes hardly any decoding and half the time of the tensor cores; or, where that
would round the weight once more and few tokens ask for better, in 16 bits with rounded inputs.

Shape legend: M tokens, N out features, K in features, E outliers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from aerogel.errors import RunFailed
from aerogel.kernels import gpu_here
from aerogel.kernels.beside.ref import Beside
from aerogel.kernels.gemm import cuda_few, cuda_few_plan, cuda_wgmma, cuda_wgmma_plan, cuda_wgmma_table
from aerogel.kernels.gemm.cuda_outliers import TileOutliers
from aerogel.kernels.gemm.cuda_table import config_for
from aerogel.kernels.gemm.cuda_weight import TileWeight
from aerogel.kernels.problem import Problem
from aerogel.pack import tiles

NAMES = ("added_row_start", "added_by_row", "added_tiles", "added_by_sheet")
"""Under which the tensors of `TileOutliers` stand beside a layout's, in its order."""
FEW_TOKENS, MOST_WARPS = 8, 8
"""Tokens; and warps along K without a ring: with more, registers spill (4096 x 4096, 8 tokens: 12.6 us for 11.1)."""


def laid(beside: Beside, problem: Problem, place_K: Tensor | None = None) -> TileOutliers | None:
    """Outliers as the matmuls take them; None for what is not sparse outliers alone, on other devices than Hopper's, and what
    `TileOutliers.of` refuses. place_K: as there."""
    value_E = beside.value_E
    if value_E is None or beside.index_C is not None:
        return None
    if gpu_here.other_than_hopper(torch.cuda.get_device_capability(value_E.device)) is not None:
        return None
    return TileOutliers.of(beside, problem.N, problem.K, problem.dtype, place_K)


def named(outliers: TileOutliers) -> dict[str, Tensor]:
    """The tensors by `NAMES`."""
    return dict(zip(NAMES, outliers.tensors(), strict=True))


def among(tensors: Mapping[str, Tensor]) -> list[Tensor] | None:
    """What an operator is called with, among a layout's tensors."""
    return [tensors[name] for name in NAMES] if NAMES[0] in tensors else None


def fewest_tokens(exact: TileWeight) -> int:
    """From how many tokens on the kernel for many serves a weight whose outliers have inputs of their own."""
    return min(FEW_TOKENS, cuda_few.most_outlier_tokens(exact, (9, 0))) + 1


def whole(exact: TileWeight) -> TileWeight:
    """As the 16-bit matmul for many tokens takes it. Of sums that a row's scale waits for, outliers would be no part."""
    return replace(exact, group_size=exact.group_size or tiles.COLUMNS * exact.codes.shape[1])


Product = Callable[[Tensor, Tensor | None, Tensor, Tensor], None]
"""(x_MK rounded, bias_N or None, y_MN to be filled, x_MK as it was) on torch's current stream and device."""


def product(exact: TileWeight, M: int, dtype: torch.dtype) -> Product:
    """The matmul of 16 bits for M tokens of a weight whose outliers have inputs of their own."""
    if fewest_tokens(exact) > M:
        few = config_for(exact, M)
        if not few.ring:
            few = replace(few, k_warps=min(few.k_warps, MOST_WARPS))
        return cuda_few_plan.Plan(exact, few, M, dtype)
    weight = whole(exact)
    weight.check()
    facts = torch.cuda.get_device_properties(weight.codes.device)
    cuts = cuda_wgmma_table.cuts_for(weight, M, facts.name)
    config = cuts[0][1] if len(cuts) == 1 else cuda_wgmma.choose_config(weight, M, facts.multi_processor_count)
    if config is None:
        raise RunFailed("no cut of the weight fits the multiprocessor, though integers without tables leave room for one")
    return cuda_wgmma_plan.Plan(weight, config, M, dtype)
