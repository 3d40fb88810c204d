"""NF4: sixteen numbers placed where weights are, so that each is used about equally often.

Weights of a trained layer look like samples of a normal distribution. Dettmers et al. 2023 (QLoRA, arXiv 2305.14314)
take as numbers the quantiles of N(0, 1), each side by itself so that 0 is one of them, and divide by the largest:

    negative side   Phi^-1 of 8 steps from 1 - o to 1/2, mirrored       o = 0.9677083
    positive side   Phi^-1 of 9 steps from 1/2 to o

Scale = the largest magnitude of the group. `scale_dtype: e4m3` is the paper's double quantization: scales in eight bits
with one float32 factor for the weight, 4.125 bits per weight at groups of 64 where float16 scales take 4.25.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from statistics import NormalDist

import torch

from aerogel.quantize.tables import TableGrid

OFFSET = 0.9677083
"""Probability of the outermost quantile: the paper's mean of 1 - 1/32 and 1 - 1/30."""


@cache
def nf4_numbers() -> tuple[float, ...]:
    """The sixteen numbers, ascending, from -1 to 1."""
    normal = NormalDist()
    positive = [normal.inv_cdf(0.5 + (OFFSET - 0.5) * step / 8) for step in range(1, 9)]
    negative = [-normal.inv_cdf(0.5 + (OFFSET - 0.5) * step / 7) for step in range(7, 0, -1)]
    return tuple(x / positive[-1] for x in (*negative, 0.0, *positive))


@dataclass(frozen=True, kw_only=True)
class Nf4(TableGrid):
    """NF4: quantiles of the normal distribution, 4 bits.

    group_size: inputs that share a scale.
    scale_dtype: type of the scales; e4m3 for double quantization.
    """

    group_size: int | None = 64
    scale_dtype: torch.dtype = torch.float32

    @property
    def bits(self) -> int:
        """Four."""
        return 4

    def numbers(self) -> tuple[tuple[float, ...], ...]:
        """One table."""
        return (nf4_numbers(),)
