"""Whether and how a sweep's columns are decided by one launch per run; see `triton_columns`.

Shape legend: N out features, K in features, G groups along K, E numbers of a table.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from aerogel.kernels import triton_here
from aerogel.kernels.rounding import triton_columns
from aerogel.kernels.rounding.triton_columns import INTEGERS, ONE_TABLE, ROWS, TABLE_PER_GROUP, TABLE_PER_ROW
from aerogel.quantize.levels import Levels
from aerogel.quantize.ranges import Step


def missing(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why columns cannot be decided by one launch there, or None."""
    if device.type != "cuda":
        return "the launch is written for GPUs"
    return "only float32 is written" if dtype is not torch.float32 else triton_here.missing()


@dataclass(frozen=True)
class Columns:
    """Decides a run of columns; called as `columns(start, stop, target, reference, lower, chosen, error)`.

    mode: see `triton_columns`. scale_GN: float32. low, high: the range of integers, numbers or float32 [G, N].
    pick_GN: int64 [G, N] or None. numbers_TE, middles_TE: sorted numbers of each table and the middles between them, the last
        of which is infinity. order_K: int32, the natural column of each place. mask_KN: like the target, or None.
    """

    mode: int
    size: int
    scale_GN: Tensor
    low: Tensor | float
    high: Tensor | float
    pick_GN: Tensor | None
    numbers_TE: Tensor
    middles_TE: Tensor
    order_K: Tensor
    mask_KN: Tensor | None

    @staticmethod
    def of(
        steps: Sequence[Step],
        size: int,
        order: Sequence[int],
        mask_KN: Tensor | None,
        tables: Levels | None,
        *,
        per_row: bool = False,
    ) -> Columns:
        """From the scales [N] of every group, and the tables if there are any; `per_row` gives every output its own."""
        joined = Step.join(steps, torch.stack)
        device = joined.scale.device
        numbers = middles = joined.scale
        mode = INTEGERS
        if tables is not None:
            numbers = tables.numbers.reshape(-1, tables.numbers.shape[-1]).contiguous()
            middles = torch.nn.functional.pad(tables.middles.reshape(len(numbers), -1), (0, 1), value=torch.inf)
            mode = TABLE_PER_ROW if per_row else TABLE_PER_GROUP if isinstance(joined.pick, Tensor) else ONE_TABLE
        return Columns(
            mode=mode,
            size=size,
            scale_GN=joined.scale.contiguous(),
            low=joined.low.contiguous() if isinstance(joined.low, Tensor) else joined.low,
            high=joined.high.contiguous() if isinstance(joined.high, Tensor) else joined.high,
            pick_GN=joined.pick.contiguous() if isinstance(joined.pick, Tensor) else None,
            numbers_TE=numbers,
            middles_TE=middles.contiguous(),
            order_K=torch.tensor(order, dtype=torch.int32, device=device),
            mask_KN=None if mask_KN is None else mask_KN.contiguous(),
        )

    def __call__(
        self, start: int, stop: int, target: Tensor, reference: Tensor, lower: Tensor, chosen: Tensor, error: Tensor
    ) -> None:
        """Writes `chosen` and `error` of columns start..stop; `target` holds all feedback from before `start`. Rows of all
        matrices are contiguous."""
        N, K = target.shape[1], lower.stride(0)
        ranges = isinstance(self.low, Tensor)
        run = slice(start, stop)
        triton_columns.columns_kernel[(-(-N // ROWS),)](
            target[run],
            reference[run],
            lower[run, run],
            chosen[run],
            error[run],
            self.order_K[run],
            target if self.mask_KN is None else self.mask_KN[run],
            self.scale_GN,
            self.low if ranges else self.scale_GN,
            self.high if ranges else self.scale_GN,
            self.scale_GN if self.pick_GN is None else self.pick_GN,
            self.numbers_TE,
            self.middles_TE,
            stop - start,
            N,
            K,
            self.size,
            0.0 if ranges else self.low,
            0.0 if ranges else self.high,
            MODE=self.mode,
            BITS=(self.numbers_TE.shape[-1] - 1).bit_length() if self.mode else 0,
            MASKED=self.mask_KN is not None,
            RANGES=ranges,
            ROWS=ROWS,
            num_warps=1,
        )
