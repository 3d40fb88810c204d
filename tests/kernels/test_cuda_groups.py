"""Groups that are filled up to whole steps: the layout is the weight, and on a GPU its product."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from aerogel.kernels.cuda import nvrtc, sources
from aerogel.kernels.dispatch import choose
from aerogel.kernels.gemm.cuda import Cuda
from aerogel.kernels.gemm.cuda_groups import CudaGroups, _spread
from aerogel.kernels.gemm.cuda_spread import Spread, spread_out
from aerogel.kernels.problem import Problem
from aerogel.quantize.codes import Codes, quantized
from aerogel.quantize.formats.bitmod import Bitmod
from aerogel.quantize.formats.floats import Float
from aerogel.quantize.formats.nf4 import Nf4
from aerogel.quantize.grids import IntGrid

GRIDS: list[Any] = [
    IntGrid(bits=4, group_size=72, scale_dtype=torch.bfloat16),
    IntGrid(bits=3, group_size=40, symmetric=False),
    IntGrid(bits=8, group_size=8, symmetric=False, scale_dtype=torch.float16),
    IntGrid(bits=4, group_size=33),
    Bitmod(bits=3, group_size=40, scale_dtype=torch.float8_e4m3fn),
    Bitmod(bits=4, group_size=72),
    Nf4(group_size=24),
    Float(kind="e2m1", group_size=200, scale_dtype=torch.bfloat16),
]


def weight_of(grid: Any, N: int, K: int, device: str = "cpu") -> Codes:
    """Random, with a group of zeros."""
    w_NK = torch.randn(N, K, generator=torch.Generator().manual_seed(0)).to(device) * 0.05
    w_NK[0, : grid.group_size] = 0
    return quantized(grid, w_NK, grid.fit(w_NK))


def problem_of(grid: Any, N: int, K: int, dtype: torch.dtype = torch.bfloat16) -> Problem:
    """The matmul of such a weight."""
    kind = "pack-quantized" if isinstance(grid, IntGrid) else "table"
    return Problem(format=kind, grid=grid, N=N, K=K, dtype=dtype, device="cuda")


@pytest.mark.parametrize("shape", [(3, 50), (37, 576), (16, 160)])
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_the_laid_out_weight_is_the_weight(grid: Any, shape: tuple[int, int]) -> None:
    N, K = shape
    codes, problem = weight_of(grid, N, K), problem_of(grid, N, K)
    layout, inner = CudaGroups.pack(codes, problem), CudaGroups.inner(problem)
    back = CudaGroups.unpack(layout, problem)
    assert torch.equal(back.values_NK, codes.values_NK) and torch.equal(back.decode(), codes.decode())
    assert back.scale_NG.dtype == codes.scale_NG.dtype and back.scale_NG.shape == codes.scale_NG.shape
    wide = Cuda.unpack(layout, inner).decode(torch.float64)
    assert inner.K % 128 == 0 and torch.isfinite(wide).all()
    x_MK = torch.randn(4, K, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(spread_out(x_MK, _spread(problem)) @ wide.T, x_MK @ codes.decode(torch.float64).T)


def test_columns_and_their_places() -> None:
    spread = Spread(K=10, group=4, copies=2, columns=112)
    x_MK = torch.arange(1, 11)[None]
    out = spread_out(x_MK, spread)[0]
    assert spread.stretch == 48 and out.shape == (112,)
    assert torch.equal(out[:48], out[48:96]) and not out[96:].any()
    assert out[:4].tolist() == [1, 2, 3, 4] and out[16:20].tolist() == [5, 6, 7, 8] and out[32:34].tolist() == [9, 10]
    assert int(out.sum()) == 2 * 55
    assert spread.sources()[:6].tolist() == [0, 1, 2, 3, 0, 0] and spread.sources()[32:36].tolist() == [8, 9, 8, 8]


def test_what_needs_no_filling_is_left_to_others() -> None:
    assert "no multiple of 16" in str(CudaGroups.refuses(problem_of(IntGrid(bits=4, group_size=64), 8, 64)))
    assert "no multiple of 16" in str(CudaGroups.refuses(problem_of(IntGrid(bits=4), 8, 64)))


@pytest.mark.parametrize("capability", [(8, 0), (9, 0), (12, 0)], ids=str)
@pytest.mark.parametrize("aligned", [0, 1])
def test_the_source_compiles(capability: tuple[int, int], aligned: int) -> None:
    try:
        compiler = nvrtc.compiler()
    except ImportError as error:
        pytest.skip(str(error))
    macros = {"GROUP": 72, "FILLED": 80, "ALIGNED": aligned, "FP16": 0}
    assert compiler.compile("spread.cu", sources.sources_of("spread.cu"), macros, capability)[:4] == b"\x7fELF"


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_spread_on_a_gpu_is_the_definition(dtype: torch.dtype) -> None:
    for K, group, copies, rest in (
        (50, 8, 1, 16),
        (576, 72, 1, 0),
        (576, 72, 3, 128),
        (200, 33, 2, 0),
        (64, 64, 4, 0),
        (7, 16, 2, 0),
    ):
        spread = Spread(K=K, group=group, copies=copies, columns=0)
        for M in (1, 3, 300):
            x_MK = torch.randn(M, K, device="cuda").to(dtype)
            rows = (x_MK, torch.randn(M, K + 1, device="cuda").to(dtype)[:, 1:])
            for x in rows:
                args = (group, copies, copies * spread.stretch + rest)
                found = torch.ops.aerogel.spread(x, *args)
                assert torch.equal(found.cpu(), torch.ops.aerogel.spread(x.cpu(), *args))


@pytest.mark.gpu
@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_products_on_a_gpu(grid: Any, dtype: torch.dtype) -> None:
    N, K = 200, 584
    codes, problem = weight_of(grid, N, K, "cuda"), problem_of(grid, N, K, dtype)
    name, kernel = choose(problem)
    assert name == "cuda-groups"
    layout, dense = kernel.pack(codes, problem), codes.decode(torch.float64)
    for M in (0, 1, 5, 16, 100, 700):
        x_MK, bias_N = torch.randn(M, K, device="cuda").to(dtype), torch.randn(N, device="cuda").to(dtype)
        found, wanted = kernel.run(x_MK, layout, problem, bias_N), x_MK.double() @ dense.T + bias_N.double()
        assert found.shape == wanted.shape and found.dtype == dtype
        assert M == 0 or float((found - wanted).norm() / wanted.norm()) < (4e-3 if dtype == torch.bfloat16 else 1e-3), M
        assert torch.equal(found, kernel.run(x_MK, layout, problem, bias_N))
