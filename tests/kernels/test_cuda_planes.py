"""Bit planes as columns of one-bit integers: the layout is the weight, and on a GPU its product."""

from __future__ import annotations

import pytest
import torch

from aerogel.kernels.dispatch import choose
from aerogel.kernels.gemm.cuda_planes import MOST_TOKENS, CudaPlanes, _inner, _places
from aerogel.kernels.problem import Problem
from aerogel.pack import tiles
from aerogel.quantize.codes import Codes, quantized
from aerogel.quantize.grids import IntGrid
from aerogel.quantize.planes import PlaneGrid

GRIDS = [
    PlaneGrid(bits=1, group_size=64),
    PlaneGrid(bits=3, group_size=32, offset="scale", scale_dtype=torch.float16),
    PlaneGrid(bits=2, group_size=128, offset="float32", scale_dtype=torch.bfloat16),
    PlaneGrid(bits=4, group_size=48, scale_dtype=torch.bfloat16),
    PlaneGrid(bits=2, group_size=16, power_of_two=True, block_rows=8),
    PlaneGrid(bits=3, group_size=8, power_of_two=True, block_rows=128),
    PlaneGrid(bits=2, group_size=72, offset="scale", scale_dtype=torch.bfloat16),
    PlaneGrid(bits=3),
    PlaneGrid(bits=1),
]


def weight_of(grid: PlaneGrid, N: int, K: int, device: str = "cpu") -> Codes:
    """Random, with a group of zeros and, where there are offsets, a constant one."""
    w_NK = torch.randn(N, K, generator=torch.Generator().manual_seed(0)).to(device) * 0.05
    if K > 64:
        w_NK[0, :64] = 0
        w_NK[min(1, N - 1), :64] = 0.25
    return quantized(grid, w_NK, grid.fit(w_NK, search="mse"))


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("shape", [(5, 33), (70, 200), (16, 256)])
def test_columns_of_bits_are_the_weight(shape: tuple[int, int], grid: PlaneGrid) -> None:
    N, K = shape
    codes = weight_of(grid, N, K)
    problem = Problem(format="planes", grid=grid, N=N, K=K, dtype=torch.bfloat16, device="cuda")
    layout, inner = CudaPlanes.pack(codes, problem), _inner(problem)
    back = CudaPlanes.unpack(layout, problem)
    assert torch.equal(back.values_NK, codes.values_NK) and torch.equal(back.scale_NG, codes.scale_NG)
    assert torch.equal(back.decode(), codes.decode())
    u, scale, zero = (
        tiles.unpack_tiles(layout["tile_codes"], 1, N, inner.K),
        tiles.unpack_rows_of_tiles(layout["tile_scale"], N),
        tiles.unpack_rows_of_tiles(layout["tile_zero"], N),
    )
    g = torch.arange(inner.K) // (inner.grid.group_size or inner.K)
    one_bit = (u.double() - zero.double()[:, g]) * scale.double()[:, g]
    dense = one_bit.reshape(N, grid.bits, -1).sum(1)[:, _places(problem, u)]
    torch.testing.assert_close(dense.float(), codes.decode(), rtol=2e-5, atol=1e-7)


def test_offsets_beside_planes_that_say_nothing() -> None:
    grid = PlaneGrid(bits=2, group_size=16, offset="float32")
    values = torch.randint(0, 4, (8, 32), dtype=torch.uint8)
    codes = Codes(values_NK=values, scale_NG=torch.zeros(8, 2, 2), zero_NG=torch.full((8, 2), 0.5), grid=grid)
    problem = Problem(format="planes", grid=grid, N=8, K=32, dtype=torch.bfloat16, device="cuda")
    layout = CudaPlanes.pack(codes, problem)
    scale, zero = (tiles.unpack_rows_of_tiles(layout[name], 8) for name in ("tile_scale", "tile_zero"))
    assert torch.equal((-zero * scale)[:, :2], torch.full((8, 2), 0.5)) and torch.isfinite(zero).all()
    back = CudaPlanes.unpack(layout, problem)
    assert torch.equal(back.scale_NG, codes.scale_NG) and torch.equal(back.values_NK, values)


def test_other_grids_are_refused() -> None:
    other = Problem(format="pack-quantized", grid=IntGrid(bits=4), N=16, K=64, dtype=torch.float16, device="cuda")
    assert "planes" in str(CudaPlanes.refuses(other))


@pytest.mark.gpu
@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_products_on_a_gpu(grid: PlaneGrid, dtype: torch.dtype) -> None:
    N, K = 200, 528
    codes = weight_of(grid, N, K, "cuda")
    problem = Problem(format="planes", grid=grid, N=N, K=K, dtype=dtype, device="cuda")
    name, kernel = choose(problem)
    assert name == "cuda-planes"
    layout, dense = kernel.pack(codes, problem), codes.decode(torch.float64)
    for M in (0, 1, 5, 16, 100, MOST_TOKENS + 1):
        x_MK, bias_N = torch.randn(M, K, device="cuda").to(dtype), torch.randn(N, device="cuda").to(dtype)
        found, wanted = kernel.run(x_MK, layout, problem, bias_N), x_MK.double() @ dense.T + bias_N.double()
        assert found.shape == wanted.shape and found.dtype == dtype
        assert M == 0 or float((found - wanted).norm() / wanted.norm()) < (1.2e-2 if dtype == torch.bfloat16 else 2e-3), M
        assert torch.equal(found, kernel.run(x_MK, layout, problem, bias_N))
