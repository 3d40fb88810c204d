"""Tiles of four, six and eight bits with the bits of their 32-bit words in the order that a decoder wants to cut them in.

`pack/tiles.py` puts the codes of a register's two halves 16 bits apart, and eight bits into two limbs, as integers need them.
Two other decoders need less work where the same bits lie otherwise.

E2M1: a bfloat16 whose sign is bit 15 and whose bits 8..6 are the exponent and the mantissa of an e2m1 is that number times
2^-126, subnormals included. With one rotation and one mask for register 0 to 2 of a step, and two of each for register 3, both
halves of a register have their sign and magnitude in place:

    register    magnitude      sign                     both come into place by
    0           8..6           15                       nothing
    1           2..0           9                        6 to the left
    2           12..10         3 of the other half      4 to the right, around the end
    3           14, 5, 4       13                       2 to the left; bit 14 by 6 to the right

E4M3: the same with bits 10..4 and 2^-120. Registers 0 and 1 share the word of the lower limb, 2 and 3 that of the upper one:

    0, 2        10..4          15                       nothing
    1, 3        14..11, 2..0   3 of the other half      4 to the right, around the end; bits 2..0 by 4 to the left

E5M2: bits 11..5 and 2^-112.

    0, 2        11..5          15                       nothing
    1, 3        14..12, 3..0   4                        3 to the right; bits 3..0 by 5, bit 4 by 11 to the left

E2M3, E3M2: six bits, of which the lowest four lie in the wide limb as ever. The sign and the fifth bit are the narrow limb's:
register i of step s is number c = 4 (s % 2) + i there, and c to the left brings its sign to bit 15 and its fifth bit to
8 or 9, where the exponent wants it. The first one or two, whose fifth bit would lie among the signs, need 8 more for it.

PAIRS, any 16 numbers: byte i holds both codes of register i, the lower half's in its low nibble: a byte looks up a pair.

ROWS, any 16 numbers that each row has for itself: two steps share two words, one of row g and one of row g + 8, a half
word each, of which a byte has both codes of a register, as in PAIRS.

BYTES, any 256 numbers: codes are whole bytes, half e of register i is byte 2 (i % 2) + e of word i / 2.

Cost: a mask and a rotation for each line of an order, at packing.

Shape legend: N out features, K in features, R row tiles, C k tiles.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from aerogel.pack.tiles import pack_tiles, row_tiles_at_once, unpack_tiles


class Move(NamedTuple):
    """Some bits of a word of `pack_tiles` and how far they turn to the left. Words of the lower limb are 0, of the upper 1; of
    four bits, which have one limb, those of an even step are 0 and of an odd one 1."""

    mask: int
    turn: int
    source: int = 0
    target: int = 0

    @property
    def back(self) -> Move:
        """The inverse."""
        return Move(_turned(self.mask, self.turn), -self.turn % 32, self.target, self.source)


Order = tuple[Move, ...]

E2M1: Order = (
    Move(0x00070007, 6),
    Move(0x00080008, 12),
    Move(0x00700070, 28),
    Move(0x00800080, 2),
    Move(0x07000700, 2),
    Move(0x08000800, 8),
    Move(0x30003000, 24),
    Move(0x40004000, 0),
    Move(0x80008000, 30),
)
# Of a register's two nibbles: the lower limb has the mantissa and the exponent's last bit, the upper one the rest and the sign.
_EVEN, _ODD = ((0xF, 4, 0), (0x7, 8, 1), (0x8, 12, 1)), ((0x7, 28, 0), (0x8, 4, 0), (0x7, 8, 1), (0x8, 12, 1))
E4M3: Order = tuple(
    Move(0x10001 * mask << 4 * register, (turn - 8 * (register // 2)) % 32, limb, register // 2)
    for register in range(4)
    for mask, turn, limb in (_ODD if register % 2 else _EVEN)
)
PAIRS: Order = (
    *(Move(0xF << 4 * i, 4 * i) for i in range(4)),
    *(Move(0xF0000 << 4 * i, (4 * i - 12) % 32) for i in range(4)),
)
ROWS: Order = tuple(
    Move(0xF << 4 * i + 16 * e, (16 * step + 8 * (i // 2) + 4 * e - 4 * i - 16 * e) % 32, step, i % 2)
    for step in range(2)
    for i in range(4)
    for e in range(2)
)
# Of register i its halves' nibbles lie at bits 4 i and 4 i + 16, the lower four bits in one word and the upper four in another.
BYTES: Order = tuple(
    Move(0xF << 4 * i + 16 * e, (16 * (i % 2) + 8 * e + 4 * limb - 4 * i - 16 * e) % 32, limb, i // 2)
    for i in range(4)
    for e in range(2)
    for limb in range(2)
)


E5M2: Order = tuple(
    Move(0x10001 * mask << 4 * register, (place - 4 * register) % 32, limb, register // 2)
    for register in range(4)
    for mask, place, limb in (
        ((0xF, 0, 0), (0x7, 12, 1), (0x8, 1, 1)) if register % 2 else ((0xF, 5, 0), (0x7, 9, 1), (0x8, 12, 1))
    )
)


def _six(top: int) -> Order:
    """The narrow limb of six bits, whose fifth bits come to bit `top`."""
    signs = (Move(0x20002 << 2 * c, (14 - 3 * c) % 32) for c in range(8))
    fifths = (Move(0x10001 << 2 * c, ((top - c if c > top - 8 else top - 8 - c) - 2 * c) % 32) for c in range(8))
    return (*signs, *fifths)


E2M3, E3M2 = _six(8), _six(9)


def pack_in_order(codes_NK: Tensor, bits: int, order: Order) -> Tensor:
    """Codes uint8 [N, K] of four, six or eight bits -> uint8 [R, C, 256 * bits]. Errors as `pack_tiles`."""
    return _moved(pack_tiles(codes_NK, bits), bits, order)


def unpack_in_order(packed: Tensor, bits: int, order: Order, N: int, K: int) -> Tensor:
    """The inverse of `pack_in_order`: uint8 [N, K]."""
    return unpack_tiles(_moved(packed, bits, tuple(move.back for move in order)), bits, N, K)


def _turned(word: int, turn: int) -> int:
    return ((word << turn) | (word >> (32 - turn))) & 0xFFFFFFFF


def _moved(packed: Tensor, bits: int, order: Order) -> Tensor:
    """Every 32-bit word with its bits where the order has them."""
    if packed.is_meta:
        return packed
    C, first_byte = packed.shape[1], 1024 if bits == 6 else 0  # six bits: the narrow limb alone
    out = packed.clone() if first_byte else torch.empty_like(packed)
    steps = bits == 4 and any(move.source or move.target for move in order)
    limbs, held = (1, 128) if first_byte else (2, 1) if steps else (bits // 4, 256)  # words of a limb, or of a step
    step = row_tiles_at_once(packed, C)
    for first in range(0, packed.shape[0], step):
        words = packed[first : first + step, :, first_byte:].contiguous().view(torch.int32).reshape(-1, limbs, held)
        moved = torch.zeros_like(words)
        for move in order:
            source, target = words[:, move.source], moved[:, move.target]
            if move.turn == 0:
                target |= source & _signed(move.mask)
                continue
            # Shifts to the right bring copies of the sign along, which the mask takes away again.
            right = 32 - move.turn
            high, low = move.mask & (0xFFFFFFFF << right & 0xFFFFFFFF), move.mask & (0xFFFFFFFF >> move.turn)
            if low:
                target |= (source & _signed(low)) << move.turn
            if high:
                target |= (source >> right) & (high >> right)
        out[first : first + step, :, first_byte:] = moved.reshape(-1, C, 128 if first_byte else 64 * bits).view(torch.uint8)
    return out


def _signed(mask: int) -> int:
    """32 bits as the number that an int32 has for them."""
    return mask - (mask >> 31 << 32)
