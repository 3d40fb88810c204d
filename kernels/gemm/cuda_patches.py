"""Sparse outliers as they are added while inputs come (`few_patches.cuh`): by patches of 8 rows x 1024 columns.

A patch is what can be added when one stage of the inputs is there. All its rows share units of 16 outliers, so that little is
filled up, and every outlier says whose it is:

    word = value | row % 8 << 16 | column % 1024 << 22

A unit is the 16 slots of a matrix product in the order in which lanes want them, four for each lane of a row. Pairs of
columns lie in four kinds of banks, and inputs are looked up by four lanes at once: each lane has its own kind, as long as
there is room.

Shape legend: N out features, K in features, E outliers, G groups of 8 rows, C patches of a group, U units.
"""

from __future__ import annotations

import torch
from torch import Tensor

ROWS, COLUMNS, UNIT = 8, 1024, 16
KINDS = LANE = 4
"""Kinds of banks, and the words of a lane."""
MOST_COLUMNS = 31 * COLUMNS
"""A warp's lanes know where each patch of a group begins, and where the last one ends."""


def patches(row_E: Tensor, column_E: Tensor, bits_E: Tensor, N: int, K: int) -> tuple[Tensor, Tensor]:
    """At which unit each patch begins, int32 [G * C + 1], row by row, and the words, int32 [U, 4, 4]: of each unit and lane.
    bits_E: the values as int16. What a unit lacks is 0 times a column of the lane's kind."""
    G, C = -(-N // ROWS), -(-K // COLUMNS)
    patch_E, kind_E = row_E // ROWS * C + column_E // COLUMNS, column_E // 2 % KINDS
    word_E = bits_E.int() & 0xFFFF | (row_E % ROWS << 16 | column_E % COLUMNS << 22).int()
    units_P = -(-torch.bincount(patch_E, minlength=G * C) // UNIT)
    start_P1 = torch.nn.functional.pad(units_P.cumsum(0), (1, 0))
    fillers_L = 2 * torch.arange(KINDS, device=row_E.device, dtype=torch.int32) << 22
    words = fillers_L.repeat_interleave(LANE).repeat(int(start_P1[-1]))
    place_E = places(patch_E * KINDS + kind_E, units_P, start_P1)
    words[place_E] = word_E
    return start_P1.int(), words.view(-1, KINDS, LANE)


def places(key_E: Tensor, units_P: Tensor, start_P1: Tensor) -> Tensor:
    """Where among all words each outlier lies: in its kind's lane, unit by unit, or where that is full in any place left of
    its patch. key_E: patch and kind."""
    order_E = key_E.argsort(stable=True)
    patch_E, kind_E = key_E[order_E] // KINDS, key_E[order_E] % KINDS
    turn_E = turns(key_E[order_E])
    unit_E = start_P1[patch_E] + turn_E // LANE
    fits_E = turn_E < units_P[patch_E] * LANE
    place_E = unit_E * UNIT + kind_E * LANE + turn_E % LANE
    free = torch.ones(int(start_P1[-1]) * UNIT, dtype=torch.bool, device=key_E.device)
    free[place_E[fits_E]] = False
    free_F, left_L = free.nonzero()[:, 0], patch_E[~fits_E]
    place_E[~fits_E] = free_F[torch.searchsorted(free_F, start_P1[left_L] * UNIT) + turns(left_L)]
    return torch.empty_like(place_E).scatter_(0, order_E, place_E)


def turns(key: Tensor) -> Tensor:
    """How many of the same key come before each; keys ascend."""
    return torch.arange(len(key), device=key.device) - torch.searchsorted(key, key)
