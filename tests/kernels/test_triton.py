"""The portable kernels: under Triton's interpreter on the CPU, built for GPUs that are not here, and on a GPU that is."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.kernels.places import PLACES
from tests.kernels.word_weights import KINDS, applies, bound, error, weight_of

from aerogel.errors import BadInput
from aerogel.kernels.dispatch import GEMM, explain, kernel
from aerogel.kernels.gemm.triton_linear import Triton, words_linear
from aerogel.kernels.problem import Problem
from aerogel.quantize.grids import Fp8Grid, IntGrid, quantized

ROOT = Path(__file__).parents[2]
needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")
on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def run(module: str, folder: Path, **environment: str) -> None:
    """A script of the tests in a process of its own: Triton reads its environment when it is imported."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", module],
        cwd=ROOT,
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join([*filter(None, sys.path), "src", "."]),
            "TRITON_CACHE_DIR": str(folder),
            **environment,
        },
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr


@needs_triton
def test_kernels_are_what_float64_says(tmp_path: Path) -> None:
    run("tests.kernels.interpret_triton", tmp_path, TRITON_INTERPRET="1")


@needs_triton
def test_kernels_build_for_other_gpus(tmp_path: Path) -> None:
    run("tests.kernels.compile_triton", tmp_path)


def test_it_stands_behind_what_is_faster_and_before_what_is_slower() -> None:
    order = list(GEMM)
    assert order.index("cuda") < order.index("triton") < order.index("torch-chunked")
    assert kernel("triton") is Triton


def test_refusals_can_be_read() -> None:
    grid = IntGrid(bits=4, group_size=64)
    facts: dict[str, Any] = {"format": "pack-quantized", "N": 64, "K": 128}
    given = {
        "found cpu": Problem(grid=grid, **facts),
        "found float64": Problem(grid=grid, dtype=torch.float64, device="cuda", **facts),
        "multiple of 16": Problem(grid=IntGrid(bits=4, group_size=24), device="cuda", **facts),
        "activations: none, found int8": Problem(grid=grid, device="cuda", activations="int8", **facts),
    }
    for reason, problem in given.items():
        assert reason in (dict(explain(problem))["triton"] or "")


def test_operator_has_a_fake_and_refuses_what_does_not_fit() -> None:
    weight, _ = weight_of(20, 200, 3, KINDS[1])
    x, codes, scale = (tensor.to("meta") for tensor in (torch.empty(5, 200), weight.codes, weight.scale))
    y = torch.ops.aerogel.words_linear(x, codes, scale, None, None, None, None, 32, 20)
    assert y.shape == (5, 20) and y.is_meta
    given = (weight.codes, weight.scale, weight.zero, None, None, None, 32)
    with pytest.raises(BadInput, match="wrong shape"):
        words_linear(torch.randn(5, 200), *given, 40)
    with pytest.raises(BadInput, match="float64"):
        words_linear(torch.randn(5, 200).double(), *given, 20)


@pytest.mark.parametrize("grid", [IntGrid(bits=5, group_size=48, symmetric=False), Fp8Grid(strategy="block")], ids=str)
def test_layout_inverts(grid: Any) -> None:
    dense = torch.randn(150, 200)
    codes = quantized(grid, dense, grid.fit(dense))
    problem = Problem(format="any", grid=grid, N=150, K=200)
    back = Triton.unpack(Triton.pack(codes, problem), problem)
    assert torch.equal(back.values_NK.view(torch.uint8), codes.values_NK.view(torch.uint8))
    assert torch.equal(back.scale_NG, codes.scale_NG)
    assert codes.zero_NG is None or (back.zero_NG is not None and torch.equal(back.zero_NG, codes.zero_NG))


@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize("place", range(len(KINDS)), ids=lambda place: f"g{KINDS[place][0]}-{KINDS[place][1]}")
@pytest.mark.parametrize("bits", range(1, 9))
def test_every_width_on_the_gpu(bits: int, place: int) -> None:
    kind = KINDS[place]
    if not applies(bits, kind):
        pytest.skip("tables have 16 or 256 entries")
    dtype = (torch.bfloat16, torch.float16, torch.float32)[(bits + place) % 3]
    for N, K, tokens in ((37, 200, (1, 40)), (300, 1152, (3,))):
        weight, dense = weight_of(N, K, bits, kind, "cuda")
        bias = torch.randn(N, device="cuda").to(dtype)
        given = (weight.codes, weight.scale, weight.zero, weight.table, weight.pick, bias, weight.group_size, N)
        for M in tokens:
            x = torch.randn(M, K, device="cuda", generator=torch.Generator("cuda").manual_seed(M)).to(dtype)
            poison = torch.full((4 * M, N), torch.nan, device="cuda")
            del poison
            y = torch.ops.aerogel.words_linear(x, *given)
            wanted = x.double() @ dense.T + bias.double()
            assert error(y, wanted) <= bound(kind, dtype), (N, K, M, error(y, wanted))
            assert torch.equal(y, torch.ops.aerogel.words_linear(x, *given)), "two runs differ"


@pytest.mark.gpu
@on_gpu
def test_graphs_on_the_gpu() -> None:
    weight, dense = weight_of(256, 512, 4, KINDS[0], "cuda")
    given = (weight.codes, weight.scale, None, None, None, None, 128, 256)
    call = torch.ops.aerogel.words_linear.default
    x = torch.randn(2, 512, device="cuda").bfloat16()
    wanted = call(x, *given) + 1
    assert error(wanted, x.double() @ dense.T + 1) < 5e-3
    held = torch.zeros_like(x)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = call(held, *given) + 1
    held.copy_(x)
    graph.replay()
    assert torch.equal(y, wanted)


@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize("M", [3, 100])
def test_inputs_lie_anywhere_on_the_gpu(M: int) -> None:
    weight, _ = weight_of(150, 544, 4, KINDS[0], "cuda")
    given = (weight.codes, weight.scale, None, None, None)
    call, x, bias = (
        torch.ops.aerogel.words_linear.default,
        torch.randn(M, 544).bfloat16().cuda(),
        torch.randn(1, 150).bfloat16().cuda(),
    )
    wanted = call(x, *given, bias[0], weight.group_size, 150)
    for place in PLACES:
        assert torch.equal(call(place(x), *given, place(bias)[0], weight.group_size, 150), wanted), place
