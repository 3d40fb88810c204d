"""NVFP4: e2m1 floats in groups of 16 with a small float as scale, and one float32 factor per weight.

    W = f * (s * factor)       f in {0, .5, 1, 1.5, 2, 3, 4, 6} and negatives, s in e4m3

Against MXFP4 the groups are half as long and their scale has three mantissa bits instead of none; both matter, the second
more. e4m3 spans only 2^-9 .. 448, so the factor puts the largest scale of the weight near 448. Here the factor is a power
of two: then s * factor rounds nothing, whoever multiplies first. `scale_dtype: ue5m3` spends the sign bit, which a scale
does not need, on range (2^-17 .. 114688) and is what Chen et al. 2025 found to train stably where e4m3 did not.
The search tries narrower and wider scales per group, which among them contain the "four over six" choice (largest weight at
4 instead of 6). Cost: 8 / 16 = 0.5 bits per weight for scales.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from aerogel.quantize.formats.floats import float_numbers
from aerogel.quantize.tables import TableGrid

GROUP = 16


@dataclass(frozen=True, kw_only=True)
class Nvfp4(TableGrid):
    """NVFP4: e2m1 with small-float scales.

    group_size: inputs that share a scale; the format has 16.
    scale_dtype: e4m3 as NVIDIA's hardware has it, or ue5m3.
    """

    group_size: int | None = GROUP
    scale_dtype: torch.dtype = torch.float8_e4m3fn

    @property
    def bits(self) -> int:
        """Four."""
        return 4

    def numbers(self) -> tuple[tuple[float, ...], ...]:
        """One table."""
        return (float_numbers("e2m1"),)
