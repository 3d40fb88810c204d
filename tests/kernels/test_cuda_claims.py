"""What is claimed of every CUDA kernel, for those whose own tests do not show it.

Problems drawn at random stay within the error budget, damage stays in its token, inputs lie anywhere, launches overlap, and
layers stand in whole graphs.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.kernels.expert_weights import experts_of, routing
from tests.kernels.places import PLACES
from tests.kernels.test_cuda import BOUND, capability
from tests.kernels.test_cuda_outliers import INT4
from tests.kernels.test_cuda_outliers import layer_of as layer_with_outliers
from tests.kernels.tile_weights import dense64
from torch import Tensor

from aerogel.kernels.gemm import cuda
from aerogel.kernels.gemm.cuda_tune import random_weight
from aerogel.kernels.linear import Linear
from aerogel.pack.format import Activations
from aerogel.quantize.formats.affine import Affine
from aerogel.quantize.formats.bitmod import Bitmod
from aerogel.quantize.formats.kmeans import KMeans
from aerogel.quantize.formats.mx import Mx
from aerogel.quantize.formats.nf4 import Nf4
from aerogel.quantize.formats.nvfp4 import Nvfp4
from aerogel.quantize.formats.rf8 import Rf8
from aerogel.quantize.grids import Fp8Grid, IntGrid, quantized
from aerogel.quantize.planes import PlaneGrid

pytestmark = pytest.mark.gpu
KINDS: dict[str, tuple[Any, Activations]] = {
    "int8": (IntGrid(bits=4, group_size=128, scale_dtype=torch.bfloat16), "int8"),
    "fp8": (Fp8Grid(scale_dtype=torch.bfloat16), "fp8"),
    "nf4": (Nf4(), "none"),
    "mxfp4": (Mx(), "none"),
    "nvfp4": (Nvfp4(), "none"),
    "planes": (PlaneGrid(bits=3, group_size=32, scale_dtype=torch.bfloat16), "none"),
    "signs": (PlaneGrid(bits=1, group_size=64, scale_dtype=torch.bfloat16), "none"),
    "codebooks": (KMeans(bits=4, rounds=2), "none"),
    "bitmod": (Bitmod(bits=4, group_size=64), "none"),
    "affine": (Affine(bits=4, group_size=64, scale_dtype=torch.bfloat16), "none"),
    "rf8": (Rf8(), "none"),
    "blocks": (Fp8Grid(strategy="block"), "fp8"),
}
"""Numbers of a weight, and how inputs are rounded. `outliers` is another, of int4 with single numbers and columns beside it."""

ROUNDED = 1.2e-2
"""Relative error where a table's numbers or floating zero points are rounded to bfloat16 as well."""


@pytest.fixture(scope="module", autouse=True)
def hopper() -> Any:
    if not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("needs a GPU of compute capability 9.0")
    with torch.no_grad():
        yield


def layer_of(kind: str, N: int, K: int, *, bias: bool = True, device: str = "cuda") -> Linear:
    """A layer in bfloat16 whose outputs are about as large as its inputs; with outliers, larger."""
    if kind == "outliers":
        return layer_with_outliers(INT4, N, K, torch.bfloat16, device, bias, False, "oc")
    grid, activations = KINDS[kind]
    draw = torch.Generator().manual_seed(N + K)
    w_NK, bias_N = torch.randn(N, K, generator=draw).to(device) / K**0.5, torch.randn(N, generator=draw).to(device)
    codes = quantized(grid, w_NK, grid.fit(w_NK))
    layer = Linear.from_codes(codes, activations=activations, bias=bias_N if bias else None, dtype=torch.bfloat16)
    assert device != "cuda" or str(layer.kernel_name).startswith("cuda"), layer.kernel_name
    return layer


def inputs(M: int, K: int, device: str = "cuda") -> Tensor:
    return torch.randn(M, K, generator=torch.Generator().manual_seed(M)).bfloat16().to(device)


# ---- problems at random ----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("bits", [2, 3, 4, 6, 8])
@settings(max_examples=6, deadline=None, derandomize=True, database=None)
@given(
    N=st.integers(1, 700),
    K=st.integers(1, 1500),
    M=st.integers(1, 16) | st.integers(17, 300),
    size=st.sampled_from((16, 32, 64, 128, 0)),
    zero=st.sampled_from(("none", "integer")),
    dtype=st.sampled_from((torch.bfloat16, torch.float16)),
    bias=st.booleans(),
)
def test_drawn_problems(bits: int, N: int, K: int, M: int, size: int, zero: str, dtype: torch.dtype, bias: bool) -> None:
    weight = random_weight(N, K, bits, size, "cuda", seed=N + K, zero=zero)
    x_MK, bias_N = inputs(M, K).to(dtype), torch.randn(N, device="cuda").to(dtype) if bias else None
    run = cuda.choose(weight, M, dtype, capability()).plan(weight, M, dtype)
    found = torch.full((2, M + 1, N), torch.nan, dtype=dtype, device="cuda")
    for y_MN in found:
        run(x_MK, bias_N, y_MN[:M])
    assert found[:, M].isnan().all(), "writes past the last token"
    assert torch.equal(found[0, :M], found[1, :M]), "two runs differ"
    x, w, b = x_MK.double(), dense64(weight), 0 if bias_N is None else bias_N.double()
    # Against what the sums would be if nothing cancelled. Few outputs do not average the rounding of each.
    error = (found[0, :M].double() - (x @ w.T + b)).norm() / (x.square() @ w.T.square() + b**2).sqrt().norm()
    assert error <= BOUND[dtype] * (1 if M * N >= 32 else 2), float(error)


@pytest.mark.parametrize("kind", [kind for kind, (_, activations) in KINDS.items() if activations == "none"])
@settings(max_examples=4, deadline=None, derandomize=True, database=None)
@given(N=st.integers(1, 500), K=st.integers(1, 1200), M=st.integers(1, 16) | st.integers(17, 200))
def test_drawn_problems_in_every_kind_of_numbers(kind: str, N: int, K: int, M: int) -> None:
    K += K % 2 if kind in ("mxfp4", "nvfp4") else 0  # their checkpoints hold two columns in a byte
    layer, x_MK = layer_of(kind, N, K, bias=False), inputs(M, K)
    found = layer(x_MK)
    assert torch.equal(found, layer(x_MK)), "two runs differ"
    x, w = x_MK.double(), layer.dequantize(torch.float32).double()
    error = (found.double() - x @ w.T).norm() / (x.square() @ w.T.square()).sqrt().norm()
    assert error <= ROUNDED, float(error)


# ---- damage ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", [*KINDS, "outliers"])
def test_damage_stays_in_its_token(kind: str) -> None:
    N, K = 144, 544
    layer = layer_of(kind, N, K)
    for M in (5, 100):
        x_MK = inputs(M, K)
        clean, spoilt = layer(x_MK), x_MK.clone()
        assert clean.isfinite().all()
        spoilt[0, 7], spoilt[1, K - 1], spoilt[M - 1, K // 2] = torch.nan, torch.nan, torch.inf
        y_MN = layer(spoilt)
        assert y_MN[:2].isnan().all() and not y_MN[M - 1].isfinite().any(), M
        assert torch.equal(y_MN[2 : M - 1], clean[2 : M - 1]), M


@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_a_stored_scale_hides_no_damage(kind: str) -> None:
    N, K = 144, 544
    layer = layer_of(kind, N, K)
    operands = layer.operands() | {"input_scale": torch.full((1,), 0.02, device="cuda")}
    for M in (5, 100):
        x_MK = inputs(M, K)
        clean, spoilt = layer._kernel.run(x_MK, operands, layer.problem(), layer.bias), x_MK.clone()
        spoilt[0, 7], spoilt[M - 1, K // 2] = torch.nan, torch.inf
        y_MN = layer._kernel.run(spoilt, operands, layer.problem(), layer.bias)
        assert clean.isfinite().all() and not y_MN[[0, M - 1]].isfinite().any(), M
        assert torch.equal(y_MN[1 : M - 1], clean[1 : M - 1]), M


# ---- inputs that lie anywhere ----------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", ["int8", "fp8", "nf4", "planes", "codebooks", "blocks", "outliers"])
def test_inputs_lie_anywhere(kind: str) -> None:
    N, K = 144, 544
    layer = layer_of(kind, N, K)
    run: Callable[..., Tensor] = layer.product if kind == "outliers" else layer._kernel.run
    for M, place in itertools.product((5, 100), PLACES):
        x_MK, bias_N = inputs(M, K), torch.randn(1, N, device="cuda").bfloat16()
        if kind == "outliers":  # a layer of its own, which puts rows in order before its operator sees them
            assert torch.equal(run(place(x_MK), bias_N[0]), run(x_MK, bias_N[0])), (M, place)
            continue
        wanted = run(x_MK, layer.operands(), layer.problem(), bias_N[0])
        assert torch.equal(run(place(x_MK), layer.operands(), layer.problem(), place(bias_N)[0]), wanted), (M, place)


def test_inputs_of_experts_lie_anywhere() -> None:
    E, N, K, each = 6, 150, 256, 3
    layer = experts_of(IntGrid(bits=4, group_size=32, scale_dtype=torch.bfloat16), E, N, K, torch.bfloat16, "cuda")
    assert layer.kernel_name == "cuda"
    kernel, problem = layer._kernel, layer.problem()
    for M, place in itertools.product((3, 100), PLACES):
        expert_S, x_MK = routing(M, each, E, "cuda"), inputs(M, K)
        bias_EN, share_Mk = torch.randn(E, N, device="cuda").bfloat16(), torch.rand(M, each, device="cuda")

        def product(
            place: Callable[[Tensor], Tensor],
            x_MK: Tensor = x_MK,
            expert_S: Tensor = expert_S,
            bias_EN: Tensor = bias_EN,
            share_Mk: Tensor = share_Mk,
        ) -> Tensor:
            routes = kernel.route(place(expert_S[None].double()).long()[0], E)
            x_SK = kernel.spread(place(x_MK), routes)
            y_SN = kernel.run(place(x_SK), expert_S, routes, layer._tensors(), problem, place(bias_EN))
            return kernel.add(place(y_SN), place(share_Mk), routes)

        wanted = product(lambda tensor: tensor)
        assert wanted.isfinite().all() and torch.equal(product(place), wanted), (M, place)


# ---- launches that overlap -------------------------------------------------------------------------------------------
@pytest.mark.parametrize("M", [4, 64])
@pytest.mark.parametrize("kind", ["int8", "fp8", "nf4", "planes", "codebooks", "blocks", "outliers"])
def test_replays_of_overlapping_launches(kind: str, M: int) -> None:
    """Sixteen launches, each of which reads what the last one wrote, in a graph replayed three hundred times."""
    K = 1024
    layer = layer_of(kind, K, K, bias=False)
    first = inputs(M, K)

    def chain() -> list[Tensor]:
        held = [first]
        for _ in range(16):
            held.append(layer(held[-1]))
        return held[1:]

    wanted = chain()
    assert all(y_MN.isfinite().all() and y_MN.any() for y_MN in wanted)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = chain()
    wrong = torch.zeros((), device="cuda", dtype=torch.int64)
    for _ in range(300):
        for y_MN in found:
            y_MN.fill_(torch.nan)
        graph.replay()
        wrong += torch.stack([(y_MN != right).any() for y_MN, right in zip(found, wanted, strict=True)]).any()
    assert wrong.item() == 0, f"{wrong.item()} of 300 replays differ"


# ---- whole graphs ----------------------------------------------------------------------------------------------------
def same_when_compiled(call: Callable[..., Tensor], *calls: tuple[Tensor, ...]) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(lambda *given: torch.relu(call(*given)) + 1, backend="aot_eager", fullgraph=True, dynamic=False)
    for one in calls:
        found, wanted = compiled(*one), torch.relu(call(*one)) + 1
        assert found.isfinite().all() and torch.equal(found, wanted), len(one[0])


@pytest.mark.parametrize("kind", ["int8", "fp8", "nf4", "mxfp4", "planes", "signs", "outliers"])
def test_a_layer_stands_in_a_whole_graph(kind: str) -> None:
    layer = layer_of(kind, 144, 544)
    same_when_compiled(layer, (inputs(1, 544),), (inputs(40, 544),))
