"""Bipolar integers: the odd numbers from -(2^k - 1) to 2^k - 1, which is what k bits of -1 and +1 add up to.

    W = s q,    q = sum 2^i b_i,  b_i in {-1, +1}

There is no zero, no zero point and no sign bit, so that a product of two such numbers is a sum over pairs of planes, counted
with xor and popcount (`quantize/bipolar.py`, which also rounds activations). Stored as codes u with q = 2 u - (2^k - 1).
A group whose weights are all zero gets the scale 0; single zeros become the smallest number of their group, so nothing can
be pruned. Against symmetric integers of k bits the levels are as many and lie half a step aside.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from aerogel.errors import BadInput
from aerogel.quantize.codes import Params, refuse_zeros
from aerogel.quantize.ranges import Search
from aerogel.quantize.scales import check_wide
from aerogel.quantize.tables import TableGrid


@dataclass(frozen=True, kw_only=True)
class Bipolar(TableGrid):
    """Bipolar: odd integers of 1 to 8 bits.

    bits: planes of -1 and +1.
    group_size: inputs that share a scale; null for one per output, which exact integer products need.
    scale_dtype: type of the scales.
    """

    bits: int = 4
    group_size: int | None = None
    scale_dtype: torch.dtype = torch.float32
    without_zero: ClassVar[str] = "bipolar integers"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.bits <= 8:
            raise BadInput(f"bits must lie between 1 and 8, found {self.bits}")
        check_wide(self.scale_dtype)

    def numbers(self) -> tuple[tuple[float, ...], ...]:
        """One table, rising."""
        most = (1 << self.bits) - 1
        return (tuple(float(2 * u - most) for u in range(most + 1)),)

    def store(self, scale: Tensor) -> Tensor:
        """As stored; 0 stays 0, since no code is."""
        return super().store(scale).masked_fill(scale == 0, 0.0)

    def fit(
        self,
        w_NK: Tensor,
        importance_K: Tensor | None = None,
        mask_NK: Tensor | None = None,
        search: Search | str = "minmax",
        curvature_KK: Tensor | None = None,
    ) -> Params:
        """As every table. Raises `BadInput` for a mask: no code is zero."""
        refuse_zeros(mask_NK, self.without_zero)
        return super().fit(w_NK, importance_K, None, search, curvature_KK)
