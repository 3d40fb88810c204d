"""Up to 16 tokens at a time on CUDA: which of the kernels of `few_tokens.cuh`, and in which configuration.

The source explains the kernels. Here stands what a launch (`cuda_few_plan.py`) needs: the configuration (from the tuned table
of the device, else by rule), the macros that specialise the source, and how much shared memory that takes.

More than 16 tokens run as slices of 16; each slice reads the weight again, so this serves few slices only.

Shape legend: M tokens, N out features, K in features; tiles of 16 rows x 128 columns.
"""

from __future__ import annotations

import itertools
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from aerogel.kernels.cuda.sources import Wanted
from aerogel.kernels.gemm.cuda import Runner
from aerogel.kernels.gemm.cuda_apart import slice_count, slice_tiles
from aerogel.kernels.gemm.cuda_decoder import (
    by_rows,
    decoder_defines,
    made_room,
    side_bytes,
    table_bytes,
    table_room,
)
from aerogel.kernels.gemm.cuda_patches import COLUMNS
from aerogel.kernels.gemm.cuda_weight import TileWeight
from aerogel.pack import tiles

TOKENS = 16
OUTLIER_TOKENS = (1, 2, 4, 8, TOKENS)
"""For so many tokens sums of outliers are kept."""
LANE_TOKENS = 4
"""With more, outliers are a matrix product, for which inputs may be turned: a column's lie side by side."""
TURNED_TOKENS = 8
MOST_TOKENS = 96
"""Above this, decoding the whole weight and multiplying densely is faster than passing over it every 16 tokens."""
MOST_TABLE_BYTES = 48 << 10
SHARED_LIMIT = {8: 99 << 10, 9: 227 << 10, 10: 227 << 10, 12: 99 << 10}
"""Shared memory of a block in bytes, by the major compute capability; the least of the generation's devices."""
APART_AHEAD = 4096
"""Bytes that each warp of a block that adds outliers apart has on their way."""
PATCH_TILES, PATCH_ROUNDS, PATCH_ROUND = COLUMNS // tiles.COLUMNS, 4, 512
"""K tiles of a patch; rounds of patches that a warp has on their way, and bytes of each."""
HALF_SHARED = 112 << 10
"""With this much shared memory the next kernel's blocks can move in beside the present one's."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """How a few-token kernel is cut.

    ring: weights through a ring in shared memory (compute capability 9.0), else through registers.
    row_tiles: tiles of 16 rows of one warp. row_warps, k_warps: warps of a block along rows and along K.
    stages: of the ring. x_resident: all of x stays in shared memory (ring only). x_in_stage: else, x comes with the stages, as
        it does where it is shared. cluster: blocks that split K among them.
    share: blocks of a cluster that fetch x together, for other rows each (ring only, and not where K is split).
    blocks: row blocks resident on a multiprocessor at once.
    seats: blocks that a multiprocessor has registers for. More than `blocks` let those of the next launch move in early,
        which is worth much for small weights.
    beside: warps lay out the tables of rows of the next row block, in a second place, and add up the sums of the last one
        (ring only, tables of rows only).
    half_sums: partial sums of the slices of K leave in two turns, in half of the room, which beside large tables may be another
        stage (ring only); a barrier more at the end of a row block.
    copies: of all pairs of numbers in shared memory, for tables of rows. With two, look-ups wait less for each other, with
        none numbers are looked up one by one, in a quarter of the room of one copy. None: two for up to three row tiles.
    apart: blocks that add outliers and nothing else, the same number for each slice of their inputs (`cuda_apart.py`).
    turned: inputs of outliers are turned, from LANE_TOKENS + 1 tokens on. None: those of up to TURNED_TOKENS are.
    """

    ring: bool
    row_tiles: int
    k_warps: int
    row_warps: int = 1
    stages: int = 3
    x_resident: bool = False
    x_in_stage: bool = False
    cluster: int = 1
    share: int = 1
    blocks: int = 1
    seats: int = 1
    beside: bool = False
    half_sums: bool = False
    copies: int | None = None
    apart: int = 0
    turned: bool | None = None

    @property
    def row_copies(self) -> int:
        """Copies of the pairs of rows' tables; four row tiles of two leave too little room for the ring."""
        return self.copies if self.copies is not None else 2 if self.block_tiles <= 3 else 1

    @property
    def block_tiles(self) -> int:
        """Row tiles of a block."""
        return self.row_tiles * self.row_warps

    @property
    def stages_hold_x(self) -> bool:
        """Whether a stage of the ring holds columns of x beside the weights."""
        return not self.x_resident and (self.x_in_stage or self.share > 1)

    @property
    def kernel(self) -> str:
        """The kernel's name; its source is the file of that name."""
        return "few_ring" if self.ring else "few_registers"

    @property
    def warps(self) -> int:
        """Multiplying warps of a block."""
        return self.row_warps * self.k_warps


def ceil_divide(a: int, b: int) -> int:
    """a / b rounded up."""
    return -(-a // b)


def kernel_of(weight: TileWeight, config: Config, M: int, dtype: torch.dtype) -> Wanted:
    """The kernel of a launch."""
    return Wanted(f"{config.kernel}.cu", config.kernel, defines(weight, config, M, dtype))


def defines(weight: TileWeight, config: Config, M: int, dtype: torch.dtype) -> dict[str, int]:
    """The macros that specialise the source."""
    return {
        **decoder_defines(weight, dtype),
        "TOKEN_TILES": 1 if M <= 8 else 2,
        "ROW_TILES": config.row_tiles,
        "ROW_WARPS": config.row_warps,
        "K_WARPS": config.k_warps,
        "X_RESIDENT": int(config.x_resident),
        "X_IN_STAGE": int(config.stages_hold_x),
        "CLUSTER": config.cluster,
        "X_SHARE": config.share,
        "BLOCKS": max(config.blocks, config.seats),
        "TRADE": int(trades(config, M)),
        "WHOLE": int(weight.K % 128 == 0),
        **outlier_defines(weight, config, M),
        "KEPT": int(weight.kept is not None),
        "ROW_COPIES": config.row_copies,
        "BESIDE": int(config.beside),
        "HALF_SUMS": int(config.half_sums),
    }


def outlier_defines(weight: TileWeight, config: Config, M: int) -> dict[str, int]:
    """The macros of `outliers.cuh`; none for a weight without outliers."""
    if weight.outliers is None:
        return {}
    if config.apart:
        return {
            "APART": 1,
            "OUTLIERS": apart_tokens(M),
            "OUTLIER_SHARE": 0,
            "OUTLIER_WARPS": collecting_warps(config, M),
            "OUTLIER_ROUNDS": 1,
            "OUTLIER_TURN": 0,
        }
    patched = takes_patches(weight, config)
    return {
        **({"PATCHES": 1} if patched else {}),
        "OUTLIERS": apart_tokens(M) if patched else outlier_tokens(M),
        "OUTLIER_SHARE": int(shares_inputs(weight, config)),
        "OUTLIER_WARPS": outlier_warps(config, M),
        "OUTLIER_ROUNDS": PATCH_ROUNDS if patched else outlier_rounds(config, M),
        "OUTLIER_TURN": int(turns_inputs(config, M) and not patched),
        **({"EXACT": 1} if weight.exact else {}),
    }


def outlier_tokens(M: int) -> int:
    """Tokens that sums of outliers are kept for."""
    return next(most for most in OUTLIER_TOKENS if most >= M)


def apart_tokens(M: int) -> int:
    """The same where blocks of their own add outliers: they gather 8 tokens at once."""
    return TURNED_TOKENS if M <= TURNED_TOKENS else TOKENS


def apart_bytes(weight: TileWeight, config: Config, M: int) -> int:
    """Shared memory of such a block: a slice of the inputs, and what each warp has on its way."""
    warps = threads_of(config, M, outliers=True) // 32
    return slice_tiles(weight.K) * tiles.COLUMNS * 2 * apart_tokens(M) + warps * APART_AHEAD


def shares_inputs(weight: TileWeight, config: Config) -> bool:
    """Whether outliers take their inputs from where those of a ring stay; else they have a place of their own."""
    return config.ring and config.x_resident and config.cluster == 1 and not weight.exact and not config.apart


def takes_patches(weight: TileWeight, config: Config) -> bool:
    """Whether outliers are added patch by patch, as inputs come (`cuda_patches.py`)."""
    listed = weight.outliers is not None and weight.outliers.patches is not None and not weight.exact
    return listed and wants_patches(config)


def wants_patches(config: Config) -> bool:
    """Whether that is the cut's way of adding outliers, where a weight has them by patches."""
    return config.ring and config.stages_hold_x and config.k_warps == PATCH_TILES and config.cluster == 1 and not config.apart


def x_rows(weight: TileWeight, config: Config, M: int) -> int:
    """Tokens that there is room for where the whole of x stays: inputs are turned in squares."""
    turned = weight.outliers is not None and shares_inputs(weight, config) and turns_inputs(config, M)
    return outlier_tokens(M) if turned else M


def turns_inputs(config: Config, M: int) -> bool:
    """Whether inputs of outliers are turned."""
    return LANE_TOKENS < M and (M <= TURNED_TOKENS if config.turned is None else config.turned)


def outlier_warps(config: Config, M: int) -> int:
    """Warps that add outliers: several for a row tile, where that is not too many for a block, else one for 16 or 32 rows."""
    tiles = config.block_tiles
    if tiles <= (4 if M > LANE_TOKENS or wants_patches(config) else 2) and not _few_far_ahead(config, M):
        return tiles * 2
    return tiles if tiles <= 8 else tiles // 2


def collecting_warps(config: Config, M: int) -> int:
    """Warps that wait for sums from blocks apart; more where the blocks that add these would have few. Where registers are
    traded it is those that have nothing else to do."""
    most = 16 if M <= TURNED_TOKENS else 12
    return 3 if trades(config, M) else max(1, most - config.warps - int(config.ring))


def most_outlier_tokens(weight: TileWeight, capability: tuple[int, int]) -> int:
    """For how many tokens outliers are added here: as many as leave room for weights beside their inputs in shared memory."""
    most, each = SHARED_LIMIT.get(capability[0], 99 << 10) * 4 // 7, weight.codes.shape[1] * 256 + 16
    useful = TOKENS if capability >= (9, 0) else 8
    return max((M for M in OUTLIER_TOKENS if useful >= M and M * each <= most), default=0)


def outlier_rounds(config: Config, M: int) -> int:
    """Rounds of such a warp that are on their way: a block of one row block has no use for many, inputs of 16 tokens leave no
    room for them."""
    if (config.ring and M <= LANE_TOKENS) or _few_far_ahead(config, M):
        return 4
    return 2 if M <= 8 else 1


def _few_far_ahead(config: Config, M: int) -> bool:
    """Whether half as many warps have twice the rounds on their way: beside three row tiles more leave too few registers."""
    return not config.ring and config.row_tiles == 3 and turns_inputs(config, M)


def outlier_bytes(weight: TileWeight, config: Config, M: int, single: bool) -> int:
    """Shared memory for outliers, laid out as `few_tokens.cuh` does: barriers, inputs, the sums of two row blocks, rounds.
    single: whether a block has one row block only."""
    if weight.outliers is None:
        return 0
    if config.apart:
        return 128 + (1 if single else 2) * apart_tokens(M) * config.block_tiles * 16 * 4
    patched = takes_patches(weight, config)
    tokens = apart_tokens(M) if patched else outlier_tokens(M)
    inputs = (
        0 if patched or shares_inputs(weight, config) else ceil_divide(tokens * (weight.codes.shape[1] * 256 + 16), 128) * 128
    )
    rounds = outlier_warps(config, M) * (PATCH_ROUNDS * PATCH_ROUND if patched else outlier_rounds(config, M) * 2048)
    stages = ceil_divide(weight.codes.shape[1], config.k_warps) if shares_inputs(weight, config) and M > LANE_TOKENS else 1
    return ceil_divide(16 * stages, 128) * 128 + inputs + 2 * tokens * config.block_tiles * 16 * 4 + rounds


def beside_bytes(weight: TileWeight, config: Config, M: int, single: bool) -> int:
    """Shared memory for outliers, and for a step of kept columns for each warp. single: as above."""
    steps = 0 if weight.kept is None else min(weight.kept.shape[1], config.k_warps)
    return ceil_divide(outlier_bytes(weight, config, M, single) + config.block_tiles * steps * 512, 128) * 128


def trades(config: Config, M: int) -> bool:
    """Whether the multiplying warps take registers over from a warpgroup of which only one warp works: see few_ring.cu."""
    alone = config.blocks == config.seats == 1
    return config.ring and alone and config.warps == 8 and config.row_tiles > 4 and M > 8


def threads_of(config: Config, M: int, outliers: bool = False) -> int:
    """Threads of a block."""
    beside = 0
    if outliers and config.apart:
        beside = 0 if trades(config, M) else collecting_warps(config, M)
    elif outliers:
        beside = outlier_warps(config, M)
    return 32 * (config.warps + (4 if trades(config, M) or config.beside else int(config.ring)) + beside)


def shared_bytes(weight: TileWeight, config: Config, M: int, grid: int) -> int:
    """Dynamic shared memory of a launch."""
    own = _own_bytes(weight, config, M, grid - config.apart)
    return max(own, apart_bytes(weight, config, M)) if config.apart else own


def _own_bytes(weight: TileWeight, config: Config, M: int, grid: int) -> int:
    """That of a block with rows, of which there are `grid`, laid out as the source does."""
    rows = config.block_tiles * 16
    k_tiles = weight.codes.shape[1]
    slices = ceil_divide(config.k_warps, 2) if config.half_sums else config.k_warps
    partials = slices * M * (rows + 4) * 4
    tables = table_room(weight, config.block_tiles, config.row_copies) + made_room(weight, config.block_tiles * config.k_warps)
    if not config.ring:
        tokens = 0 if weight.outliers is not None and not weight.exact and not config.apart else M * 272
        slots = config.warps * 2 * (tokens + config.row_tiles * side_bytes(weight, 128))
        return (tables + 15) // 16 * 16 + beside_bytes(weight, config, M, True) + max(slots, partials)
    single = grid // config.cluster >= ceil_divide(weight.codes.shape[0], config.block_tiles)
    tables = (tables * (2 if config.beside and not single else 1) + 127) // 128 * 128
    stage = config.block_tiles * (config.k_warps * 256 * weight.bits + side_bytes(weight, config.k_warps * 128))
    stage = (stage + 127) // 128 * 128
    if config.stages_hold_x:
        stage += ((8 if M <= 8 else 16) * (config.k_warps * 256 + 16) + 127) // 128 * 128
    ring = config.stages * stage
    stages_each = ceil_divide(ceil_divide(k_tiles, config.k_warps), config.cluster)
    if config.x_resident:
        ring += x_rows(weight, config, M) * (stages_each * config.k_warps * 256 + 16)
    elif not config.stages_hold_x:
        ring += config.warps * 2 * M * 272
    inbox = (M * rows * 4 + 127) // 128 * 128 if config.cluster > 1 else 0
    return 256 + tables + beside_bytes(weight, config, M, single) + inbox + (max(ring, partials) if single else ring + partials)


def grid_of(weight: TileWeight, config: Config, multiprocessors: int) -> int:
    """Blocks of a launch: one per row block, or as many as run at once where blocks are persistent."""
    row_blocks = ceil_divide(weight.codes.shape[0], config.block_tiles)
    if config.cluster > 1 or not config.ring:
        return row_blocks * config.cluster + config.apart
    seats = (multiprocessors * config.blocks - config.apart) // config.share
    return min(ceil_divide(row_blocks, config.share), seats) * config.share + config.apart


def fits(weight: TileWeight, config: Config, M: int, capability: tuple[int, int], multiprocessors: int) -> bool:
    """Whether a device can launch the configuration."""
    if config.ring and capability < (9, 0):
        return False
    if threads_of(config, M, weight.outliers is not None) > 1024 or (not config.ring and config.row_warps > 1):
        return False
    if config.cluster not in (1, 2, 4, 8) or config.share > 8:  # a cluster's blocks divide 8 pairs of rows
        return False
    if config.share > 1 and (config.cluster > 1 or not config.ring):
        return False
    if config.half_sums and (config.beside or not config.ring):
        return False
    if config.beside and not (config.ring and config.cluster == 1 and by_rows(weight) and weight.outliers is None):
        return False
    if config.apart and not _parts_fit(weight, config, M, multiprocessors):
        return False
    if weight.outliers is not None and not config.apart and not _outliers_fit(weight, config, M):
        return False
    grid = grid_of(weight, config, multiprocessors)
    resident = min(config.blocks, 2) if config.ring else 1
    return shared_bytes(weight, config, M, grid) * resident <= SHARED_LIMIT.get(capability[0], 99 << 10)


def _outliers_fit(weight: TileWeight, config: Config, M: int) -> bool:
    """Whether the blocks themselves can add the weight's outliers: not where registers are all spoken for, or all inputs of
    many tokens would be there twice."""
    once = M <= TURNED_TOKENS or shares_inputs(weight, config) or takes_patches(weight, config)
    return once and not trades(config, M)


def _parts_fit(weight: TileWeight, config: Config, M: int, multiprocessors: int) -> bool:
    """Whether blocks can add the weight's outliers apart: as many for each slice, whole clusters, one on a multiprocessor."""
    if weight.outliers is None or weight.outliers.apart is None or weight.exact:
        return False
    even = config.apart % slice_count(weight.K) == 0 and config.apart % (config.cluster * config.share) == 0
    return even and config.apart < multiprocessors and config.blocks == config.seats == 1


def default_config(weight: TileWeight, M: int, capability: tuple[int, int], multiprocessors: int) -> Config:
    """A sound configuration for a weight that no table knows, by what won on the measured shapes of an H100.

    Where each multiprocessor has at most four row tiles, or there is no copy engine: through registers, all of them in one
    block. Else through a ring: many row tiles of few k tiles, x resident if it fits. More than 8 tokens go through a ring
    wherever a multiprocessor has two row tiles: few of them beside a resident x, else more, and two blocks fetch x together.
    """
    R, C = weight.codes.shape[:2]
    tall = ceil_divide(R, multiprocessors)
    rings = [(*cut, resident, 1) for cut in ((7, 4), (4, 8), (2, 8), (2, 4)) for resident in (True, False)]
    if M > 8:
        rings = [(tall if tall <= 3 else 2, 8, True, 1), (min(tall, 4), 8, False, 2), (2, 4, False, 1), (1, 4, False, 1)]
    if resident_only := weight.outliers is not None and M > 8:
        rings = [rings[0], *((min(tall, 2), k_warps, True, 1) for k_warps in (8, 4, 2, 1))]
    if capability >= (9, 0) and (resident_only or tall > (4 if M <= 8 else 1)):
        for (row_tiles, k_warps, resident, share), stages in itertools.product(rings, (6, 5, 4, 3, 2)):
            config = Config(ring=True, row_tiles=row_tiles, k_warps=k_warps, stages=stages, x_resident=resident, share=share)
            if k_warps <= C and fits(weight, config, M, capability, multiprocessors):
                return config
    # 16 warps leave 128 registers to a thread: too few for two token tiles beside many words, scales or zero points.
    crowded = M > 8 and (weight.bits > 4 or (weight.zero is not None and 0 < weight.group_size < 128))
    for row_tiles in range(max(1, min(tall, 4, 16 // weight.bits)), 0, -1):
        for k_warps in (8, 4, 2, 1) if crowded or (M > 8 and row_tiles > 2) else (16, 8, 4, 2, 1):
            config = Config(ring=False, row_tiles=row_tiles, k_warps=k_warps)
            if k_warps <= max(C, 1) and fits(weight, config, M, capability, multiprocessors):
                return config
    return Config(ring=False, row_tiles=1, k_warps=1)


class Few:
    """1 to 16 tokens in one pass over the weight, up to 96 in several."""

    name: ClassVar[str] = "few"

    @staticmethod
    def refuses(weight: TileWeight, M: int, dtype: torch.dtype, capability: tuple[int, int]) -> str | None:
        """Too many tokens, or tables that do not fit into shared memory."""
        from aerogel.kernels.gemm.cuda_table import adds_without_room

        if M > MOST_TOKENS:
            return f"passes over the weight once per {TOKENS} tokens, {M} are better served by a dense product"
        most = M if weight.outliers is None else most_outlier_tokens(weight, capability)
        if most < M and not adds_without_room(weight, M):
            return f"adds outliers of this weight for up to {most} tokens, found {M}"
        if table_bytes(weight, 1) > MOST_TABLE_BYTES:
            return f"holds its tables in shared memory, and these are {table_bytes(weight, 1)} bytes"
        return None

    @staticmethod
    def kernels(weight: TileWeight, M: int, dtype: torch.dtype, device: torch.device) -> list[Wanted]:
        """See `Implementation.kernels`: that of a whole slice, and of what is left."""
        from aerogel.kernels.gemm.cuda_table import config_for

        slices = dict.fromkeys(min(TOKENS, M - start) for start in range(0, M, TOKENS))
        return [kernel_of(weight, config_for(weight, size, device), size, dtype) for size in slices]

    @staticmethod
    def plan(weight: TileWeight, M: int, dtype: torch.dtype) -> Runner:
        """See `Implementation.plan`."""
        from aerogel.kernels.gemm.cuda_few_plan import Plan
        from aerogel.kernels.gemm.cuda_table import config_for

        if M > TOKENS:
            return _slices(weight, M, dtype)
        return Plan(weight, config_for(weight, M), M, dtype)


def _slices(weight: TileWeight, M: int, dtype: torch.dtype) -> Runner:
    parts = [(start, min(start + TOKENS, M)) for start in range(0, M, TOKENS)]
    plans = {stop - start: Few.plan(weight, stop - start, dtype) for start, stop in parts}

    def run(x_MK: Tensor, bias_N: Tensor | None, y_MN: Tensor) -> None:
        for start, stop in parts:
            plans[stop - start](x_MK[start:stop], bias_N, y_MN[start:stop])

    return run


def as_data(config: Config) -> dict[str, Any]:
    """A configuration as it stands in a table: what differs from the defaults."""
    plain = asdict(Config(ring=config.ring, row_tiles=config.row_tiles, k_warps=config.k_warps))
    kept = ("ring", "row_tiles", "k_warps")
    return {name: value for name, value in asdict(config).items() if name in kept or value != plain[name]}
