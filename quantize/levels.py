"""The nearest of a few numbers, for many values at once: what rounding to a table is.

A code's numbers are sorted once per group, with the middles between neighbours; a value's place among the middles (a
binary search) is then its nearest number, and a second lookup gives the code. Numbers that occur twice (both zeros of a
float) are found under the first of their codes; codes that are no number (NaN) are never found.

Shape legend: E numbers of a table; B... leading dimensions (outputs, groups); m values looked up in each.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

FEW, SMALL = 16, 4096
"""Middles up to which, and values from which on, a CPU counts comparisons."""


class Levels(NamedTuple):
    """Sorted numbers of one or many tables.

    numbers: [B..., E] ascending. middles: [B..., E - 1]. codes: int64 [B..., E], whose number each is.
    """

    numbers: Tensor
    middles: Tensor
    codes: Tensor

    @staticmethod
    def of(table: Tensor) -> Levels:
        """From numbers in the order of their codes, [B..., E]."""
        # NaN goes before sorting: on a GPU one with a sign comes first. Adding 0 makes both zeros the same number.
        numbers, codes = torch.sort(table.nan_to_num(torch.inf, torch.inf, -torch.inf) + 0.0, dim=-1, stable=True)
        middles = numbers[..., :-1] * 0.5 + numbers[..., 1:] * 0.5
        # Between neighbouring floats the middle rounds to one of them; at the upper it would hide that one from itself.
        upper = numbers[..., 1:]
        middles = torch.where((middles >= upper) & upper.isfinite(), numbers[..., :-1], middles)
        # The second of two equal numbers gets an empty interval: its lower end is moved up to its upper end.
        middles = middles.masked_fill(numbers[..., :-1] == numbers[..., 1:], torch.inf)
        middles = middles.flip(-1).cummin(-1).values.flip(-1).contiguous()
        return Levels(numbers, middles, codes)

    def to(self, device: torch.device, dtype: torch.dtype) -> Levels:
        """On another device, numbers in another float type."""
        return Levels(self.numbers.to(device, dtype), self.middles.to(device, dtype), self.codes.to(device))

    def pick(self, tables: Tensor) -> Levels:
        """Some of many tables: int64 [n] -> [n, E]."""
        return Levels(self.numbers[tables], self.middles[tables], self.codes[tables])

    def places(self, x: Tensor) -> Tensor:
        """Places of the nearest numbers among the sorted ones, int32 or int64. One table: x of any shape. Many: x [B..., m]."""
        if self.middles.dim() == 1:
            if x.device.type == "cpu" and len(self.middles) < FEW and x.numel() > SMALL:
                return _counted(x, self.middles)
            return torch.bucketize(x.contiguous(), self.middles)
        return torch.searchsorted(self.middles, x.contiguous())

    def nearest(self, x: Tensor) -> Tensor:
        """The nearest numbers, shaped like x."""
        return self._take(self.numbers, self.places(x))

    def nearest_codes(self, x: Tensor) -> Tensor:
        """The codes of the nearest numbers, uint8, shaped like x."""
        return self._take(self.codes, self.places(x)).to(torch.uint8)

    def _take(self, held: Tensor, places: Tensor) -> Tensor:
        if held.dim() == 1:
            return held.index_select(0, places.reshape(-1)).view(places.shape)
        return held.gather(-1, places)


def _counted(x: Tensor, middles: Tensor) -> Tensor:
    """How many middles lie below each number, int32: a few vectorised comparisons cost a third of a binary search on a CPU."""
    found = torch.zeros(x.shape, dtype=torch.int8)
    for middle in middles.tolist():
        found += x > middle
    return found.int()
