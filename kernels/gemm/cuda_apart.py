"""Sparse outliers as blocks of their own take them (`few_apart.cuh`): by slices of K, in units of 64 for eight rows.

A slice's inputs, 16 tokens, fit into a block's shared memory. Rows are sorted within pieces of 256 by how many outliers they
have in the slice, and eight of them are a group, whose units have eight outliers of each row. What a row lacks is 0 times some
column of the slice: what is not finite there makes the whole token so anyway.

A unit is four products of 16 slots, two for each row; the eight slots of rows 0 to 3, and of rows 4 to 7, are gathered at
once, which is fast where their columns lie in eight kinds of banks. So a row's outliers of one kind go to the product in which
the other rows want other kinds, as long as there is room.

Shape legend: N out features, K in features, E outliers, S slices, G groups of 8 rows, U units.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from aerogel.pack import tiles

PIECE_ROWS, GROUP_ROWS, UNIT = 256, 8, 64
KINDS = 8
"""Of banks: 16 bytes each, of a line of 128."""
TRIES = 12
"""Times that an outlier which is one too many of its kind looks for a fetch without it."""
MOST_TILES = 32
"""K tiles of a slice: 16 tokens' inputs are 128 KB then."""


def slice_tiles(K: int) -> int:
    """K tiles of a slice, as even as can be."""
    k_tiles = -(-K // tiles.COLUMNS)
    return -(-k_tiles // -(-k_tiles // MOST_TILES))


def slice_count(K: int) -> int:
    """Slices of all K."""
    return -(-K // (slice_tiles(K) * tiles.COLUMNS))


def units(row_E: Tensor, column_E: Tensor, bits_E: Tensor, N: int, K: int) -> tuple[Tensor, Tensor, Tensor]:
    """Where each slice's groups begin, int32 [S * G + 1], the units, int16 [U, 32, 2, 2], and the groups' rows in their pieces,
    uint8 [S, G * 8]. bits_E: the values as int16."""
    columns, S, G = slice_tiles(K) * tiles.COLUMNS, slice_count(K), -(-N // PIECE_ROWS) * PIECE_ROWS // GROUP_ROWS
    slice_E, place_E = column_E // columns, places(column_E % columns)
    count = torch.bincount(slice_E * G * GROUP_ROWS + row_E, minlength=S * G * GROUP_ROWS).view(S, -1, PIECE_ROWS)
    count, rows = count.sort(dim=2, stable=True)
    count, rows = (spread(found.view(S, -1, PIECE_ROWS)) for found in (count, rows))
    sorted_E = rows.argsort(dim=2)[slice_E, row_E // PIECE_ROWS, row_E % PIECE_ROWS]
    group_E = slice_E * G + (row_E // PIECE_ROWS * PIECE_ROWS + sorted_E) // GROUP_ROWS
    units_G = -(-count.view(-1, GROUP_ROWS).amax(1) // GROUP_ROWS)
    start_G1 = torch.nn.functional.pad(units_G.cumsum(0), (1, 0))
    key_E = group_E * GROUP_ROWS + sorted_E % GROUP_ROWS
    slots = Slots.of(units_G, start_G1)
    which_P, fetched_FK = dealt(key_E, place_E % KINDS, units_G, start_G1, slots)
    return start_G1.int(), laid_out(place_E, bits_E, which_P, fetched_FK, slots), rows.to(torch.uint8).view(S, -1)


def spread(sorted_SPR: Tensor) -> Tensor:
    """A piece's groups in an order in which any run of them has long ones and short ones: numbers with their bits reversed."""
    count = PIECE_ROWS // GROUP_ROWS
    order = [int(f"{group:0{count.bit_length() - 1}b}"[::-1], 2) for group in range(count)]
    return sorted_SPR.view(*sorted_SPR.shape[:2], count, GROUP_ROWS)[:, :, order].reshape(sorted_SPR.shape)


def places(column: Tensor) -> Tensor:
    """Where in shared memory a column of a slice lies, in pieces of 16 bytes."""
    return column // KINDS * KINDS + (column + 2 * (column // KINDS)) % KINDS


@dataclass(frozen=True, slots=True)
class Slots:
    """Places of outliers, int64 [P]: a row's follow each other, unit by unit and product by product.

    fetch: the columns that are gathered at once, those of half a product. slot: which of these eight, and so the kind that its
    column had best be of."""

    unit: Tensor
    product: Tensor
    row: Tensor
    second: Tensor
    fetch: Tensor
    slot: Tensor

    @classmethod
    def of(cls, units_G: Tensor, start_G1: Tensor) -> Self:
        """Those of groups of so many units, which begin at these units."""
        group_P = torch.arange(len(units_G), device=units_G.device).repeat_interleave(units_G * UNIT)
        inside_P = torch.arange(len(group_P), device=units_G.device) - start_G1[group_P] * UNIT
        each_P = units_G[group_P] * GROUP_ROWS
        row_P, turn_P = inside_P // each_P, inside_P % each_P
        unit_P, product_P, second_P = start_G1[group_P] + turn_P // GROUP_ROWS, turn_P % GROUP_ROWS // 2, turn_P % 2
        fetch_P = (unit_P * 4 + product_P) * 2 + row_P // 4
        return cls(unit_P, product_P, row_P, second_P, fetch_P, (row_P + product_P) % 4 * 2 + second_P)


def dealt(key_E: Tensor, kind_E: Tensor, units_G: Tensor, start_G1: Tensor, slots: Slots) -> tuple[Tensor, Tensor]:
    """Which outlier is at each place, -1 for none, and which kinds are fetched, bool [fetches, KINDS].

    A row has as many places for each kind as it has units. Those that are one too many of their kind look for a place whose
    fetch has nobody of their kind, TRIES times, and then take any. key_E: the outliers' rows, counted through all groups."""
    device, P = key_E.device, len(slots.slot)
    order_E = (key_E * KINDS + kind_E).argsort(stable=True)
    key_E, kind_E = key_E[order_E], kind_E[order_E]
    group_E, row_E = key_E // GROUP_ROWS, key_E % GROUP_ROWS
    base_E, turn_E = start_G1[group_E] * UNIT + row_E * units_G[group_E] * GROUP_ROWS, turns(key_E * KINDS + kind_E)
    fits_E = turn_E < units_G[group_E]
    which_P, fetched = torch.full((P,), -1, device=device), torch.zeros(P, dtype=torch.bool, device=device)
    own_E = base_E + turn_E * GROUP_ROWS + (kind_E // 2 - row_E) % 4 * 2 + kind_E % 2
    which_P[own_E[fits_E]] = order_E[fits_E]
    fetched[slots.fetch[own_E[fits_E]] * KINDS + kind_E[fits_E]] = True
    left_L = (~fits_E).nonzero()[:, 0]
    free_P = (which_P < 0).nonzero()[:, 0]
    for turn in range(TRIES):
        base_L, key_L = base_E[left_L], key_E[left_L]
        first_L, end_L = (torch.searchsorted(free_P, at) for at in (base_L, base_L + units_G[key_L // GROUP_ROWS] * GROUP_ROWS))
        place_L = free_P[first_L + (turns(key_L) + turn) % (end_L - first_L)]
        wish_L = slots.fetch[place_L] * KINDS + kind_E[left_L]
        takes_L = ~fetched[wish_L] & (which_P[place_L] < 0)
        for wanted_L in (place_L, wish_L):
            takes_L = takes_L & firsts(wanted_L, takes_L, P)
        which_P[place_L[takes_L]] = order_E[left_L[takes_L]]
        fetched[wish_L[takes_L]] = True
        left_L = left_L[~takes_L]
    free_P = (which_P < 0).nonzero()[:, 0]
    place_L = free_P[torch.searchsorted(free_P, base_E[left_L]) + turns(key_E[left_L])]
    which_P[place_L] = order_E[left_L]
    fetched[slots.fetch[place_L] * KINDS + kind_E[left_L]] = True
    return which_P, fetched.view(-1, KINDS)


def turns(key: Tensor) -> Tensor:
    """How many of the same key come before each; keys ascend."""
    return torch.arange(len(key), device=key.device) - torch.searchsorted(key, key)


def firsts(wanted: Tensor, counts: Tensor, size: int) -> Tensor:
    """Whether each of those that count is the first to want something."""
    number = torch.arange(len(wanted), device=wanted.device)
    least = number.new_full((size,), len(wanted)).scatter_reduce(0, wanted[counts], number[counts], "amin")
    return least[wanted] == number


def laid_out(place_E: Tensor, bits_E: Tensor, which_P: Tensor, fetched_FK: Tensor, slots: Slots) -> Tensor:
    """The units, int16 [U, lane, word, half]; see `few_apart.cuh` for what a lane has. Where no outlier is, a column of a kind
    that is not fetched is multiplied by 0."""
    lacks_P, outlier_P = which_P < 0, which_P.clamp(min=0)
    at_P = slots.fetch * KINDS + slots.slot
    lacks_FK = torch.zeros_like(fetched_FK).view(-1).index_put((at_P,), lacks_P).view(-1, KINDS)
    other_FK = fetched_FK.to(torch.uint8).argsort(dim=1, stable=True)  # kinds that are not fetched come first
    filler_FK = other_FK.gather(1, (lacks_FK.cumsum(1) - 1).clamp(min=0))
    if len(place_E) == 0:
        place_E, bits_E = place_E.new_zeros(1), bits_E.new_zeros(1)
    found = torch.zeros(len(fetched_FK) // 8, 32, 2, 2, dtype=torch.int16, device=which_P.device)
    lane_P = 16 * (slots.row // 4) + 8 * (slots.product % 2) + slots.slot
    place_P = torch.where(lacks_P, filler_FK.view(-1)[at_P], place_E[outlier_P])
    found[slots.unit, lane_P, 0, slots.product // 2] = place_P.to(torch.int16)
    lane_P = 4 * slots.row + slots.slot // 2
    found[slots.unit, lane_P, 1, slots.second] = torch.where(lacks_P, 0, bits_E[outlier_P]).to(torch.int16)
    return found
