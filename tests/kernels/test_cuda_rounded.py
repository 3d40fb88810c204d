"""Inputs in e4m3 where tensor cores do not multiply e4m3: who serves them, and the reference's numbers on a GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from aerogel.kernels.dispatch import choose
from aerogel.kernels.gemm.cuda_rounded import CudaRounded
from aerogel.kernels.gemm.ref import Reference
from aerogel.kernels.linear import Linear
from aerogel.kernels.problem import Problem
from aerogel.quantize.grids import Fp8Grid, IntGrid, quantized

on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
BLOCK = Fp8Grid(strategy="block")


def problem_of(grid: Any, N: int = 320, K: int = 1024, **more: Any) -> Problem:
    given = {"dtype": torch.bfloat16, "device": "cuda", "activations": "fp8", **more}
    return Problem(format="float-quantized", grid=grid, N=N, K=K, **given)


def test_it_serves_what_products_of_e4m3_do_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("aerogel.kernels.gpu_here.nvidia_missing", lambda *least: None)
    for served in (
        problem_of(BLOCK),
        problem_of(BLOCK, 33, 70),
        problem_of(BLOCK, dtype=torch.float16),
        problem_of(Fp8Grid(), 33, 70),
        problem_of(Fp8Grid(), dtype=torch.float16, activations="fp8-static"),
    ):
        assert choose(served)[0] == "cuda-rounded", served
    assert choose(problem_of(Fp8Grid()))[0] == "cuda-fp8"
    assert choose(problem_of(BLOCK, activations="none"))[0] == "cuda"
    assert "activations: fp8" in (CudaRounded.refuses(problem_of(BLOCK, activations="none")) or "")
    assert "e4m3 floats" in (CudaRounded.refuses(problem_of(IntGrid(bits=8))) or "")
    assert "bfloat16 or float16" in (CudaRounded.refuses(problem_of(BLOCK, dtype=torch.float32)) or "")


@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("grid", [BLOCK, Fp8Grid(scale_dtype=torch.bfloat16)], ids=["block", "channel"])
def test_it_agrees_with_the_specification(grid: Fp8Grid, dtype: torch.dtype) -> None:
    for N, K in ((320, 1024), (33, 200)):
        problem = problem_of(grid, N, K, dtype=dtype)
        if choose(problem)[0] == "cuda-fp8":
            continue
        assert choose(problem)[0] == "cuda-rounded"
        w = torch.randn(N, K, device="cuda") * 0.05
        codes = quantized(grid, w, grid.fit(w))
        layout = CudaRounded.pack(codes, problem)
        back = CudaRounded.unpack(layout, problem)
        assert torch.equal(back.values_NK.view(torch.uint8), codes.values_NK.view(torch.uint8))
        for M in (0, 1, 7, 40, 300):
            x, bias = torch.randn(M, K, device="cuda").to(dtype), torch.randn(N, device="cuda").to(dtype)
            y = CudaRounded.run(x, layout, problem, bias)
            wanted = Reference.run(x.float(), problem.stored.encode(codes), problem, bias)
            assert y.shape == wanted.shape and y.dtype == dtype
            assert M == 0 or ((y.float() - wanted).norm() / wanted.norm()).item() < 6e-3, (N, K, M)


@pytest.mark.gpu
@on_gpu
def test_a_layer_is_captured_and_compiled() -> None:
    w = torch.randn(256, 512, device="cuda") * 0.05
    layer = Linear.from_codes(quantized(BLOCK, w, BLOCK.fit(w)), activations="fp8", dtype=torch.bfloat16)
    assert layer.kernel_name == "cuda-rounded"
    x = torch.randn(3, 512, device="cuda").bfloat16()
    wanted = layer(x)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = layer(x)
    graph.replay()
    assert torch.equal(y, wanted)
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(layer, backend="aot_eager", fullgraph=True)(x), wanted)
