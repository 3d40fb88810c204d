"""The matmul of packed integers with activations rounded to int8 on NVIDIA GPUs: integer tensor cores for many tokens.

    x ~ x8 * s_x                 int8, a scale per token, s_x = max |x| / 127, or a stored one     kernels/cuda/quantize.cu
    W = w8 * r                   int8, a scale per output                              kernels/cuda/fragment8.cuh
    y_MN = (x8 @ w8.T) * s_x * r + bias       exact sums in int32                      kernels/cuda/wgmma.cu with INT8

Per channel w8 is the code itself and nothing is lost beside the rounding of x. With groups, all groups of a row are brought to
one scale while they are decoded, w8 = round((u - z) * s / r): a second rounding, of half a unit of r, which is 1/252 of the
row's range (two-step dequantisation: MixLLM, Zheng et al. 2024, section 3.3; QQQ, Zhang et al. 2024). Relative to a weight in
4 bits that is about a fortieth of what its own rounding cost; `TWO_STEP` bounds it, and tests hold the kernel to exactly this
integer arithmetic.

Up to `FEW_TOKENS` tokens memory decides and not the tensor cores. Eight bits per channel have the same matmul with other cuts
(`cuda_bytes`), whose blocks may share K. With groups or fewer bits, for very few tokens, where 16 bits are faster, and before
Hopper, x is rounded to the same int8 values and multiplied in 16 bits by the weight-only kernels, without a second rounding of
the weight.

Sparse outliers meet x as it is: `cuda_added`, on Hopper; elsewhere they are added behind the matmul.

Shape legend: M tokens, N out features, K in features, R row tiles, C k tiles, G groups along K.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import ClassVar

import torch
from torch import Tensor

from aerogel.errors import RunFailed
from aerogel.kernels import gpu_here
from aerogel.kernels.beside.ref import Beside
from aerogel.kernels.gemm import (
    cuda,
    cuda_added,
    cuda_bytes,
    cuda_few,
    cuda_few_plan,
    cuda_wgmma,
    cuda_wgmma_plan,
    cuda_wgmma_table,
)
from aerogel.kernels.gemm.cuda_kept import KEPT, KeptOperand
from aerogel.kernels.gemm.cuda_made import Made
from aerogel.kernels.gemm.cuda_outliers import TileOutliers
from aerogel.kernels.gemm.cuda_quantize import INT8, ROUNDED, Quantizer
from aerogel.kernels.gemm.cuda_table import config_for
from aerogel.kernels.gemm.cuda_weight import TileWeight, codes_of, per_kind, tensors_of
from aerogel.kernels.gemm.cuda_wgmma import Config, ceil_divide, deepest
from aerogel.kernels.problem import Kernel, Layout, Problem, Tuned
from aerogel.pack import tiles
from aerogel.quantize.grids import Codes, IntGrid

FEW_TOKENS, FEWEST_IN_BYTES = 96, 8
LONGEST_K = (1 << 31) // (127 * 127)
"""More columns could carry a sum beyond int32."""
SHARED_TOKENS = 2048
"""From so many tokens on, of two cuts with the same estimate the one whose blocks share x is taken: on an H100 2 to 18 % less
time where the device has pauses, between 2 % less and 4 % more where it is at its power limit."""
TWO_STEP = 1.2e-2
"""Bound of the second rounding at 4 bits and fewer, relative Frobenius error of W, for groups whose scales differ tenfold."""
CUTS = (
    *((tokens, 1, 1, 4) for tokens in (64, 128, 160)),
    *((tokens, 2, 1, 2) for tokens in (96, 128)),
    *((tokens, 1, 1, 2) for tokens in (192, 256)),
    (256, 1, 2, 4),
)
"""(tokens, blocks of 64 rows of each warpgroup, blocks of a cluster that share x, steps at a time) that compile without spills
and were the fastest at some size."""

Runner = Callable[..., None]


def row_scale(weight: TileWeight) -> Tensor:
    """r, float32 [16 R]: what one unit of w8 is worth in each row. 1 where a row holds nothing but zeros."""
    scale = weight.scale.float()
    if weight.group_size == 0:
        return scale.reshape(-1).contiguous()
    top, centre = (1 << weight.bits) - 1, 1 << (weight.bits - 1)
    if weight.zero is None:
        reach: Tensor | int = centre
    else:
        reach = torch.maximum(weight.zero.float(), top - weight.zero.float())
    r = (scale.abs() * reach).amax(1).reshape(-1) / 126
    return torch.where(r > 0, r, 1.0).contiguous()


def cut(weight: TileWeight, tokens: int, blocks: int, share: int, batch: int) -> Config | None:
    """A configuration with the deepest rings that fit; None when none do."""
    return deepest(weight, Config(tokens=tokens, blocks=blocks, share=share, batch=batch))


def tiles_of(weight: TileWeight, config: Config, M: int) -> int:
    """Blocks that have work."""
    rows = ceil_divide(weight.codes.shape[0], config.row_tiles * config.share) * config.share
    return rows * ceil_divide(M, config.tokens)


def microseconds(weight: TileWeight, config: Config, M: int, multiprocessors: int) -> float:
    """Estimate of a launch's time: `microseconds_of_tiles`."""
    return microseconds_of_tiles(weight, config, tiles_of(weight, config, M), multiprocessors)


def microseconds_of_tiles(weight: TileWeight, config: Config, tiles: int, multiprocessors: int) -> float:
    """Estimate of the time of so many blocks that have work, fitted on an H100 (8 % off as a rule): whole rounds of tiles, each
    of so many steps of 128 columns.

    A step costs the tensor cores by rows and tokens and decoding by rows, which overlap a little; where a fragment serves one
    block of rows only, loads show.
    """
    rows = 16 * config.row_tiles
    work = (0.6 if weight.group_size == 0 else 1.0) * max(1, weight.bits.bit_count() if weight.bits < 8 else 1.5)
    tensor, decode = 1.17 * rows / 64 * config.tokens, 3.77 * rows * work
    step = math.pow(tensor**1.22 + decode**1.22, 1 / 1.22) + (185 if config.blocks == 1 else 0)
    rounds = ceil_divide(tiles, multiprocessors)
    return rounds * (weight.codes.shape[1] * step + 0.27 * rows * config.tokens) / 1.7e3


@per_kind
def choose_config(weight: TileWeight, M: int, multiprocessors: int) -> Config | None:
    """The cut with the least estimated time; None when the weight has too much beside its codes for any, or when 16 bits are
    faster: blocks of these cuts do not share K, and few rows with few tokens leave multiprocessors idle."""
    found = [config for numbers in CUTS if (config := cut(weight, *numbers)) is not None]
    alike = -1 if M >= SHARED_TOKENS else 1
    best = min(found, key=lambda config: (microseconds(weight, config, M, multiprocessors), alike * config.share), default=None)
    wide = cuda_wgmma.choose_config(weight, M, multiprocessors)
    if best is None or wide is None:
        return best
    faster = microseconds(weight, best, M, multiprocessors) < cuda_wgmma.microseconds(weight, wide, M, multiprocessors)
    return best if faster else None


def cuts_in_bytes(weight: TileWeight, M: int, name: str, multiprocessors: int) -> list[tuple[int, Config]]:
    """Runs of rows and their cuts for M tokens on the device `name`: measured, or else estimated to be the fastest. None where
    16 bits are faster, and where they are more exact: weights in groups with few tokens."""
    if weight.group_size > 0 and FEW_TOKENS >= M:
        return []
    if weight.exact or shares_columns(weight, M):
        return cuda_bytes.cuts_for(replace(weight, in_bytes=True), M, name, multiprocessors)
    config = choose_config(weight, M, multiprocessors) if M > FEW_TOKENS else None
    return [] if config is None else [(weight.N, config)]


def shares_columns(weight: TileWeight, M: int) -> bool:
    """Whether the cuts of `cuda_bytes` are for M tokens of a weight without outliers. Other widths were not measured."""
    return weight.bits == 8 and weight.group_size == 0 and FEWEST_IN_BYTES < M <= cuda_bytes.TOKENS[-1]


def many_tokens(
    weight: TileWeight,
    r: Tensor,
    M: int,
    dtype: torch.dtype,
    config: Config | None = None,
    kept: KeptOperand | None = None,
) -> Runner | None:
    """The integer matmul planned for M tokens; None where the device or the weight has none. It is called with (x_MK or what
    makes it, bias_N or None, y_MN to be filled, and the scale of all tokens, float32 [1], where that is stored)."""
    facts = torch.cuda.get_device_properties(weight.codes.device)
    if facts.major != 9:
        return None
    found = cuts_in_bytes(weight, M, facts.name, facts.multi_processor_count) if config is None else [(weight.N, config)]
    if not found:
        return None
    fragments = None if kept is None else kept.fragments
    plan: cuda_wgmma_plan.Plan | cuda_wgmma_plan.Parts
    if len(found) == 1:
        plan = cuda_wgmma_plan.Plan(weight, found[0][1], M, dtype, row_scale=r, kept=fragments)
    else:
        plan = cuda_wgmma_plan.Parts(weight, found, M, dtype, row_scale=r, kept=fragments)
    columns, keeps = 128 * weight.codes.shape[1], kept is not None
    rounding = Quantizer(
        dtype=dtype, device=weight.codes.device, output=INT8, columns=columns, permuted=True, keeps=keeps
    )  # fmt: skip
    which = None if kept is None else kept.columns

    def run(x: Tensor | Made, bias_N: Tensor | None, y_MN: Tensor, fixed: Tensor | None = None) -> None:
        chosen_MC = None if which is None else y_MN.new_empty(M, which.columns)
        codes, scale_M = rounding(x, fixed, which, chosen_MC)
        if weight.exact and isinstance(x, Tensor):
            chosen_MC = cuda_wgmma_plan.in_pieces(x)
        plan.launch(codes, scale_M, bias_N, y_MN, chosen=chosen_MC)

    return run


def with_outliers(exact: TileWeight, r: Tensor, M: int, dtype: torch.dtype) -> Runner:
    """The matmul planned for M tokens of a weight whose outliers have inputs of their own; called as `many_tokens`'."""
    if cuda_added.fewest_tokens(exact) <= M:
        planned = many_tokens(replace(exact, in_bytes=True), r, M, dtype)
        if planned is not None:
            return planned
    product, columns = cuda_added.product(exact, M, dtype), ceil_divide(exact.K, 16) * 16
    rounding = Quantizer(dtype=dtype, device=exact.codes.device, output=ROUNDED, columns=columns)

    def run(x: Tensor, bias_N: Tensor | None, y_MN: Tensor, fixed: Tensor | None = None) -> None:
        product(rounding(x, fixed)[0][:, : exact.K].contiguous(), bias_N, y_MN, x)

    return run


def some_tokens(weight: TileWeight, M: int, dtype: torch.dtype, kept: KeptOperand) -> cuda_wgmma_plan.Plan:
    """The 16-bit matmul for tokens too few for integers, planned with kept columns as further steps; on Hopper. It is launched
    with the rounded inputs and those of the kept columns."""
    facts = torch.cuda.get_device_properties(weight.codes.device)
    cuts = cuda_wgmma_table.cuts_for(weight, M, facts.name)
    config = cuts[0][1] if len(cuts) == 1 else cuda_wgmma.choose_config(weight, M, facts.multi_processor_count)
    if config is None:
        raise RunFailed("no cut of the weight fits the multiprocessor, though integers without tables leave room for one")
    return cuda_wgmma_plan.Plan(weight, config, M, dtype, kept=kept.fragments)


_plans: dict[tuple[object, ...], Runner | None] = {}
_some_plans: dict[tuple[object, ...], cuda_wgmma_plan.Plan] = {}
_few_plans: dict[tuple[object, ...], cuda_few_plan.Plan] = {}


def tiles_linear_int8(
    x: Tensor | Made,
    codes: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    row_scale: Tensor,
    bias: Tensor | None,
    group_size: int,
    N: int,
    fixed: Tensor | None = None,
    kept: list[Tensor] | None = None,
    outliers: list[Tensor] | None = None,
) -> Tensor:
    """`aerogel::tiles_linear_int8` on CUDA: x [M, K] bf16 or fp16, or the norm or gate that makes it and rounds it there, ->
    [M, N]; `row_scale` is that of `cuda_int8.row_scale`, `fixed` the scale of all tokens, float32 [1], where it is stored.
    kept: the tensors of a `KeptOperand`. outliers: those of a `TileOutliers`, which x meets unrounded; not with kept."""
    like = x if isinstance(x, Tensor) else x.x
    M, K = like.shape
    y = like.new_empty(M, N)
    if M == 0 or N == 0 or K == 0:
        return y.zero_() if bias is None else y.copy_(bias.expand(M, N))
    added = TileOutliers.given(outliers)
    if added is not None:
        x = (x if isinstance(x, Tensor) else x.settled()).contiguous()
    given = (codes, scale, zero, row_scale, *(kept or ()), *(outliers or ()))
    held_at = (None if tensor is None else tensor.data_ptr() for tensor in given)
    key = (*held_at, M, K, N, group_size, y.dtype, scale.dtype)
    operand = KeptOperand.given(kept)

    def weight() -> TileWeight:
        one = TileWeight(codes=codes, scale=scale, zero=zero, table=None, pick=None, group_size=group_size, N=N, K=K)
        one.check()
        return one

    with nullcontext() if y.get_device() == torch._C._cuda_getDevice() else torch.cuda.device(y.device):
        if (added is not None or (FEW_TOKENS if group_size else FEWEST_IN_BYTES) < M) and key not in _plans:
            if len(_plans) >= cuda.MOST_PLANS:
                _plans.clear()
            if added is None:
                _plans[key] = many_tokens(weight(), row_scale, M, y.dtype, kept=operand)
            else:
                _plans[key] = with_outliers(replace(weight(), outliers=added, exact=True), row_scale, M, y.dtype)
        runner = _plans.get(key)
        if runner is not None:
            runner(x, bias, y, fixed)
            return y
        columns = -(-K // 16) * 16
        rounding = Quantizer(dtype=y.dtype, device=y.device, output=ROUNDED, columns=columns, keeps=operand is not None)
        if operand is None:
            rounded = rounding(x, fixed)[0][:, :K].contiguous()
            return cuda.tiles_linear(rounded, codes, scale, zero, None, None, bias, group_size, N)
        whole = group_size or tiles.COLUMNS * codes.shape[1]
        if M <= cuda_few.TOKENS:
            if key not in _few_plans:
                held = TileWeight(
                    codes=codes,
                    scale=scale,
                    zero=zero,
                    table=None,
                    pick=None,
                    group_size=whole,
                    N=N,
                    K=K,
                    kept=operand.fragments,
                )
                held.check()
                _few_plans[key] = cuda_few_plan.Plan(held, config_for(held, M), M, y.dtype)
            chosen = y.new_empty(M, operand.columns.columns)
            _few_plans[key](rounding(x, fixed, operand.columns, chosen)[0][:, :K].contiguous(), bias, y, chosen)
            return y
        if torch.cuda.get_device_capability(y.device)[0] == 9:
            if key not in _some_plans:
                held = TileWeight(codes=codes, scale=scale, zero=zero, table=None, pick=None, group_size=group_size, N=N, K=K)
                held.check()
                _some_plans[key] = some_tokens(held, M, y.dtype, operand)
            chosen = y.new_empty(M, operand.columns.columns)
            rounded = cuda_wgmma_plan.in_pieces(rounding(x, fixed, operand.columns, chosen)[0][:, :K])
            _some_plans[key].launch(rounded, None, bias, y, chosen=chosen)
            return y
        # The numbers of kept columns stay what they are, so their weights can be added as outliers are.
        rounded, outliers = rounding(x, fixed, operand.columns)[0][:, :K].contiguous(), operand.outliers.tensors()
        return cuda.tiles_linear(rounded, codes, scale, zero, None, None, bias, whole, N, outliers=outliers)


def _fake(
    x: Tensor,
    codes: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    row_scale: Tensor,
    bias: Tensor | None,
    group_size: int,
    N: int,
    fixed: Tensor | None = None,
    kept: list[Tensor] | None = None,
    outliers: list[Tensor] | None = None,
) -> Tensor:
    return x.new_empty(x.shape[0], N)


_library = torch.library.Library("aerogel", "FRAGMENT")  # type: ignore[no-untyped-call]
_library.define(  # type: ignore[no-untyped-call]
    "tiles_linear_int8(Tensor x, Tensor codes, Tensor scale, Tensor? zero, Tensor row_scale, Tensor? bias,"
    " int group_size, int N, Tensor? fixed=None, Tensor[]? kept=None, Tensor[]? outliers=None) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_library.impl("tiles_linear_int8", tiles_linear_int8, "CUDA")  # type: ignore[no-untyped-call]
torch.library.register_fake("aerogel::tiles_linear_int8", _fake, lib=_library)


class CudaInt8(Kernel):
    """Packed integers with int8 activations."""

    about: ClassVar[str] = "CUDA kernels compiled at run time: integers of 1 to 8 bits with activations: int8; kept columns"

    @staticmethod
    def refuses(problem: Problem) -> str | None:
        """Anything but integers with int8 activations in a 16-bit type; what bytes and their sums cannot hold."""
        return (
            problem.needs_activations("int8", "int8-static")
            or problem.needs_numbers(IntGrid)
            or cuda.Cuda.refuses(replace(problem, activations="none"))
            or problem.needs_groups(32)
            or _refuses_sums(problem)
        )

    @staticmethod
    def pack(codes: Codes, problem: Problem) -> dict[str, Tensor]:
        """The tile layout's tensors, and tile_row_scale float32 [16 R]."""
        layout = tensors_of(codes)
        return {**layout, "tile_row_scale": row_scale(_weight(layout, problem))}

    @staticmethod
    def lay_beside(beside: Beside, layout: Layout, problem: Problem, place_K: Tensor | None = None) -> dict[str, Tensor] | None:
        """Kept columns, or on Hopper sparse outliers."""
        kept = KeptOperand.of(beside, problem.N, problem.K, problem.dtype, place_K)
        if kept is not None:
            return dict(zip(KEPT, kept.tensors(), strict=True))
        outliers = cuda_added.laid(beside, problem, place_K)
        return None if outliers is None else cuda_added.named(outliers)

    @staticmethod
    def tune(problem: Problem, tokens: Sequence[int]) -> Tuned | None:
        """Cuts of the 16-bit matmul, which serves few tokens, and of the integer one where blocks may share K."""
        from aerogel.kernels.gemm import cuda_bytes_tune

        return cuda_bytes_tune.joined(_tune_sixteen(problem, tokens), cuda_bytes_tune.tune_and_keep(problem, tokens))

    @staticmethod
    def unpack(layout: Layout, problem: Problem) -> Codes:
        """The inverse of `pack`, exactly."""
        return codes_of(dict(layout), problem.grid, problem.N, problem.K)

    @staticmethod
    def run(x_MK: Tensor, layout: Layout, problem: Problem, bias_N: Tensor | None = None) -> Tensor:
        """One call of the operator."""
        y_MN: Tensor = torch.ops.aerogel.tiles_linear_int8.default(
            x_MK,
            layout["tile_codes"],
            layout["tile_scale"],
            layout.get("tile_zero"),
            layout["tile_row_scale"],
            bias_N,
            problem.grid.group_size or 0,
            problem.N,
            layout.get("input_scale"),
            [layout[name] for name in KEPT] if KEPT[0] in layout else None,
            cuda_added.among(layout),
        )
        return y_MN


def _tune_sixteen(problem: Problem, tokens: Sequence[int]) -> Tuned | None:
    """What `Kernel.tune` gives for the matmul in 16 bits."""
    from aerogel.kernels.gemm import cuda_tune

    few = [M for M in tokens if FEW_TOKENS >= M]
    if not problem.outliers:
        inner = replace(problem, activations="none")
        return cuda_tune.tune_and_keep(lambda: cuda_tune.like(inner), few)
    if problem.grid.group_size is None or gpu_here.other_than_hopper(torch.cuda.get_device_capability()) is not None:
        return None
    weight = cuda_tune.like(problem)
    if weight is None:
        return None
    return cuda_tune.tuned_and_kept(weight, [], [M for M in few if cuda_added.fewest_tokens(weight) <= M])


def _weight(layout: Layout, problem: Problem) -> TileWeight:
    return TileWeight(
        codes=layout["tile_codes"],
        scale=layout["tile_scale"],
        zero=layout.get("tile_zero"),
        table=None,
        pick=None,
        group_size=problem.grid.group_size or 0,
        N=problem.N,
        K=problem.K,
    )


def two_step(weight: TileWeight, r: Tensor) -> Tensor:
    """w8, int8 [N, K]: the integers that the kernel multiplies with, in plain torch. What it is tested against, exactly."""
    u_NK = tiles.unpack_tiles(weight.codes, weight.bits, weight.N, weight.K).int()
    size = weight.group_size or max(weight.K, 1)

    def spread(values: Tensor) -> Tensor:
        return tiles.unpack_rows_of_tiles(values, weight.N).repeat_interleave(size, 1)[:, : weight.K]

    centre = torch.full_like(weight.scale, 1 << (weight.bits - 1)) if weight.zero is None else weight.zero
    z_NK = spread(centre.int())
    if weight.group_size == 0:
        return (u_NK - z_NK).to(torch.int8)
    inverse = (128.0 / r).reshape(-1, 1, 16)
    m_NK = spread(2 * (weight.scale.float() * inverse).round().int())
    return ((u_NK * m_NK + 129 - z_NK * m_NK) >> 8).to(torch.int8)


def _refuses_sums(problem: Problem) -> str | None:
    """What bytes and their sums cannot hold."""
    grid = problem.integer
    if grid is not None and grid.bits == 8 and not grid.symmetric and grid.group_size is None:
        return "8 bits with a zero point per channel do not fit into a signed byte"
    return None if problem.K <= LONGEST_K else f"sums up to {LONGEST_K} products in 32 bits, K is {problem.K}"
