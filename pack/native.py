"""The CPU kernels' layout: codes in strips of 16 rows and tiles of 32 columns. Exactly invertible, any width, any shape.

    codes  uint8 [strips, tiles, 64 * bits]      strips = ceil(N / 16), tiles = ceil(K / 32)
    scale  [strips, G, 16]                       in the stored type; 0 in the rows beyond N
    zero   int8 [strips, G, 16]                  signed, only when asymmetric; float32, of u, where zero points are floats

Inside a tile the unsigned code u = q + 2^(b-1) is split into limbs of 4, 2 and 1 bits after the binary digits of b, low
bits in the widest limb (8 bits: one limb of whole bytes); the limbs lie one after the other, the widest first. A limb of
width w is a row of 64-byte vectors, each of 8 / w steps of four columns:

    byte 4 * row + j, bits w * f .. w * f + w - 1   =   column 4 * (steps of earlier vectors + f) + j of that row

A weight whose codes point into tables has strips of 4 rows and steps of 16 columns instead, see `pack/lookup.py`.

The columns of a group that is no multiple of 8 are filled up to one (`fill`), so that two steps have one scale.

Why: kernels/native/layout.h. This file is plain torch, so that a checkpoint in this layout can be written and read back on
any machine. Columns beyond K hold code 0: their activations are zeros. Cost: b bits per padded weight.

Shape legend: N out features, K in features, G groups along K, S strips, T tiles.
"""

from __future__ import annotations

import torch
from torch import Tensor

STRIP, TILE, OCTET = 16, 32, 8
WORDS_AT_ONCE = 1 << 16
"""Words that are rearranged at a time: they stay in a core's second-level cache."""
ROWS_AT_ONCE = 1024
"""Rows that are packed at a time, so that what is added at the peak stays small beside the weight."""


def columns(K: int, group: int, step: int = OCTET) -> int:
    """How many columns a weight of K has where groups are filled up to whole steps; group: 0 for all columns."""
    return -(-K // group) * (-(-group // step) * step) if 0 < group < K and group % step else K


def fill(values_NK: Tensor, group: int, step: int = OCTET) -> Tensor:
    """[N, K] -> [N, columns(K, group, step)] with zeros where a group is filled up; the same tensor where nothing is."""
    N, K = values_NK.shape
    if columns(K, group, step) == K:
        return values_NK
    whole = torch.nn.functional.pad(values_NK, (0, -K % group)).reshape(N, -1, group)
    return torch.nn.functional.pad(whole, (0, -group % step)).flatten(1)


def unfill(filled: Tensor, K: int, group: int, step: int = OCTET) -> Tensor:
    """The inverse of `fill`."""
    if columns(K, group, step) == K:
        return filled
    return filled.reshape(len(filled), -(-K // group), -1)[:, :, :group].flatten(1)[:, :K].contiguous()


def limbs(bits: int) -> list[int]:
    """Widths of the limbs of a code, widest first: 3 -> [2, 1], 8 -> [8]."""
    return [8] if bits == 8 else [width for width in (4, 2, 1) if bits & width]


def shape_of(N: int, K: int, bits: int, strip: int = STRIP) -> tuple[int, int, int]:
    """The shape of `codes` for a weight [N, K]."""
    return -(-N // strip), -(-K // (STRIP * TILE // strip)), 64 * bits


def pack_codes(values_NK: Tensor, bits: int, strip: int = STRIP) -> Tensor:
    """Signed codes int8 [N, K] of `bits` bits -> uint8 [strips, tiles, 64 * bits], strips of `strip` rows."""
    N, K = values_NK.shape
    packed = torch.empty(shape_of(N, K, bits, strip), dtype=torch.uint8, device=values_NK.device)
    step = 64 // strip
    for start in range(0, N, ROWS_AT_ONCE):
        rows = values_NK[start : start + ROWS_AT_ONCE]
        unsigned = torch.add(rows, 1 << (bits - 1), out=torch.empty(rows.shape, dtype=torch.int16, device=rows.device))
        padded = torch.nn.functional.pad(unsigned.to(torch.uint8), (0, -K % (8 * step), 0, -len(rows) % strip))
        # [S, row, T, step, j] -> [S, T, step, row, j]: the bytes of a vector are row and j.
        steps = padded.reshape(-1, strip, packed.shape[1], 8, step).permute(0, 2, 3, 1, 4)
        packed[start // strip : start // strip + steps.shape[0]] = _tile_bytes(steps.flatten(3), bits)
    return packed


def pack_stream(words_NW: Tensor, bits: int) -> Tensor:
    """The same from unsigned codes in rows of dense little-endian words (`pack/bits.py`), without unpacking them.

    A vector holds, of each row, exactly the codes of one word; only their places differ. With fields counted by c = 4 f + j,
    the stream has field c at bit w * c and the tile has it at bit 8 * j + w * f: the two lowest binary digits of c become
    the highest. Digits are exchanged in pairs, each pair by six operations on whole words.

    Args:
        words_NW: int32 [N, ceil(K * bits / 32)], unused bits zero.
        bits: 2, 4 or 8, whose codes never straddle a word.

    Returns:
        uint8 [strips, tiles, 64 * bits], as `pack_codes`.
    """
    N, W = words_NW.shape
    strips, tiles = -(-N // STRIP), -(-W // bits)
    packed = torch.empty(strips, tiles * bits, STRIP, dtype=torch.int32, device=words_NW.device)
    step = max(1, WORDS_AT_ONCE // (STRIP * max(W, 1)))
    for start in range(0, strips, step):
        rows = words_NW[start * STRIP : (start + step) * STRIP]
        held = _exchanged(rows, bits)
        padded = torch.nn.functional.pad(held, (0, tiles * bits - W, 0, -len(rows) % STRIP))
        packed[start : start + step] = padded.reshape(-1, STRIP, tiles * bits).transpose(1, 2)
    return packed.view(torch.uint8).reshape(strips, tiles, 64 * bits)


def _exchanged(words: Tensor, bits: int) -> Tensor:
    """Words with the fields of each in the order of the tile."""
    # Pairs of digits of a field's number: (f0, j1) then (j1', j0) rotates three; (f1, j1) and (f0, j0) swap two and two.
    for low, high in {8: (), 4: ((1, 2), (0, 1)), 2: ((1, 3), (0, 2))}[bits]:
        near, far = bits << low, bits << high
        # Fields with digit `low` set and digit `high` not set change places with those that are far - near bits above.
        mask = sum(((1 << bits) - 1) << (bits * c) for c in range(32 // bits) if c >> low & 1 and not c >> high & 1)
        moved = (words >> (far - near)).bitwise_xor_(words).bitwise_and_(mask)
        words = moved.bitwise_xor(words).bitwise_xor_(moved << (far - near))
    return words


def unpack_codes(packed: Tensor, bits: int, N: int, K: int, strip: int = STRIP) -> Tensor:
    """The inverse of `pack_codes`: int8 [N, K]."""
    values_NK = torch.empty(N, K, dtype=torch.int8, device=packed.device)
    for start in range(0, N, ROWS_AT_ONCE):
        part = packed[start // strip : (start + ROWS_AT_ONCE) // strip]
        steps = _tile_codes(part, bits).reshape(*part.shape[:2], 8, strip, 64 // strip)
        rows = steps.permute(0, 3, 1, 2, 4).reshape(part.shape[0] * strip, -1)
        signed = rows.to(torch.int16) - (1 << (bits - 1))
        values_NK[start : start + ROWS_AT_ONCE] = signed.to(torch.int8)[: min(ROWS_AT_ONCE, N - start), :K]
    return values_NK


def pack_factors(factors_NG: Tensor, strip: int = STRIP) -> Tensor:
    """Scales or zero points [N, G] -> [strips, G, strip], zeros in the rows beyond N."""
    N, G = factors_NG.shape
    # Padding bytes rather than numbers works for every type.
    padded = torch.zeros(-(-N // strip) * strip, G, dtype=factors_NG.dtype, device=factors_NG.device)
    padded[:N] = factors_NG
    return padded.reshape(-1, strip, G).transpose(1, 2).contiguous()


def pack_bits(bit_NG: Tensor) -> Tensor:
    """Zeros and ones [N, G] -> int16 [strips, G], bit i that of row i of a strip."""
    lanes = pack_factors(bit_NG).to(torch.int32) << torch.arange(STRIP, dtype=torch.int32, device=bit_NG.device)
    return lanes.sum(2, dtype=torch.int32).to(torch.int16)


def unpack_bits(packed: Tensor, N: int) -> Tensor:
    """The inverse of `pack_bits`: uint8 [N, G]."""
    bits = packed[..., None].to(torch.int32) >> torch.arange(STRIP, dtype=torch.int32, device=packed.device) & 1
    return unpack_factors(bits.to(torch.uint8), N)


def unpack_factors(packed: Tensor, N: int) -> Tensor:
    """The inverse of `pack_factors`: [N, G]."""
    return packed.transpose(1, 2).reshape(-1, packed.shape[1])[:N].contiguous()


def _tile_bytes(steps: Tensor, bits: int) -> Tensor:
    """Codes uint8 [S, T, 8 steps, 64] -> bytes [S, T, 64 * bits]."""
    found, value = [], 0
    for width in limbs(bits):
        per = 8 // width
        field = ((steps >> value) & ((1 << width) - 1)).reshape(*steps.shape[:2], width, per, 64)
        vectors = field[:, :, :, 0].clone()
        for f in range(1, per):
            vectors |= field[:, :, :, f] << (width * f)
        found.append(vectors.reshape(*steps.shape[:2], -1))
        value += width
    return torch.cat(found, -1)


def _tile_codes(packed: Tensor, bits: int) -> Tensor:
    """Bytes [S, T, 64 * bits] -> codes uint8 [S, T, 8 steps, 64]."""
    S, T = packed.shape[:2]
    steps = torch.zeros(S, T, 8, 64, dtype=torch.uint8, device=packed.device)
    begin, value = 0, 0
    for width in limbs(bits):
        per, size = 8 // width, 64 * width
        vectors = packed[:, :, begin : begin + size].reshape(S, T, width, 1, 64)
        shifts = torch.arange(0, 8, width, dtype=torch.uint8, device=packed.device).reshape(per, 1)
        fields = (vectors >> shifts) & ((1 << width) - 1)
        steps |= fields.reshape(S, T, 8, 64) << value
        begin, value = begin + size, value + width
    return steps
