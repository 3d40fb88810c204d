"""Tiles of codes of one to four bits as nibbles, the way a byte permutation looks them up (kernels/cuda/planes.cuh).

The tiles and lanes are those of `pack/tiles.py`. A lane has eight codes in each of the eight steps of a tile: with one nibble
for each they are a word, and a permutation takes the four of its lower or upper half. By rows these are the codes of row g and
of row g + 8, by columns those of columns 0..7 and 8..15 of the step:

    rows       nibble 4 i0 + 2 i1 + e          columns    nibble 4 i1 + 2 i0 + e

Codes of fewer bits leave room in their nibbles for those of other steps, so that b bits take 2 b words:

    4 bits   word s                  a nibble is a code's lower three bits; the fourth, which is a sign, lies at bit 8 c + 7 for
                                     code c of the lower half word, at bit 8 c + 3 for code c of the upper one
    3 bits   word 3 (s / 4) + s % 4  for s % 4 < 3; bit j of the fourth step's codes is bit 3 of the nibbles of word j
    2 bits   word s / 2              steps s and s + 1 in the lower and upper two bits
    1 bit    word s / 4              step s in bit s % 4

A lane's words lie in pieces of four, then two, piece after piece for all lanes, as `pack/tiles.py` has them. Cost: a few
elementwise passes over four bytes for each code; work memory of one chunk of rows.

Shape legend: N out features, K in features, R = ceil(N / 16) row tiles, C = ceil(K / 128) k tiles.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from aerogel.pack.tiles import _lanes, _rows, pack_fields, unpack_fields

EACH = 0x11111111
"""The lowest bit of every nibble."""


def pack_nibbles(codes_NK: Tensor, bits: int, *, by_columns: bool = False) -> Tensor:
    """uint8 [N, K], values below 2^bits, of 1 to 4 bits -> uint8 [R, C, 256 * bits]. Raises `BadInput` for another type."""
    return pack_fields(codes_NK, bits, (bits,), _lanes, partial(_join, by_columns=by_columns))


def unpack_nibbles(packed: Tensor, bits: int, N: int, K: int, *, by_columns: bool = False) -> Tensor:
    """The inverse of `pack_nibbles`: uint8 [N, K]. Raises `BadInput` for a shape that does not belong to N, K and bits."""
    return unpack_fields(packed, bits, N, K, (bits,), partial(_split, by_columns=by_columns), _rows)


def _sign(place: int) -> int:
    """Where the fourth bit of the code of nibble `place` lies."""
    return 8 * (place % 4) + (7 if place < 4 else 3)


def _join(codes: Tensor, bits: int, *, by_columns: bool) -> Tensor:
    """[r, c, s, g, t, e, i1, i0] -> bytes [r, c, 256 * bits]."""
    ordered = codes.permute(0, 1, 2, 3, 4, *((6, 7, 5) if by_columns else (7, 6, 5))).flatten(-3).int()
    nibbles = torch.zeros_like(ordered[..., 0])
    for place in range(8):
        nibbles |= (ordered[..., place] & 7) << 4 * place
        nibbles |= (ordered[..., place] >> 3) << _sign(place)
    step = nibbles.unbind(2)
    if bits == 4:
        words = list(step)
    elif bits == 3:
        words = [step[h + j] | (step[h + 3] >> j & EACH) << 3 for h in (0, 4) for j in range(3)]
    elif bits == 2:
        words = [step[s] | step[s + 1] << 2 for s in range(0, 8, 2)]
    else:
        words = [step[s] | step[s + 1] << 1 | step[s + 2] << 2 | step[s + 3] << 3 for s in (0, 4)]
    pieces = [torch.stack(words[first : first + 4], -1).flatten(2) for first in range(0, len(words), 4)]
    return torch.cat(pieces, -1).contiguous().view(torch.uint8)


def _split(packed: Tensor, bits: int, *, by_columns: bool) -> Tensor:
    """The inverse of `_join`."""
    lead = packed.shape[:2]
    held = packed.contiguous().view(torch.int32)
    counts = [min(4, 2 * bits - first) for first in range(0, 2 * bits, 4)]
    pieces = torch.split(held, [32 * count for count in counts], -1)
    word = [w for piece, n in zip(pieces, counts, strict=True) for w in piece.reshape(*lead, 8, 4, n).unbind(-1)]
    if bits == 4:
        step = word
    elif bits == 3:
        step = []
        for first in (0, 3):
            three = word[first : first + 3]
            step += [w & 7 * EACH for w in three]
            step.append((three[0] >> 3 & EACH) | (three[1] >> 3 & EACH) << 1 | (three[2] >> 3 & EACH) << 2)
    else:
        step = [word[s * bits // 4] >> s % (4 // bits) * bits & ((1 << bits) - 1) * EACH for s in range(8)]
    nibbles = torch.stack(step, 2)
    signs = [(nibbles >> _sign(place) & 1) << 3 if bits == 4 else 0 for place in range(8)]
    codes = torch.stack([nibbles >> 4 * place & 7 | signs[place] for place in range(8)], -1).to(torch.uint8)
    axes = codes.reshape(*lead, 8, 8, 4, 2, 2, 2)  # i0, i1, e, or i1, i0, e
    return axes.permute(0, 1, 2, 3, 4, *((7, 5, 6) if by_columns else (7, 6, 5)))
