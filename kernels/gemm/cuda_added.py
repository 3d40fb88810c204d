"""Sparse outliers beside integers whose inputs are rounded to bytes, on Hopper: they meet inputs as they are.

    y_MN = x'_MK @ W_NK.T + x_MK @ S_NK.T        x' rounded, S sparse

The matmul has both inputs. Up to `FEW_TOKENS` tokens it adds outliers as the weight-only kernels do, but looks their inputs up
in a place of their own. For more, a sheet of outliers (`tile_outliers.cuh`) is not added to what codes decode to, but
multiplied apart, in 16 bits, with inputs that stand behind those of the codes in every stage. The codes themselves are
multiplied as bytes (`cuda_int8`), which takes hardly any decoding and half the time of the tensor cores; or, where that
would round the weight once more and few tokens ask for better, in 16 bits with rounded inputs.

Shape legend: M tokens, N out features, K in features, E outliers.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from aerogel.errors import RunFailed
from aerogel.kernels import gpu_here
from aerogel.kernels.beside.ref import Beside
from aerogel.kernels.gemm import cuda_few, cuda_few_plan, cuda_wgmma, cuda_wgmma_plan, cuda_wgmma_table
from aerogel.kernels.gemm.cuda_outliers import TileOutliers
from aerogel.kernels.gemm.cuda_table import config_for
from aerogel.kernels.gemm.cuda_weight import TileWeight, per_kind
from aerogel.kernels.gemm.cuda_wgmma import CLUSTERS, Config, ceil_divide, deepest
from aerogel.kernels.problem import Problem
from aerogel.pack import tiles

NAMES = ("added_row_start", "added_by_row", "added_tiles", "added_by_sheet")
"""Under which the tensors of `TileOutliers` stand beside a layout's, in its order."""
FEW_TOKENS, MOST_WARPS = 8, 8
"""Tokens; and warps along K without a ring: with more, registers spill (4096 x 4096, 8 tokens: 12.6 us for 11.1)."""
CUTS = (
    *((tokens, warpgroups, blocks) for tokens in (16, 32) for warpgroups, blocks in ((2, 2), (2, 1), (1, 1))),
    *((tokens, warpgroups, 1) for tokens in (64, 128) for warpgroups in (2, 1)),
)
"""(tokens, warpgroups, blocks of 64 rows of each) that were the fastest at some size where codes are bytes."""
CLUSTERINGS = ((1, 1), (2, 1), *((1, split) for split in range(2, 7)))
"""Blocks that share inputs, and that share K."""
FILLING = 980
"""Cycles that a warp takes for two sheets."""


def laid(beside: Beside, problem: Problem, place_K: Tensor | None = None) -> TileOutliers | None:
    """Outliers as the matmuls take them; None for what is not sparse outliers alone, on other devices than Hopper's, and what
    `TileOutliers.of` refuses. place_K: as there."""
    value_E = beside.value_E
    if value_E is None or beside.index_C is not None:
        return None
    if gpu_here.other_than_hopper(torch.cuda.get_device_capability(value_E.device)) is not None:
        return None
    return TileOutliers.of(beside, problem.N, problem.K, problem.dtype, place_K)


def named(outliers: TileOutliers) -> dict[str, Tensor]:
    """The tensors by `NAMES`."""
    return dict(zip(NAMES, outliers.tensors(), strict=True))


def among(tensors: Mapping[str, Tensor]) -> list[Tensor] | None:
    """What an operator is called with, among a layout's tensors."""
    return [tensors[name] for name in NAMES] if NAMES[0] in tensors else None


def fewest_tokens(exact: TileWeight) -> int:
    """From how many tokens on the kernel for many serves a weight whose outliers have inputs of their own."""
    return min(FEW_TOKENS, cuda_few.most_outlier_tokens(exact, (9, 0))) + 1


def config_in_bytes(held: TileWeight, M: int, name: str, multiprocessors: int) -> Config | None:
    """The cut that multiplies M tokens of a weight `in_bytes` on the device `name`: measured, or else estimated to be fastest;
    None where none fits."""
    cuts = cuda_wgmma_table.cuts_for(held, M, name)
    return cuts[0][1] if cuts else choose_config(held, M, multiprocessors)


@per_kind
def choose_config(held: TileWeight, M: int, multiprocessors: int) -> Config | None:
    """The cut in bytes with the least estimated time; None where none fits."""
    found = []
    for (tokens, warpgroups, blocks), (share, split) in itertools.product(CUTS, CLUSTERINGS):
        plain = Config(tokens=tokens, warpgroups=warpgroups, blocks=blocks, share=share, split=split, batch=2)
        alone = ceil_divide(held.codes.shape[0], plain.row_tiles) * ceil_divide(M, tokens)
        idle = split == 1 or alone < multiprocessors  # blocks that share K begin anew with each tile
        cut = deepest(held, plain) if idle and (tokens < 2 * M or tokens == CUTS[0][0]) else None
        if cut is not None:
            found.append(cut)
    return min(found, key=lambda cut: microseconds(held, cut, M, multiprocessors), default=None)


def microseconds(held: TileWeight, config: Config, M: int, multiprocessors: int) -> float:
    """Estimate of a launch's time in bytes, fitted on an H200 (13 % off as a rule): whole rounds of tiles, each of steps of 128
    columns, in which tensor cores work on rows and tokens, beside what takes the same for any number of tokens; and filling two
    sheets takes its time."""
    rows, C = 16 * config.row_tiles, ceil_divide(held.codes.shape[1], config.split)
    count = ceil_divide(held.codes.shape[0], config.row_tiles * config.share) * ceil_divide(M, config.tokens)
    seats = multiprocessors * CLUSTERS[config.cluster] // CLUSTERS[1]
    crowd = min(config.resident, ceil_divide(count, seats))
    tensor, beside = 1.24 * rows / 64 * 6 * config.tokens, 140 + 820 * rows / 128
    step = max(crowd * math.hypot(tensor, beside), math.sqrt(crowd) * FILLING)
    edge = 2500 + rows * config.tokens / 16 + (2500 + rows * config.tokens / 8 if config.split > 1 else 0)
    memory = held.nbytes / (2.9e6 * min(1.0, 0.35 + 0.75 * min(1.0, count * config.cluster / multiprocessors)))
    rounds = ceil_divide(count, seats * config.resident)
    return 2.0 + max(rounds * (C * step + edge) / 1.75e3, memory + edge / 1.75e3)


def whole(exact: TileWeight) -> TileWeight:
    """As the 16-bit matmul for many tokens takes it. Of sums that a row's scale waits for, outliers would be no part."""
    return replace(exact, group_size=exact.group_size or tiles.COLUMNS * exact.codes.shape[1])


Product = Callable[[Tensor, Tensor | None, Tensor, Tensor], None]
"""(x_MK rounded, bias_N or None, y_MN to be filled, x_MK as it was) on torch's current stream and device."""


def product(exact: TileWeight, M: int, dtype: torch.dtype) -> Product:
    """The matmul of 16 bits for M tokens of a weight whose outliers have inputs of their own."""
    if fewest_tokens(exact) > M:
        few = config_for(exact, M)
        if not few.ring:
            few = replace(few, k_warps=min(few.k_warps, MOST_WARPS))
        return cuda_few_plan.Plan(exact, few, M, dtype)
    weight = whole(exact)
    weight.check()
    facts = torch.cuda.get_device_properties(weight.codes.device)
    cuts = cuda_wgmma_table.cuts_for(weight, M, facts.name)
    config = cuts[0][1] if len(cuts) == 1 else cuda_wgmma.choose_config(weight, M, facts.multi_processor_count)
    if config is None:
        raise RunFailed("no cut of the weight fits the multiprocessor, though integers without tables leave room for one")
    return cuda_wgmma_plan.Plan(weight, config, M, dtype)
