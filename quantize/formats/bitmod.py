"""BitMoD: each group picks the one of four tables that suits it. 3 and 4 bits.

A float has two zeros and needs one. Chen et al. 2024 (BitMoD, arXiv 2411.11745) give the code of -0 to one more number, and
let each group of 128 weights choose which: a number between the others for finer steps, or one beyond them for a tail on
one side.

    3 bits   {0, +-1, +-2, +-4}                     and one of  +3  -3  +6  -6
    4 bits   {0, +-1, +-2, +-3, +-4, +-6, +-8, +-12}   and one of  +5  -5  +16  -16

Cost: the choice takes 2 bits per group beside the scale (stored in a byte here).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from aerogel.errors import BadInput
from aerogel.quantize.tables import TableGrid

MAGNITUDES = {3: (0, 1, 2, 4), 4: (0, 1, 2, 3, 4, 6, 8, 12)}
SPECIAL = {3: (3, -3, 6, -6), 4: (5, -5, 16, -16)}


@dataclass(frozen=True, kw_only=True)
class Bitmod(TableGrid):
    """BitMoD: small floats whose spare code means what the group needs.

    bits: 3 or 4.
    group_size: inputs that share a scale and a table.
    scale_dtype: type of the scales.
    """

    bits: int = 4
    group_size: int | None = 128
    scale_dtype: torch.dtype = torch.float32

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.bits not in MAGNITUDES:
            raise BadInput(f"bits must be 3 or 4 for bitmod, found {self.bits}")

    def numbers(self) -> tuple[tuple[float, ...], ...]:
        """Four tables: positive codes, then the special number in the place of -0, then negative codes."""
        found = MAGNITUDES[self.bits]
        return tuple((*map(float, found), float(special), *(-float(x) for x in found[1:])) for special in SPECIAL[self.bits])
