"""Every kernel in the table against the float32 reference, on ragged shapes; refusals that can be read; layouts that invert."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from aerogel.kernels.dispatch import GEMM, choose, explain, kernel
from aerogel.kernels.gemm.ref import Reference, quantize_fp8, quantize_int8
from aerogel.kernels.native import library
from aerogel.kernels.problem import Problem
from aerogel.pack.config import choose_format
from aerogel.quantize.grids import Codes, Fp8Grid, IntGrid, quantized
from aerogel.quantize.planes import PlaneGrid

HALF = torch.bfloat16
SCHEMES: list[tuple[Any, str]] = [
    (IntGrid(bits=4, group_size=32, scale_dtype=torch.bfloat16), "none"),
    (IntGrid(bits=4, group_size=64, symmetric=False, scale_dtype=torch.float16), "none"),
    (IntGrid(bits=3, group_size=32, symmetric=False), "none"),
    (IntGrid(bits=8, scale_dtype=torch.bfloat16), "none"),
    (IntGrid(bits=8, group_size=32), "none"),
    (IntGrid(bits=8), "int8"),
    (Fp8Grid(), "fp8"),
    (Fp8Grid(strategy="block"), "fp8"),
    (Fp8Grid(strategy="tensor"), "none"),
]
SHAPES = [(1, 1), (1, 40), (48, 64), (130, 200), (160, 256)]
TOKENS = (0, 1, 2, 7, 16, 33)


def weight(grid: Any, N: int, K: int) -> Codes:
    dense = torch.randn(N, K, generator=torch.Generator().manual_seed(N * K))
    return quantized(grid, dense, grid.fit(dense))


def relative_error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return ((found.double() - wanted.double()).norm() / wanted.double().norm().clamp_min(1e-30)).item()


@pytest.mark.parametrize("name", GEMM)
@pytest.mark.parametrize(("grid", "activations"), SCHEMES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_kernels_agree_with_the_reference(name: str, grid: Any, activations: Any, dtype: torch.dtype) -> None:
    ran = 0
    for N, K in SHAPES:
        codes = weight(grid, N, K)
        fmt = choose_format(grid, activations)
        problem = Problem(format=fmt.name, grid=grid, N=N, K=K, dtype=dtype, activations=activations)
        found = kernel(name)
        reason = found.refuses(problem)
        if reason is not None:
            assert isinstance(reason, str) and len(reason.split()) > 3
            continue
        ran += 1
        layout = found.pack(codes, problem)
        assert not found.runs_stored(problem) or set(layout) == set(fmt.encode(codes))
        back = found.unpack(layout, problem)
        assert torch.equal(back.decode(), codes.decode())
        bias = torch.randn(N, generator=torch.Generator().manual_seed(1)).to(dtype)
        for M in TOKENS:
            x = torch.randn(M, K, generator=torch.Generator().manual_seed(M)).to(dtype)
            poison = torch.full((M, N), torch.nan, dtype=dtype)
            del poison  # freed memory full of NaN is what a kernel that skips an element would return
            y = found.run(x, layout, problem, bias)
            assert y.shape == (M, N) and y.dtype == dtype and bool(torch.isfinite(y).all())
            wanted = Reference.run(x.float(), fmt.encode(codes), problem, bias)
            # One output of one token may nearly cancel against its bias: measured against what was added up.
            added = Reference.run(x.float(), fmt.encode(codes), problem).norm() + bias.float().norm() * M**0.5
            error = ((y.float() - wanted).norm() / added.clamp_min(1e-30)).item()
            worst = int((y.float() - wanted).abs().argmax()) if M else 0
            assert error <= fmt.tolerance[dtype], f"{name} {grid} [{M}, {N}, {K}]: {error:.2e}, worst at {worst}"
    assert ran or name not in ("reference", "torch-chunked")


@pytest.mark.parametrize(("grid", "activations"), SCHEMES, ids=str)
def test_reference_against_float64(grid: Any, activations: Any) -> None:
    codes = weight(grid, 33, 70)
    fmt = choose_format(grid, activations)
    problem = Problem(format=fmt.name, grid=grid, N=33, K=70, activations="none")
    x = torch.randn(5, 70)
    wanted = x.double() @ codes.decode().double().T
    assert relative_error(Reference.run(x, fmt.encode(codes), problem), wanted) < 1e-6


def test_dynamic_rounding_of_inputs() -> None:
    x = torch.tensor([[1.0, -2.0, 0.5], [0.0, 0.0, 0.0]])
    values, scale = quantize_int8(x)
    assert values.tolist() == [[64, -127, 32], [0, 0, 0]] and scale.flatten().tolist() == pytest.approx([2 / 127, 1])
    values, scale = quantize_fp8(x)
    assert values.float().tolist() == [[224, -448, 112], [0, 0, 0]] and scale[1].item() == 1
    for function in (quantize_int8, quantize_fp8):
        big = torch.randn(9, 64)
        values, scale = function(big)
        assert relative_error(values.float() * scale, big) < 0.03


@pytest.mark.parametrize("fixed", [None, torch.tensor([0.5])], ids=["of each token", "stored"])
def test_rounding_hides_no_infinity_and_no_nan(fixed: torch.Tensor | None) -> None:
    x = torch.tensor([[1.0, -2.0], [torch.nan, 1.0], [1.0, -torch.inf]])
    for function in (quantize_int8, quantize_fp8):
        scale = function(x, fixed)[1].flatten()
        assert scale.isfinite().tolist() == [True, False, False] and scale[1].isnan()
        assert fixed is None or scale[0] == 0.5


def test_choice_and_explanation() -> None:
    grid = IntGrid(bits=4, group_size=64, scale_dtype=HALF)
    problem = Problem(format="pack-quantized", grid=grid, N=64, K=128, dtype=HALF)
    assert choose(problem)[0] == ("cpu" if library.missing() is None else "torch-int4-cpu")
    reasons = dict(explain(problem))
    assert list(reasons) == list(GEMM)
    assert reasons["torch-int4-cpu"] is None and reasons["reference"] is None
    assert "activations: int8" in (reasons["torch-int8-dynamic"] or "")
    odd = Problem(format="pack-quantized", grid=grid, N=65, K=128, dtype=HALF)
    assert choose(odd)[0] == ("cpu" if library.missing() is None else "torch-chunked") and "65" in (
        dict(explain(odd))["torch-int4-cpu"] or ""
    )
    elsewhere = Problem(format="pack-quantized", grid=grid, N=64, K=128, dtype=HALF, device="cuda")
    there = "cuda" if dict(explain(elsewhere))["cuda"] is None else "torch-chunked"
    assert choose(elsewhere)[0] == there and "cuda" in (dict(explain(elsewhere))["torch-int4-cpu"] or "")


def test_refusals_say_what_is_needed_what_was_found_and_what_to_do() -> None:
    problem = Problem(
        format="pack-quantized", grid=IntGrid(bits=4, group_size=24), N=65, K=48, dtype=torch.float64, activations="int8"
    )
    assert problem.needs_device("cuda", "xpu") == ("needs device cuda or xpu, found cpu; load the model with --device cuda")
    sentences = {
        problem.needs_dtype(torch.bfloat16, torch.float16): ("bfloat16 or float16", "found float64", "dtype=torch.bfloat16"),
        problem.needs_activations("none", "fp8"): ("activations: none or fp8", "found int8", "quantize stage"),
        problem.needs_numbers(Fp8Grid, PlaneGrid): ("e4m3 floats or bit planes", "found integers", "quantize stage"),
        problem.needs_groups(16): ("a multiple of 16", "found 24", "quantize stage"),
        problem.needs_multiples(16, 32): ("N a multiple of 16 and K of 32", "found 65 and 48", "pad"),
    }
    for sentence, words in sentences.items():
        assert sentence is not None and all(word in sentence for word in words), sentence
    served = (
        problem.needs_device("cpu"),
        problem.needs_dtype(torch.float32, torch.float64),
        problem.needs_activations("int8"),
        problem.needs_numbers(IntGrid),
        problem.needs_groups(8),
        problem.needs_multiples(5, 16),
    )
    assert served == (None,) * 6
    whole = Problem(format="pack-quantized", grid=IntGrid(bits=4), N=65, K=50)
    assert whole.needs_groups(16) is None, "a scale for each output is no group"


def test_a_kernel_whose_library_is_missing_refuses_with_that(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(GEMM, "absent", "aerogel.kernels.gemm.no_such_module:Kernel")
    problem = Problem(format="int-quantized", grid=IntGrid(bits=8), N=8, K=8)
    assert "no_such_module" in (dict(explain(problem))["absent"] or "")


def test_chunks_cover_every_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("aerogel.kernels.gemm.torch_ops.CHUNK_ELEMENTS", 1)
    for grid, activations in SCHEMES:
        codes = weight(grid, 300, 70)
        fmt = choose_format(grid, activations)  # type: ignore[arg-type]
        problem = Problem(format=fmt.name, grid=grid, N=300, K=70, activations=activations)  # type: ignore[arg-type]
        x = torch.randn(3, 70)
        layout = fmt.encode(codes)
        error = relative_error(kernel("torch-chunked").run(x, layout, problem), Reference.run(x, layout, problem))
        assert error < 1e-5, grid
