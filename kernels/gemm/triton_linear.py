"""The matmul with a packed weight on any GPU that Triton compiles for: AMD, Intel, NVIDIA.

    y_MN = x_MK @ W_NK.T + bias_N          bfloat16, float16 or float32 activations, float32 accumulation

Integers with any zero point, small floats and tables. The weight lies in words of eight codes (`pack/words.py`); the kernels
are in `triton_words.py`. The operator `aerogel::words_linear` has a fake implementation, so that
`torch.compile(fullgraph=True)` traces through it, and its launches are recorded by CUDA and HIP graphs. The kernels that are
compiled for NVIDIA alone (`cuda.py`) are faster where they run.

Shape legend: M tokens, N out features, K in features, R row tiles, C k tiles, G groups along K.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import ClassVar

import torch
from torch import Tensor

from aerogel.errors import BadInput
from aerogel.kernels import gpu_here, triton_here
from aerogel.kernels.gemm.cuda_weight import TileWeight, codes_of, tensors_of
from aerogel.kernels.problem import Kernel, Layout, Problem
from aerogel.pack.tiles import ROWS
from aerogel.pack.words import pack_words, unpack_words
from aerogel.quantize.formats.affine import Affine
from aerogel.quantize.grids import Codes, Fp8Grid, IntGrid
from aerogel.quantize.tables import TableGrid

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
DEVICES = ("cuda", "xpu")
"""What torch calls AMD's and NVIDIA's GPUs, and Intel's."""


class Triton(Kernel):
    """Weight-only matmul in words of eight codes."""

    rows: ClassVar[int] = ROWS
    shared: ClassVar[frozenset[str]] = frozenset({"tile_table", "tile_factor", "stored_factor"})
    about: ClassVar[str] = (
        "Triton kernels for any GPU: integers of 1 to 8 bits with any zero point, small floats, tables of up to 256 numbers;"
        " activations of any float type"
    )

    @staticmethod
    def refuses(problem: Problem) -> str | None:
        """Anything but weight-only matmuls on a GPU that Triton compiles for."""
        return (
            problem.needs_device(*DEVICES)
            or problem.needs_activations("none")
            or problem.needs_dtype(*DTYPES)
            or problem.needs_numbers(IntGrid, Affine, Fp8Grid, TableGrid)
            or (None if isinstance(problem.grid, Fp8Grid) else problem.needs_groups(16))
            or triton_here.missing()
            or gpu_here.missing(problem.device)
        )

    @staticmethod
    def pack(codes: Codes, problem: Problem) -> dict[str, Tensor]:
        """tile_codes uint8 [R, C, 256 * bits], tile_scale [R, G, 16], and tile_zero, tile_table, tile_pick or tile_factor where
        there are any."""
        return tensors_of(codes, pack_words)

    @staticmethod
    def unpack(layout: Layout, problem: Problem) -> Codes:
        """The inverse of `pack`, exactly."""
        return codes_of(dict(layout), problem.grid, problem.N, problem.K, unpack_words)

    @staticmethod
    def run(x_MK: Tensor, layout: Layout, problem: Problem, bias_N: Tensor | None = None, wide: bool = False) -> Tensor:
        """One call of the operator. wide: the result in float32."""
        y_MN: Tensor = torch.ops.aerogel.words_linear.default(
            x_MK,
            layout["tile_codes"],
            layout["tile_scale"],
            layout.get("tile_zero"),
            layout.get("tile_table"),
            layout.get("tile_pick"),
            bias_N,
            problem.grid.group_size or 0,
            problem.N,
            problem.mantissa,
            layout.get("tile_factor"),
            wide,
        )
        return y_MN


def words_linear(
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
    wide: bool = False,
) -> Tensor:
    """`aerogel::words_linear`: x [M, K] -> [M, N], in float32 where `wide`. The other arguments are as `TileWeight` has them,
    with codes in words.

    Raises:
        BadInput: shapes or dtypes that contradict each other. Nothing has been read then.
    """
    if x.dtype not in DTYPES:
        raise BadInput(f"words_linear multiplies bfloat16, float16 or float32 activations, found {x.dtype}; cast them")
    held = TileWeight(
        codes=codes, scale=scale, zero=zero, table=table, pick=pick, group_size=group_size, N=N, K=x.shape[1],
        floats=floats, factor=factor,
    )  # fmt: skip
    held.check()
    from aerogel.kernels.gemm.triton_words import linear

    with torch.cuda.device(x.device) if x.device.type == "cuda" else nullcontext():
        bias = None if bias is None else bias.contiguous()
        out = torch.float32 if wide else None
        return linear(x.contiguous(), codes, scale, zero, table, pick, bias, group_size, N, None, floats, factor, out)


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
    wide: bool = False,
) -> Tensor:
    return x.new_empty(x.shape[0], N, dtype=torch.float32 if wide else None)


_library = torch.library.Library("aerogel", "FRAGMENT")  # type: ignore[no-untyped-call]
_library.define(  # type: ignore[no-untyped-call]
    "words_linear(Tensor x, Tensor codes, Tensor scale, Tensor? zero, Tensor? table, Tensor? pick, Tensor? bias,"
    " int group_size, int N, int floats=0, Tensor? factor=None, bool wide=False) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_library.impl("words_linear", words_linear, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
torch.library.register_fake("aerogel::words_linear", _fake, lib=_library)
