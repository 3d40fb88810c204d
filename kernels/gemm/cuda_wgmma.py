"""More than 16 tokens at a time on Hopper: `wgmma.cu` in a configuration that suits the shape, with its tensor maps.

    y_MN = x_MK @ W_NK.T + bias_N          weights decoded into the registers of the warpgroup matrix instruction

The source explains the kernel. Here stands the choice of a configuration (from the measured table of the device, else by a
cost model), the macros that specialise the source, and the shared memory it takes; `cuda_wgmma_plan` launches.

Error, relative Frobenius norm: the weight (u - z) * s is rounded once to the activations' type, as a dense weight is, and so
is s where it is stored wider; the output is rounded too. Together at most 3e-3 in bfloat16 and 4e-4 in float16.

Shape legend: M tokens, N out features, K in features, R row tiles of 16, C k tiles of 128, G groups along K.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar, NamedTuple

import torch

from aerogel.errors import RunFailed
from aerogel.kernels import gpu_here
from aerogel.kernels.cuda.sources import Wanted
from aerogel.kernels.cuda.tensor_map import LARGEST_BOX
from aerogel.kernels.gemm.cuda import Runner
from aerogel.kernels.gemm.cuda_decoder import (
    PAIR_BYTES,
    SCALE_NUMBER,
    by_rows,
    eight_bytes,
    made_room,
    paired,
    table_bytes,
    table_kind,
)
from aerogel.kernels.gemm.cuda_few import most_outlier_tokens
from aerogel.kernels.gemm.cuda_outliers import LINE, MOST_LINES, SHEET_BYTES
from aerogel.kernels.gemm.cuda_weight import TileWeight, per_kind

SOURCE = "wgmma.cu"
RING_BARRIERS = 2
"""Of a stage: full and empty. The build for racecheck (sanitize.cuh) has a third one."""
FEW_TOKENS = 16
WIDE_BYTES = 192 << 20
"""Up to FEW_TOKENS the few-token kernels are faster, except for codes of more than four bits and of WIDE_BYTES and more."""
SHARED_LIMIT, SHARED_RESERVED = 227 << 10, 1 << 10
"""Shared memory that a block can have, and what the driver keeps of the multiprocessor's for each further one."""
REGISTERS = {(2, 1): (40, 232), (3, 1): (40, 152), (4, 1): (32, 112), (2, 2): (40, 96)}
"""Registers of a producing and of a consuming thread, by warpgroups and blocks on a multiprocessor; others do not trade."""
REGISTERS_BESIDE = {(2, 1): (56, 224), (2, 2): (48, 96)}
"""The same where producers put outliers into sheets."""
FILLER_REGISTERS = 40
REGISTERS_APART = {(2, 1): (24, 224), (3, 1): (24, 136), (4, 1): (24, 104)}
"""The same where a warpgroup of FILLER_REGISTERS does so."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """How the kernel is cut.

    tokens: of a block, a multiple of 16 up to 256. warpgroups: that multiply. blocks: of 64 rows for each of them.
    share: blocks of a cluster that share activations. split: blocks of a cluster that split K.
    x_stages: of 64 columns, of 128 where batch is 8. w_stages: of w_tiles * 128 columns.
    batch: k16 steps decoded at a time (2, 4 or 8). lead: x stages by which warpgroups start one after the other.
    resident: blocks that fit on a multiprocessor at once. span: blocks of tokens that share a strip of weights in cache.
    copies: of the pairs of tables of rows in shared memory (`cuda_few.Config`).
    """

    tokens: int
    warpgroups: int = 2
    blocks: int = 1
    share: int = 1
    split: int = 1
    x_stages: int = 4
    w_stages: int = 3
    w_tiles: int = 1
    batch: int = 4
    lead: int = 0
    resident: int = 1
    span: int = 8
    copies: int = 1

    @property
    def row_tiles(self) -> int:
        """Row tiles of a block."""
        return 4 * self.warpgroups * self.blocks

    @property
    def cluster(self) -> int:
        """Blocks of a cluster."""
        return self.share * self.split


def ceil_divide(a: int, b: int) -> int:
    """a / b rounded up."""
    return -(-a // b)


def window(group_size: int, w_tiles: int) -> int:
    """Groups that a weight stage may touch, as the source counts them."""
    columns = 128 * w_tiles
    if group_size == 0 or (group_size % 128 == 0 and w_tiles == 1):
        return 1
    return columns // group_size if 128 % group_size == 0 else (columns - 1) // group_size + 2


def side_bytes(weight: TileWeight) -> tuple[int, int]:
    """Bytes of 16 rows' scales, and of their zero points or table numbers, for one group."""
    held = weight.zero if weight.zero is not None else weight.pick
    return 16 * weight.scale.element_size(), 0 if held is None else 16 * held.element_size()


def defines(weight: TileWeight, config: Config, dtype: torch.dtype) -> dict[str, int]:
    """The macros that specialise wgmma.cu."""
    plain = weight.outliers is None
    registers = REGISTERS if plain else REGISTERS_APART if fillers_apart(weight, config) else REGISTERS_BESIDE
    producer, consumer = registers.get((config.warpgroups, config.resident), (0, 0))
    if plain and config.split > 1 and config.resident == 1:  # of whose blocks a producer has more to know
        producer, consumer = producer + 8, consumer - 8
    zero = 0 if weight.zero is None else 1 if weight.zero.dtype == torch.uint8 else 2
    return {
        "BITS": weight.bits,
        "GROUP": weight.group_size,
        "ACTIVATION": SCALE_NUMBER[dtype],
        "SCALE": SCALE_NUMBER[weight.scale.dtype],
        "ZERO": zero,
        "TABLE": table_kind(weight),
        "FLOATS": weight.floats,
        "TABLES": weight.table.shape[0] if weight.table is not None and table_kind(weight) != 2 else 1,
        "TOKENS": config.tokens,
        "ACCUMULATORS": config.tokens // 2,
        "WARPGROUPS": config.warpgroups,
        "BLOCKS": config.blocks,
        "SHARE": config.share,
        "SPLIT": config.split,
        "X_STAGES": config.x_stages,
        "W_STAGES": config.w_stages,
        "W_TILES": config.w_tiles,
        "BATCH": config.batch,
        "LEAD": config.lead,
        "MIN_BLOCKS": config.resident,
        "PRODUCER_REGISTERS": producer,
        "CONSUMER_REGISTERS": consumer,
        "FILLER_REGISTERS": FILLER_REGISTERS,
        "SHARED_BYTES": shared_bytes(weight, config),
        "OUTLIERS": int(weight.outliers is not None),
        "LINES": list_lines(config),
        **({"ROW_COPIES": config.copies} if by_rows(weight) else {}),
        **({"EXACT": 1} if weight.exact else {}),
    }


class Space(NamedTuple):
    """Bytes of dynamic shared memory, laid out as the source does: stages of x and w, or in their place the sums that blocks
    of a cluster exchange; and what stands beside them."""

    x_stage: int
    w_stage: int
    sums: int
    beside: int

    def total(self, x_stages: int, w_stages: int) -> int:
        """Bytes of a launch with so many stages, each with its barriers."""
        barriers = 8 * RING_BARRIERS * (x_stages + w_stages)
        return max(x_stages * self.x_stage + w_stages * self.w_stage, self.sums) + self.beside + barriers

    def most_x(self, w_stages: int, room: int) -> int:
        """Stages of x that fit into `room` bytes beside so many of w; less than one where none does."""
        barriers, left = 8 * RING_BARRIERS, room - self.beside
        return min(
            (left - w_stages * (self.w_stage + barriers)) // (self.x_stage + barriers),
            (left - self.sums) // barriers - w_stages,
        )


def table_room(weight: TileWeight, row_tiles: int, copies: int = 1) -> int:
    """Bytes of tables in shared memory: those of 16 numbers for each row for half of the rows, those of bit planes where a tile
    has several groups."""
    if by_rows(weight):
        return row_tiles * eight_bytes(copies)
    if weight.planes:
        return made_room(weight, row_tiles) if weight.group_size % 128 else 0
    return paired(weight) * PAIR_BYTES or table_bytes(weight, row_tiles)


def list_lines(config: Config) -> int:
    """Lines of outliers that are on their way: nearly as far ahead as codes are; of a part of the columns nearly all."""
    return MOST_LINES // 2 if config.split == 1 and config.blocks * config.resident > 1 else MOST_LINES


def sheet_room(config: Config) -> int:
    """Bytes of the sheets of outliers, the lists that go into them, and barriers."""
    lists = list_lines(config) * 4 * LINE
    return config.row_tiles // 4 * (2 * SHEET_BYTES + lists) + 32 * config.warpgroups


def space(weight: TileWeight, config: Config) -> Space:
    """What a launch needs, whatever the number of stages."""
    scale, zero = side_bytes(weight)
    touched = config.row_tiles * window(weight.group_size, config.w_tiles) if weight.group_size else 0
    sheets = 0 if weight.outliers is None else sheet_room(config)
    threads, pieces = 128 * config.warpgroups, config.blocks * config.tokens // 16
    out = 2 * config.warpgroups * 128 * (32 if config.tokens > 32 and config.tokens % 32 == 0 else 16)
    return Space(
        x_stage=config.tokens * (256 if config.batch == 8 else 128) * (1 + weight.exact * (1 + weight.in_bytes)),
        w_stage=config.row_tiles * config.w_tiles * 256 * weight.bits
        + ceil_divide(touched * scale, 128) * 128
        + ceil_divide(touched * zero, 128) * 128,
        sums=ceil_divide(pieces, config.split) * config.split * threads * 32 if config.split > 1 else 0,
        beside=out + table_room(weight, config.row_tiles, config.copies) + sheets + 16,
    )


def shared_bytes(weight: TileWeight, config: Config) -> int:
    """Dynamic shared memory of a launch."""
    return space(weight, config).total(config.x_stages, config.w_stages)


def threads_of(weight: TileWeight, config: Config) -> int:
    """Threads of a block: warpgroups that multiply, one that streams, and perhaps one that puts outliers into sheets."""
    return 128 * (config.warpgroups + 1 + fillers_apart(weight, config))


def fillers_apart(weight: TileWeight, config: Config) -> bool:
    """Whether a warpgroup of its own puts outliers into sheets: where two warps would be too few."""
    return weight.outliers is not None and config.warpgroups * config.blocks > 2


def fits(weight: TileWeight, config: Config) -> bool:
    """Whether the configuration can run the weight at all."""
    return (
        _cuts(weight, config)
        and _deep_enough(config, config.x_stages, config.w_stages)
        and shared_bytes(weight, config) * config.resident <= SHARED_LIMIT
    )


def shared_room(config: Config) -> int:
    """Shared memory of each of the blocks that are to share a multiprocessor. (`fits` asks for less: some measured cuts are a
    few bytes too large for two, and win one by one.)"""
    return (SHARED_LIMIT + SHARED_RESERVED) // config.resident - SHARED_RESERVED


def _cuts(weight: TileWeight, config: Config) -> bool:
    """What does not depend on the number of stages."""
    boxes = config.w_tiles * 32 * weight.bits <= LARGEST_BOX and window(weight.group_size, config.w_tiles) * 16 <= LARGEST_BOX
    even = config.tokens % (16 * min(config.share, 2)) == 0 and config.cluster <= 8
    return boxes and even and config.split <= weight.codes.shape[1]


def _deep_enough(config: Config, x_stages: int, w_stages: int) -> bool:
    return config.lead < x_stages and config.lead <= 2 * w_stages * config.w_tiles


@per_kind
def deepest(weight: TileWeight, config: Config) -> Config | None:
    """The configuration with as many stages as fit: equally deep rings, at most 12 tiles of columns. None when none fit."""
    if not _cuts(weight, config):
        return None
    needs, room = space(weight, config), shared_room(config)
    tiles_a_stage, least = (1.0, 2) if config.batch == 8 or weight.in_bytes else (0.5, 3)

    def score(stages: tuple[int, int]) -> float:
        x_depth, w_depth = stages[0] * tiles_a_stage, stages[1] * config.w_tiles
        return min(x_depth, w_depth, 12) - 0.1 * abs(x_depth - w_depth) - 0.001 * sum(stages)

    depths: list[tuple[int, int]] = []
    for w_stages in range(2, 13):
        fewest, most = max(least, config.lead + 1), min(needs.most_x(w_stages, room), 24)
        even = w_stages * config.w_tiles / tiles_a_stage  # the score falls on either side of it
        nearest = [min(max(x_stages, fewest), most) for x_stages in (math.floor(even), math.ceil(even))]
        depths += [(x, w_stages) for x in nearest if x >= fewest and _deep_enough(config, x, w_stages)]
    best = max(depths, key=score, default=None)
    return None if best is None else replace(config, x_stages=best[0], w_stages=best[1])


@per_kind
def candidates(weight: TileWeight, M: int) -> tuple[Config, ...]:
    """Cuts worth a measurement or an estimate, each with the deepest rings that fit."""
    found: list[Config] = []
    looked_up = weight.table is not None and (weight.bits == 4 or paired(weight) > 0)
    waits = looked_up or weight.outliers is not None
    for tokens, warpgroups, blocks, resident in (*CUTS, *(WAITING_CUTS if waits else ())):
        if tokens >= 2 * M and tokens > 16:
            continue
        for split in range(1, 9 if warpgroups < 4 else 2):
            for w_tiles in (2, 1):
                batch = 2 if blocks * resident > 2 or warpgroups * tokens > 256 else 4
                lead = 3 if tokens == LARGEST_BOX and split == 1 and weight.codes.shape[1] > 1 else 0  # two x stages a tile
                plain = Config(tokens=tokens, warpgroups=warpgroups, blocks=blocks, split=split, w_tiles=w_tiles)
                config = deepest(weight, replace(plain, batch=batch, lead=lead, resident=resident))
                if config is not None:
                    found.append(config)
                    break
    return tuple(found)


CUTS = (
    *((tokens, 2, 1, 1) for tokens in (16, 32, 48, 64, 96, 128, 256)),
    *((tokens, 2, 2, 1) for tokens in (16, 32, 48, 64, 96, 128)),
    *((tokens, 3, 1, 1) for tokens in (16, 32, 48, 64, 96, 128)),
    *((tokens, 2, 1, 2) for tokens in (16, 32, 48, 64)),
)
"""(tokens, warpgroups, blocks, resident) that compile without spills."""
WAITING_CUTS = tuple((tokens, 4, 1, 1) for tokens in (32, 64))
"""Likewise for what lies in shared memory, tables and sheets of outliers: four warps of each scheduler wait for it in turn."""


def microseconds(weight: TileWeight, config: Config, M: int, multiprocessors: int) -> float:
    """Estimate of a launch's time, from counting: what `choose_config` minimises where nothing was measured.

    A tile takes the longest of its tensor, decode and load time, plus what its start and end cost; clusters of more than two
    blocks do not fill the device. The constants are an H100's; 15 % off is usual.
    """
    tiles = ceil_divide(weight.codes.shape[0], config.row_tiles * config.share) * ceil_divide(M, config.tokens)
    return microseconds_of_tiles(weight, config, tiles, weight.nbytes, multiprocessors)


def microseconds_of_tiles(weight: TileWeight, config: Config, tiles: int, nbytes: float, multiprocessors: int) -> float:
    """The same for so many tiles of clusters, which read so many bytes of weights from memory."""
    C, rows = weight.codes.shape[1], config.row_tiles * 16
    seats = multiprocessors * CLUSTERS[config.cluster] // CLUSTERS[1]
    crowd = min(config.resident, ceil_divide(tiles, seats))
    rounds = ceil_divide(tiles, seats * config.resident)
    inputs = 1 + weight.exact
    tensor = 1.08 * rows / 64 * config.tokens / 2 * inputs
    decode = 29 + rows / 128 * (42 + 24 * limbs(weight, config.warpgroups))
    loads = (config.tokens * 32 * inputs / config.share + rows * 2 * weight.bits) / 38
    step = crowd * max(math.cbrt(tensor**3 + decode**3), loads)
    edge = 2500 + rows * config.tokens / 16 + (2500 + rows * config.tokens / 8 if config.split > 1 else 0)
    busy = min(1.0, tiles * config.cluster / multiprocessors)
    memory = nbytes / (2.9e6 * min(1.0, 0.35 + 0.75 * busy))
    return 2.5 + max((rounds * (8 * ceil_divide(C, config.split) * step + edge)) / 1.7e3, memory + edge / 1.7e3)


def limbs(weight: TileWeight, warpgroups: int) -> float:
    """How much work a code is to decode, 1 for 4 bits: limbs, or a look-up in a table, whose delay more warps hide better."""
    if weight.planes:
        return 2.0
    if paired(weight):
        return 1.0 if warpgroups > 2 else 1.5
    if weight.floats or weight.bits == 3:
        return 1.0
    return 2.0 if weight.table is not None else max(1, weight.bits.bit_count()) if weight.bits != 8 else 2.5


CLUSTERS = {1: 132, 2: 66, 3: 39, 4: 30, 5: 22, 6: 17, 7: 15, 8: 15}
"""Clusters by size that an H100 runs at once: they live inside groups of 14 to 18 multiprocessors."""


@per_kind
def choose_config(weight: TileWeight, M: int, multiprocessors: int) -> Config | None:
    """The cut with the least estimated time; None when none can run the weight."""
    found = candidates(weight, M)
    return min(found, key=lambda config: microseconds(weight, config, M, multiprocessors), default=None)


class ManyTokens:
    """More tokens than the few-token kernels are good for, on compute capability 9.0."""

    name: ClassVar[str] = "many"

    @staticmethod
    def refuses(weight: TileWeight, M: int, dtype: torch.dtype, capability: tuple[int, int]) -> str | None:
        """Other devices than Hopper's, few tokens, and tables that leave no room in shared memory."""
        from aerogel.kernels.gemm.cuda_table import adds_without_room

        elsewhere = gpu_here.other_than_hopper(capability)
        if elsewhere is not None:
            return elsewhere
        if fewest_tokens(weight) > M:
            return f"takes {fewest_tokens(weight)} tokens and more of this weight, found {M}"
        if adds_without_room(weight, M):
            return f"leaves {M} tokens to a cut that adds this weight's outliers though not all inputs fit into a block"
        if not candidates(weight, M):
            return "finds no cut of this weight that fits into shared memory (its tables are too large)"
        return None

    @staticmethod
    def kernels(weight: TileWeight, M: int, dtype: torch.dtype, device: torch.device) -> list[Wanted]:
        """See `Implementation.kernels`: one for each run of rows."""
        from aerogel.kernels.gemm.cuda_wgmma_plan import KERNEL, macros_of, parts_of

        cuts = _cuts_on(weight, M, device)
        parts = parts_of(weight, cuts) if len(cuts) > 1 else [(0, weight, cuts[0][1])]
        return [Wanted(SOURCE, KERNEL, macros_of(part, config, dtype)) for _, part, config in parts]

    @staticmethod
    def plan(weight: TileWeight, M: int, dtype: torch.dtype) -> Runner:
        """See `Implementation.plan`."""
        from aerogel.kernels.gemm.cuda_wgmma_plan import Parts, Plan

        cuts = _cuts_on(weight, M, weight.codes.device)
        return Plan(weight, cuts[0][1], M, dtype) if len(cuts) == 1 else Parts(weight, cuts, M, dtype)


def _cuts_on(weight: TileWeight, M: int, device: torch.device) -> list[tuple[int, Config]]:
    """Runs of rows and their configurations on a device: measured ones, else the cost model's."""
    from aerogel.kernels.gemm.cuda_wgmma_rounds import in_rounds
    from aerogel.kernels.gemm.cuda_wgmma_table import cuts_for

    facts = torch.cuda.get_device_properties(device)
    cuts = cuts_for(weight, M, facts.name)
    if not cuts:
        config = choose_config(weight, M, facts.multi_processor_count)
        if config is None:
            raise RunFailed("no cut of the weight fits the multiprocessor; such a weight must be refused, not planned")
        cuts = [(weight.N, config)]
    return cuts if len(cuts) > 1 else in_rounds(weight, cuts[0][1], M, facts.multi_processor_count)


def fewest_tokens(weight: TileWeight) -> int:
    """From how many tokens on a weight is served here: wide layers read x too often in the few-token kernels. Tables cost more
    here, where look-ups and tokens share the way to shared memory."""
    if weight.outliers is not None:
        return most_outlier_tokens(weight, (9, 0)) + 1
    wide = weight.bits > 4 and weight.codes.nbytes >= WIDE_BYTES and weight.table is None
    return 9 if wide else FEW_TOKENS + 1
