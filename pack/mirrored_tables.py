"""Tables that are another table with the other sign, as two of BitMoD's four are: kept once.

    {.., +5, ..} and {.., -5, ..} around the same symmetric numbers:   T_1[u] = -T_0[name(u)]

A kernel that looks up pairs of numbers holds 256 of them for each table and lane, 32 KB; two tables fit where four do not. In a
register there is room for 32 numbers, two tables of 4 bits. So a group that picks T_1 has its codes renamed and picks T_0 with
the sign taken back, by its scale: SIGN beside the table's number.

Shape legend: N out features, K in features, G groups along K, T tables of E numbers.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from aerogel.quantize.tables import TableGrid

SIGN = 0x80
"""In a group's pick: the numbers of its table are taken with the other sign."""


class Mirrored(NamedTuple):
    """What becomes of T tables.

    kept: their numbers that a kernel holds, indices into T.
    pick: uint8 [T], the new number of each table, with `SIGN` where it is the mirror of another.
    names: uint8 [T, E], the new code of each code.
    """

    kept: list[int]
    pick: Tensor
    names: Tensor


@functools.cache
def mirrored(grid: TableGrid) -> Mirrored:
    """Of the tables that groups of this grid pick from."""
    tables = grid.numbers()
    kept: list[int] = []
    picks, names = [], []
    for number, table in enumerate(tables):
        negated = [-x for x in table]
        twin = next((place for place, t in enumerate(kept) if sorted(tables[t]) == sorted(negated)), None)
        if twin is None:
            kept.append(number)
            picks.append(len(kept) - 1)
            names.append(list(range(len(table))))
        else:
            picks.append(twin | SIGN)
            names.append([tables[kept[twin]].index(x) for x in negated])
    return Mirrored(kept, torch.tensor(picks, dtype=torch.uint8), torch.tensor(names, dtype=torch.uint8))


def to_kept(grid: TableGrid, values_NK: Tensor, pick_NG: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Codes and picks of groups of `size` inputs -> the same with the tables that are kept."""
    held = mirrored(grid)
    if values_NK.is_meta:
        return values_NK, pick_NG
    names = held.names.to(values_NK.device)
    return _renamed(names, values_NK, pick_NG.long(), size), held.pick.to(pick_NG.device)[pick_NG.long()]


def from_kept(grid: TableGrid, values_NK: Tensor, pick_NG: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """The inverse of `to_kept`."""
    held = mirrored(grid)
    number = torch.zeros(256, dtype=torch.uint8)
    number[held.pick.long()] = torch.arange(len(held.pick), dtype=torch.uint8)
    pick_NG = number.to(pick_NG.device)[pick_NG.long()]
    names = held.names.argsort(1).to(torch.uint8).to(values_NK.device)
    return _renamed(names, values_NK, pick_NG.long(), size), pick_NG


def _renamed(names_TE: Tensor, values_NK: Tensor, pick_NG: Tensor, size: int) -> Tensor:
    """names[pick, value]; group by group, so that nothing is as wide as the codes but codes."""
    out = torch.empty_like(values_NK)
    for group, first in enumerate(range(0, values_NK.shape[1], size)):
        columns = slice(first, first + size)
        out[:, columns] = names_TE[pick_NG[:, group : group + 1], values_NK[:, columns].long()]
    return out
