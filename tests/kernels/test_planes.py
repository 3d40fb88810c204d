"""Bit planes on the kernels for integers, against the reference in float64."""

from __future__ import annotations

import pytest
import torch
from tests.quantize.test_planes import GRIDS

from aerogel.kernels.gemm.plane_rows import PlaneRows
from aerogel.kernels.gemm.ref import Reference
from aerogel.kernels.native import library
from aerogel.kernels.problem import Problem
from aerogel.quantize.codes import quantized
from aerogel.quantize.planes import PlaneGrid

RUNS = [
    *GRIDS,
    PlaneGrid(bits=2, group_size=7),
    PlaneGrid(bits=2, group_size=16, power_of_two=True, block_rows=8, offset="float32"),
]


@pytest.mark.skipif(library.missing() is not None, reason=str(library.missing()))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("grid", RUNS, ids=str)
@pytest.mark.parametrize("shape", [(1, 5, 33), (3, 70, 96), (20, 16, 160)])
def test_rows_of_bits_are_the_weight(shape: tuple[int, int, int], grid: PlaneGrid, dtype: torch.dtype) -> None:
    M, N, K = shape
    w_NK = torch.randn(N, K)
    codes = quantized(grid, w_NK, grid.fit(w_NK, search="mse"))
    problem = Problem(format="planes", grid=grid, N=N, K=K, dtype=dtype)
    assert PlaneRows.refuses(problem) is None
    layout = PlaneRows.pack(codes, problem)
    back = PlaneRows.unpack(layout, problem)
    assert torch.equal(back.values_NK, codes.values_NK) and torch.equal(back.scale_NG, codes.scale_NG)
    assert torch.equal(back.decode(), codes.decode())
    x_MK, bias_N = torch.randn(M, K).to(dtype), torch.randn(N)
    found = PlaneRows.run(x_MK, layout, problem, bias_N)
    wanted = x_MK.double() @ codes.decode(torch.float64).T + bias_N.double()
    tolerance = 2e-6 if dtype is torch.float32 else 2e-6 + 2**-8  # one number may be most of y: half a unit in its last place
    assert found.dtype == dtype and float((found - wanted).norm() / wanted.norm()) < tolerance
    spoken = Reference.run(x_MK, problem.stored.encode(codes), problem, bias_N)
    assert float((found.double() - spoken.double()).norm() / wanted.norm()) < 2 * tolerance


def test_other_grids_are_refused() -> None:
    from aerogel.quantize.grids import IntGrid

    assert "planes" in str(PlaneRows.refuses(Problem(format="pack-quantized", grid=IntGrid(bits=4), N=4, K=4)))
    wrong = Problem(format="planes", grid=PlaneGrid(bits=2), N=4, K=70, device="cuda")
    assert "cuda" in str(PlaneRows.refuses(wrong))
