"""The matmul with bit planes on the kernels for integers: every plane is one more set of rows of one-bit integers.

    y_MN = sum_i (2 alpha_i u_i) . x + (offset - sum_i alpha_i) . X,    u_i in {0, 1}, X[m, g] the sum of x over group g

because a sign is 2 u - 1. The q planes of N outputs lie below one another as one asymmetric one-bit weight [q N, K], whose
scales 2 alpha are exact, so any kernel for integers reads q bits per weight and nothing is converted beforehand. The second
term is a small dense product. Sums are float32 throughout, whatever the activations' type: planes of a weight cancel, so
their sums must not be rounded one by one.

Shape legend: M tokens, N out features, K in features, G groups along K, q planes.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from aerogel.kernels.gemm.cpu import Native
from aerogel.kernels.problem import Kernel, Layout, Problem
from aerogel.quantize.codes import Codes
from aerogel.quantize.grids import IntGrid
from aerogel.quantize.planes import PlaneGrid, exponent_bytes


@dataclass(frozen=True, kw_only=True)
class BitGrid(IntGrid):
    """Asymmetric integers of one bit, which no recipe asks for: u is stored as u - 1 with the zero point -1. Of more bits
    it says how wide the codes of `cuda_planes` are."""

    bits: int = 1
    symmetric: bool = False

    def __post_init__(self) -> None:
        """Nothing that a recipe could have wrong."""


class PlaneRows(Kernel):
    """Planes as rows of one-bit integers on the CPU's compiled kernels."""

    about: ClassVar[str] = "bit planes as rows of one-bit integers, on the compiled CPU kernels"
    base: ClassVar[type[Kernel]] = Native
    """The kernel for integers that multiplies the rows."""
    dtype: ClassVar[torch.dtype | None] = torch.float32
    """Of the activations that it is given; None for those that there are."""

    @classmethod
    def refuses(cls, problem: Problem) -> str | None:
        """Anything but planes, and what the kernels for integers refuse."""
        return problem.needs_numbers(PlaneGrid) or cls.base.refuses(cls.inner(problem))

    @classmethod
    def inner(cls, problem: Problem) -> Problem:
        """The matmul with all planes of the weight below one another."""
        grid = planes_of(problem)
        # Twice a float16 may be too large for one.
        kind = torch.bfloat16 if grid.scale_dtype == torch.bfloat16 and not grid.power_of_two else torch.float32
        bit = BitGrid(group_size=grid.group_size, scale_dtype=kind)
        return replace(problem, grid=bit, N=problem.N * grid.bits, dtype=cls.dtype or problem.dtype)

    @classmethod
    def pack(cls, codes: Codes, problem: Problem) -> dict[str, Tensor]:
        """The integer kernel's tensors of [q N, K], with the stored scales, offsets and what the rows of one leave to add."""
        inner, grid = cls.inner(problem), planes_of(problem)
        N = codes.values_NK.shape[0]
        alpha, offset = (x.repeat_interleave(grid.block_rows, 0)[:N] for x in grid.numbers(codes))
        signs = [((codes.values_NK >> (grid.bits - 1 - i)) & 1).to(torch.int8) - 1 for i in range(grid.bits)]
        scale = (2 * alpha).permute(2, 0, 1).flatten(0, 1).to(inner.grid.scale_dtype).contiguous()
        zero = torch.full(scale.shape, -1, dtype=torch.int8, device=scale.device)
        rows = Codes(values_NK=torch.cat(signs), scale_NG=scale, zero_NG=zero, grid=inner.grid)
        layout = {**cls.base.pack(rows, inner), "shift": offset - alpha.sum(-1)}
        return layout if codes.zero_NG is None else {**layout, "stored_offset": codes.zero_NG}

    @classmethod
    def unpack(cls, layout: Layout, problem: Problem) -> Codes:
        """The same planes, scales and offsets."""
        inner, grid = cls.inner(problem), planes_of(problem)
        rows = cls.base.unpack(layout, inner)
        values = torch.zeros(problem.N, problem.K, dtype=torch.uint8, device=rows.values_NK.device)
        for i, part in enumerate(torch.split(rows.values_NK, problem.N)):
            values |= (part + 1).to(torch.uint8) << (grid.bits - 1 - i)
        alpha = rows.scale_NG.reshape(grid.bits, problem.N, -1)[:, :: grid.block_rows].permute(1, 2, 0) / 2
        return Codes(values_NK=values, scale_NG=stored_scales(grid, alpha), zero_NG=layout.get("stored_offset"), grid=grid)

    @classmethod
    def product(cls, x_MK: Tensor, layout: Layout, inner: Problem) -> Tensor:
        """x times the rows of all planes, float32 [M, q N]."""
        return cls.base.run(x_MK.float(), layout, inner)

    @classmethod
    def run(cls, x_MK: Tensor, layout: Layout, problem: Problem, bias_N: Tensor | None = None) -> Tensor:
        """y: the rows' sums over planes, and the shift."""
        inner, grid = cls.inner(problem), planes_of(problem)
        wide_MK = x_MK.float()
        M, K = x_MK.shape
        parts_MqN = cls.product(x_MK, layout, inner).reshape(M, grid.bits, problem.N)
        size = min(grid.group_size or K, K)
        sums_MG = torch.nn.functional.pad(wide_MK, (0, -K % size)).reshape(M, -1, size).sum(-1)
        y_MN = torch.addmm(parts_MqN.sum(1), sums_MG, layout["shift"].T)
        if bias_N is not None:
            y_MN += bias_N.float()
        return y_MN.to(x_MK.dtype)


def planes_of(problem: Problem) -> PlaneGrid:
    """The grid of a problem that is known to have planes."""
    if not isinstance(problem.grid, PlaneGrid):
        raise TypeError(f"plane rows were asked to run a {type(problem.grid).__name__}")
    return problem.grid


def stored_scales(grid: PlaneGrid, alpha_BGq: Tensor) -> Tensor:
    """Scales that are exact in the type that files have them in, in that type."""
    stored = exponent_bytes(alpha_BGq) if grid.power_of_two else alpha_BGq.to(grid.scale_dtype)
    return stored.contiguous()
