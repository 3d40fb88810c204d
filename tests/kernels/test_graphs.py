"""Whole graphs: `torch.compile(fullgraph=True)` of layers in every number format, on every device.

On the CPU what was compiled runs, and gives the numbers of the layer itself. For GPUs the graph is traced on any machine, with
the machine's checks replaced: it is made, and holds operators of ours, or what torch knows; running it is for tests on a GPU.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from tests.kernels.expert_weights import experts_of, routing
from torch import Tensor

from aerogel.errors import RunFailed
from aerogel.kernels import gpu_here, triton_here
from aerogel.kernels.dispatch import choose, choose_grouped
from aerogel.kernels.experts import ExpertLinear, replace_experts, stacked
from aerogel.kernels.gemm.ref import Reference
from aerogel.kernels.gemm.torch_ops import Chunked
from aerogel.kernels.linear import Linear
from aerogel.kernels.problem import Problem
from aerogel.pack import FORMATS
from aerogel.pack.config import choose_format
from aerogel.pack.format import Activations
from aerogel.quantize import GRIDS
from aerogel.quantize.formats.affine import Affine
from aerogel.quantize.formats.bipolar import Bipolar
from aerogel.quantize.formats.bitmod import Bitmod
from aerogel.quantize.formats.complex import Complex
from aerogel.quantize.formats.floats import Float
from aerogel.quantize.formats.kmeans import KMeans
from aerogel.quantize.formats.mx import Mx
from aerogel.quantize.formats.nf4 import Nf4
from aerogel.quantize.formats.nvfp4 import Nvfp4
from aerogel.quantize.formats.rf8 import Rf8
from aerogel.quantize.formats.ternary import Ternary
from aerogel.quantize.grids import Codes, Fp8Grid, IntGrid, quantized
from aerogel.quantize.planes import PlaneGrid

N, K = 48, 96
KINDS: list[tuple[Any, Activations]] = [
    (IntGrid(bits=4, group_size=32), "none"),
    (IntGrid(bits=3, group_size=40, symmetric=False), "none"),
    (IntGrid(bits=4, group_size=32), "int8"),
    (IntGrid(bits=8), "int8"),
    (Ternary(), "none"),
    (Affine(bits=3, group_size=32), "none"),
    (Fp8Grid(), "none"),
    (Fp8Grid(), "fp8"),
    (Fp8Grid(strategy="block"), "fp8"),
    (Float(), "none"),
    (Nf4(), "none"),
    (Mx(), "none"),
    (Mx(kind="e4m3"), "none"),
    (Nvfp4(), "none"),
    (Bitmod(), "none"),
    (KMeans(bits=4, rounds=2), "none"),
    (Rf8(), "none"),
    (Bipolar(), "none"),
    (Complex(), "none"),
    (PlaneGrid(bits=1, group_size=32), "none"),
    (PlaneGrid(bits=3, group_size=40), "none"),
    (PlaneGrid(bits=6, group_size=32), "none"),
]
"""Numbers and how inputs are rounded; every format and every grid is among them."""
DTYPES = (torch.float32, torch.bfloat16)


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    """No graph of another test, and a complaint of torch's about a missing gradient is a failure."""
    torch._dynamo.reset()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*autograd.*")
        yield


@pytest.fixture
def anywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with every GPU."""
    for module, name in ((gpu_here, "missing"), (gpu_here, "nvidia_missing"), (triton_here, "missing")):
        monkeypatch.setattr(module, name, lambda *given: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *device: (9, 0))


def codes_of(grid: Any, seed: int = 0) -> Codes:
    weight = torch.randn(N, K, generator=torch.Generator().manual_seed(seed))
    return quantized(grid, weight, grid.fit(weight))


def traced(call: Callable[..., Tensor], like: Tensor, *given: Tensor) -> list[str]:
    """What a graph of `call` holds, which is made but not run. Its result is like `like`."""
    held: list[str] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., tuple[Tensor, ...]]:
        held.extend(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return lambda *given: (like,)

    with torch.no_grad():
        found = torch.compile(call, backend=backend, fullgraph=True)(*given)
    assert found.shape == like.shape
    return held


def test_every_format_and_every_grid_is_here() -> None:
    assert {choose_format(grid, activations).name for grid, activations in KINDS} >= set(FORMATS) - {"pack-quantized"}
    assert {f"{type(grid).__module__}:{type(grid).__name__}" for grid, _ in KINDS} == set(GRIDS.values())


@pytest.mark.parametrize("place", range(len(KINDS)), ids=lambda place: str(KINDS[place]))
def test_a_linear_on_a_cpu(place: int) -> None:
    """In float32 and bfloat16 by turns."""
    (grid, activations), dtype = KINDS[place], DTYPES[place % 2]
    layer = Linear.from_codes(codes_of(grid), activations=activations, bias=torch.randn(N), dtype=dtype)
    same_when_compiled(layer, dtype)


@pytest.mark.parametrize("kernel", [Chunked, Reference])
@pytest.mark.parametrize(("grid", "activations"), [KINDS[2], KINDS[7], KINDS[14], KINDS[-1]], ids=str)
def test_a_linear_that_is_decoded(grid: Any, activations: Activations, kernel: Any) -> None:
    layer = Linear.from_codes(codes_of(grid), activations=activations, bias=torch.randn(N))
    layer.restore()
    layer.adopt(layer._tensors(), kernel.__name__, kernel, layer.problem())
    same_when_compiled(layer, torch.float32)


def same_when_compiled(layer: Linear, dtype: torch.dtype) -> None:
    """For one token, and for other numbers of them."""
    compiled = torch.compile(lambda x: torch.relu(layer(x)) + 1, backend="aot_eager", fullgraph=True)
    for M in (1, 5, 40):
        x = torch.randn(M, K).to(dtype)
        assert torch.equal(compiled(x), torch.relu(layer(x)) + 1), (layer.kernel_name, M)


@pytest.mark.usefixtures("anywhere")
@pytest.mark.parametrize("device", ["cuda", "xpu"])
@pytest.mark.parametrize(("grid", "activations"), KINDS, ids=str)
def test_a_linear_on_a_gpu_is_traced(grid: Any, activations: Activations, device: str) -> None:
    codes, stored = codes_of(grid), choose_format(grid, activations).name
    for dtype in DTYPES:
        problem = Problem(format=stored, grid=grid, N=N, K=K, dtype=dtype, device=device, activations=activations)
        layer = Linear.from_codes(codes, activations=activations, bias=torch.randn(N), dtype=dtype)
        name, kernel = choose(problem)
        layer.adopt(kernel.pack(codes, problem), name, kernel, problem)
        held = traced(layer, torch.zeros(3, N, dtype=dtype), torch.randn(3, K).to(dtype))
        assert any(target.startswith("aerogel.") for target in held) or name == "torch-int8-dynamic", (name, held)


EXPERTS: list[Any] = [
    IntGrid(bits=4, group_size=32, scale_dtype=torch.bfloat16),
    Fp8Grid(),
    Mx(),
    KMeans(bits=3, rounds=2),
    PlaneGrid(bits=3, group_size=32),
]


def module_of(grid: Any, dtype: torch.dtype, device: str = "cpu") -> Any:
    """transformers' experts, packed."""
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralExperts

    config = MixtralConfig(num_local_experts=6, num_experts_per_tok=2, hidden_size=64, intermediate_size=96)
    with torch.device("meta"):
        module = MixtralExperts(config).to(dtype)
    for name, parameter in list(module.named_parameters()):
        replace_experts(module, name, experts_of(grid, *parameter.shape, dtype, device))
    return module


def tokens(M: int, dtype: torch.dtype, device: str = "cpu") -> tuple[Tensor, Tensor, Tensor]:
    """x, the experts of each token and their weights."""
    x_MH, share_Mk = torch.randn(M, 64, device=device).to(dtype), torch.rand(M, 2, device=device).to(dtype)
    return x_MH / 64, routing(M, 2, 6, device).reshape(M, 2), share_Mk


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("grid", EXPERTS, ids=str)
def test_experts_on_a_cpu(grid: Any, dtype: torch.dtype) -> None:
    module = module_of(grid, dtype)
    compiled = torch.compile(lambda *given: module(*given) + 1, backend="aot_eager", fullgraph=True)
    for M in (1, 5, 40):
        given = tokens(M, dtype)
        assert torch.equal(compiled(*given), module(*given) + 1), M


@pytest.mark.usefixtures("anywhere")
@pytest.mark.parametrize("device", ["cuda", "xpu"])
@pytest.mark.parametrize("grid", EXPERTS, ids=str)
def test_experts_on_a_gpu_are_traced(grid: Any, device: str) -> None:
    module = module_of(grid, torch.bfloat16)
    for weight in (child for child in module.children() if isinstance(child, ExpertLinear)):
        problem = Problem(
            format=weight.scheme.format,
            grid=grid,
            N=weight.out_features,
            K=weight.in_features,
            dtype=torch.bfloat16,
            device=device,
        )
        codes = [weight.codes_of(e) for e in range(weight.experts)]
        name, kernel = choose_grouped(problem)
        weight.adopt(stacked(lambda e: kernel.base_of(problem).pack(codes[e], problem), weight.experts), name, kernel, problem)  # noqa: B023
    for M in (1, 40):
        torch._dynamo.reset()
        held = traced(module, torch.zeros(M, 64, dtype=torch.bfloat16), *tokens(M, torch.bfloat16))
        assert any(target.startswith("aerogel.") for target in held), held


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_gradient_is_refused_when_it_is_computed(backend: str) -> None:
    layer = Linear.from_codes(codes_of(IntGrid(bits=4, group_size=32)), bias=torch.randn(N))
    experts = module_of(EXPERTS[0], torch.float32)
    x_MK, (x_MH, index_Mk, share_Mk) = torch.randn(3, K), tokens(3, torch.float32)
    compiled = torch.compile(layer, backend=backend, fullgraph=True), torch.compile(experts, backend=backend, fullgraph=True)
    for linear, mixed in ((layer, experts), compiled):
        y_MN = linear(x_MK.clone().requires_grad_())
        y_MH = mixed(x_MH, index_Mk, share_Mk.clone().requires_grad_())
        with torch.no_grad():
            assert torch.equal(y_MN, linear(x_MK)) and torch.equal(y_MH, mixed(x_MH, index_Mk, share_Mk))
        for y in (y_MN, y_MH):
            with pytest.raises(RunFailed, match="no_grad"):
                y.sum().backward()
