"""The layout of weight codes for NVIDIA's matrix instructions: tiles of 16 rows x 128 columns, every lane's bits together.

A warp multiplies with `mma.m16n8k16`, the weights as its left factor A. Of such a 16 x 16 block each lane holds eight
numbers, so with b-bit codes exactly b bytes, whatever b is: stored in the order in which the lanes want them, odd widths
cost nothing, a lane's load is one aligned vector, and no shuffle stands between memory and the tensor core (MARLIN's
offline permutation, Tilus' bytes per lane, TurboMind's rule that the packer follows the fragment map).

    row    = 16 * row tile + g + 8 * i0                 g = lane / 4, t = lane % 4
    column = 128 * k tile + 16 * s + 8 * i1 + 2 * t + e     step s = 0..7, register i = i0 + 2 * i1, half e

A code is cut into limbs of 4, 2 and 1 bits, its low bits in the widest limb: 5 = 4 + 1, 6 = 4 + 2, 7 = 4 + 2 + 1,
8 = 4 + 4. The limbs of a tile lie one after the other, widest first. In a lane's 32-bit words, half e of the register
begins at bit 16 * e, and register i of step s has there

    4 bits   word s           bit 4 * i                    the lane's words in two pieces of 16 bytes, 512 bytes apart
    2 bits   word s / 2       bit 8 * (s % 2) + 2 * i      one piece of 16 bytes
    1 bit    word s / 4       bit 4 * (s % 4) + i          one piece of 8 bytes

Three bits are not cut: whole codes cost a kernel half the instructions. Of the 16 codes f = 4 * (s % 4) + i of half a tile

    3 bits   word 3 * (s / 4) + f / 5    bit 3 * (f % 5)   words 0..3 in one piece of 16 bytes, 4 and 5 in one of 8

and the bits of the sixteenth are the bits 15 of the three words, the lowest first.

Tiles are stored [row tile][k tile][256 * b bytes], so that the whole of K is one stream for each 16 rows. Rows and
columns beyond N and K hold code 0. Cost: a few elementwise passes over bytes; work memory of one chunk of rows.

Shape legend: N out features, K in features, R = ceil(N / 16) row tiles, C = ceil(K / 128) k tiles, G groups along K.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from aerogel.errors import BadInput

ROWS = 16
COLUMNS = 128
CHUNK = {"cpu": 1 << 20, "cuda": 1 << 24}
"""Codes in work at a time: what stays in a CPU's cache, or what keeps a GPU busy for longer than its launches take."""


def limbs(bits: int) -> tuple[int, ...]:
    """Widths of the limbs of a code cut by its binary digits, widest and lowest first: 7 is (4, 2, 1)."""
    if not 1 <= bits <= 8:
        raise BadInput(f"codes of {bits} bits have no tile layout; write a width from 1 to 8")
    return (4, 4) if bits == 8 else tuple(width for width in (4, 2, 1) if bits & width)


def pieces(bits: int) -> tuple[int, ...]:
    """Widths of the parts of a code in a tile: its limbs, but three bits stay together. Raises as `limbs`."""
    return (3,) if bits == 3 else limbs(bits)


def tile_counts(N: int, K: int) -> tuple[int, int]:
    """Row tiles and k tiles of an [N, K] weight."""
    return -(-N // ROWS), -(-K // COLUMNS)


def pack_tiles(codes_NK: Tensor, bits: int) -> Tensor:
    """Codes in the order of the matrix instruction.

    Args:
        codes_NK: uint8 [N, K], values in [0, 2^bits); any device, any strides.
        bits: 1 to 8.

    Returns:
        uint8 [R, C, 256 * bits] on the same device.

    Raises:
        BadInput: a width outside 1..8, or codes that are no uint8 matrix.
    """
    return pack_fields(codes_NK, bits, pieces(bits), _lanes, lambda limb, width: _JOIN[width](limb))


def unpack_tiles(packed: Tensor, bits: int, N: int, K: int) -> Tensor:
    """The inverse of `pack_tiles`.

    Args:
        packed: uint8 [R, C, 256 * bits].
        bits: 1 to 8.
        N, K: the weight's own shape.

    Returns:
        uint8 [N, K], values in [0, 2^bits).

    Raises:
        BadInput: a width outside 1..8, or a shape that does not belong to N, K and bits.
    """
    return unpack_fields(packed, bits, N, K, pieces(bits), _split, _rows)


def _lanes(part: Tensor, C: int) -> Tensor:
    """Axes: row tile, i0, g | k tile, s, i1, t, e  ->  row tile, k tile, s, g, t, e, i1, i0."""
    return part.reshape(-1, 2, 8, C, 8, 2, 4, 2).permute(0, 3, 4, 2, 6, 7, 5, 1)


def _rows(lanes: Tensor) -> Tensor:
    """The inverse of `_lanes`."""
    return lanes.permute(0, 7, 3, 1, 2, 6, 4, 5).reshape(-1, lanes.shape[1] * COLUMNS)


def pack_fields(
    codes_NK: Tensor,
    bits: int,
    widths: Sequence[int],
    spread: Callable[[Tensor, int], Tensor],
    join: Callable[[Tensor, int], Tensor],
) -> Tensor:
    """Codes in tiles of 16 x 128, limb after limb, in whatever order inside; a few rows at a time.

    Args:
        codes_NK: uint8 [N, K].
        bits: of a code. widths: of its limbs, lowest first.
        spread: uint8 [16 r, 128 C] and C -> the codes by the axes of the order, [r, C, ...].
        join: those axes with codes of one limb, and its width -> bytes [r, C, ...], 256 * width in all.

    Returns:
        uint8 [R, C, 256 * bits].
    """
    if codes_NK.dim() != 2 or codes_NK.dtype != torch.uint8:
        raise BadInput(f"codes to pack must be a uint8 matrix, found {codes_NK.dtype} {list(codes_NK.shape)}")
    N, K = codes_NK.shape
    R, C = tile_counts(N, K)
    packed = torch.empty(R, C, 256 * bits, dtype=torch.uint8, device=codes_NK.device)
    if packed.is_meta:
        return packed
    step = row_tiles_at_once(codes_NK, C)
    for first in range(0, R, step):
        rows = codes_NK[first * ROWS : (first + step) * ROWS]
        part = torch.nn.functional.pad(rows, (0, C * COLUMNS - K, 0, -rows.shape[0] % ROWS))
        fields = spread(part, C).contiguous()
        offset, low = 0, 0
        for width in widths:
            limb = (fields >> low) & ((1 << width) - 1)
            packed[first : first + step, :, offset : offset + 256 * width] = join(limb, width).flatten(2)
            offset, low = offset + 256 * width, low + width
    return packed


def unpack_fields(
    packed: Tensor,
    bits: int,
    N: int,
    K: int,
    widths: Sequence[int],
    split: Callable[[Tensor, int], Tensor],
    gather: Callable[[Tensor], Tensor],
) -> Tensor:
    """The inverse of `pack_fields`: `split` undoes its `join`, `gather` its `spread`. uint8 [N, K]."""
    R, C = tile_counts(N, K)
    if packed.dtype != torch.uint8 or tuple(packed.shape) != (R, C, 256 * bits):
        raise BadInput(
            f"tiles of a [{N}, {K}] weight in {bits} bits are uint8 [{R}, {C}, {256 * bits}],"
            f" found {packed.dtype} {list(packed.shape)}"
        )
    codes_NK = torch.empty(N, K, dtype=torch.uint8, device=packed.device)
    if packed.is_meta:
        return codes_NK
    step = row_tiles_at_once(codes_NK, C)
    for first in range(0, R, step):
        part = packed[first : first + step]
        fields: Tensor | None = None
        offset, low = 0, 0
        for width in widths:
            limb = split(part[:, :, offset : offset + 256 * width], width) << low
            fields = limb if fields is None else fields.bitwise_or_(limb)
            offset, low = offset + 256 * width, low + width
        out = codes_NK[first * ROWS : (first + step) * ROWS]
        if fields is not None:
            out.copy_(gather(fields)[: out.shape[0], :K])
    return codes_NK


def pack_rows_of_tiles(values_NG: Tensor) -> Tensor:
    """Scales, zero points or table numbers [N, G] as [R, G, 16], rows beyond N zero; same dtype and device."""
    N, G = values_NG.shape
    padded = torch.nn.functional.pad(values_NG, (0, 0, 0, -N % ROWS))
    return padded.reshape(-1, ROWS, G).transpose(1, 2).contiguous()


def unpack_rows_of_tiles(values_RG16: Tensor, N: int) -> Tensor:
    """The inverse of `pack_rows_of_tiles`: [N, G]."""
    G = values_RG16.shape[1]
    return values_RG16.transpose(1, 2).reshape(-1, G)[:N].contiguous()


def row_tiles_at_once(codes_NK: Tensor, C: int) -> int:
    """Row tiles of a chunk: see `CHUNK`."""
    return max(1, CHUNK.get(codes_NK.device.type, CHUNK["cpu"]) // (ROWS * COLUMNS * max(C, 1)))


def _axis(x: Tensor, dim: int, *sizes: int) -> Tensor:
    """Axis `dim` split into `sizes`."""
    return x.reshape(*x.shape[:dim], *sizes, *x.shape[dim + 1 :])


def _join4(limb: Tensor) -> Tensor:
    """[r, c, s, g, t, e, i1, i0] -> bytes [r, c, piece, g, t, s % 4, e, i1]; i0 is the nibble."""
    byte = limb[..., 0] | limb[..., 1] << 4
    return _axis(byte, 2, 2, 4).permute(0, 1, 2, 4, 5, 3, 6, 7)


def _join2(limb: Tensor) -> Tensor:
    """-> bytes [r, c, g, t, word, e, s % 2]; i0 and i1 are the field."""
    byte = limb[..., 0, 0] | limb[..., 0, 1] << 2 | limb[..., 1, 0] << 4 | limb[..., 1, 1] << 6
    return _axis(byte, 2, 4, 2).permute(0, 1, 4, 5, 2, 6, 3)


def _join1(limb: Tensor) -> Tensor:
    """-> bytes [r, c, g, t, word, e, s / 2 % 2]; i0, i1 and s % 2 are the bit."""
    half = limb[..., 0, 0] | limb[..., 0, 1] << 1 | limb[..., 1, 0] << 2 | limb[..., 1, 1] << 3
    pairs = _axis(half, 2, 2, 2, 2)
    byte = pairs[:, :, :, :, 0] | pairs[:, :, :, :, 1] << 4
    return byte.permute(0, 1, 4, 5, 2, 6, 3)


def _join3(limb: Tensor) -> Tensor:
    """-> bytes [r, c, pieces of 16 and of 8 bytes a lane]; the six words of a lane have two halves of five codes and a bit."""
    codes = _axis(limb, 2, 2, 4).permute(0, 1, 4, 5, 2, 6, 3, 7, 8).flatten(-3).short()  # r, c, g, t, half, e, code
    fives = _axis(codes[..., :15], 6, 3, 5)
    word = sum(fives[..., q] << 3 * q for q in range(5))
    last = torch.stack([codes[..., 15] >> bit & 1 for bit in range(3)], -1)
    halves = (word | last << 15).transpose(-1, -2).contiguous()  # r, c, g, t, half of the tile, word, e
    lane = halves.flatten(4).view(torch.uint8)
    return torch.cat([lane[..., :16].flatten(2), lane[..., 16:].flatten(2)], -1)


_JOIN = {4: _join4, 3: _join3, 2: _join2, 1: _join1}


def _split(part: Tensor, width: int) -> Tensor:
    """Bytes [r, c, 256 * width] of one limb -> its fields [r, c, s, g, t, e, i1, i0], the inverse of the joins."""
    lead = part.shape[:2]
    if width == 3:
        lane = torch.cat([part[..., :512].reshape(*lead, 8, 4, 16), part[..., 512:].reshape(*lead, 8, 4, 8)], -1).contiguous()
        word = lane.view(torch.int16).reshape(*lead, 8, 4, 2, 3, 2).transpose(-1, -2)  # g, t, half of the tile, e, word
        codes = torch.stack([word >> 3 * q & 7 for q in range(5)], -1).flatten(-2)
        last = (word >> 15 & 1) << torch.arange(3, dtype=torch.int16, device=part.device)
        codes = torch.cat([codes, last.sum(-1, keepdim=True, dtype=torch.int16)], -1).to(torch.uint8)
        fields = _axis(codes, -1 % codes.dim(), 4, 2, 2).permute(0, 1, 4, 6, 2, 3, 5, 7, 8)  # half, step, g, t, e, i1, i0
        return fields.reshape(*lead, 8, 8, 4, 2, 2, 2)
    if width == 4:
        byte = part.reshape(*lead, 2, 8, 4, 4, 2, 2).permute(0, 1, 2, 5, 3, 4, 6, 7).reshape(*lead, 8, 8, 4, 2, 2)
        return torch.stack([byte & 15, byte >> 4], -1)
    if width == 2:
        byte = part.reshape(*lead, 8, 4, 4, 2, 2).permute(0, 1, 4, 6, 2, 3, 5).reshape(*lead, 8, 8, 4, 2)
        return _axis(torch.stack([(byte >> 2 * i) & 3 for i in range(4)], -1), 6, 2, 2)
    byte = part.reshape(*lead, 8, 4, 2, 2, 2).permute(0, 1, 4, 6, 2, 3, 5)
    fields = torch.stack([(byte >> 4 * odd) & 15 for odd in range(2)], 4).reshape(*lead, 8, 8, 4, 2)
    return _axis(torch.stack([(fields >> i) & 1 for i in range(4)], -1), 6, 2, 2)
