"""Compiled CPU kernels in a graph that torch compiles: operators with shapes known before they run, and the same numbers."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from aerogel.kernels.gemm import cpu_lookup, cpu_own, cpu_tables
from aerogel.kernels.linear import Linear
from aerogel.kernels.native import library
from aerogel.kernels.problem import Problem
from aerogel.pack.format import Activations
from aerogel.quantize.formats.kmeans import KMeans
from aerogel.quantize.formats.nf4 import Nf4
from aerogel.quantize.formats.nvfp4 import Nvfp4
from aerogel.quantize.grids import Fp8Grid, IntGrid, quantized
from aerogel.quantize.planes import PlaneGrid

pytestmark = pytest.mark.skipif(library.missing() is not None, reason="needs the compiled library")


GRAPHS: list[tuple[Any, Activations, torch.dtype, str]] = [
    (IntGrid(bits=4, group_size=32), "none", torch.bfloat16, "cpu"),
    (IntGrid(bits=8), "int8", torch.bfloat16, "cpu-int8-dynamic"),
    (Fp8Grid(), "fp8", torch.float32, "cpu-tables"),
    (Nvfp4(), "none", torch.float32, "cpu-lookup"),
    (Nf4(), "none", torch.bfloat16, ""),
    (KMeans(bits=3, rounds=5), "none", torch.bfloat16, ""),
    (PlaneGrid(bits=3, group_size=32), "none", torch.bfloat16, ""),
]
"""Numbers, rounding, type of activations, and who runs them wherever the library is compiled ("": as the processor has it)."""


@pytest.mark.parametrize(("grid", "activations", "dtype", "kernel"), GRAPHS, ids=str)
def test_every_compiled_kernel_stands_in_a_whole_graph(
    grid: Any, activations: Activations, dtype: torch.dtype, kernel: str
) -> None:
    weight = torch.randn(48, 96)
    made = Linear.from_codes(
        quantized(grid, weight, grid.fit(weight)), activations=activations, bias=torch.randn(48), dtype=dtype
    )
    assert kernel in ("", made.kernel_name)
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: torch.relu(made(x)) + 1, backend="aot_eager", fullgraph=True)
    for M in (1, 5, 200):
        x = torch.randn(M, 96).to(dtype)
        with torch.no_grad():
            assert torch.equal(compiled(x), torch.relu(made(x)) + 1)


CASES = [
    (cpu_tables, cpu_tables.NativeTables, "native_tables", Nf4(), torch.bfloat16),
    (cpu_lookup, cpu_lookup.NativeLookup, "native_lookup", Nf4(), torch.float32),
    (cpu_own, cpu_own.NativeOwn, "native_own_tables", KMeans(bits=3), torch.bfloat16),
]


@pytest.mark.parametrize(
    ("module", "kernel", "name", "grid", "dtype"), CASES, ids=lambda case: case if isinstance(case, str) else ""
)
def test_operators_keep_the_promises_of_their_schemas(
    module: Any, kernel: Any, name: str, grid: Any, dtype: torch.dtype
) -> None:
    problem = Problem(format="any", grid=grid, N=40, K=64, dtype=dtype)
    reason = kernel.refuses(problem)
    if reason is not None:
        pytest.skip(reason)
    weight = torch.randn(40, 64)
    layout = kernel.pack(quantized(grid, weight, grid.fit(weight)), problem)
    held = [layout.get(tensor) for tensor in module.TENSORS]
    numbers = list(cpu_own.tables_of(grid, 64)) if module is cpu_own else [grid.group_size or 0]
    given = (torch.randn(3, 64).to(dtype), *held, torch.randn(40), 40, numbers)
    operator = getattr(torch.ops.aerogel, name).default
    checks = torch.library.opcheck(operator, given, test_utils=("test_schema", "test_faketensor"))
    assert set(checks.values()) == {"SUCCESS"}
