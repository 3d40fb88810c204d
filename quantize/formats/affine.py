"""Integers with a floating zero point: 2^b equal steps that may lie anywhere, also where none of them is zero.

    W = (u - z) * s,    u in 0 .. 2^b - 1,  z and s floats of one type, for `group_size` consecutive inputs of one output

It is what HQQ (Badri & Shaji 2023) fits, and the only grid of integers that is of use with one bit: two numbers anywhere. An
integer zero point (`IntGrid`) costs b bits and represents 0 exactly; this one costs as much as a scale and does not, so
that nothing can be pruned. Scales and zero points are rounded to the type they are stored in before any code is chosen.

Shape legend: N out features, K in features, G groups along K, g members of a group, n outputs.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from aerogel.errors import BadInput
from aerogel.quantize.codes import Params, check_group_size, refuse_zeros, row_slices
from aerogel.quantize.grids import searched_step
from aerogel.quantize.ranges import Search, Step
from aerogel.quantize.rounder import Rounder
from aerogel.quantize.scales import check_wide, rounded

MOVES = (-0.5, -0.25, 0.25, 0.5)
"""Steps by which a search moves a zero point."""


@dataclass(frozen=True, kw_only=True)
class Affine:
    """Integers of 1 to 8 bits with a floating zero point.

    bits: width of a code.
    group_size: inputs that share a scale and a zero point; null for one per output.
    scale_dtype: type that scales and zero points are stored in, and rounded to before use.
    """

    bits: int = 4
    group_size: int | None = 64
    scale_dtype: torch.dtype = torch.float32
    without_zero: ClassVar[str] = "integers with a floating zero point"

    def __post_init__(self) -> None:
        if not 1 <= self.bits <= 8:
            raise BadInput(f"bits must lie between 1 and 8, found {self.bits}")
        check_group_size(self.group_size)
        check_wide(self.scale_dtype)

    @property
    def shared_rows(self) -> int:
        """Every output has its own scale."""
        return 1

    @property
    def largest(self) -> int:
        """The largest code."""
        return (1 << self.bits) - 1

    def groups(self, K: int) -> int:
        """ceil(K / group_size), 1 per channel."""
        return -(-K // (self.group_size or K))

    def fit(
        self,
        w_NK: Tensor,
        importance: Tensor | None = None,
        mask_NK: Tensor | None = None,
        search: Search | str = "minmax",
        curvature_KK: Tensor | None = None,
    ) -> Params:
        """Scales and zero points for `w_NK`, as `IntGrid.fit`. Raises `BadInput` for a mask with zeros: no code is zero."""
        refuse_zeros(mask_NK, self.without_zero)
        step = searched_step(self, w_NK, importance, None, Search.of(search), curvature_KK)
        return self.params(step, *w_NK.shape)

    def step_of_range(self, low: Tensor, high: Tensor) -> Step:
        """Scale (high - low) / (2^b - 1), zero point -low / scale."""
        scale = self.store((high - low) / self.largest)
        return self.step_of(scale, -low / scale)

    def step_of(self, scale: Tensor, zero: Tensor) -> Step:
        """A step with these scales, as stored, and these zero points, which are rounded to the stored type here."""
        low = -zero.to(self.scale_dtype).to(zero.dtype)
        return Step(scale, low, low + self.largest)

    def neighbours(self, step: Step) -> list[Step]:
        """Zero points a part of a step beside the present ones."""
        return [self.step_of(step.scale, torch.as_tensor(move - step.low)) for move in MOVES]

    def store(self, scale: Tensor) -> Tensor:
        """Scales as stored; 0 becomes 1, underflow the smallest value of the type."""
        return rounded(scale, self.scale_dtype)

    def snap(self, w: Tensor, step: Step, out: Tensor | None = None) -> Tensor:
        """s * (clamp(round(w / s + z), 0, 2^b - 1) - z), ties to even."""
        codes = torch.div(w, step.scale, out=out).sub_(step.low).round_().clamp_(0, self.largest)
        return codes.add_(step.low).mul_(step.scale)

    def params(self, step: Step, N: int, K: int) -> Params:
        """Scales and zero points [G, N] as they are stored, [N, G]."""
        low = step.low if isinstance(step.low, Tensor) else torch.full_like(step.scale, step.low)
        scale, zero = (tensor.T.contiguous().to(self.scale_dtype) for tensor in (step.scale, -low))
        return Params(scale_NG=scale, zero_NG=zero)

    def rounder(self, params: Params, N: int, K: int, dtype: torch.dtype = torch.float32) -> Rounder:
        """Column-wise rounding with these scales and zero points."""
        scale, zero = (tensor.T.to(dtype).contiguous() for tensor in (params.scale_NG, _zero(params)))
        return Rounder(self, Step(scale, -zero, self.largest - zero), N, K)

    def encode(self, w_NK: Tensor, params: Params) -> Tensor:
        """Nearest codes, uint8 [N, K]."""
        u_NK = torch.empty(w_NK.shape, dtype=torch.uint8, device=w_NK.device)
        for rows, w, scale, zero in self._chunks(w_NK, params):
            u_NK[rows] = (w.float() / scale).add_(zero).round_().clamp_(0, self.largest).to(torch.uint8)
        return u_NK

    def decode(self, q_NK: Tensor, params: Params) -> Tensor:
        """(u - z) * s, float32 [N, K]."""
        w_NK = torch.empty(q_NK.shape, dtype=torch.float32, device=q_NK.device)
        for rows, u, scale, zero in self._chunks(q_NK, params):
            w_NK[rows] = u.float().sub_(zero).mul_(scale)
        return w_NK

    def _chunks(self, x_NK: Tensor, params: Params) -> Iterator[tuple[slice, Tensor, Tensor, Tensor]]:
        """Rows of a matrix with their scales and zero points spread over the columns."""
        K = x_NK.shape[1]
        size = min(self.group_size or K, K)
        for rows in row_slices(x_NK):
            held = (params.scale_NG[rows], _zero(params)[rows])
            scale, zero = (tensor.float().repeat_interleave(size, 1)[:, :K] for tensor in held)
            yield rows, x_NK[rows], scale, zero


def _zero(params: Params) -> Tensor:
    if params.zero_NG is None:
        raise BadInput("codes with floating zero points need them, and there are none; the file is not whole")
    return params.zero_NG
