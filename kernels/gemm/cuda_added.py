"""Sparse outliers beside integers whose inputs are rounded to bytes, on Hopper: they meet inputs as they are.

    y_MN = x'_MK @ W_NK.T + x_MK @ S_NK.T        x' rounded, S sparse

Up to `EXACT_TOKENS` tokens the matmul adds them as the weight-only kernels do, but looks their inputs up in a place of their
own. For more, their sums are the first to be in y: `beside.cu` makes them beside the rounding of x, and the matmul adds its
product to what it finds there.

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
from aerogel.kernels.gemm import cuda, cuda_dense, cuda_few, cuda_few_plan
from aerogel.kernels.gemm.cuda_outliers import TileOutliers
from aerogel.kernels.gemm.cuda_table import config_for
from aerogel.kernels.gemm.cuda_weight import TileWeight
from aerogel.kernels.problem import Problem

NAMES = ("added_start", "added_column", "added_value", "added_row_start", "added_by_row")
"""Under which the tensors of `Added` stand beside a layout's, in its order."""
EXACT_TOKENS, MOST_WARPS = 8, 8
"""Tokens; and warps along K without a ring: with more, registers spill (4096 x 4096, 8 tokens: 12.6 us for 11.1)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Added:
    """Outliers as `Beside` has them, and once more by rows as `TileOutliers` has them."""

    beside: Beside
    row_start_N1: Tensor
    by_row_E: Tensor

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
        return cls(beside=Beside(start_N1, column_E, value_E), row_start_N1=laid.start_N1, by_row_E=laid.by_row_E)

    @classmethod
    def given(cls, tensors: list[Tensor] | None) -> Self | None:
        """From the list that an operator is called with; None for None."""
        if tensors is None:
            return None
        *stored, row_start_N1, by_row_E = tensors
        return cls(beside=Beside(*stored), row_start_N1=row_start_N1, by_row_E=by_row_E)

    @classmethod
    def among(cls, tensors: Mapping[str, Tensor]) -> list[Tensor] | None:
        """What `given` takes, among a layout's tensors."""
        return [tensors[name] for name in NAMES] if NAMES[0] in tensors else None

    def named(self) -> dict[str, Tensor]:
        """The tensors by `NAMES`."""
        start_N1, column_E, value_E = (tensor for tensor in self.beside.all()[:3] if tensor is not None)
        return dict(zip(NAMES, (start_N1, column_E, value_E, self.row_start_N1, self.by_row_E), strict=True))

    def fill(self, y_MN: Tensor, x_MK: Tensor) -> None:
        """y = x S^T; see `beside.cuda.fill`."""
        beside_cuda.fill(y_MN, x_MK, self.beside)


@dataclass(frozen=True, slots=True)
class Product:
    """The 16-bit matmul of rounded inputs with outliers. exact: the matmul adds them; else `Added.fill` goes before it."""

    plan: Callable[..., None]
    exact: bool

    def __call__(self, x_MK: Tensor, rounded_MK: Tensor, bias_N: Tensor | None, y_MN: Tensor) -> None:
        """x as it was, and rounded."""
        self.plan(rounded_MK, bias_N, y_MN, *((x_MK,) if self.exact else ()))


def product(weight: TileWeight, added: Added, M: int, dtype: torch.dtype) -> Product:
    """For M tokens of a weight without what stands beside it."""
    nowhere = added.row_start_N1[:0]  # sheets are for more tokens
    by_rows = TileOutliers(start_N1=added.row_start_N1, by_row_E=added.by_row_E, start_T1=nowhere, by_sheet_E=nowhere)
    exact = replace(weight, outliers=by_rows, exact=True)
    if min(EXACT_TOKENS, cuda_few.most_outlier_tokens(exact, (9, 0))) >= M:
        config = config_for(exact, M)
        if not config.ring:
            config = replace(config, k_warps=min(config.k_warps, MOST_WARPS))
        return Product(cuda_few_plan.Plan(exact, config, M, dtype), exact=True)
    adding = replace(weight, adds=True)
    found = cuda.choose(adding, M, dtype, (9, 0))
    if found is cuda_dense.Dense:
        raise RunFailed("no packed kernel takes the weight, though integers without tables fit all of Hopper's")
    return Product(found.plan(adding, M, dtype), exact=False)
