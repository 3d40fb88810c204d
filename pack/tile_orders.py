"""Tiles of four bits with the bits of each 32-bit word in the order that a decoder wants to cut them in.

`pack/tiles.py` puts the codes of a register's two halves 16 bits apart, as integers need them. Two other decoders need less
work where the same 32 bits lie otherwise.

Floats, e2m1: a bfloat16 whose sign is bit 15 and whose bits 8..6 are the exponent and the mantissa of an e2m1 is that number
times 2^-126, subnormals included. With one rotation and one mask for register 0 to 2 of a step, and two of each for register
3, both halves of a register have their sign and magnitude in place:

    register    magnitude      sign                     both come into place by
    0           8..6           15                       nothing
    1           2..0           9                        6 to the left
    2           12..10         3 of the other half      4 to the right, around the end
    3           14, 5, 4       13                       2 to the left; bit 14 by 6 to the right

Pairs, any 16 numbers: byte i holds both codes of register i, the lower half's in its low nibble: a byte looks up a pair.

Cost: eight or nine masks and rotations for eight codes, at packing.

Shape legend: N out features, K in features, R row tiles, C k tiles.
"""

from __future__ import annotations

import torch
from torch import Tensor

from aerogel.pack.tiles import pack_tiles, unpack_tiles

Moves = tuple[tuple[int, int], ...]
"""Bits of a word of `pack_tiles`, and by how much they turn to the left."""

FLOATS: Moves = (
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
PAIRS: Moves = (
    *((0xF << 4 * i, 4 * i) for i in range(4)),
    *((0xF0000 << 4 * i, (4 * i - 12) % 32) for i in range(4)),
)


def pack_in_order(codes_NK: Tensor, order: Moves) -> Tensor:
    """Codes uint8 [N, K] of four bits -> uint8 [R, C, 1024]. Errors as `pack_tiles`."""
    return _turned(pack_tiles(codes_NK, 4), order)


def unpack_in_order(packed: Tensor, order: Moves, N: int, K: int) -> Tensor:
    """The inverse of `pack_in_order`: uint8 [N, K]."""
    back = tuple((_rotated(mask, turn), -turn % 32) for mask, turn in order)
    return unpack_tiles(_turned(packed, back), 4, N, K)


def _rotated(word: int, turn: int) -> int:
    return ((word << turn) | (word >> (32 - turn))) & 0xFFFFFFFF


def _turned(packed: Tensor, moves: Moves) -> Tensor:
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
