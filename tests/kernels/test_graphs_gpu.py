"""Whole graphs and CUDA graphs of layers on a Hopper GPU: what `test_graphs` traces is run here, and recorded."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from tests.kernels.test_graphs import EXPERTS, KINDS, N, codes_of, module_of, tokens

from aerogel.kernels.linear import Linear
from aerogel.pack.format import Activations

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def hopper() -> Iterator[None]:
    if not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("needs a GPU of compute capability 9.0")
    torch._dynamo.reset()
    with torch.no_grad():
        yield


@pytest.mark.parametrize(("grid", "activations"), KINDS, ids=str)
def test_a_linear_is_compiled_whole_and_recorded(grid: Any, activations: Activations) -> None:
    codes = codes_of(grid).to("cuda")
    layer = Linear.from_codes(codes, activations=activations, bias=torch.randn(N, device="cuda"), dtype=torch.bfloat16)
    compiled = torch.compile(lambda x: torch.relu(layer(x)) + 1, backend="aot_eager", fullgraph=True, dynamic=False)
    x_MK = torch.randn(8, layer.in_features, device="cuda").bfloat16()
    assert torch.equal(compiled(x_MK), torch.relu(layer(x_MK)) + 1), layer.kernel_name
    if layer.kernel_name == "torch-chunked":
        return  # reads the weight's shape back in every call, which no recording can hold
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y_MN = compiled(x_MK)
    x_MK.normal_()
    graph.replay()
    assert torch.equal(y_MN, torch.relu(layer(x_MK)) + 1), layer.kernel_name


@pytest.mark.parametrize("grid", EXPERTS, ids=str)
def test_experts_are_compiled_whole(grid: Any) -> None:
    module = module_of(grid, torch.bfloat16, "cuda")
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True, dynamic=False)
    given = tokens(40, torch.bfloat16, "cuda")
    found, wanted = compiled(*given), module(*given)
    # The gate is a kernel of ours or the model's code, which round alike but for the last bits of the activation.
    assert (found - wanted).float().norm() <= 1e-2 * wanted.float().norm()


@pytest.mark.parametrize("grid", EXPERTS, ids=str)
def test_recorded_experts_follow_the_routing(grid: Any) -> None:
    module = module_of(grid, torch.bfloat16, "cuda")
    for M in (1, 40):
        x_MH, index_Mk, share_Mk = tokens(M, torch.bfloat16, "cuda")
        module(x_MH, index_Mk, share_Mk)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y_MH = module(x_MH, index_Mk, share_Mk)
        for _ in range(2):
            x_MH.normal_().div_(64)
            index_Mk.add_(1).remainder_(6)
            graph.replay()
            assert torch.equal(y_MH, module(x_MH, index_Mk, share_Mk)), M
