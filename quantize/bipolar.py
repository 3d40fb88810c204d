"""Bipolar integers for weights and activations, and their product by counting bits.

k bits mean q = sum 2^i b_i with b_i in {-1, +1}: the odd numbers from -(2^k - 1) to 2^k - 1, without a zero and without a
sign bit that would need a case of its own. Then the inner product of two such vectors of length K is

    sum_n w_n x_n = sum_ij 2^(i+j) (K - 2 popcount(W_i xor X_j)),     W_i, X_j the vectors of bits of planes i and j

an exact integer (arbitrary-precision products on tensor cores: Ma et al. 2024, arXiv 2409.17870). A real weight is
s q with s = max|w| / (2^k - 1). As a stored format: `formats/bipolar.py`.

Whether it pays: a k_w x k_x product needs k_w k_x passes of one-bit operations. Hopper has no one-bit matrix instruction any
more (mma b1 is taken apart into logic and popc), and popc runs 16 lanes of 32 bits a cycle and SM, 512 bit products, against
4096 int8 products of its tensor cores (1979 Tops at 1.83 GHz on 132 SMs, two operations each): even one bit by one bit is
eight times slower than int8, so there is no GPU kernel here. Its place is the exact reference, and machines without a fast
int8 product.

Shape legend: M tokens, N out features, K in features, W words of 32 bits, k planes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from aerogel.errors import BadInput
from aerogel.pack import bits as bitstream
from aerogel.quantize.codes import Codes
from aerogel.quantize.formats.bipolar import Bipolar

WIDTHS = range(1, 9)


def bipolar(x_NK: Tensor, bits: int, per_row: bool = True) -> tuple[Tensor, Tensor]:
    """The nearest bipolar integers and their scale: x ~ q s.

    Args:
        x_NK: floats.
        bits: 1 to 8.
        per_row: one scale per row [N, 1], else one for all [1, 1].

    Returns:
        q int16 [N, K], odd numbers; s float32, 1 where a row is zero.
    """
    _check(bits)
    most = (1 << bits) - 1
    peak = x_NK.abs().amax(1, keepdim=True) if per_row else x_NK.abs().amax().reshape(1, 1)
    scale = torch.where(peak > 0, peak.float() / most, torch.ones_like(peak, dtype=torch.float32))
    # The odd number nearest to y is 2 floor(y / 2) + 1.
    q_NK = (2 * torch.floor(x_NK.float() / scale / 2) + 1).clamp_(-most, most)
    return q_NK.to(torch.int16), scale


def planes_of(q_NK: Tensor, bits: int) -> Tensor:
    """The bits of bipolar integers, plane 0 worth 1: int32 [k, N, W]. Bits beyond K are 0."""
    _check(bits)
    codes = (q_NK.to(torch.int32) + (1 << bits) - 1) >> 1
    return torch.stack([bitstream.pack(((codes >> i) & 1).to(torch.uint8), 1) for i in range(bits)])


def product(x_kMW: Tensor, w_kNW: Tensor, K: int) -> Tensor:
    """The exact product of bipolar integers by their bits, int64 [M, N]."""
    y_MN = torch.zeros(x_kMW.shape[1], w_kNW.shape[1], dtype=torch.int64, device=x_kMW.device)
    for j, x_MW in enumerate(x_kMW):
        for i, w_NW in enumerate(w_kNW):
            differing = popcount(x_MW[:, None] ^ w_NW[None]).sum(-1)
            y_MN += (K - 2 * differing) << (i + j)
    return y_MN


def multiply(x_MK: Tensor, codes: Codes, bits: int) -> Tensor:
    """x W^T with x rounded to bipolar integers of `bits` bits per token: the integer part exact, by counting bits.

    Args:
        x_MK: floats.
        codes: a weight on `formats.bipolar.Bipolar` with one scale per output.
        bits: of the activations, 1 to 8.

    Returns:
        float32 [M, N]: (q_x q_w^T) s_x s_w.

    Raises:
        BadInput: codes on another grid, or in groups.
    """
    if not isinstance(codes.grid, Bipolar) or codes.grid.group_size is not None:
        raise BadInput(f"counting bits needs bipolar weights with one scale per output, found {codes.grid}")
    q_MK, scale_M1 = bipolar(x_MK, bits)
    w_kNW = planes_of(integers_of(codes), codes.grid.bits)
    y_MN = product(planes_of(q_MK, bits), w_kNW, x_MK.shape[1])
    return y_MN.float() * scale_M1 * codes.scale_NG.float().T


def integers_of(codes: Codes) -> Tensor:
    """The odd integers of stored codes, int16 [N, K]."""
    return 2 * codes.values_NK.to(torch.int16) - ((1 << codes.grid.bits) - 1)


def popcount(words: Tensor) -> Tensor:
    """How many bits are set in each int32 word, int64."""
    x = words.to(torch.int64) & 0xFFFFFFFF
    x = x - ((x >> 1) & 0x55555555)
    x = (x & 0x33333333) + ((x >> 2) & 0x33333333)
    x = (x + (x >> 4)) & 0x0F0F0F0F
    return ((x * 0x01010101) & 0xFFFFFFFF) >> 24


def _check(bits: int) -> None:
    if bits not in WIDTHS:
        raise BadInput(f"bipolar integers have 1 to 8 bits, found {bits}")
