"""The search for a configuration: every cut of a weight that fills the device, compiled, checked, timed. Here those of up to 16
tokens; `cuda_wgmma_tune` has those of more.

Whole sets of configurations are compiled at once on the CPU's cores, then each is compared with a dense product in float32
and timed as a model would use it (`cuda.timing`). One that is wrong raises: a table must never hold a broken kernel.
Cost: a second of compilation per configuration and core, and some 30 ms of the device for each.

Shape legend: M tokens, N out features, K in features, R row tiles, C k tiles, G groups.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from aerogel.kernels.beside.ref import Beside
from aerogel.kernels.cuda import sources
from aerogel.kernels.cuda.timing import copies
from aerogel.kernels.gemm import cuda_table, cuda_wgmma_table
from aerogel.kernels.gemm.block_scales import E5M3, E8M0, unit_of_sums
from aerogel.kernels.gemm.cuda import choose
from aerogel.kernels.gemm.cuda_apart import slice_count
from aerogel.kernels.gemm.cuda_decoder import by_rows
from aerogel.kernels.gemm.cuda_few import (
    HALF_SHARED,
    LANE_TOKENS,
    Config,
    Few,
    as_data,
    ceil_divide,
    defines,
    fits,
    grid_of,
    shared_bytes,
    takes_patches,
    turns_inputs,
)
from aerogel.kernels.gemm.cuda_few_plan import Plan
from aerogel.kernels.gemm.cuda_outliers import TileOutliers
from aerogel.kernels.gemm.cuda_ranked import ranked
from aerogel.kernels.gemm.cuda_weight import TileWeight
from aerogel.kernels.gemm.cuda_wgmma import CLUSTERS, ManyTokens
from aerogel.kernels.gemm.plane_tables import numbers_of_rows, tables_of_blocks
from aerogel.kernels.gemm.small_floats import mantissa_bits
from aerogel.kernels.problem import Problem, Tuned
from aerogel.pack.mirrored_tables import SIGN
from aerogel.pack.tiles import COLUMNS, tile_counts
from aerogel.quantize.tables import TableGrid

LEAST_APART = 8
"""Blocks that add outliers and nothing else; fewer would be slower than all others."""
LEAST_FILL = 0.8
"""Of the best cut's share of the device in work. Others may win: while the last blocks end, those of the next launch fill their
rings where a block has ended before, and memory does not rest."""
FLOATS_OF_8 = {"e4m3": 3, "block": 3, "mxfp8": 3, "e5m2": 2}
"""Bits of mantissa."""
_WARPS = ((1, 4), (1, 5), (1, 6), (1, 7), (1, 8), (1, 12), (1, 15), (1, 16), (2, 4), (2, 7), (2, 8))
"""Multiplying warps along rows and along K of a ring's block."""
_CLUSTERS = ((1, 1), (2, 1), (4, 1), (1, 2), (1, 4))
"""Blocks of a cluster that share K, and that share x."""


def random_weight(
    N: int, K: int, bits: int, group_size: int, device: torch.device | str, *, seed: int = 0, zero: str = "none"
) -> TileWeight:
    """A weight of random codes with bfloat16 scales of about the size of a trained model's.

    zero: "none", "integer" or "float".
    """
    generator = torch.Generator(device).manual_seed(seed)
    R, C = tile_counts(N, K)
    G = 1 if group_size == 0 else ceil_divide(K, group_size)
    codes = torch.randint(0, 256, (R, C, 256 * bits), dtype=torch.uint8, device=device, generator=generator)
    scale = (0.5 + torch.rand(R, G, 16, device=device, generator=generator)) * 0.04 / (1 << bits)
    held: Tensor | None = None
    if zero != "none":
        held = torch.randint(0, 1 << bits, (R, G, 16), device=device, generator=generator).to(torch.uint8)
        held = held if zero == "integer" else (held.float() + 0.25).bfloat16()
    return TileWeight(codes=codes, scale=scale.bfloat16(), zero=held, table=None, pick=None, group_size=group_size, N=N, K=K)


def random_numbers(N: int, K: int, name: str, group_size: int, device: torch.device | str, *, seed: int = 0) -> TileWeight:
    """A weight of random codes that are no integers. name, of four bits: `nvfp4` (e2m1, e4m3 scales and a factor), `mxfp4`
    (e2m1, e8m0 scales), or with bfloat16 scales any 16 numbers: `table` (one for all), `rows` (one table for each row) or
    `groups` (each group of a row picks one of two tables and a sign, as those of BitMoD do). Of eight bits: `e4m3`, `block`
    (the same), `e5m2`, `mxfp8` (e4m3, e8m0 scales), `rf8` (any 256 numbers). Of one bit: `plane` (signs)."""
    bits = 1 if name == "plane" else 8 if name in FLOATS_OF_8 or name == "rf8" else 4
    plain = random_weight(N, K, bits, group_size, device, seed=seed)
    generator = torch.Generator(device).manual_seed(seed + 1)
    bytes_of = {"nvfp4": (E5M3, 8, 152), "mxfp4": (E8M0, 112, 124), "mxfp8": (E8M0, 112, 124)}
    if name == "plane":
        return replace(plain, floats=1)
    if name in FLOATS_OF_8 and name not in bytes_of:
        return replace(plain, floats=FLOATS_OF_8[name])
    R, G = plain.scale.shape[:2]
    tables = {"table": 1, "rows": R * 16, "groups": 2, "rf8": 1}
    if name in tables:
        table, pick = torch.randn(tables[name], 1 << bits, device=device, generator=generator), None
        if name == "groups":
            pick = torch.randint(0, 4, (R, G, 16), device=device, generator=generator, dtype=torch.uint8)
            pick = pick & 1 | (pick & 2) * (SIGN // 2)
        return replace(plain, table=table, pick=pick)
    dtype, least, beyond = bytes_of[name]
    scale = torch.randint(least, beyond, plain.scale.shape, device=device, generator=generator, dtype=torch.uint8).view(dtype)
    factor = torch.full((), 2.0**-10, device=device) if name == "nvfp4" else None
    return replace(plain, scale=scale, floats=FLOATS_OF_8.get(name, 1), factor=factor)


def random_planes(
    N: int, K: int, planes: int, group_size: int, device: torch.device | str, *, offset: bool = False, blocks: bool = False
) -> TileWeight:
    """A weight of random bit planes in bfloat16. blocks: 64 rows share a table of each half of `group_size`, which is 16."""
    plain, generator = random_weight(N, K, planes, group_size, device), torch.Generator(device).manual_seed(1)
    rows, groups = (ceil_divide(N, 64), ceil_divide(K, 8)) if blocks else (N, ceil_divide(K, group_size))
    alpha = torch.rand(rows, groups, planes, device=device, generator=generator) * 0.02
    offset_NG = alpha[..., 0] / 2 if offset else torch.zeros_like(alpha[..., 0])
    if blocks:
        return replace(plain, scale=tables_of_blocks(alpha, offset_NG, 64, N, torch.bfloat16))
    laid = numbers_of_rows(alpha, offset_NG if offset else None, torch.bfloat16)
    return replace(plain, scale=laid["tile_scale"], zero=laid.get("tile_zero"))


def with_outliers(
    weight: TileWeight, share: float = 0.01, *, seed: int = 0, apart: bool = False, patches: bool = True
) -> TileWeight:
    """The weight with random outliers beside it, as many of its numbers as `share` says or a few less."""
    N, K, device = weight.N, weight.K, weight.codes.device
    generator = torch.Generator(device).manual_seed(seed)
    place_E = torch.unique(torch.randint(N * K, (round(share * N * K),), device=device, generator=generator))
    start_N1 = torch.zeros(N + 1, dtype=torch.int64, device=device)
    start_N1[1:] = torch.bincount(place_E // K, minlength=N).cumsum(0)
    value_E = torch.randn(len(place_E), device=device, generator=generator).bfloat16()
    unit = unit_of_sums(weight.scale, weight.floats > 0, weight.factor, torch.bfloat16)
    laid = TileOutliers.of(
        Beside(start_N1, place_E % K, value_E), N, K, torch.bfloat16, unit=unit, apart=apart, patches=patches
    )
    return replace(weight, outliers=laid, group_size=weight.group_size or tile_counts(N, K)[1] * COLUMNS)


def like(problem: Problem) -> TileWeight | None:
    """A random weight of a problem's shape and kind on the GPU, with outliers where it has some, which meet inputs of their own
    where others are rounded; None for other kinds."""
    weight = _without_outliers(problem)
    if weight is None or not problem.outliers:
        return weight
    exact = problem.activations != "none"
    apart = not exact and cuda_table.has_apart_cut(torch.cuda.get_device_name(), problem.N, problem.K)
    return replace(with_outliers(weight, apart=apart), exact=exact)


def _without_outliers(problem: Problem) -> TileWeight | None:
    grid, size = problem.grid, problem.grid.group_size or 0
    if problem.integer is not None:
        zero = "none" if problem.integer.symmetric else "integer"
        return random_weight(problem.N, problem.K, grid.bits, size, "cuda", zero=zero)
    if grid.bits != 4 or not isinstance(grid, TableGrid) or grid.learned or grid.pick_bits:
        return None
    bytes_of = {torch.float8_e4m3fn: "nvfp4", torch.float8_e8m0fnu: "mxfp4"}
    name = bytes_of.get(grid.scale_dtype) if mantissa_bits(grid) else None if grid.scale_dtype in bytes_of else "table"
    return None if name is None else random_numbers(problem.N, problem.K, name, size, "cuda")


def tune_and_keep(made: Callable[[], TileWeight | None], tokens: Sequence[int]) -> Tuned | None:
    """What `Kernel.tune` gives for the weight that `made` makes; None where it makes none, or nothing is to be chosen."""
    weight = made()
    if weight is None:
        return None
    capability, most = torch.cuda.get_device_capability(), cuda_table.TOKEN_CLASSES[-1]
    served = {M: choose(weight, M, torch.bfloat16, capability) for M in tokens}
    few = [M for M, by in served.items() if by is Few and most >= M]
    return tuned_and_kept(weight, few, [M for M, by in served.items() if by is ManyTokens])


def tuned_and_kept(weight: TileWeight, few: Sequence[int], many: Sequence[int]) -> Tuned | None:
    """The same for numbers of tokens that are known to be served by the kernels for few and for many."""
    from aerogel.kernels.gemm import cuda_wgmma_tune

    name = torch.cuda.get_device_name()
    found: dict[int, Mapping[str, Any]] = {}
    kept: Path | None = None
    if few:
        classes = sorted({cuda_table.token_class(M) for M in few})
        entries = tune(weight, classes)
        kept = cuda_table.save(name, entries)
        found |= {M: entries[cuda_table.key_of(weight, M)] for M in classes}
    if many:
        classes = sorted({cuda_wgmma_table.token_class(M) for M in many})
        entries = cuda_wgmma_tune.tune(weight, classes)
        path = cuda_wgmma_table.save(name, cuda_wgmma_table.place_of(weight), entries)
        kept = path if kept is None else path.parent
        found |= {M: entries[str(M)] for M in classes}
    if kept is None:
        return None
    return Tuned(found={M: f"{entry['us']} us, {entry['config']}" for M, entry in found.items()}, kept=kept)


def weight_copies(weight: TileWeight) -> list[TileWeight]:
    """The weight and enough copies of it that no cache holds them all."""

    def copy(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.clone()

    return [weight] + [
        replace(
            weight,
            codes=weight.codes.clone(),
            scale=weight.scale.clone(),
            zero=copy(weight.zero),
            table=copy(weight.table),
            pick=copy(weight.pick),
            outliers=None if weight.outliers is None else TileOutliers.given([t.clone() for t in weight.outliers.tensors()]),
        )
        for _ in range(copies(weight.nbytes) - 1)
    ]


def candidates(weight: TileWeight, M: int, capability: tuple[int, int], multiprocessors: int) -> list[Config]:
    """Configurations worth a measurement: they fit, keep enough warps busy, and leave little of the device's last wave empty.

    Of the depths of a ring two are kept: the deepest that leaves room for the next kernel's blocks, and the deepest of all.
    """
    cuts = (config for cut in _cuts(weight, M) for config in _with_outliers(weight, cut, M, multiprocessors))
    found = [config for config in cuts if fits(weight, config, M, capability, multiprocessors)]
    best = max((_fill(weight, config, multiprocessors) for config in found), default=0.0)
    full = [config for config in found if _fill(weight, config, multiprocessors) >= LEAST_FILL * best]
    deepest: dict[tuple[Config, bool], Config] = {}
    for config in full:
        grid = grid_of(weight, config, multiprocessors)
        small = shared_bytes(weight, config, M, grid) * config.blocks <= HALF_SHARED
        if config.seats > config.blocks and not small:
            continue  # registers for the next launch's blocks are no use without the shared memory
        if config.half_sums and fits(weight, replace(config, half_sums=False), M, capability, multiprocessors):
            continue  # nor half the room for sums where there is the whole
        for kept in {small, False}:
            deepest[replace(config, stages=0), kept] = config
    return list(dict.fromkeys(deepest.values()))


def shortlist(weight: TileWeight, M: int, capability: tuple[int, int], multiprocessors: int, name: str) -> list[Config]:
    """Of `candidates` those whose cut has won for some weight and as many tokens on the device `name`, up to forty; all
    of them where none has. What has won beside outliers is tried there only."""
    few = M <= cuda_table.FEWEST
    won = {
        _shape_of(Config(**entry["config"]))
        for key, entry in cuda_table.table(name).items()
        if (int(key.rpartition("/m")[2]) <= cuda_table.FEWEST) is few and (weight.outliers is not None or key[:2] != "o/")
    }
    found = candidates(weight, M, capability, multiprocessors)
    return [config for config in found if _shape_of(config) in won] or found


def _shape_of(config: Config) -> tuple[Config, bool]:
    """What is alike in cuts that differ in depth and in the number of blocks apart."""
    return replace(config, stages=0, apart=0), config.apart > 0


def _fill(weight: TileWeight, config: Config, multiprocessors: int) -> float:
    """Share of the multiprocessors' time that has a block to run, from counting waves alone."""
    R = weight.codes.shape[0]
    blocks = ceil_divide(R, config.block_tiles * config.share) * config.share * config.cluster
    seats = multiprocessors * (config.blocks if config.ring else 1) - config.apart
    return R / config.block_tiles * config.cluster / (seats * ceil_divide(blocks, seats))


def _cuts(weight: TileWeight, M: int) -> Iterator[Config]:
    """Every cut; x is fetched together where it is much, and comes with the stages where warps would fetch it several times. It
    then leaves the least room for sums."""
    C = weight.codes.shape[1]
    for row_tiles in (1, 2, 3, 4):
        for k_warps in (4, 8, 12, 16):
            if k_warps <= C:
                yield from _laid_out(weight, Config(ring=False, row_tiles=row_tiles, k_warps=k_warps))
    for row_tiles, (row_warps, k_warps), (cluster, share) in itertools.product(range(1, 9), _WARPS, _CLUSTERS):
        if k_warps * cluster > C or (share > 1 and M <= 4) or (share > 2 and M <= 8):
            continue
        plain = Config(ring=True, row_tiles=row_tiles, row_warps=row_warps, k_warps=k_warps, cluster=cluster, share=share)
        placed = [replace(plain, x_resident=True), plain]
        if share == 1 and (M > 4 or by_rows(weight) or takes_patches(weight, replace(plain, x_in_stage=True))):
            placed.append(replace(plain, x_in_stage=True))
        # Warps that add outliers leave no seats to the next launch; `config_for` does not take such a cut for them.
        alone = [(1, 1)] if M > 4 or weight.outliers is not None else [(1, 1), (1, 2)]
        seated = [*alone, (2, 1)] if cluster == share == 1 and row_warps * k_warps <= 8 else alone
        for config, (blocks, seats), stages in itertools.product(placed, seated, range(2, 13)):
            yield from _laid_out(weight, replace(config, stages=stages, blocks=blocks, seats=seats))
            if config.stages_hold_x and cluster == 1:
                yield replace(config, stages=stages, blocks=blocks, seats=seats, half_sums=True)


def _with_outliers(weight: TileWeight, config: Config, M: int, multiprocessors: int) -> Iterator[Config]:
    """The cut, and for weights with outliers those that differ in how these are added: inputs are turned or not, and where they
    are in units as many blocks apart as leave the others their rounds."""
    yield config
    if weight.outliers is not None and M > LANE_TOKENS and not weight.exact:
        yield replace(config, turned=not turns_inputs(config, M))
    if weight.outliers is None or weight.outliers.apart is None or config.blocks > 1:
        return
    size = config.share * config.cluster
    step, room = math.lcm(slice_count(weight.K), size), multiprocessors * CLUSTERS[size] // CLUSTERS[1] * size
    blocks = ceil_divide(weight.codes.shape[0], config.block_tiles * config.share) * config.share * config.cluster
    rounds = ceil_divide(blocks, room - LEAST_APART) if config.ring and config.cluster == 1 else 1
    apart = (room - ceil_divide(blocks, rounds * config.share) * config.share) // step * step
    if apart >= LEAST_APART:
        yield replace(config, apart=apart)


def _laid_out(weight: TileWeight, config: Config) -> Iterator[Config]:
    """The cut, with tables of rows in every way in which these are laid out."""
    if not by_rows(weight):
        yield config
        return
    for beside in (False, True) if config.ring and config.cluster == 1 else (False,):
        for copies_of_pairs in (None, 0, 1 if config.row_copies == 2 else 2):
            yield replace(config, beside=beside, copies=copies_of_pairs)


def measure(
    weights: Sequence[TileWeight], configs: Sequence[Config], M: int, dtype: torch.dtype = torch.bfloat16
) -> list[tuple[Config, float]]:
    """Configurations and their microseconds with M <= 16 tokens, fastest first; those that spill many registers are left out.

    Args:
        weights: one weight and its copies.

    Raises:
        RunFailed: a configuration whose result is wrong.
    """
    weight = weights[0]
    sources.compile_ahead(
        [(f"{config.kernel}.cu", defines(weight, config, M, dtype)) for config in configs],
        torch.cuda.get_device_capability(weight.codes.device),
        workers=16,
    )
    return ranked(weights, configs, M, dtype, Plan)


def tune(
    weight: TileWeight, tokens: Sequence[int] = cuda_table.TOKEN_CLASSES, thorough: bool = False
) -> dict[str, dict[str, Any]]:
    """Table entries for a weight's shape and decoder: measures a shortlist and returns the best per token class.

    The result is what `cuda_table.save` keeps. The weight's values do not matter, only its shape and types.
    thorough: every candidate is measured, some hundreds, instead of what has won before.
    """
    facts = torch.cuda.get_device_properties(weight.codes.device)
    weights = weight_copies(weight)
    entries: dict[str, dict[str, Any]] = {}
    for M in tokens:
        machine = ((facts.major, facts.minor), facts.multi_processor_count)
        configs = candidates(weight, M, *machine) if thorough else shortlist(weight, M, *machine, facts.name)
        ranked = measure(weights, configs, M)
        config, microseconds = ranked[0]
        entries[cuda_table.key_of(weight, M)] = {"config": as_data(config), "us": round(microseconds, 2)}
    return entries
