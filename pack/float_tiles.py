"""Tiles of e2m1 floats: those of `pack/tiles.py`, with the bits of each 32-bit word where 16-bit floats have theirs.

A bfloat16 whose sign is bit 15 and whose bits 8..6 are the exponent and the mantissa of an e2m1 is that number times 2^-126,
subnormals included. So a word is kept as a kernel wants to cut it: with one rotation and one mask for register 0 to 2 of a
step, and two of each for register 3, both halves of a register have their sign and magnitude in place.

    register    magnitude      sign      both come into place by
    0           8..6           15        nothing
    1           2..0           9         6 to the left
    2           12..10         3 of the other half      4 to the right, around the end
    3           14, 5, 4       13        2 to the left; bit 14 by 6 to the right

Cost: eight masks and rotations for eight codes, at packing.

Shape legend: R row tiles, C k tiles.
"""

from __future__ import annotations

import torch
from torch import Tensor

from aerogel.pack.tiles import pack_tiles, unpack_tiles

BITS = 4
MOVES = (
    (0x00070007, 6),
    (0x00080008, 12),
    (0x00700070, 28),
    (0x00800080, 2),
    (0x07000700, 2),
    (0x08000800, 8),
    (0x30003000, 24),
    (0x40004000, 0),
    (0x80008000, 30),
)
"""Bits of a word of `pack_tiles` and by how much they turn to the left."""


def pack_float_tiles(codes_NK: Tensor, bits: int = BITS) -> Tensor:
    """e2m1 codes uint8 [N, K] (sign, two bits of exponent, one of mantissa) -> uint8 [R, C, 1024]; errors as `pack_tiles`."""
    return _turned(pack_tiles(codes_NK, bits), list(MOVES))


def unpack_float_tiles(packed: Tensor, bits: int, N: int, K: int) -> Tensor:
    """The inverse of `pack_float_tiles`: uint8 [N, K]."""
    back = [(_rotated(mask, turn), -turn % 32) for mask, turn in MOVES]
    return unpack_tiles(_turned(packed, back), bits, N, K)


def _rotated(word: int, turn: int) -> int:
    return ((word << turn) | (word >> (32 - turn))) & 0xFFFFFFFF


def _turned(packed: Tensor, moves: list[tuple[int, int]]) -> Tensor:
    """Every 32-bit word with its bits moved."""
    if packed.is_meta:
        return packed
    out = torch.empty_like(packed)
    for source, target in zip(packed, out, strict=True):  # a row tile at a time keeps the work memory small
        words = source.view(torch.int32).long() & 0xFFFFFFFF
        moved = torch.zeros_like(words)
        for mask, turn in moves:
            bits = words & mask
            moved |= (bits << turn) | (bits >> (32 - turn))
        moved &= 0xFFFFFFFF
        target.view(torch.int32).copy_(torch.where(moved >= 1 << 31, moved - (1 << 32), moved))
    return out
