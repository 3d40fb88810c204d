# mypy: ignore-errors
# ruff: noqa: ANN001, ANN201, ANN202
"""Grouped matmuls in Triton: the main loop of `gemm/triton_words.py` with the rows and the weight of one expert at a time.

Each program multiplies a block of rows of one expert's weight with up to BM tokens that chose it. Who takes which tokens is
worked out on the device, by a sort and prefix sums whose sizes depend on S and E alone, so nothing waits for the host and a
graph can record it:

    order        pairs sorted by expert, ties in their own order
    block p      expert e(p) and pairs order[first(p) .. end(p)], at most BM;  p < S / BM + min(S, E)

With few pairs a sort would take longer than it saves: there each pair is a block of its own, and an expert that two tokens
chose comes from the cache the second time. Every output is written by one program, so the same input gives the same bits.

Shape legend: E experts, M rows of x, S pairs of token and expert, N out features, K in features, P blocks of pairs.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import ClassVar

import torch
from torch import Tensor

from aerogel.errors import BadInput
from aerogel.kernels.gemm.triton_linear import DTYPES
from aerogel.kernels.gemm.triton_linear import Triton as One
from aerogel.kernels.gemm.triton_words import Config, product, scale_bytes, scale_kind, table_kind, wide
from aerogel.kernels.grouped.kernel import Grouped, Routes
from aerogel.kernels.problem import Kernel, Layout, Problem
from aerogel.kernels.triton_here import language
from aerogel.pack.tiles import tile_counts

triton, tl = language()

FEW_PAIRS = 32
"""Up to so many pairs are not sorted."""


@triton.jit(do_not_specialize=["experts", "each"])
def grouped_kernel(
    x_ptr, expert_ptr, order_ptr, first_ptr, end_ptr, codes_ptr, scale_ptr, zero_ptr, table_ptr, pick_ptr, factor_ptr,
    bias_ptr, y_ptr, experts, each, N, K, C, G, ROWS,
    BITS: tl.constexpr, GROUP: tl.constexpr, ZERO: tl.constexpr, TABLE: tl.constexpr, FLOATS: tl.constexpr,
    SCALE: tl.constexpr, FACTOR: tl.constexpr, TABLES: tl.constexpr, BIAS: tl.constexpr,
    EVEN: tl.constexpr, WIDE: tl.constexpr, SORTED: tl.constexpr, BN: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    """One block of y. expert_ptr: the expert of block p, which is that of pair p where pairs are not SORTED. TABLES: numbers in
    all tables of an expert."""
    p = tl.program_id(1)
    m = tl.arange(0, BM)
    n_N = tl.program_id(0) * BN + tl.arange(0, BN)
    e = tl.load(expert_ptr + p).to(tl.int64)
    if SORTED:
        at = tl.load(first_ptr + p) + m
        there_M = (at < tl.load(end_ptr + p)) & (e < experts)
        pair_M = tl.load(order_ptr + at, mask=there_M, other=0)
    else:
        there_M = (m == 0) & (e >= 0)
        pair_M = (p + m * 0).to(tl.int64)
    last = tl.where(e < experts, C, 0).to(tl.int32)
    e = tl.minimum(e, experts - 1)
    rows = e * ROWS
    total = product(
        x_ptr, pair_M // each, there_M, codes_ptr + rows // 16 * C * 256 * BITS, scale_ptr + rows * G, zero_ptr + rows * G,
        table_ptr + e * TABLES, pick_ptr + rows * G, factor_ptr + e, n_N, 0, last, K, C, G, ROWS,
        BITS, GROUP, ZERO, TABLE, FLOATS, SCALE, FACTOR, EVEN, WIDE, BN, BM,
    )  # fmt: skip
    if BIAS:
        bias_N = tl.load(bias_ptr + e * N + n_N, mask=(n_N < N) & (last > 0), other=0.0)
        total += bias_N.to(tl.float32)[:, None]
    inside = (n_N < N)[:, None] & there_M[None, :]
    tl.store(y_ptr + (pair_M * N)[None, :] + n_N[:, None], total.to(y_ptr.dtype.element_ty), mask=inside)


def block_tokens(pairs: int, experts: int) -> int:
    """Tokens of a block: about as many as an expert gets on average."""
    return min(64, max(16, 1 << max(0, pairs // max(experts, 1) - 1).bit_length()))


def config_of(pairs: int, experts: int, sorted_pairs: bool) -> Config:
    """Blocks for so many pairs."""
    return Config(64, block_tokens(pairs, experts) if sorted_pairs else 16, 1, 4, 4)


def linear(
    x: Tensor,
    expert: Tensor,
    routes: Routes,
    codes: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    table: Tensor | None,
    pick: Tensor | None,
    bias: Tensor | None,
    group_size: int,
    N: int,
    floats: int = 0,
    factor: Tensor | None = None,
    config: Config | None = None,
) -> Tensor:
    """`aerogel::grouped_words_linear`: y [S, N] for x [M, K] and expert int64 [S].

    routes: what `Triton.route` gave for `expert`. codes uint8 [E, R, C, 256 * bits], scale and zero [E, R, G, 16]: those of
    `triton_words.linear`, stacked, as are table [E, T, 2^bits], pick [E, R, G, 16] and factor [E]. bias: [E, N]. config: chosen
    by a rule unless given.

    Raises:
        BadInput: shapes or dtypes that contradict each other. Nothing has been read then.
    """
    pairs, experts, K = expert.shape[0], codes.shape[0], x.shape[1]
    R, C = tile_counts(N, K)
    G = -(-K // group_size) if group_size else 1
    bits, rows = codes.shape[-1] // 256, x.shape[0]
    like_scales = all(held is None or held.shape == scale.shape for held in (zero, pick))
    fits = codes.shape[1:3] == (R, C) and scale.shape == (experts, R, G, 16) and like_scales
    fits &= table is None or (table.dim() == 3 and len(table) == experts and table.shape[2] == 1 << bits)
    fits &= factor is None or factor.shape == (experts,)
    if not fits or x.dtype not in DTYPES or (rows and pairs % rows) or (bias is not None and bias.shape != (experts, N)):
        raise BadInput(
            f"grouped experts [{experts}, {N}, {K}] in groups of {group_size} do not fit codes {list(codes.shape)}, scales"
            f" {list(scale.shape)}, x {x.dtype} {list(x.shape)} and {pairs} pairs"
        )
    y = x.new_zeros(pairs, N) if routes else x.new_empty(pairs, N)
    if pairs == 0 or N == 0:
        return y
    config = config or config_of(pairs, experts, bool(routes))
    expert, bias = expert.contiguous(), None if bias is None else bias.contiguous()
    order, of_block, first, end = routes or (expert, expert, expert, expert)
    with torch.cuda.device(x.device) if x.device.type == "cuda" else nullcontext():
        grouped_kernel[-(-N // config.rows), of_block.shape[0]](
            x.contiguous(), of_block, order, first, end, codes, scale_bytes(scale), codes if zero is None else zero,
            x if table is None else table, codes if pick is None else pick, x if factor is None else factor,
            x if bias is None else bias, y, experts, pairs // rows, N, K, C, G, 16 * R,
            BITS=bits, GROUP=group_size, ZERO=zero is not None, TABLE=table_kind(None if table is None else table[0], pick),
            FLOATS=floats, SCALE=scale_kind(scale), FACTOR=factor is not None,
            TABLES=0 if table is None else table[0].numel(), BIAS=bias is not None,
            EVEN=K % 128 == 0, WIDE=wide(x.dtype), SORTED=bool(routes), BN=config.rows, BM=config.tokens,
            num_warps=config.warps, num_stages=config.stages,
        )  # fmt: skip
    return y


def _fake(x, expert, routes, codes, scale, zero, table, pick, bias, group_size, N, floats=0, factor=None):
    return x.new_empty(expert.shape[0], N)


_library = torch.library.Library("aerogel", "FRAGMENT")
_library.define(
    "grouped_words_linear(Tensor x, Tensor expert, Tensor[] routes, Tensor codes, Tensor scale, Tensor? zero, Tensor? table,"
    " Tensor? pick, Tensor? bias, int group_size, int N, int floats=0, Tensor? factor=None) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_library.impl("grouped_words_linear", linear, "CompositeExplicitAutograd")
torch.library.register_fake("aerogel::grouped_words_linear", _fake, lib=_library)


class Triton(Grouped):
    """Triton kernels over (expert, block of rows)."""

    about: ClassVar[str] = "Triton kernels for any GPU: one launch over all experts that tokens chose"
    base: ClassVar[type[Kernel]] = One

    @staticmethod
    def route(expert_S: Tensor, experts: int) -> Routes:
        """order int64 [S]; expert, first and end int64 [P] of each block. Nothing where there are few pairs."""
        pairs = expert_S.shape[0]
        if pairs <= FEW_PAIRS:
            return []
        size = block_tokens(pairs, experts)
        sorted_S, order_S = torch.sort(expert_S, stable=True)
        edges = torch.searchsorted(sorted_S, torch.arange(experts + 1, device=expert_S.device))
        blocks_E = (edges.diff() + size - 1) // size
        ends_E = blocks_E.cumsum(0)
        p = torch.arange(pairs // size + min(pairs, experts), device=expert_S.device)
        of_block = torch.searchsorted(ends_E, p, right=True)
        e = of_block.clamp(max=experts - 1)
        first = edges[e] + (p - ends_E[e] + blocks_E[e]) * size
        return [order_S, of_block, first, torch.minimum(edges[e + 1], first + size)]

    @staticmethod
    def run(
        x_MK: Tensor, expert_S: Tensor, routes: Routes, layout: Layout, problem: Problem, bias_EN: Tensor | None = None
    ) -> Tensor:
        """One call of the operator."""
        return torch.ops.aerogel.grouped_words_linear.default(
            x_MK,
            expert_S,
            routes,
            layout["tile_codes"],
            layout["tile_scale"],
            layout.get("tile_zero"),
            layout.get("tile_table"),
            layout.get("tile_pick"),
            bias_EN,
            problem.grid.group_size or 0,
            problem.N,
            problem.mantissa,
            layout.get("tile_factor"),
        )
