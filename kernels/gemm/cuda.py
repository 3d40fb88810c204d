"""The matmul with a packed weight on NVIDIA GPUs: one operator over several implementations.

    y_MN = x_MK @ W_NK.T + bias_N          bf16 or fp16 activations, float32 accumulation

The weight lies in the tile layout (`pack/tiles.py`); which implementation runs is decided per number of tokens M, by
`IMPLEMENTATIONS`, in order of preference: the first that does not refuse. Each makes a plan once per weight and M, and a
plan is called with nothing but the tensors that change. The operator `aerogel::tiles_linear` has a fake implementation,
so that `torch.compile(fullgraph=True)` traces through it, and its launches are recorded by CUDA graphs.

Shape legend: M tokens, N out features, K in features, R row tiles, C k tiles, G groups along K.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from aerogel.errors import BadInput
from aerogel.kernels import gpu_here
from aerogel.kernels.beside.ref import Beside
from aerogel.kernels.cuda.sources import Wanted
from aerogel.kernels.gemm.block_scales import unit_of_sums
from aerogel.kernels.gemm.cuda_outliers import NAMES as OUTLIERS
from aerogel.kernels.gemm.cuda_outliers import TileOutliers
from aerogel.kernels.gemm.cuda_weight import TileWeight, codes_of, tensors_of
from aerogel.kernels.problem import Kernel, Layout, Pieces, Problem, Tuned
from aerogel.lazy import load
from aerogel.pack import tiles
from aerogel.pack.format import Shapes
from aerogel.quantize.formats.affine import Affine
from aerogel.quantize.grids import Codes, Fp8Grid, IntGrid
from aerogel.quantize.tables import TableGrid

DTYPES = (torch.bfloat16, torch.float16)
Runner = Callable[[Tensor, Tensor | None, Tensor], None]
"""(x_MK contiguous, bias_N or None, y_MN to be filled) on torch's current stream and device."""


class Implementation(Protocol):
    """One way to multiply with a `TileWeight`. A class that is never instantiated: its methods are static."""

    name: ClassVar[str]

    @staticmethod
    def refuses(weight: TileWeight, M: int, dtype: torch.dtype, capability: tuple[int, int]) -> str | None:
        """Why it does not run this weight with M tokens on such a device, or None. Looks at shapes and dtypes only."""

    @staticmethod
    def kernels(weight: TileWeight, M: int, dtype: torch.dtype, device: torch.device) -> list[Wanted]:
        """What `plan` compiles and loads on `device`. Looks at shapes and dtypes only: the weight may be on the meta device."""

    @staticmethod
    def plan(weight: TileWeight, M: int, dtype: torch.dtype) -> Runner:
        """Everything that can be done before the activations are known (compiling, tables, argument blocks)."""


IMPLEMENTATIONS: list[str] = [
    "aerogel.kernels.gemm.cuda_wgmma:ManyTokens",
    "aerogel.kernels.gemm.cuda_few:Few",
    "aerogel.kernels.gemm.cuda_dense:Dense",
]
"""`"module:Name"` of each `Implementation`, best first: Hopper above 16 tokens, up to 16, and the last refuses nothing."""

MOST_PLANS = 1 << 14
_plans: dict[tuple[object, ...], Runner] = {}


def implementations() -> list[type[Implementation]]:
    """The classes of `IMPLEMENTATIONS`."""
    return [load(place) for place in IMPLEMENTATIONS]


def choose(weight: TileWeight, M: int, dtype: torch.dtype, capability: tuple[int, int]) -> type[Implementation]:
    """The first implementation that runs M tokens."""
    return next(found for found in implementations() if found.refuses(weight, M, dtype, capability) is None)


def tiles_linear(
    x: Tensor,
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
    outliers: list[Tensor] | None = None,
) -> Tensor:
    """`aerogel::tiles_linear` on CUDA: x [M, K] bf16 or fp16 -> [M, N]. See `TileWeight` for the other arguments.

    The plan depends on the weight's tensors by their addresses, so it is found again by them and never outdated.
    """
    M, K = x.shape
    y = x.new_empty(M, N)
    if M == 0 or N == 0 or K == 0:
        return y.zero_() if bias is None else y.copy_(bias.expand(M, N))
    key = (
        codes.data_ptr(),
        scale.data_ptr(),
        M,
        K,
        N,
        group_size,
        x.dtype,
        scale.dtype,
        0 if zero is None else zero.data_ptr(),
        0 if table is None else table.data_ptr(),
        0 if pick is None else pick.data_ptr(),
        0 if factor is None else factor.data_ptr(),
        codes.shape[2],
        floats,
        *(tensor.data_ptr() for tensor in outliers or ()),
    )
    runner = _plans.get(key)
    if runner is None:
        held = TileWeight(
            codes=codes, scale=scale, zero=zero, table=table, pick=pick, group_size=group_size, N=N, K=K,
            floats=floats, factor=factor, outliers=TileOutliers.given(outliers),
        )  # fmt: skip
        runner = _plan(held, x, key)
    if x.get_device() == torch._C._cuda_getDevice():
        runner(x, bias, y)
    else:
        with torch.cuda.device(x.device):
            runner(x, bias, y)
    return y


def _plan(weight: TileWeight, x: Tensor, key: tuple[object, ...]) -> Runner:
    weight.check()
    if x.dtype not in DTYPES:
        raise BadInput(f"tiles_linear multiplies bfloat16 or float16 activations, found {x.dtype}; cast them")
    capability = torch.cuda.get_device_capability(x.device)
    if len(_plans) >= MOST_PLANS:
        _plans.clear()
    with torch.cuda.device(x.device):
        runner = choose(weight, x.shape[0], x.dtype, capability).plan(weight, x.shape[0], x.dtype)
    _plans[key] = runner
    return runner


def _fake(
    x: Tensor,
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
    outliers: list[Tensor] | None = None,
) -> Tensor:
    return x.new_empty(x.shape[0], N)


_library = torch.library.Library("aerogel", "FRAGMENT")  # type: ignore[no-untyped-call]
_library.define(  # type: ignore[no-untyped-call]
    "tiles_linear(Tensor x, Tensor codes, Tensor scale, Tensor? zero, Tensor? table, Tensor? pick, Tensor? bias,"
    " int group_size, int N, int floats=0, Tensor? factor=None, Tensor[]? outliers=None) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_library.impl("tiles_linear", tiles_linear, "CUDA")  # type: ignore[no-untyped-call]
torch.library.register_fake("aerogel::tiles_linear", _fake, lib=_library)


class Cuda(Kernel):
    """Weight-only matmul in the tile layout."""

    layout: ClassVar[str | None] = "native-cuda"
    rows: ClassVar[int] = tiles.ROWS
    shared: ClassVar[frozenset[str]] = frozenset({"tile_table", "tile_factor", "stored_factor"})
    about: ClassVar[str] = (
        "CUDA kernels compiled at run time: integers of 1 to 8 bits with any zero point, small floats, tables of up to 256"
        " numbers; 16-bit inputs; adds outliers and kept columns"
    )

    @staticmethod
    def refuses(problem: Problem) -> str | None:
        """Anything but weight-only 16-bit matmuls on an NVIDIA GPU of compute capability 8.0 or newer."""
        return problem.needs_device("cuda") or _unfit(problem) or gpu_here.nvidia_missing()

    @classmethod
    def refuses_layout(cls, problem: Problem) -> str | None:
        """What no NVIDIA GPU runs, and codes into tables, which are not kept in this layout on disk."""
        return problem.needs_numbers(IntGrid, Fp8Grid) or _unfit(problem)

    @staticmethod
    def shapes(problem: Problem) -> Shapes:
        """Of tile_codes, tile_scale and, where there are zero points, tile_zero."""
        R, C = tiles.tile_counts(problem.N, problem.K)
        factors = (R, problem.grid.groups(problem.K), tiles.ROWS)
        found: Shapes = {
            "tile_codes": ((R, C, 256 * problem.grid.bits), torch.uint8),
            "tile_scale": (factors, problem.grid.scale_dtype),
        }
        if problem.integer is not None and not problem.integer.symmetric:
            found["tile_zero"] = (factors, torch.uint8)
        return found

    @staticmethod
    def pack(codes: Codes, problem: Problem) -> dict[str, Tensor]:
        """tile_codes uint8 [R, C, 256 * bits], tile_scale [R, G, 16], and tile_zero or tile_table where there are any."""
        return tensors_of(codes)

    @classmethod
    def pieces(cls, problem: Problem) -> Pieces | None:
        """Rows that share scales stay together; tables of rows grow with these."""
        shared_rows, grid = problem.grid.shared_rows, problem.grid
        if not isinstance(grid, TableGrid):
            return super().pieces(problem)
        if shared_rows is None:
            return None
        return Pieces(rows=math.lcm(tiles.ROWS, shared_rows), shared=cls.shared - ({"tile_table"} if grid.learned else set()))

    @staticmethod
    def lay_beside(beside: Beside, layout: Layout, problem: Problem, place_K: Tensor | None = None) -> dict[str, Tensor] | None:
        """Outliers in the orders of the kernels."""
        from aerogel.kernels.gemm.cuda_table import has_apart_cut, has_patch_cut

        place = layout["tile_codes"].device
        device = torch.cuda.get_device_name(place) if place.type == "cuda" else ""
        apart, patches = (has(device, problem.N, problem.K) for has in (has_apart_cut, has_patch_cut))
        unit = unit_of_sums(layout["tile_scale"], problem.mantissa > 0, layout.get("tile_factor"), problem.dtype)
        laid = TileOutliers.of(beside, problem.N, problem.K, problem.dtype, place_K, unit, apart=apart, patches=patches)
        return None if laid is None else laid.named()

    @staticmethod
    def unpack(layout: Layout, problem: Problem) -> Codes:
        """The inverse of `pack`, exactly."""
        return codes_of(layout, problem.grid, problem.N, problem.K)

    @staticmethod
    def wanted(weights: Sequence[tuple[Layout, Problem]], tokens: Sequence[int], device: torch.device) -> list[Wanted]:
        """The kernels of each kind of weight and number of tokens; those for many tokens take longest."""
        capability = torch.cuda.get_device_capability(device)
        kinds: dict[object, tuple[TileWeight, torch.dtype]] = {}
        for layout, problem in weights:
            weight = tile_weight(layout, problem)
            kinds.setdefault((weight.kind, problem.dtype), (weight, problem.dtype))

        return [
            wanted
            for M in sorted(tokens, reverse=True)
            for weight, dtype in kinds.values()
            for wanted in choose(weight, M, dtype, capability).kernels(weight, M, dtype, device)
        ]

    @staticmethod
    def tune(problem: Problem, tokens: Sequence[int]) -> Tuned | None:
        """Times configurations on a random weight of the problem's shape and kind."""
        from aerogel.kernels.gemm import cuda_tune

        return cuda_tune.tune_and_keep(lambda: cuda_tune.like(problem), tokens)

    @staticmethod
    def run(x_MK: Tensor, layout: Layout, problem: Problem, bias_N: Tensor | None = None) -> Tensor:
        """One call of the operator."""
        y_MN: Tensor = torch.ops.aerogel.tiles_linear.default(
            x_MK,
            layout["tile_codes"],
            layout["tile_scale"],
            layout.get("tile_zero"),
            layout.get("tile_table"),
            layout.get("tile_pick"),
            bias_N,
            _group_size(layout, problem),
            problem.N,
            problem.mantissa,
            layout.get("tile_factor"),
            TileOutliers.listed(layout),
        )
        return y_MN


def _group_size(layout: Layout, problem: Problem) -> int:
    """0 for one scale per row. Beside outliers that is one group of all columns, so that no sum is scaled at its end."""
    whole = layout["tile_codes"].shape[1] * tiles.COLUMNS if OUTLIERS[0] in layout else 0
    return problem.grid.group_size or whole


def tile_weight(layout: Layout, problem: Problem) -> TileWeight:
    """The layout's tensors as the implementations take them."""
    return TileWeight(
        codes=layout["tile_codes"],
        scale=layout["tile_scale"],
        zero=layout.get("tile_zero"),
        table=layout.get("tile_table"),
        pick=layout.get("tile_pick"),
        group_size=_group_size(layout, problem),
        N=problem.N,
        K=problem.K,
        floats=problem.mantissa,
        factor=layout.get("tile_factor"),
        outliers=TileOutliers.among(layout),
    )


def _unfit(problem: Problem) -> str | None:
    """What no machine changes: rounded or wide activations, groups that end inside a step."""
    return (
        problem.needs_activations("none")
        or problem.needs_dtype(*DTYPES)
        or problem.needs_numbers(IntGrid, Affine, Fp8Grid, TableGrid)
        or (None if isinstance(problem.grid, Fp8Grid) else problem.needs_groups(16))
    )
