"""The layout of weight codes for portable GPU kernels: words of eight codes that stand 16 columns apart.

A compiler that is told only "shift and mask" must find the codes of one step of a matrix product in one step's registers.
So field i of every word belongs to step i: 16 lanes of words give 16 neighbouring columns for each of 8 shifts, and nothing
has to move between threads. A step never crosses a group, since groups are multiples of 16 columns.

    row    = 16 * row tile + r                  r = 0..15
    column = 128 * k tile + 16 * i + l          field i = 0..7 of lane l = 0..15

A word of b-bit codes has b bytes, whatever b is: a code is cut into limbs of 4, 2 and 1 bits as in `tiles`, widest and
lowest first, and a limb of w bits makes words of w bytes, field i at bit w * i of the little-endian word. The limbs of a
tile lie one after the other, each [16 rows, 16 lanes]. Tiles are stored [row tile][k tile][256 * b bytes]; rows and columns
beyond N and K hold code 0. Scales, zero points and tables lie as `tiles` has them.

Shape legend: N out features, K in features, R = ceil(N / 16) row tiles, C = ceil(K / 128) k tiles.
"""

from __future__ import annotations

import torch
from torch import Tensor

from aerogel.pack.tiles import COLUMNS, ROWS, limbs, pack_fields, unpack_fields

LANES = 16
FIELDS = 8


def pack_words(codes_NK: Tensor, bits: int) -> Tensor:
    """Codes as words of eight.

    Args:
        codes_NK: uint8 [N, K], values in [0, 2^bits); any device, any strides.
        bits: 1 to 8.

    Returns:
        uint8 [R, C, 256 * bits] on the same device.

    Raises:
        BadInput: a width outside 1..8, or codes that are no uint8 matrix.
    """
    return pack_fields(codes_NK, bits, limbs(bits), _words, _bytes_of)


def unpack_words(packed: Tensor, bits: int, N: int, K: int) -> Tensor:
    """The inverse of `pack_words`.

    Args:
        packed: uint8 [R, C, 256 * bits].
        bits: 1 to 8.
        N, K: the weight's own shape.

    Returns:
        uint8 [N, K], values in [0, 2^bits).

    Raises:
        BadInput: a width outside 1..8, or a shape that does not belong to N, K and bits.
    """
    return unpack_fields(packed, bits, N, K, limbs(bits), _fields_of, _rows)


def _words(part: Tensor, C: int) -> Tensor:
    """Axes: row tile, r | k tile, i, l  ->  row tile, k tile, r, l, i."""
    return part.reshape(-1, ROWS, C, FIELDS, LANES).permute(0, 2, 1, 4, 3)


def _rows(words: Tensor) -> Tensor:
    """The inverse of `_words`."""
    return words.permute(0, 2, 1, 4, 3).reshape(-1, words.shape[1] * COLUMNS)


def _bytes_of(limb: Tensor, width: int) -> Tensor:
    """Fields [..., 8] of `width` bits -> bytes [..., width], the first fields in the low bits of the first byte."""
    parts = limb.reshape(*limb.shape[:-1], width, FIELDS // width)
    byte: Tensor = parts[..., 0].clone()
    for place in range(1, FIELDS // width):
        byte |= parts[..., place] << (width * place)
    return byte


def _fields_of(part: Tensor, width: int) -> Tensor:
    """Bytes [r, c, 256 * width] of one limb -> fields [r, c, 16, 16, 8]."""
    byte = part.reshape(*part.shape[:2], ROWS, LANES, width)
    fields = [(byte >> (width * place)) & ((1 << width) - 1) for place in range(FIELDS // width)]
    return torch.stack(fields, -1).flatten(-2)
