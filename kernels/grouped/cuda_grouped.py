"""Grouped matmuls on Hopper: the warpgroup kernel `wgmma.cu` over the weights of all experts, one below the other.

    y_s = W[expert_s] x_s + b[expert_s]        pairs sorted by expert (`cuda_routes`), so that an expert's tokens lie together

A block multiplies some rows of one expert's weight with a run of at most T of its tokens. Which runs there are is counted on
the device; the host knows how many pairs and experts there are, and from that alone chooses T and the cut of the weight: a
guess of how tokens fall on experts at random decides, and only speed depends on it.

Error and determinism are those of `cuda_wgmma`: every output is written once, by one block.

Shape legend: E experts, S pairs of token and expert, N out features, K in features, R row tiles of one expert, T tokens of a
run.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import ClassVar

import torch
from torch import Tensor

from aerogel.errors import RunFailed
from aerogel.kernels import gpu_here
from aerogel.kernels.gemm import cuda, cuda_int8, cuda_quantize, cuda_wgmma
from aerogel.kernels.gemm.cuda_quantize import INT8, Quantizer
from aerogel.kernels.gemm.cuda_weight import TileWeight, per_kind
from aerogel.kernels.gemm.cuda_wgmma import Config, ceil_divide, deepest, microseconds_of_tiles
from aerogel.kernels.gemm.cuda_wgmma_plan import Plan, in_pieces
from aerogel.kernels.grouped.cuda_routes import expected_runs, most_runs, run_tokens
from aerogel.kernels.grouped.kernel import Grouped, Routes
from aerogel.kernels.problem import Kernel, Layout, Problem
from aerogel.pack import tiles
from aerogel.quantize.tables import TableGrid

SPLITS = (1, 2, 3, 4, 6)
LEARNED_BITS = 4
LEAST_INT8_RUN = 96
"""Tokens of the shortest runs multiplied in integers: on an H200 0.78 of the time of 16 bits. Memory decides shorter ones."""
CUTS = (*cuda_wgmma.CUTS, (160, 2, 1, 1), (192, 2, 1, 1))
"""As `cuda_wgmma.CUTS`, with runs that one would not choose for a single weight."""


@per_kind
def choose_config(weight: TileWeight, run: int, runs: int, chosen: int, multiprocessors: int) -> Config | None:
    """The cut with the least estimated time for so many runs and experts that anybody chose; None when none runs the weight."""
    row_tiles, experts = ceil_divide(weight.N, 16), weight.codes.shape[0] // ceil_divide(weight.N, 16)

    def microseconds(config: Config) -> float:
        blocks = ceil_divide(row_tiles, config.row_tiles) * runs
        return microseconds_of_tiles(weight, config, blocks, weight.nbytes * chosen / experts, multiprocessors)

    return min((config for split in SPLITS for config in cuts(weight, run, split)), key=microseconds, default=None)


def cuts(weight: TileWeight, run: int, split: int = 1) -> list[Config]:
    """Every cut for runs of so many tokens, with the deepest rings that fit. split: blocks that share the columns of a tile,
    where there are too few tiles for the device."""
    found: list[Config] = []
    for tokens, warpgroups, blocks, resident in CUTS:
        batch = 2 if blocks * resident > 2 or warpgroups > 2 else 4
        lead = 3 if tokens > 128 and split == 1 and weight.codes.shape[1] > 1 else 0
        plain = Config(
            tokens=tokens, warpgroups=warpgroups, blocks=blocks, split=split, batch=batch, lead=lead, resident=resident
        )
        fitting = (deepest(weight, replace(plain, w_tiles=count)) for count in (2, 1)) if tokens == run else ()
        found += [config for config in fitting if config is not None][:1]
    return found


_plans: dict[tuple[object, ...], Plan] = {}


def grouped_tiles_linear(
    x: Tensor,
    runs: Tensor,
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
) -> Tensor:
    """`aerogel::grouped_tiles_linear` on CUDA: x [S, K] bf16 or fp16 in sorted order -> [S, N] in the same order.

    runs: of `cuda_routes.route_experts` with T = `run_tokens(S, E)`. codes, scale, zero, pick: those of `TileWeight`, stacked,
    [E, R, ...]; table for all of them, or [E, 16 R, 16]; factor [E]. Rows of experts that do not exist are left as they are.
    """
    pairs, experts = x.shape[0], codes.shape[0]
    y = x.new_empty(pairs, N)
    if y.numel() == 0:
        return y
    held = (codes, scale, zero, table, pick, factor)
    key = (*(0 if tensor is None else tensor.data_ptr() for tensor in held), pairs, experts, N, group_size, floats, x.dtype)
    with torch.cuda.device(x.device):
        plan = _plans.get(key)
        if plan is None:
            weight = TileWeight(
                codes=codes, scale=scale, zero=zero, table=table, pick=pick, group_size=group_size, N=N, K=x.shape[1],
                floats=floats, factor=factor,
            )  # fmt: skip
            if len(_plans) >= cuda.MOST_PLANS:
                _plans.clear()
            plan = _plans[key] = planned(below_each_other(weight), experts, pairs, x.dtype)
        plan.launch(in_pieces(x), None, bias, y, runs=runs)
    return y


def below_each_other(weight: TileWeight) -> TileWeight:
    """Stacked tensors [E, R, ...] as [E * R, ...], still with the N of one expert."""
    held = {name: getattr(weight, name) for name in ("codes", "scale", "zero", "table", "pick")}
    # A table for all has two dimensions.
    stacked = {name: tensor for name, tensor in held.items() if tensor is not None and tensor.dim() > 2}
    return replace(weight, **{name: tensor.flatten(0, 1) for name, tensor in stacked.items()})


def planned_int8(weight: TileWeight, row_scale: Tensor, experts: int, pairs: int, dtype: torch.dtype) -> Plan | None:
    """The integer matmul of so many pairs; None where 16 bits are faster: short runs, which memory decides."""
    run = run_tokens(pairs, experts)
    if run < LEAST_INT8_RUN:
        return None
    facts = torch.cuda.get_device_properties(weight.codes.device)
    runs, row_tiles = math.ceil(expected_runs(pairs, experts, run)), ceil_divide(weight.N, 16)
    found = [cuda_int8.cut(weight, *numbers) for numbers in cuda_int8.CUTS if numbers[0] == run and numbers[2] == 1]

    def microseconds(config: Config) -> float:
        blocks = ceil_divide(row_tiles, config.row_tiles) * runs
        return cuda_int8.microseconds_of_tiles(weight, config, blocks, facts.multi_processor_count)

    config = min((config for config in found if config is not None), key=microseconds, default=None)
    if config is None:
        return None
    return Plan(weight, config, pairs, dtype, row_scale=row_scale, runs=most_runs(pairs, experts, run))


def planned(weight: TileWeight, experts: int, pairs: int, dtype: torch.dtype, config: Config | None = None) -> Plan:
    """The matmul of so many pairs, cut as the estimate says unless `config` does. Raises `RunFailed` where nothing fits."""
    run = run_tokens(pairs, experts)
    if config is None:
        facts = torch.cuda.get_device_properties(weight.codes.device)
        chosen = math.ceil(experts * -math.expm1(-pairs / experts))  # up, for a token's experts are distinct
        runs = math.ceil(expected_runs(pairs, experts, run))
        config = choose_config(weight, run, runs, chosen, facts.multi_processor_count)
    if config is None:
        raise RunFailed("no cut of the experts' weight fits the multiprocessor; such a weight must be refused, not planned")
    return Plan(weight, config, pairs, dtype, runs=most_runs(pairs, experts, run))


_int8_plans: dict[tuple[object, ...], Plan | None] = {}


def grouped_tiles_linear_int8(
    x: Tensor,
    runs: Tensor,
    codes: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    row_scale: Tensor,
    bias: Tensor | None,
    group_size: int,
    N: int,
) -> Tensor:
    """`aerogel::grouped_tiles_linear_int8` on CUDA: as `grouped_tiles_linear`, with x rounded to int8, a scale for each row.

    Long runs are multiplied in integers, where weights with groups are rounded once more (`cuda_int8`); others in 16 bits.
    row_scale: that of `cuda_int8.row_scale` for each expert, float32 [E, 16 R].
    """
    pairs, experts, K = x.shape[0], codes.shape[0], x.shape[1]
    if pairs == 0 or N == 0:
        return x.new_empty(pairs, N)
    held = (codes, scale, zero, row_scale)
    key = (*(0 if tensor is None else tensor.data_ptr() for tensor in held), pairs, experts, N, group_size, x.dtype)
    with torch.cuda.device(x.device):
        if key not in _int8_plans:
            weight = TileWeight(codes=codes, scale=scale, zero=zero, table=None, pick=None, group_size=group_size, N=N, K=K)
            if len(_int8_plans) >= cuda.MOST_PLANS:
                _int8_plans.clear()
            _int8_plans[key] = planned_int8(below_each_other(weight), row_scale, experts, pairs, x.dtype)
        plan = _int8_plans[key]
        if plan is None:
            rounded_SK = cuda_quantize.rounded(x)
            return grouped_tiles_linear(rounded_SK, runs, codes, scale, zero, None, None, bias, group_size, N)
        y_SN, columns = x.new_empty(pairs, N), tiles.COLUMNS * codes.shape[2]
        rounding = Quantizer(dtype=x.dtype, device=x.device, output=INT8, columns=columns, permuted=True)
        x8_SK, scale_S = rounding(x)
        plan.launch(x8_SK, scale_S, bias, y_SN, runs=runs)
    return y_SN


def _fake_int8(
    x: Tensor,
    runs: Tensor,
    codes: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    row_scale: Tensor,
    bias: Tensor | None,
    group_size: int,
    N: int,
) -> Tensor:
    return x.new_empty(x.shape[0], N)


def _fake(
    x: Tensor,
    runs: Tensor,
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
) -> Tensor:
    return x.new_empty(x.shape[0], N)


_library = torch.library.Library("aerogel", "FRAGMENT")  # type: ignore[no-untyped-call]
_library.define(  # type: ignore[no-untyped-call]
    "grouped_tiles_linear(Tensor x, Tensor runs, Tensor codes, Tensor scale, Tensor? zero, Tensor? table, Tensor? pick,"
    " Tensor? bias, int group_size, int N, int floats=0, Tensor? factor=None) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_library.impl("grouped_tiles_linear", grouped_tiles_linear, "CUDA")  # type: ignore[no-untyped-call]
torch.library.register_fake("aerogel::grouped_tiles_linear", _fake, lib=_library)
_library.define(  # type: ignore[no-untyped-call]
    "grouped_tiles_linear_int8(Tensor x, Tensor runs, Tensor codes, Tensor scale, Tensor? zero, Tensor row_scale,"
    " Tensor? bias, int group_size, int N) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_library.impl("grouped_tiles_linear_int8", grouped_tiles_linear_int8, "CUDA")  # type: ignore[no-untyped-call]
torch.library.register_fake("aerogel::grouped_tiles_linear_int8", _fake_int8, lib=_library)


class Cuda(Grouped):
    """The warpgroup kernel over sorted pairs."""

    about: ClassVar[str] = "the warpgroup kernels of compute capability 9.0, one launch over all experts that tokens chose"
    base: ClassVar[type[Kernel]] = cuda.Cuda

    @classmethod
    def refuses(cls, problem: Problem) -> str | None:
        """What the kernel for one weight refuses, other devices than Hopper's, and large tables for each row."""
        large = _learned(problem) and problem.grid.bits > LEARNED_BITS
        return (
            cls.base.refuses(problem)
            or (f"takes tables for each row of at most {LEARNED_BITS} bits, found {problem.grid.bits}" if large else None)
            or gpu_here.other_than_hopper(torch.cuda.get_device_capability())
        )

    @staticmethod
    def route(expert_S: Tensor, experts: int) -> Routes:
        """order, place and runs of `cuda_routes.route_experts`."""
        return list(torch.ops.aerogel.route_experts.default(expert_S, experts))

    @staticmethod
    def in_order(expert_S: Tensor, routes: Routes) -> Tensor:
        """Sorted, with nobody's pairs at the end."""
        return expert_S[routes[0].long()]

    @staticmethod
    def spread(x_MK: Tensor, routes: Routes) -> Tensor:
        """A row for each pair, sorted by expert."""
        x_SK: Tensor = torch.ops.aerogel.spread_tokens.default(x_MK, routes[0])
        return x_SK

    @staticmethod
    def run(
        x_SK: Tensor, expert_S: Tensor, routes: Routes, layout: Layout, problem: Problem, bias_EN: Tensor | None = None
    ) -> Tensor:
        """One call of the operator. Rows of experts that do not exist hold anything; `add` leaves them out."""
        table = layout.get("tile_table")
        if table is not None and not _learned(problem):
            table = table[0]
        y_SN: Tensor = torch.ops.aerogel.grouped_tiles_linear.default(
            x_SK,
            routes[2],
            layout["tile_codes"],
            layout["tile_scale"],
            layout.get("tile_zero"),
            table,
            layout.get("tile_pick"),
            bias_EN,
            problem.grid.group_size or 0,
            problem.N,
            problem.mantissa,
            layout.get("tile_factor"),
        )
        return y_SN

    @staticmethod
    def add(y_SN: Tensor, weight_Mk: Tensor, routes: Routes) -> Tensor:
        """One kernel: float32 sums over each token's pairs."""
        y_MN: Tensor = torch.ops.aerogel.add_experts.default(y_SN, routes[1], weight_Mk)
        return y_MN


def _learned(problem: Problem) -> bool:
    """Whether rows have tables of their own."""
    return isinstance(problem.grid, TableGrid) and problem.grid.learned
