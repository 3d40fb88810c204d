"""Microscaling formats (OCP MX v1.0): small floats in groups of 32 whose scale is a power of two, one byte.

    W = f * 2^(u - 127)        f in e2m1 (MXFP4), e3m2 or e2m3 (MXFP6), e4m3 or e5m2 (MXFP8)

The standard takes 2^(floor(log2 max|w|) - emax), emax the exponent of the largest float: the largest weight of a group may
then be cut by up to a quarter (e2m1: 7.99 / 6). The search looks at the next power of two as well and keeps the better one,
which takes a tenth of the error away and stays within the format. Cost: 8 / 32 = 0.25 bits per weight for scales.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from aerogel.quantize.formats.floats import float_numbers
from aerogel.quantize.ranges import Step
from aerogel.quantize.tables import TableGrid

GROUP = 32


@dataclass(frozen=True, kw_only=True)
class Mx(TableGrid):
    """MXFP4, MXFP6, MXFP8: small floats with power-of-two scales.

    kind: the float: e2m1 is MXFP4, e3m2 and e2m3 are MXFP6, e4m3 and e5m2 are MXFP8.
    group_size: inputs that share a scale; the standard, and every server, has 32.
    """

    kind: Literal["e2m1", "e3m2", "e2m3", "e4m3", "e5m2"] = "e2m1"
    group_size: int | None = GROUP
    scale_dtype: torch.dtype = torch.float8_e8m0fnu

    @property
    def bits(self) -> int:
        """Of one float."""
        return 1 + int(self.kind[1]) + int(self.kind[3])

    def numbers(self) -> tuple[tuple[float, ...], ...]:
        """One table."""
        return (float_numbers(self.kind),)

    def step_of_range(self, low: Tensor, high: Tensor) -> Step:
        """2^(floor(log2 peak) - emax)."""
        peak = torch.maximum(high, -low)
        most = self.largest[0]
        floor = torch.frexp(peak).exponent - 1
        scale = torch.ldexp(torch.ones_like(peak), floor - math.floor(math.log2(most)))
        scale = self.store(torch.where(peak > 0, scale, torch.zeros_like(peak)))
        return Step(scale, -most, most, torch.zeros_like(peak, dtype=torch.int64))
