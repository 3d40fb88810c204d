"""The matmul with a packed weight on any GPU that Triton compiles for: AMD, Intel, NVIDIA.

    y_MN = x_MK @ W_NK.T + bias_N          bfloat16, float16 or float32 activations, float32 accumulation

The weight lies in words of eight codes (`pack/words.py`); the kernels are in `triton_words.py`. The operator
`aerogel::words_linear` has a fake implementation, so that `torch.compile(fullgraph=True)` traces through it, and its launches
are recorded by CUDA and HIP graphs. The kernels that are compiled for NVIDIA alone (`cuda.py`) are faster where they run.

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
from aerogel.quantize.grids import Codes, Fp8Grid, IntGrid

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
DEVICES = ("cuda", "xpu")
"""What torch calls AMD's and NVIDIA's GPUs, and Intel's."""


class Triton(Kernel):
    """Weight-only matmul in words of eight codes."""

    rows: ClassVar[int] = ROWS
    shared: ClassVar[frozenset[str]] = frozenset({"tile_table"})
    about: ClassVar[str] = "Triton kernels for any GPU: integers of 1 to 8 bits and e4m3 with activations of any float type"

    @staticmethod
    def refuses(problem: Problem) -> str | None:
        """Anything but weight-only matmuls on a GPU that Triton compiles for."""
        return (
            problem.needs_device(*DEVICES)
            or problem.needs_activations("none")
            or problem.needs_dtype(*DTYPES)
            or problem.needs_numbers(IntGrid, Fp8Grid)
            or (problem.needs_groups(16) if problem.integer else None)
            or triton_here.missing()
            or gpu_here.missing(problem.device)
        )

    @staticmethod
    def pack(codes: Codes, problem: Problem) -> dict[str, Tensor]:
        """tile_codes uint8 [R, C, 256 * bits], tile_scale [R, G, 16], and tile_zero or tile_table where there are any."""
        return tensors_of(codes, pack_words)

    @staticmethod
    def unpack(layout: Layout, problem: Problem) -> Codes:
        """The inverse of `pack`, exactly."""
        return codes_of(dict(layout), problem.grid, problem.N, problem.K, unpack_words)

    @staticmethod
    def run(x_MK: Tensor, layout: Layout, problem: Problem, bias_N: Tensor | None = None) -> Tensor:
        """One call of the operator."""
        y_MN: Tensor = torch.ops.aerogel.words_linear.default(
            x_MK,
            layout["tile_codes"],
            layout["tile_scale"],
            layout.get("tile_zero"),
            layout.get("tile_table"),
            None,
            bias_N,
            problem.grid.group_size or 0,
            problem.N,
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
) -> Tensor:
    """`aerogel::words_linear`: x [M, K] -> [M, N]. The other arguments are as `TileWeight` has them, with codes in words.

    Raises:
        BadInput: shapes or dtypes that contradict each other. Nothing has been read then.
    """
    if x.dtype not in DTYPES:
        raise BadInput(f"words_linear multiplies bfloat16, float16 or float32 activations, found {x.dtype}; cast them")
    held = TileWeight(codes=codes, scale=scale, zero=zero, table=table, pick=pick, group_size=group_size, N=N, K=x.shape[1])
    held.check()
    from aerogel.kernels.gemm.triton_words import linear

    with torch.cuda.device(x.device) if x.device.type == "cuda" else nullcontext():
        bias = None if bias is None else bias.contiguous()
        return linear(x.contiguous(), codes, scale, zero, table, pick, bias, group_size, N)


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
) -> Tensor:
    return x.new_empty(x.shape[0], N)


_library = torch.library.Library("aerogel", "FRAGMENT")  # type: ignore[no-untyped-call]
_library.define(  # type: ignore[no-untyped-call]
    "words_linear(Tensor x, Tensor codes, Tensor scale, Tensor? zero, Tensor? table, Tensor? pick, Tensor? bias,"
    " int group_size, int N) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_library.impl("words_linear", words_linear, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
torch.library.register_fake("aerogel::words_linear", _fake, lib=_library)
