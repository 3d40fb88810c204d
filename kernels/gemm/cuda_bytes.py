"""How the integer matmul is cut for a hundred tokens or so, where memory decides and not the tensor cores: blocks may share K.

`cuda_int8` multiplies codes and inputs as bytes. Thousands of tokens keep every multiprocessor busy whatever the cut, and few
will do (`cuda_int8.CUTS`). For fewer tokens there are those here: small tiles, two blocks of which may share a multiprocessor,
and clusters whose blocks share K, where rows are too few to keep all of the device busy. Sums of bytes are exact whoever adds
them up. So are weights served beside whose codes outliers are multiplied in 16 bits (`cuda_added`).

Which is the fastest was measured, for some weights (`cuda_wgmma_table`, `8a/...` and `8i/...`), or is estimated.

Shape legend: M tokens, N out features, K in features, R row tiles, C k tiles.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

from aerogel.kernels.gemm import cuda_wgmma, cuda_wgmma_table
from aerogel.kernels.gemm.cuda_weight import TileWeight, per_kind
from aerogel.kernels.gemm.cuda_wgmma import CLUSTERS, Config, ceil_divide, deepest

TOKENS = cuda_wgmma_table.TOKENS_IN_BYTES
"""Of a block: with more, tensor cores decide."""
PLAIN = {(2, 1, 1): 128, (1, 1, 2): 128, (2, 1, 2): 64, (2, 2, 1): 128, (3, 1, 1): 128, (4, 1, 1): 64}
"""(warpgroups, blocks of 64 rows of each, resident) and up to how many tokens they compile without spills."""
BESIDE = (
    *((tokens, warpgroups, blocks, 1) for tokens in (16, 32) for warpgroups, blocks in ((2, 2), (2, 1), (1, 1))),
    *((tokens, warpgroups, 1, 1) for tokens in (64, 128) for warpgroups in (2, 1)),
    *((tokens, 1, 1, 2) for tokens in (16, 32)),
)
"""(tokens, warpgroups, blocks, resident) that were the fastest at some size where outliers stand beside the codes."""
CLUSTERINGS = ((1, 1), (2, 1), *((1, split) for split in range(2, 7)))
"""Blocks that share inputs, and that share K."""
FILLING = 980
"""Cycles that a warp takes for two sheets of outliers."""
CYCLES = 1.75e3
"""Of a multiprocessor in a microsecond."""
SIXTEEN = "sixteen"
"""Under which an entry of the table has the microseconds of the matmul in 16 bits, where that was measured too."""


def candidates(held: TileWeight, M: int, multiprocessors: int) -> list[Config]:
    """Cuts worth a measurement or an estimate for a weight `in_bytes`, each with the deepest rings that fit."""
    tokens = next((size for size in TOKENS if size >= M), TOKENS[-1])
    plain = ((tokens, *cut) for cut, most in PLAIN.items() if tokens <= most)
    beside = (cut for cut in BESIDE if cut[0] < 2 * M or cut[0] == BESIDE[0][0])
    found = []
    for (tokens, warpgroups, blocks, resident), (share, split) in itertools.product(
        beside if held.exact else plain, CLUSTERINGS
    ):
        cut = Config(tokens=tokens, warpgroups=warpgroups, blocks=blocks, share=share, split=split, batch=2, resident=resident)
        alone = ceil_divide(held.codes.shape[0], cut.row_tiles) * ceil_divide(M, tokens)
        idle = split == 1 or alone < multiprocessors * resident  # blocks that share K begin anew with each tile
        deep = deepest(held, cut) if idle else None
        if deep is not None:
            found.append(deep)
    return found


def cuts_for(held: TileWeight, M: int, name: str, multiprocessors: int) -> list[tuple[int, Config]]:
    """Runs of rows and their cuts for M tokens of a weight `in_bytes` on the device `name`: measured, or else estimated to be
    the fastest. None where none fits, and of a weight without outliers where 16 bits are as fast."""
    found = measured(held, M, name)
    if found is not None:
        return found
    config = choose_config(held, M, multiprocessors)
    return [] if config is None else [(held.N, config)]


def measured(held: TileWeight, M: int, name: str) -> list[tuple[int, Config]] | None:
    """The same from measurements alone; None without any."""
    entry = cuda_wgmma_table.entry_of(held, M, name)
    if entry is not None and entry["us"] >= entry.get(SIXTEEN, math.inf):
        return []
    return cuda_wgmma_table.cuts_for(held, M, name) or None


@per_kind
def choose_config(held: TileWeight, M: int, multiprocessors: int) -> Config | None:
    """The cut with the least estimated time; None as `cuts_for`."""
    found = candidates(held, M, multiprocessors)
    best = min(found, key=lambda cut: microseconds(held, cut, M, multiprocessors), default=None)
    wide = None if held.exact else cuda_wgmma.choose_config(replace(held, in_bytes=False), M, multiprocessors)
    if best is None or wide is None:
        return best
    faster = microseconds(held, best, M, multiprocessors) < cuda_wgmma.microseconds(held, wide, M, multiprocessors)
    return best if faster else None


def microseconds(held: TileWeight, config: Config, M: int, multiprocessors: int) -> float:
    """Estimate of a launch's time, fitted on an H200 (9 % off as a rule, 13 % beside outliers): whole rounds of tiles, each of
    steps of 128 columns, in which tensor cores work on rows and tokens, beside what takes the same for any number of tokens.

    A block alone waits in each step for what two on a multiprocessor wait for in turns, and memory is busy meanwhile. Beside
    outliers the slower of both counts, and filling two sheets takes its time.
    """
    rows, C = 16 * config.row_tiles, ceil_divide(held.codes.shape[1], config.split)
    count = ceil_divide(held.codes.shape[0], config.row_tiles * config.share) * ceil_divide(M, config.tokens)
    seats = multiprocessors * CLUSTERS[config.cluster] // CLUSTERS[1]
    crowd, rounds = min(config.resident, ceil_divide(count, seats)), ceil_divide(count, seats * config.resident)
    gather = rows * config.tokens / 8 if config.split > 1 else 0
    if held.exact:
        tensor, beside = 1.24 * rows / 64 * 6 * config.tokens, 140 + 820 * rows / 128
        step = max(crowd * math.hypot(tensor, beside), math.sqrt(crowd) * FILLING)
        edge = 2500 + rows * config.tokens / 16 + gather + 2500 * (config.split > 1)
        busy = min(1.0, 0.35 + 0.75 * min(1.0, count * config.cluster / multiprocessors))
        return 2.0 + max(rounds * (C * step + edge) / CYCLES, held.nbytes / (2.9e6 * busy) + edge / CYCLES)
    tensor, beside = 1.4 * rows / 64 * 2 * config.tokens, 13 + 450 * rows / 128
    step = max(crowd * math.hypot(tensor, beside), 300 + 2.5 * config.tokens + 1.4 * rows)
    edge = 690 + rows * config.tokens / 16 + gather + 2190 * (config.split > 1)
    together = math.pow(rounds * C * step / CYCLES, 1.5) + math.pow(held.nbytes / 4.4e6, 1.5)
    return 2.0 + rounds * edge / CYCLES + math.pow(together, 1 / 1.5)
