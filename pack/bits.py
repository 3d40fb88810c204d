"""Dense bit packing: unsigned codes of 1 to 8 bits, end to end, in int32 words.

Element i of a row occupies the bits `i*b .. i*b + b - 1` of that row's little-endian bit stream, so a code may straddle
two words and 32 codes fill exactly `b` words. This is the layout of compressed-tensors `pack-quantized` (along K), of
its packed zero points (along N) and of GPTQ's `qweight` (along K, transposed).

How: any eight codes are `b` whole bytes. Eight codes go into one int64 (`8b <= 64` bits), and its first `b` bytes are
the stream. Widths that divide 8 take a shorter way, `8/b` codes per byte. Everything is a handful of elementwise passes
over bytes; 4096 x 14336 at 4 bits takes a small part of a second on one core.

Shape legend: I codes along the packed dimension, W = ceil(I * b / 32) words.
"""

from __future__ import annotations

import torch
from torch import Tensor

from aerogel.errors import BadInput

WORD_BITS = 32
WORD_BYTES = 4


def words(count: int, bits: int) -> int:
    """int32 words that `count` codes of `bits` bits fill: ceil(count * bits / 32)."""
    return -(-count * bits // WORD_BITS)


def pack(codes: Tensor, bits: int) -> Tensor:
    """Packs along the last dimension.

    Args:
        codes: [..., I], uint8 (or another integer dtype), values in [0, 2^bits). Higher bits are not looked at.
        bits: 1 to 8.

    Returns:
        int32 [..., ceil(I * bits / 32)], on the same device; unused bits of the last word are zero. On the meta device
        only the shape is computed.

    Raises:
        BadInput: a width outside 1..8.
    """
    _check(bits)
    lead, count = codes.shape[:-1], codes.shape[-1]
    packed = torch.zeros(*lead, words(count, bits), dtype=torch.int32, device=codes.device)
    if packed.is_meta or packed.numel() == 0:
        return packed
    octets = -(-count // 8)
    padded = torch.nn.functional.pad(codes.to(torch.uint8), (0, octets * 8 - count))
    stream = _join_within_bytes(padded, bits) if 8 % bits == 0 else _join_octets(padded, bits)
    whole = packed.view(torch.uint8)
    shared = min(whole.shape[-1], stream.shape[-1])
    whole[..., :shared] = stream[..., :shared]
    return packed


def unpack(packed: Tensor, bits: int, count: int) -> Tensor:
    """The inverse of `pack`.

    Args:
        packed: int32 [..., W] with W = ceil(count * bits / 32).
        bits: 1 to 8.
        count: how many codes (I) each row holds.

    Returns:
        uint8 [..., count].

    Raises:
        BadInput: a width outside 1..8, a dtype other than int32, or a W that does not fit `count`.
    """
    _check(bits)
    if packed.dtype != torch.int32 or packed.shape[-1] != words(count, bits):
        raise BadInput(
            f"packed codes: found {packed.dtype} with {packed.shape[-1]} words per row, but {count} codes of {bits} bits"
            f" are int32 with {words(count, bits)} words; the bits or the shape in the config do not match the file"
        )
    codes = torch.empty(*packed.shape[:-1], count, dtype=torch.uint8, device=packed.device)
    if codes.is_meta or codes.numel() == 0:
        return codes
    # Flat in between: a contiguous tensor whose last dimension is 1 may have any stride there, which forbids the view.
    stream = packed.contiguous().reshape(-1).view(torch.uint8).reshape(*packed.shape[:-1], -1)
    if 8 % bits == 0:
        _split_within_bytes(stream, bits, codes)
    else:
        _split_octets(stream, bits, codes)
    return codes


def pack_rows(codes: Tensor, bits: int) -> Tensor:
    """`pack` along the first dimension of a matrix: [I, C] -> int32 [ceil(I * bits / 32), C]."""
    return pack(codes.T.contiguous(), bits).T.contiguous()


def unpack_rows(packed: Tensor, bits: int, count: int) -> Tensor:
    """`unpack` along the first dimension of a matrix: int32 [W, C] -> uint8 [count, C]."""
    return unpack(packed.T.contiguous(), bits, count).T.contiguous()


def signed_to_unsigned(codes: Tensor, bits: int) -> Tensor:
    """int8 q in [-2^(b-1), 2^(b-1)) to uint8 u = q + 2^(b-1), without a wider intermediate."""
    # Adding 2^(b-1) modulo 256 is the same on the two readings of a byte.
    return codes.contiguous().view(torch.uint8) + torch.tensor(1 << (bits - 1), dtype=torch.uint8, device=codes.device)


def unsigned_to_signed(codes: Tensor, bits: int) -> Tensor:
    """uint8 u to int8 q = u - 2^(b-1), the inverse of `signed_to_unsigned`."""
    return (codes - torch.tensor(1 << (bits - 1), dtype=torch.uint8, device=codes.device)).view(torch.int8)


def _check(bits: int) -> None:
    if not 1 <= bits <= 8:
        raise BadInput(f"codes of {bits} bits cannot be packed; write a width from 1 to 8")


def _join_within_bytes(codes: Tensor, bits: int) -> Tensor:
    """[..., 8o] codes whose width divides 8 -> uint8 [..., o*bits]; the first code is lowest."""
    per_byte, mask = 8 // bits, (1 << bits) - 1
    stream = codes[..., 0::per_byte] & mask
    for lane in range(1, per_byte):
        stream |= (codes[..., lane::per_byte] & mask) << (lane * bits)
    return stream


def _split_within_bytes(stream: Tensor, bits: int, codes: Tensor) -> None:
    """The inverse of `_join_within_bytes`, into `codes` [..., I]."""
    per_byte, mask = 8 // bits, (1 << bits) - 1
    for lane in range(min(per_byte, codes.shape[-1])):
        part = codes[..., lane::per_byte]
        part.copy_((stream[..., : part.shape[-1]] >> (lane * bits)) & mask)


def _join_octets(codes: Tensor, bits: int) -> Tensor:
    """[..., 8o] codes of any width -> uint8 [..., o*bits]: eight codes in an int64, of which `bits` bytes count."""
    mask = (1 << bits) - 1
    octet = codes[..., 0::8].to(torch.int64) & mask
    for lane in range(1, 8):
        octet |= (codes[..., lane::8].to(torch.int64) & mask) << (lane * bits)
    return octet.unsqueeze(-1).view(torch.uint8)[..., :bits].flatten(-2)


def _split_octets(stream: Tensor, bits: int, codes: Tensor) -> None:
    """The inverse of `_join_octets`, into `codes` [..., I]."""
    mask, octets = (1 << bits) - 1, -(-codes.shape[-1] // 8)
    wide = torch.zeros(*stream.shape[:-1], octets, 8, dtype=torch.uint8, device=stream.device)
    short = octets * bits - stream.shape[-1]
    stream = torch.nn.functional.pad(stream, (0, short)) if short > 0 else stream[..., : octets * bits]
    wide[..., :bits] = stream.reshape(*stream.shape[:-1], octets, bits)
    octet = wide.view(torch.int64).squeeze(-1)
    for lane in range(min(8, codes.shape[-1])):
        part = codes[..., lane::8]
        part.copy_((octet[..., : part.shape[-1]] >> (lane * bits)) & mask)
