"""Floats of few bits that GPU kernels decode by arithmetic: whose codes, and as which float.

A float with at least one bit of mantissa needs no table: its bits are those of a wider one (kernels/cuda/floats.cuh). Floats
of three bits are held in four, as the e2m1 of the same number; all others as they are. A float is known by its bits and by
how many of them are mantissa.

Shape legend: any.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from aerogel.errors import BadInput
from aerogel.pack.tile_orders import E2M1, E2M3, E3M2, E4M3, E5M2, Order
from aerogel.pack.tile_orders import pack_in_order as in_order
from aerogel.pack.tiles import pack_tiles
from aerogel.quantize.formats.floats import Kind, float_numbers
from aerogel.quantize.grids import Fp8Grid, Grid
from aerogel.quantize.planes import PlaneGrid
from aerogel.quantize.tables import TableGrid

KINDS: tuple[Kind, ...] = ("e2m1", "e2m2", "e3m1", "e2m3", "e3m2", "e4m3", "e5m2")
INSIDE: dict[Kind, Kind] = {"e1m1": "e2m1", "e2m0": "e2m1"}
"""Floats whose numbers are among those of another, which holds them."""
ORDERS: dict[tuple[int, int], Order] = {(4, 1): E2M1, (6, 3): E2M3, (6, 2): E3M2, (8, 3): E4M3, (8, 2): E5M2}
"""Bits and bits of mantissa -> how the bits of words are ordered; the others as `pack/tiles.py` has it."""


def float_kind(grid: Grid) -> Kind | None:
    """The float that holds the codes of this grid; None where numbers are looked up."""
    if isinstance(grid, Fp8Grid):
        return "e4m3"
    return _kind(grid) if isinstance(grid, TableGrid) and not grid.learned else None


@functools.cache
def _kind(grid: TableGrid) -> Kind | None:
    numbers = repr(grid.numbers())  # NaN equals NaN here
    found = next((kind for kind in (*KINDS, *INSIDE) if repr((float_numbers(kind),)) == numbers), None)
    return None if found is None else INSIDE.get(found, found)


def mantissa_bits(grid: Grid) -> int:
    """Bits of mantissa of the float that holds the codes of this grid; 0 where numbers are looked up. 1 for a single plane: its
    codes of one bit are signs."""
    if isinstance(grid, PlaneGrid):
        return int(grid.bits == 1 and grid.offset == "none")
    kind = float_kind(grid)
    return 0 if kind is None else int(kind[3])


def kind_of(bits: int, mantissa: int) -> Kind:
    """The float of so many bits and bits of mantissa."""
    return next(kind for kind in KINDS if kind == f"e{bits - 1 - mantissa}m{mantissa}")


@functools.cache
def names(grid: TableGrid) -> Tensor | None:
    """The code of each code of this grid in the float that holds it, uint8 [2^b]; None where it is the same."""
    kind, own = float_kind(grid), grid.numbers()[0]
    if kind is None or 1 << grid.bits == len(float_numbers(kind)):
        return None
    theirs, half = float_numbers(kind), len(own) // 2
    places = [theirs.index(number) for number in own[:half]]
    return torch.tensor([*places, *(place + len(theirs) // 2 for place in places)], dtype=torch.uint8)


def own_names(grid: TableGrid) -> Tensor | None:
    """The inverse of `names`, uint8 [256]."""
    held = names(grid)
    own = torch.zeros(256, dtype=torch.uint8)
    return None if held is None else own.scatter_(0, held.long(), torch.arange(len(held), dtype=torch.uint8))


def pack_floats(values: Tensor, bits: int, mantissa: int, pack: Callable[[Tensor, int], Tensor] = pack_tiles) -> Tensor:
    """Codes uint8 [N, K] of a float -> tiles, or what else `pack` makes of codes. Raises `BadInput` for codes of eight bits
    that are no number."""
    if bits == 8 and not values.is_meta:
        least = 0x7F if mantissa == 3 else 0x7C
        if bool(((values & 0x7F) >= least).any()):
            raise BadInput(
                f"a weight in e{7 - mantissa}m{mantissa} holds a NaN or an infinity, which the kernels would take for a number;"
                " get the checkpoint again"
            )
    order = ORDERS.get((bits, mantissa)) if pack is pack_tiles else None
    return pack(values, bits) if order is None else in_order(values, bits, order)
