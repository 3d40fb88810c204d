"""RF8: a weight as the sum of two powers of two. Eight bits, wide range, multiplication by shifts.

The first two set binary digits of a number are kept, everything behind them is rounded away:

    w ~ +-(2^e + 2^(e - j)),   1 <= j <= 4       sign, 32 exponents, 2 bits for j

so the numbers of an octave are 1 + {1/16, 1/8, 1/4, 1/2}: no scale is needed for range (2^32 between the smallest and the
largest), and the relative error is at most 17 % (between 1.5 and 2 * 1.0625). The lowest code of each sign stands for 0.
The width of the exponent is not stated in the description of the method that is known to us; five bits fill the byte.
Same bits as e4m3 with three times its error on normal weights: of interest for arithmetic, not for accuracy.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from aerogel.quantize.tables import TableGrid

EXPONENTS = range(-31, 1)


@dataclass(frozen=True, kw_only=True)
class Rf8(TableGrid):
    """RF8: sums of two powers of two.

    group_size: inputs that share a scale; null for one per output.
    scale_dtype: type of the scales.
    """

    group_size: int | None = None
    scale_dtype: torch.dtype = torch.float32

    @property
    def bits(self) -> int:
        """Eight."""
        return 8

    def numbers(self) -> tuple[tuple[float, ...], ...]:
        """One table: sign, exponent, and the second digit from far to near."""
        found = [2.0**e * (1 + 2.0**-j) for e in EXPONENTS for j in (4, 3, 2, 1)]
        found[0] = 0.0
        return ((*found, *(-x for x in found)),)
