"""A decode step as a list of native operations: the same logits as the plain function, token after token; what it refuses."""

from __future__ import annotations

import ctypes
from typing import Any

import pytest
import torch
from torch import fx, nn

from aerogel.errors import BadInput
from aerogel.kernels.decode import ops
from aerogel.kernels.decode.native_program import NativeProgram
from aerogel.kernels.decode.operations import Operations
from aerogel.kernels.decode.trace import CannotTrace, Seen
from aerogel.kernels.gemm.cpu_lookup import NativeLookup
from aerogel.kernels.linear import Linear
from aerogel.kernels.native import library
from aerogel.kernels.problem import Problem
from aerogel.kernels.sidecars import SidecarLinear
from aerogel.quantize.formats.kmeans import KMeans
from aerogel.quantize.formats.nf4 import Nf4
from aerogel.quantize.grids import IntGrid, quantized
from aerogel.quantize.hadamard import random_signs
from aerogel.quantize.outliers import Outliers
from aerogel.quantize.planes import PlaneGrid
from aerogel.quantize.rotation import Rotation
from aerogel.quantize.rows import Rows

pytestmark = pytest.mark.skipif(library.missing() is not None, reason=str(library.missing()))


def linear(N: int, K: int, dtype: torch.dtype, tables: bool) -> Linear:
    grid = IntGrid(bits=4, group_size=32)
    weight = torch.randn(N, K) / K**0.5
    layer = Linear.from_codes(quantized(grid, weight, grid.fit(weight)), dtype=dtype)
    if tables:
        nf4 = Nf4(group_size=32)
        problem = Problem(format="any", grid=nf4, N=N, K=K, dtype=dtype)
        packed = NativeLookup.pack(quantized(nf4, weight, nf4.fit(weight)), problem)
        layer.adopt(packed, "cpu-lookup", NativeLookup, problem)
    return layer


def chain(dtype: torch.dtype, layers: int = 4, tables: bool = False) -> tuple[fx.GraphModule, list[Linear], torch.Tensor]:
    """x -> (norm -> up -> gate -> down -> add) repeated, with a view and an operator that only torch has in between."""
    graph, root, modules = fx.Graph(), nn.Module(), []
    weight = torch.rand(64).to(dtype) + 0.5
    root.register_buffer("weight", weight)

    def seen(node: fx.Node, *shape: int) -> fx.Node:
        node.meta["seen"] = Seen.of(torch.empty(*shape, dtype=dtype))
        return node

    x = seen(graph.placeholder("x"), 1, 1, 64)
    norm = graph.get_attr("weight")
    h = x
    for _ in range(layers):
        up, down = linear(96, 64, dtype, tables), linear(64, 96, dtype, tables)
        modules += [up, down]
        y = seen(graph.call_function(torch.ops.aerogel.rms_norm.default, (h, norm, 1e-5, True)), 1, 1, 64)
        wide = seen(graph.call_function(up.forward, (y,)), 1, 1, 96)
        flat = seen(graph.call_function(torch.ops.aten.view.default, (wide, [1, 96])), 1, 96)
        bent = seen(graph.call_function(torch.ops.aten.tanh.default, (flat,)), 1, 96)
        product = seen(graph.call_function(torch.ops.aerogel.gate.default, (flat, bent, "silu")), 1, 96)
        back = seen(graph.call_function(torch.ops.aten.view.default, (product, [1, 1, 96])), 1, 1, 96)
        low = seen(graph.call_function(down.forward, (back,)), 1, 1, 64)
        h = seen(graph.call_function(torch.ops.aten.add.Tensor, (h, low)), 1, 1, 64)
    graph.output(h)
    return fx.GraphModule(root, graph), modules, weight


def plain(x: torch.Tensor, modules: list[Linear], weight: torch.Tensor) -> torch.Tensor:
    for up, down in zip(modules[::2], modules[1::2], strict=True):
        wide = up(ops.rms_norm(x, weight, 1e-5, True))
        x = x + down(ops.gate(wide, torch.tanh(wide), "silu"))
    return x


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tables", [False, True], ids=["integers", "tables"])
def test_it_computes_what_the_function_computes(dtype: torch.dtype, tables: bool) -> None:
    graph, modules, weight = chain(dtype, tables=tables)
    program = NativeProgram(graph)
    assert program.operators == 16
    results = []
    for _ in range(3):
        x = torch.randn(1, 1, 64).to(dtype)
        found, wanted = program(x), plain(x, modules, weight)
        error = (found.float() - wanted.float()).norm() / wanted.float().norm()
        assert error < (1e-5 if dtype == torch.float32 else 2e-2)
        results.append(found)
    assert not torch.equal(results[0], results[1]), "results share memory"


@pytest.mark.parametrize("group", [8, 32])
def test_weights_with_tables_of_their_own_are_operations(group: int) -> None:
    grid = PlaneGrid(bits=3, group_size=group, power_of_two=True, block_rows=16)
    weight = torch.randn(96, 64)
    layer = Linear.from_codes(quantized(grid, weight, grid.fit(weight)), dtype=torch.bfloat16)
    assert layer.kernel_name == "cpu-own-tables"
    x, y = torch.randn(2, 1, 64).bfloat16(), torch.empty(2, 1, 96, dtype=torch.bfloat16)
    operations = Operations()
    assert operations.linear(layer, x, y)
    operations.run()
    assert torch.equal(y, layer(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("outliers", [False, True])
def test_rows_of_more_bits_are_operations(dtype: torch.dtype, outliers: bool) -> None:
    grid = IntGrid(bits=4, group_size=32)
    weight_NK, index_R = torch.randn(80, 64), torch.tensor([3, 17, 79])
    codes = quantized(grid, weight_NK, grid.fit(weight_NK))
    layer = SidecarLinear.from_codes(codes, dtype=dtype)
    layer.keep(Rows.of(index_R, quantized(grid, weight_NK[index_R] / 9, grid.fit(weight_NK[index_R] / 9))).tensors())
    if outliers:
        layer.keep(Outliers.of(weight_NK, torch.rand(80, 64) < 0.02).tensors())
    x, y = torch.randn(2, 1, 64).to(dtype), torch.empty(2, 1, 80, dtype=dtype)
    operations = Operations()
    assert operations.linear(layer, x, y)
    operations.run()
    assert (operations.count, operations.calls) == (3, 1)
    assert torch.equal(y, layer(x))
    assert not torch.equal(y[..., index_R], Linear.from_codes(codes, dtype=dtype)(x)[..., index_R])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rows", [False, True])
def test_a_rotation_of_inputs_is_an_operation_and_all_see_its_result(dtype: torch.dtype, rows: bool) -> None:
    grid = IntGrid(bits=4, group_size=32)
    signs_K = random_signs(64, torch.Generator().manual_seed(1)).to(torch.int8)
    rotation, layers = Rotation(signs_K=signs_K, block_1=torch.tensor([16], dtype=torch.int32)), []
    for N in (80, 48):
        weight_NK, index_R = torch.randn(N, 64), torch.tensor([3, 17, 40])
        layer = SidecarLinear.from_codes(quantized(grid, weight_NK, grid.fit(weight_NK)), dtype=dtype)
        layer.keep(rotation.tensors())
        if rows:
            finer_RK = weight_NK[index_R] / 9
            layer.keep(Rows.of(index_R, quantized(grid, finer_RK, grid.fit(finer_RK))).tensors())
        layers.append(layer)
    x = [torch.randn(2, 1, 64).to(dtype) for _ in layers]
    y = [torch.empty(2, 1, layer.out_features, dtype=dtype) for layer in layers]
    operations = Operations()
    assert all(operations.linear(*each) for each in zip(layers, x, y, strict=True))
    for _ in range(2):
        operations.run()
        for layer, given, found in zip(layers, x, y, strict=True):
            assert torch.equal(found, layer(given))
            given.copy_(torch.randn_like(given))
    assert (operations.count, operations.calls) == (8 if rows else 4, 1)


@pytest.mark.parametrize(
    "grid", [KMeans(rounds=3), Nf4(group_size=32), Nf4(group_size=40), PlaneGrid(bits=2, group_size=32)], ids=str
)
def test_outliers_beside_tables_are_no_operation_of_their_own(grid: Any) -> None:
    weight_NK = torch.randn(80, 64)
    layer = SidecarLinear.from_codes(quantized(grid, weight_NK, grid.fit(weight_NK)), dtype=torch.bfloat16)
    plain = layer(torch.ones(1, 64).bfloat16())
    layer.keep(Outliers.of(weight_NK, torch.rand(80, 64) < 0.02).tensors())
    assert not torch.equal(layer(torch.ones(1, 64).bfloat16()), plain)
    for tokens in (1, 6):
        x, y = torch.randn(tokens, 1, 64).bfloat16(), torch.empty(tokens, 1, 80, dtype=torch.bfloat16)
        operations = Operations()
        assert operations.linear(layer, x, y)
        operations.run()
        assert (operations.count, operations.calls) == (1, 1)
        assert torch.equal(y, layer(x))


def test_sums_for_rows_that_are_not_there_are_refused() -> None:
    part, index, y = torch.ones(1, 1), torch.tensor([4]), torch.zeros(1, 4)
    sums = library.RowSums(part.data_ptr(), index.data_ptr(), y.data_ptr(), 1, 4, 1, library.TYPES[y.dtype])
    with pytest.raises(BadInput, match="row"):
        library.check(library.library().aerogel_native_row_sums(ctypes.byref(sums)), "sums")
    assert not y.any()


def test_a_step_with_hardly_anything_native_is_refused() -> None:
    with pytest.raises(CannotTrace, match="native"):
        NativeProgram(chain(torch.float32, layers=1)[0])
