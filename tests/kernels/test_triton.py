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
from tests.kernels.expert_weights import FLOATS, experts_of, routing, wanted_of
from tests.kernels.places import PLACES
from tests.kernels.word_weights import BOUND, KINDS, ROUNDED, applies, bound, error, weight_of
from tests.quantize.test_tables import GRIDS as TABLES
from tests.quantize.test_tables import weight as table_weight

from aerogel.errors import BadInput
from aerogel.kernels.dispatch import GEMM, explain, kernel
from aerogel.kernels.experts import stacked
from aerogel.kernels.gemm.triton_linear import Triton, words_linear
from aerogel.kernels.gemm.triton_planes import TritonPlanes
from aerogel.kernels.grouped.triton_grouped import Triton as GroupedTriton
from aerogel.kernels.problem import Problem
from aerogel.pack.config import choose_format
from aerogel.quantize.formats.affine import Affine
from aerogel.quantize.formats.bitmod import Bitmod
from aerogel.quantize.formats.kmeans import KMeans
from aerogel.quantize.formats.mx import Mx
from aerogel.quantize.formats.nf4 import Nf4
from aerogel.quantize.formats.nvfp4 import Nvfp4
from aerogel.quantize.grids import Fp8Grid, IntGrid, quantized
from aerogel.quantize.planes import PlaneGrid

NUMBERS = [grid for grid in (*TABLES, Mx(kind="e2m3")) if (grid.group_size or 16) % 16 == 0]
"""Tables and floats whose groups end with a step of sixteen columns."""
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


@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize("place", range(len(NUMBERS)), ids=lambda place: str(NUMBERS[place]))
def test_tables_and_floats_on_the_gpu(place: int) -> None:
    grid, dtype, M = NUMBERS[place], (torch.bfloat16, torch.float16, torch.float32)[place % 3], (1, 130)[place % 2]
    dense = table_weight(200, 288).cuda()
    codes = quantized(grid, dense, grid.fit(dense, search="mse"))
    decoded = codes.decode()
    problem = Problem(format=choose_format(grid).name, grid=grid, N=200, K=288, dtype=dtype, device="cuda")
    layout = Triton.pack(codes, problem)
    assert torch.equal(Triton.unpack(layout, problem).decode(), decoded)
    x = torch.randn(M, 288, device="cuda").to(dtype)
    y = Triton.run(x, layout, problem)
    assert error(y, x.double() @ decoded.double().T) <= ROUNDED[dtype]
    assert torch.equal(y, Triton.run(x, layout, problem)), "two runs differ"


@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize("grid", [PlaneGrid(bits=3, group_size=32, offset="scale"), PlaneGrid(bits=1, group_size=64)], ids=str)
def test_planes_on_the_gpu(grid: Any) -> None:
    dense = table_weight(200, 288).cuda()
    codes = quantized(grid, dense, grid.fit(dense))
    problem = Problem(format="planes", grid=grid, N=200, K=288, dtype=torch.bfloat16, device="cuda")
    layout = TritonPlanes.pack(codes, problem)
    assert torch.equal(TritonPlanes.unpack(layout, problem).decode(), codes.decode())
    x = torch.randn(20, 288, device="cuda").bfloat16()
    assert error(TritonPlanes.run(x, layout, problem), x.double() @ codes.decode().double().T) <= BOUND[torch.bfloat16]


EXPERTS = [*FLOATS, Nvfp4(), Nf4(), KMeans(bits=3, rounds=2), Bitmod(group_size=48)]


@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize("place", range(len(EXPERTS)), ids=lambda place: str(EXPERTS[place]))
def test_experts_in_tables_and_floats_on_the_gpu(place: int) -> None:
    layer = experts_of(EXPERTS[place], 5, 40, 160, torch.bfloat16, "cuda")
    problem = layer.problem(torch.bfloat16)
    packed = stacked(lambda e: GroupedTriton.base.pack(layer.codes_of(e), problem), 5)
    M, k = ((1, 2), (40, 3))[place % 2]
    expert, x = routing(M, k, 5, "cuda"), torch.randn(M, 160, device="cuda").bfloat16()
    y = GroupedTriton.run(x, expert, GroupedTriton.route(expert, 5), packed, problem)
    assert error(y, wanted_of(layer, x, expert, None)) <= ROUNDED[torch.bfloat16]


def test_the_portable_path_takes_what_it_decodes_and_says_what_it_does_not() -> None:
    facts: dict[str, Any] = {"N": 64, "K": 128, "dtype": torch.bfloat16, "device": "xpu"}
    for grid in (Nf4(), Mx(), Nvfp4(), Bitmod(group_size=64), KMeans(), Affine(bits=1)):
        reason = Triton.refuses(Problem(format=choose_format(grid).name, grid=grid, **facts))
        assert reason is None or "needs a GPU" in reason or "triton" in reason.lower(), reason  # the machine, not the numbers
    assert "multiple of 16" in str(Triton.refuses(Problem(format="table-packed", grid=Bitmod(group_size=40), **facts)))
