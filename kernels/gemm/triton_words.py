# mypy: ignore-errors
# ruff: noqa: ANN001, ANN201, ANN202
"""Products with packed weights in Triton, for any GPU it compiles for: one main loop, decoders as branches of constants.

    y_MN = sum over groups of s_N * ((u - z) x^T)          integers; z = 2^(b-1) where there is no zero point
    y_MN = sum over groups of s_N * (table[u] x^T)         16 or 256 numbers: one table, one per row, one picked per group
    y_MN = sum over groups of s_N * (float(u) x^T)         small floats (`small_floats.py`), whose bits are those of a wider one

The weight is the left factor: 16 columns of BN rows per step, decoded in the registers in which the matrix instruction
takes them, because field i of every word belongs to step i (`pack/words.py`). Codes minus an integer zero point are whole
numbers of at most 9 bits, exact in bfloat16 and float16 as small floats are, and the scale meets the float32 sum of its group:
nothing is rounded but the result. Float zero points and table numbers are rounded to the activations' type.

An integer becomes a float without a conversion instruction: its bits in the mantissa of 2^23, minus 2^23 + z. A small float
becomes one by a shift: its exponent and mantissa where float32 has them are the number times 2^(its bias - 127), subnormals
included. Scales may be bytes (`block_scales.py`), which become floats the same way; the weight's factor meets the sum of all.
Tables of 16 are looked up in registers: each row's numbers lie there in pairs of 16 bits, and bits of the code choose among
them. Larger ones, and those of float32 activations, are looked up in memory.

Few rows leave a GPU idle, so K is also cut into SPLIT shares; they write float32 sums that a second kernel adds in order.
There are no atomics: the same input gives the same bits.

Shape legend: M tokens, N out features, K in features, C k tiles of 128 columns, G groups along K; BN and BM block sizes.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from aerogel.kernels.gemm.block_scales import BIAS, BYTES
from aerogel.kernels.triton_here import language
from aerogel.pack.tiles import tile_counts

triton, tl = language()
MAGIC = tl.constexpr(0x4B000000)
"""The bits of 2^23 in float32."""
MAGIC_VALUE = tl.constexpr(8388608.0)
E5M3_TO_FLOAT = tl.constexpr((127 - BIAS) << 23)
"""What the bytes of `block_scales.E5M3`, moved to the top of float32's mantissa, lack of its exponent."""


MOST_SHORTENED = 1 << 16
"""Numbers of tables that are brought to 16 bits at every call: as many as cost a microsecond or two."""


@dataclass(frozen=True, slots=True)
class Config:
    """Rows and tokens of a block, shares of K, warps of a program, tiles in flight."""

    rows: int
    tokens: int
    split: int
    warps: int
    stages: int


@triton.jit
def _words(codes_ptr, tile_N, r_N, WIDTH: tl.constexpr, START: tl.constexpr, BITS: tl.constexpr):
    """The words of one limb, uint32 [BN, 16]."""
    lane = tl.arange(0, 16)
    start_ptr = codes_ptr + START
    if WIDTH == 4:
        words_ptr = start_ptr.to(tl.pointer_type(tl.uint32), bitcast=True)
    elif WIDTH == 2:
        words_ptr = start_ptr.to(tl.pointer_type(tl.uint16), bitcast=True)
    else:
        words_ptr = start_ptr
    at_N = tile_N * (256 * BITS // WIDTH) + r_N * 16
    return tl.load(words_ptr + at_N[:, None] + lane[None, :]).to(tl.uint32)


@triton.jit
def _code(a, b, c, i: tl.constexpr, W0: tl.constexpr, W1: tl.constexpr, W2: tl.constexpr):
    """Field i of the words of up to three limbs, put together."""
    u = (a >> (W0 * i)) & ((1 << W0) - 1)
    if W1 > 0:
        u |= ((b >> (W1 * i)) & ((1 << W1) - 1)) << W0
    if W2 > 0:
        u |= ((c >> (W2 * i)) & ((1 << W2) - 1)) << (W0 + W1)
    return u


@triton.jit
def _small_float(u, BITS: tl.constexpr, MANTISSA: tl.constexpr):
    """The float of BITS bits, MANTISSA of them behind the point, whose bits are u, in float32."""
    BIAS: tl.constexpr = (1 << (BITS - 2 - MANTISSA)) - 1
    size = (u & ((1 << (BITS - 1)) - 1)) << (23 - MANTISSA)
    sign = (u >> (BITS - 1)) << 31
    return (size | sign).to(tl.float32, bitcast=True) * (2.0 ** (127 - BIAS))


@triton.jit
def _scales(scale_ptr, at_N, SCALE: tl.constexpr):
    """Scales as float32. SCALE: 0 floats, 1 bytes of `block_scales.E5M3`, 2 powers of two; byte 0 is 0."""
    held_N = tl.load(scale_ptr + at_N)
    if SCALE == 0:
        return held_N.to(tl.float32)
    bits_N = held_N.to(tl.uint32) << (20 if SCALE == 1 else 23)
    if SCALE == 1:
        bits_N += E5M3_TO_FLOAT
    return tl.where(held_N == 0, 0.0, bits_N.to(tl.float32, bitcast=True))


@triton.jit
def _pair(at_N, i: tl.constexpr, dtype: tl.constexpr):
    """Numbers 2i and 2i + 1 of a table for each row, rounded to 16 bits and side by side, uint32 [BN, 1]."""
    low_N = tl.load(at_N + 2 * i).to(dtype).to(tl.uint16, bitcast=True).to(tl.uint32)
    high_N = tl.load(at_N + 2 * i + 1).to(dtype).to(tl.uint16, bitcast=True).to(tl.uint32)
    return (low_N | (high_N << 16))[:, None]


@triton.jit
def _pairs(table_ptr, book_N, dtype: tl.constexpr):
    """The eight pairs of a table of 16 for each row."""
    at_N = table_ptr + book_N * 16
    return (
        _pair(at_N, 0, dtype), _pair(at_N, 1, dtype), _pair(at_N, 2, dtype), _pair(at_N, 3, dtype),
        _pair(at_N, 4, dtype), _pair(at_N, 5, dtype), _pair(at_N, 6, dtype), _pair(at_N, 7, dtype),
    )  # fmt: skip


@triton.jit
def _choose(u, pairs, dtype: tl.constexpr):
    """Number u of a table of 16, which never leaves the registers: three choices by bits of u, a shift by the last."""
    second, third, fourth = (u & 2) != 0, (u & 4) != 0, (u & 8) != 0
    low = tl.where(third, tl.where(second, pairs[3], pairs[2]), tl.where(second, pairs[1], pairs[0]))
    high = tl.where(third, tl.where(second, pairs[7], pairs[6]), tl.where(second, pairs[5], pairs[4]))
    pair = tl.where(fourth, high, low)
    return (pair >> ((u & 1) << 4)).to(tl.uint16).to(dtype, bitcast=True)


@triton.jit
def product(
    x_ptr, row_M, there_M, codes_ptr, scale_ptr, zero_ptr, table_ptr, pick_ptr, factor_ptr, n_N, first, last, K, C, G, ROWS,
    BITS: tl.constexpr, GROUP: tl.constexpr, ZERO: tl.constexpr, TABLE: tl.constexpr, FLOATS: tl.constexpr,
    SCALE: tl.constexpr, FACTOR: tl.constexpr, EVEN: tl.constexpr, WIDE: tl.constexpr, BN: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    """W[n_N, tiles first..last] @ x[row_M].T in float32 [BN, BM].

    row_M: rows of x, where there_M. ROWS: rows of the weight rounded up to row tiles; beyond them the last is read again.
    ZERO: whether there are zero points. TABLE: 0 for none, 1 for one table, 2 for one per row, 3 for one picked per group.
    FLOATS: bits of mantissa of floats, 0 for none. SCALE: as `_scales`. FACTOR: whether a float multiplies everything.
    EVEN: K is whole tiles. WIDE: multiply in float32, see `wide`.
    """
    W0: tl.constexpr = 4 if BITS >= 4 else BITS - BITS // 3
    W1: tl.constexpr = 4 if BITS == 8 else ((BITS - W0) // 2 * 2 if BITS - W0 > 1 else BITS - W0)
    W2: tl.constexpr = BITS - W0 - W1
    RUN: tl.constexpr = 8 if GROUP % 128 == 0 else (4 if GROUP % 64 == 0 else (2 if GROUP % 32 == 0 else 1))
    NUMBER: tl.constexpr = x_ptr.dtype.element_ty
    CHOSEN: tl.constexpr = TABLE > 0 and BITS == 4 and NUMBER.primitive_bitwidth == 16
    lane = tl.arange(0, 16)
    n_N = tl.minimum(n_N, ROWS - 1)
    r_N = n_N % 16
    tile_N = (n_N // 16).to(tl.int64)
    x_row_M = row_M.to(tl.int64) * K
    total = tl.zeros((BN, BM), tl.float32)
    if CHOSEN:
        pairs = _pairs(table_ptr, n_N.to(tl.int64) if TABLE == 2 else n_N * 0, NUMBER)
    for tile in range(first, last):
        a = _words(codes_ptr, tile_N * C + tile, r_N, W0, 0, BITS)
        b = _words(codes_ptr, tile_N * C + tile, r_N, W1, 256 * W0, BITS) if W1 > 0 else a
        c = _words(codes_ptr, tile_N * C + tile, r_N, W2, 256 * (W0 + W1), BITS) if W2 > 0 else a
        for run in tl.static_range(8 // RUN):
            g = 0 if GROUP == 0 else tl.minimum((tile * 128 + run * RUN * 16) // (GROUP + (GROUP == 0)), G - 1)
            at_N = (tile_N * G + g) * 16 + r_N
            scale_N = _scales(scale_ptr, at_N, SCALE)
            if TABLE == 1:
                book_N = at_N * 0
            elif TABLE == 2:
                book_N = n_N.to(tl.int64)
            elif TABLE == 3:
                book_N = tl.load(pick_ptr + at_N).to(tl.int64)
                if CHOSEN:
                    pairs = _pairs(table_ptr, book_N, NUMBER)
            elif ZERO:
                zero_N = tl.load(zero_ptr + at_N)
                offset_N = zero_N.to(tl.float32) if zero_N.dtype.is_floating() else zero_N.to(tl.float32) + MAGIC_VALUE
            part = tl.zeros((BN, BM), tl.float32)
            for step in tl.static_range(RUN):
                u = _code(a, b, c, run * RUN + step, W0, W1, W2)
                if CHOSEN:
                    w = _choose(u, pairs, NUMBER)
                elif TABLE > 0:
                    w = tl.load(table_ptr + book_N[:, None] * (1 << BITS) + u)
                elif FLOATS > 0:
                    w = _small_float(u, BITS, FLOATS)
                else:
                    w = (u | MAGIC).to(tl.float32, bitcast=True)
                    if not ZERO:
                        w -= MAGIC_VALUE + (1 << (BITS - 1))
                    elif zero_N.dtype.is_floating():
                        w = w - MAGIC_VALUE - offset_N[:, None]
                    else:
                        w -= offset_N[:, None]
                k = tile * 128 + (run * RUN + step) * 16 + lane
                inside = there_M[None, :] if EVEN else there_M[None, :] & (k < K)[:, None]
                x = tl.load(x_ptr + x_row_M[None, :] + k[:, None], mask=inside, other=0.0)
                w = w.to(x.dtype)
                if WIDE:
                    w, x = w.to(tl.float32), x.to(tl.float32)
                part = tl.dot(w, x, part, input_precision="ieee")
            total += part * scale_N[:, None]
    if FACTOR:
        total *= tl.load(factor_ptr)
    return total


@triton.jit(do_not_specialize=["M", "tiles"])
def linear_kernel(
    x_ptr, codes_ptr, scale_ptr, zero_ptr, table_ptr, pick_ptr, factor_ptr, bias_ptr, y_ptr, M, N, K, C, G, ROWS, tiles,
    BITS: tl.constexpr, GROUP: tl.constexpr, ZERO: tl.constexpr, TABLE: tl.constexpr, FLOATS: tl.constexpr,
    SCALE: tl.constexpr, FACTOR: tl.constexpr, BIAS: tl.constexpr, EVEN: tl.constexpr, WIDE: tl.constexpr,
    BN: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    """One block of y, or of the float32 sums [shares, M, N] of `tiles` k tiles. Neighbouring programs share the weight."""
    m_M = tl.program_id(0) * BM + tl.arange(0, BM)
    n_N = tl.program_id(1) * BN + tl.arange(0, BN)
    share = tl.program_id(2)
    total = product(
        x_ptr, m_M, m_M < M, codes_ptr, scale_ptr, zero_ptr, table_ptr, pick_ptr, factor_ptr, n_N,
        share * tiles, tl.minimum(C, (share + 1) * tiles), K, C, G, ROWS,
        BITS, GROUP, ZERO, TABLE, FLOATS, SCALE, FACTOR, EVEN, WIDE, BN, BM,
    )  # fmt: skip
    inside = (n_N < N)[:, None] & (m_M < M)[None, :]
    if BIAS:
        total += tl.load(bias_ptr + n_N, mask=n_N < N, other=0.0).to(tl.float32)[:, None]
    y_M = (share.to(tl.int64) * M + m_M) * N
    tl.store(y_ptr + y_M[None, :] + n_N[:, None], total.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["M"])
def sum_kernel(
    part_ptr, bias_ptr, y_ptr, M, N, BIAS: tl.constexpr, SPLIT: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """y = the sum of SPLIT float32 parts [M, N] in their order, plus bias."""
    m = tl.program_id(1).to(tl.int64)
    n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for share in tl.static_range(SPLIT):
        total += tl.load(part_ptr + (share * M + m) * N + n, mask=n < N, other=0.0)
    if BIAS:
        total += tl.load(bias_ptr + n, mask=n < N, other=0.0).to(tl.float32)
    tl.store(y_ptr + m * N + n, total.to(y_ptr.dtype.element_ty), mask=n < N)


@cache
def processors(device: torch.device) -> int:
    """Multiprocessors (compute units, Xe cores) of a GPU; 4 elsewhere, so that the interpreter tests shares of K."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).multi_processor_count
    if device.type == "xpu":
        return torch.xpu.get_device_properties(device).gpu_subslice_count
    return 4


def config_of(M: int, N: int, K: int, device: torch.device) -> Config:
    """Blocks for M tokens: as many programs as keep the device's memory busy."""
    tokens = min(64, max(16, triton.next_power_of_2(M)))
    rows = 64
    blocks = -(-N // rows) * -(-M // tokens)
    k_tiles = tile_counts(N, K)[1]
    split = max(1, min(8, k_tiles // 4, 4 * processors(device) // blocks)) if M <= 64 else 1
    return Config(rows, tokens, triton.next_power_of_2(split + 1) // 2, 4, 4)


def linear(
    x_MK: Tensor,
    codes: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    table: Tensor | None,
    pick: Tensor | None,
    bias_N: Tensor | None,
    group_size: int,
    N: int,
    config: Config | None = None,
    floats: int = 0,
    factor: Tensor | None = None,
    out: torch.dtype | None = None,
) -> Tensor:
    """x @ W.T (+ bias), [M, N] in `out` or x's dtype, for tensors as `cuda_weight.TileWeight` has them but codes in words.

    x_MK: bfloat16, float16 or float32 [M, K], contiguous. config: chosen by a rule unless given.
    """
    M, K = x_MK.shape
    y_MN = x_MK.new_empty(M, N, dtype=out)
    if M == 0 or N == 0 or K == 0:
        return y_MN.zero_() if bias_N is None else y_MN.copy_(bias_N.expand(M, N))
    if table is not None and x_MK.dtype.itemsize == 2 and table.shape[1] > 16 and table.numel() <= MOST_SHORTENED:
        table = table.to(x_MK.dtype)  # as it would be in the kernel, and half of what passes through memory
    R, C = tile_counts(N, K)
    config = config or config_of(M, N, K, x_MK.device)
    tiles = -(-C // config.split)
    shares = -(-C // tiles)
    to = y_MN if shares == 1 else torch.empty(shares, M, N, dtype=torch.float32, device=x_MK.device)
    grid = (-(-M // config.tokens), -(-N // config.rows), shares)
    linear_kernel[grid](
        x_MK, codes, scale_bytes(scale), codes if zero is None else zero, x_MK if table is None else table,
        codes if pick is None else pick, x_MK if factor is None else factor, x_MK if bias_N is None else bias_N, to,
        M, N, K, C, scale.shape[1], 16 * R, tiles,
        BITS=codes.shape[2] // 256, GROUP=group_size, ZERO=zero is not None, TABLE=table_kind(table, pick), FLOATS=floats,
        SCALE=scale_kind(scale), FACTOR=factor is not None, BIAS=bias_N is not None and shares == 1, EVEN=K % 128 == 0,
        WIDE=wide(x_MK.dtype), BN=config.rows, BM=config.tokens,
        num_warps=config.warps, num_stages=config.stages,
    )  # fmt: skip
    if shares > 1:
        sum_kernel[-(-N // 512), M](
            to, x_MK if bias_N is None else bias_N, y_MN, M, N, BIAS=bias_N is not None, SPLIT=shares, BLOCK=512,
        )  # fmt: skip
    return y_MN


def wide(dtype: torch.dtype) -> bool:
    """Triton's interpreter has no bfloat16 products; in float32 they are the same."""
    return dtype == torch.bfloat16 and bool(triton.knobs.runtime.interpret)


def scale_kind(scale: Tensor) -> int:
    """0 floats, 1 and 2 bytes of the two types of `block_scales`."""
    return 1 + BYTES.index(scale.dtype) if scale.dtype in BYTES else 0


def scale_bytes(scale: Tensor) -> Tensor:
    """The scales as Triton takes them, which does not know the type of powers of two."""
    return scale.view(torch.uint8) if scale.dtype in BYTES else scale


def table_kind(table: Tensor | None, pick: Tensor | None) -> int:
    """0 none, 1 one table, 2 one per row, 3 one picked per group."""
    if table is None:
        return 0
    return 3 if pick is not None else 1 if table.shape[0] == 1 else 2
