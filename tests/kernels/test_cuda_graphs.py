"""What the CUDA kernels' `run` does around their operator can be traced on any machine: whole graphs need no GPU to be made."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from aerogel.kernels.gemm.cuda import Cuda
from aerogel.kernels.problem import Problem
from aerogel.quantize.formats.kmeans import KMeans
from aerogel.quantize.formats.mx import Mx
from aerogel.quantize.formats.nf4 import Nf4
from aerogel.quantize.formats.nvfp4 import Nvfp4
from aerogel.quantize.grids import Fp8Grid, IntGrid, quantized

GRIDS: list[Any] = [IntGrid(bits=4, group_size=32), Fp8Grid(), Nf4(), Mx(), Nvfp4(), KMeans(bits=4, rounds=2)]


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_every_kind_of_numbers_is_traced_whole(grid: Any) -> None:
    traced: list[str] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., tuple[Tensor, ...]]:
        traced.extend(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return lambda *given: (torch.zeros(3, 48, dtype=torch.bfloat16),)  # the operator itself runs on a GPU only

    weight = torch.randn(48, 96)
    problem = Problem(format="any", grid=grid, N=48, K=96, dtype=torch.bfloat16, device="cuda")
    layout = Cuda.pack(quantized(grid, weight, grid.fit(weight)), problem)
    torch._dynamo.reset()
    compiled = torch.compile(lambda x_MK: Cuda.run(x_MK, layout, problem), backend=backend, fullgraph=True)
    assert compiled(torch.randn(3, 96).bfloat16()).shape == (3, 48)
    assert traced == ["aerogel.tiles_linear.default"]
