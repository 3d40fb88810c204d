"""The column-wise view of a grid: what a solver that rounds one input at a time works with.

Shape legend: N out features, K in features, G groups along K.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from aerogel.quantize.ranges import Step

if TYPE_CHECKING:
    from aerogel.kernels.rounding.columns import Columns
    from aerogel.quantize.codes import Grid, Params
    from aerogel.quantize.levels import Levels


class Rounder:
    """Snaps columns of one weight in [K, N] layout; every column is one contiguous run of N values.

    Scales may be replaced group by group while a solver runs (`replace`); `params` gives what finally must be stored.
    """

    def __init__(self, grid: Grid, step_GN: Step, N: int, K: int) -> None:
        self.grid, self.N, self.K = grid, N, K
        self.size = min(grid.group_size or K, K)
        self._steps = [step_GN.each(lambda x, g=g: x[g].contiguous()) for g in range(grid.groups(K))]  # type: ignore[misc]

    def group(self, column: int) -> int:
        """The group that a column belongs to."""
        return column // self.size

    def span(self, group: int) -> tuple[int, int]:
        """First and one past the last column of a group."""
        return group * self.size, min(self.K, (group + 1) * self.size)

    def step(self, group: int) -> Step:
        """Scales in use for a group, [N]."""
        return self._steps[group]

    def column(self, column: int, w_N: Tensor, out: Tensor) -> Tensor:
        """Nearest grid values of one column, written to `out`."""
        return self.grid.snap(w_N, self._steps[column // self.size], out)

    def at_once(self, order: Sequence[int], mask_KN: Tensor | None) -> Columns | None:
        """What decides a run of columns in one launch, with the scales as they are now; None where there is no such thing
        for this grid or device. `order`: the natural column of each place; `mask_KN`: in that order.
        """
        return None

    def _columns(
        self, order: Sequence[int], mask_KN: Tensor | None, tables: Levels | None = None, per_row: bool = False
    ) -> Columns | None:
        from aerogel.kernels.rounding.columns import Columns, missing

        scale = self._steps[0].scale
        if missing(scale.device, scale.dtype):
            return None
        return Columns.of(self._steps, self.size, order, mask_KN, tables, per_row=per_row)

    def replace(self, group: int, step_N: Step) -> None:
        """Other scales for one group; columns already snapped with the old ones are the caller's business."""
        self._steps[group] = step_N

    def rescale(self, group: int, gain_N: Tensor, stiffness_N: Tensor) -> Tensor | None:
        """Multiply the scales of a group by 1 + x where that lowers the loss, -2 x gain + x^2 stiffness per output.

        Returns x as realised after rounding the scale to its stored type, [N], 0 where nothing changed; None when the
        grid cannot change one output's scale alone.
        """
        if self.grid.shared_rows != 1:
            return None
        step = self._steps[group]
        wanted = torch.where(stiffness_N > 0, gain_N / stiffness_N, torch.zeros_like(gain_N))
        scale = self.grid.store(step.scale * (1 + wanted.clamp_(min=-0.5)))
        change = scale / step.scale - 1
        # Said this way round, a scale of zero, whose change is no number, is left alone.
        worse = ~(change * (change * stiffness_N - 2 * gain_N) < 0)
        scale, change = torch.where(worse, step.scale, scale), change.masked_fill_(worse, 0)
        self._steps[group] = step._replace(scale=scale)
        return change

    def params(self) -> Params:
        """The scales in use, as they are stored."""
        return self.grid.params(Step.join(self._steps, torch.stack), self.N, self.K)
