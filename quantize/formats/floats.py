"""Floats of 3 to 8 bits: a sign, some exponent bits, some mantissa bits, and no codes wasted on infinities.

    x = (-1)^s * 2^(e - bias) * (1 + m / 2^M)      e > 0,  bias = 2^(E-1) - 1
    x = (-1)^s * 2^(1 - bias) * m / 2^M            e = 0

The narrow types (6 bits and fewer) use every code for a number, as the OCP microscaling formats and Tilus do (Ding et al.
2025, arXiv 2504.12984): their largest is 2^(2^E - 1 - bias) * (2 - 2^-M). The two of eight bits are the hardware's: e4m3
has no infinity and one NaN (largest 448), e5m2 is IEEE-like (largest 57344); their other codes are not used.

More exponent bits mean numbers denser around zero and a wider range; at equal bits a normal distribution in groups of 128
prefers mantissa (e2m1 has less error than e3m0), heavy tails and wide groups prefer exponent.
Scale = largest magnitude / largest number.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from typing import Literal

import torch

from aerogel.errors import BadInput
from aerogel.quantize.tables import BLOCK, TableGrid

Kind = Literal["e5m2", "e4m3", "e3m2", "e2m3", "e3m1", "e2m2", "e2m1", "e3m0", "e1m1", "e2m0"]


@cache
def float_numbers(kind: str) -> tuple[float, ...]:
    """The numbers of a float type in the order of their codes (sign, exponent, mantissa); NaN for codes that are none."""
    exponent_bits, mantissa_bits = int(kind[1]), int(kind[3])
    bias = 2 ** (exponent_bits - 1) - 1
    found = []
    for code in range(1 << (exponent_bits + mantissa_bits)):
        exponent, mantissa = code >> mantissa_bits, (code & ((1 << mantissa_bits) - 1)) / (1 << mantissa_bits)
        found.append(2.0 ** (exponent - bias) * (1 + mantissa) if exponent else 2.0 ** (1 - bias) * mantissa)
    unused = {"e4m3": 1, "e5m2": 4}.get(kind, 0)
    found[len(found) - unused :] = [math.nan] * unused
    return (*found, *(-x for x in found))


@dataclass(frozen=True, kw_only=True)
class Float(TableGrid):
    """Small floats of 3 to 8 bits: FP3, FP4, FP5, FP6, e5m2.

    kind: exponent and mantissa bits; the sign adds one.
    group_size: inputs that share a scale; null for one scale per output.
    block: one scale for 128 outputs x 128 inputs; needs group_size 128.
    scale_dtype: type of the scales.
    """

    kind: Kind = "e2m1"
    group_size: int | None = None
    block: bool = False
    scale_dtype: torch.dtype = torch.float32

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.block and self.group_size != BLOCK:
            raise BadInput(f"block scales cover 128 x 128 weights; write group_size: {BLOCK}, found {self.group_size}")

    @property
    def bits(self) -> int:
        """Sign, exponent and mantissa."""
        return 1 + int(self.kind[1]) + int(self.kind[3])

    @property
    def shared_rows(self) -> int | None:
        """128 in blocks."""
        return BLOCK if self.block else 1

    def numbers(self) -> tuple[tuple[float, ...], ...]:
        """One table."""
        return (float_numbers(self.kind),)
