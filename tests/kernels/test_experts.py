"""Packed experts: every kernel against the dense weights pair by pair, and the layer that moves between devices and types."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.kernels.expert_weights import (
    BOUND,
    FLOATS,
    FP8,
    GRIDS,
    experts_of,
    product,
    rounded_of,
    routing,
    wanted_of,
    with_rows,
)

from aerogel.errors import BadInput, RunFailed
from aerogel.kernels.dispatch import GROUPED, choose_grouped, explain_grouped
from aerogel.kernels.experts import PackedExperts
from aerogel.kernels.grouped.triton_grouped import linear
from aerogel.kernels.native import library
from aerogel.quantize.codes import Codes
from aerogel.quantize.formats.kmeans import KMeans
from aerogel.quantize.grids import Fp8Grid, IntGrid
from aerogel.quantize.planes import PlaneGrid

on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def error(y: torch.Tensor, wanted: torch.Tensor) -> float:
    return ((y.double() - wanted).norm() / wanted.norm().clamp_min(1e-30)).item()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("grid", [*GRIDS, *FLOATS], ids=str)
def test_every_pair_meets_its_expert(grid: Any, dtype: torch.dtype) -> None:
    layer = experts_of(grid, 4, 21, 70, dtype)
    compiled = "cpu" if grid in GRIDS else "cpu-tables"
    assert layer.kernel_name == (compiled if library.missing() is None else "each")
    bias = torch.randn(4, 21).to(dtype)
    for M, k in ((1, 2), (2, 3), (9, 2)):
        expert = routing(M, k, 4)
        for x in (torch.randn(M, 70).to(dtype), torch.randn(M * k, 70).to(dtype)):
            poison = torch.full((M * k, 21), torch.nan, dtype=dtype)
            del poison
            for given in (None, bias):
                y = product(layer, x, expert, given)
                assert y.dtype == dtype and error(y, wanted_of(layer, x, expert, given)) <= BOUND[dtype]


OWN: list[Any] = [KMeans(bits=3, rounds=2), PlaneGrid(bits=3, group_size=32), PlaneGrid(bits=6, group_size=40)]
"""Numbers that no grouped kernel of a CPU knows."""


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("grid", OWN, ids=str)
def test_other_numbers_run_on_the_kernel_of_a_single_weight(
    grid: Any, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer, bias = experts_of(grid, 4, 21, 80, dtype), torch.randn(4, 21).to(dtype)
    assert layer.kernel_name == "each"
    expert, x = routing(9, 2, 4), torch.randn(9, 80).to(dtype)
    wanted = wanted_of(layer, x, expert, bias)
    if library.missing() is None:  # nothing dense is made
        monkeypatch.setattr(Codes, "decode", lambda *given: pytest.fail("decoded a weight"))
    assert error(product(layer, x, expert, bias), wanted) <= BOUND[dtype]


@pytest.mark.parametrize("activations", ["int8", "int8-static", "fp8", "fp8-static"])
def test_inputs_are_rounded_as_the_checkpoint_asks(activations: Any) -> None:
    grid: Any = IntGrid(bits=8) if activations.startswith("int8") else Fp8Grid()
    layer = experts_of(grid, 4, 21, 80, torch.float32, "cpu", activations)
    expert, x = routing(9, 2, 4), torch.randn(9, 80)
    y = product(layer, x, expert)
    assert error(y, rounded_of(layer, x, expert)) <= 1e-5 < 3e-3 < error(y, wanted_of(layer, x, expert, None))


def test_rows_of_more_bits_join_their_rows() -> None:
    layer = with_rows(experts_of(GRIDS[0], 4, 21, 64, torch.float32), 3)
    for M, k in ((1, 2), (9, 2)):
        expert, x = routing(M, k, 4), torch.randn(M, 64)
        assert error(product(layer, x, expert), wanted_of(layer, x, expert, None)) <= 1e-5


def test_no_tokens() -> None:
    layer, nobody = experts_of(GRIDS[0], 4, 21, 70, torch.float32), torch.empty(0, dtype=torch.int64)
    assert product(layer, torch.empty(0, 70), nobody).shape == (0, 21)


def test_weights_survive_layouts_types_and_the_way_back() -> None:
    layer = experts_of(GRIDS[1], 3, 20, 48, torch.float32)
    dense, held = layer.dequantize(), {name: tensor.clone() for name, tensor in layer._buffers.items() if tensor is not None}
    layer.restore()
    stored = {name: tuple(tensor.shape) for name, tensor in layer._tensors().items()}
    assert stored["weight_scale"] == (3, 20, 3) and stored["weight_packed"][0] == 3
    layer.prepare()
    assert all(torch.equal(layer._buffers[name], tensor) for name, tensor in held.items())
    layer.bfloat16()
    assert layer.compute_dtype == torch.bfloat16 and torch.equal(layer.dequantize(torch.float32), dense)
    assert layer(torch.randn(2, 48).bfloat16(), torch.tensor([0, 2]), []).dtype == torch.bfloat16


def test_refusals_can_be_read() -> None:
    layer = experts_of(GRIDS[0], 2, 16, 32, torch.float32)
    reasons = dict(explain_grouped(layer.problem()))
    assert list(reasons) == list(GROUPED) and "found cpu" in (reasons["triton"] or "") and reasons["reference"] is None
    assert choose_grouped(layer.problem())[0] == layer.kernel_name
    codes, scale = torch.zeros(2, 1, 1, 1024, dtype=torch.uint8), torch.zeros(2, 1, 1, 16)
    with pytest.raises(BadInput, match="do not fit"):
        linear(torch.zeros(1, 32), torch.zeros(3, dtype=torch.int64), [], codes, scale, None, None, None, None, 0, 17)


def test_another_routing_is_refused() -> None:
    with pytest.raises(RunFailed, match="report this model"):
        PackedExperts()(torch.zeros(2, 8), torch.zeros(2, 2, dtype=torch.int64), torch.zeros(2, 4))


def test_operators_keep_the_promises_of_their_schemas() -> None:
    layer = experts_of(GRIDS[0], 3, 16, 32, torch.float32)
    if layer.kernel_name == "cpu":
        held = layer._tensors()
        given = (torch.randn(2, 32), torch.tensor([0, 1]), held["codes"], held["scale"], None, None, 16, 32)
        torch.library.opcheck(
            torch.ops.aerogel.grouped_native_linear.default, given, test_utils=("test_schema", "test_faketensor")
        )
    meta = torch.zeros(3, 1, 1, 1024, dtype=torch.uint8, device="meta"), torch.zeros(3, 1, 1, 16, device="meta")
    x, expert = torch.empty(2, 32, device="meta"), torch.zeros(4, dtype=torch.int64, device="meta")
    assert torch.ops.aerogel.grouped_words_linear(x, expert, [], *meta, None, None, None, None, 0, 16).shape == (4, 16)


@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("grid", [*GRIDS, FP8], ids=str)
def test_every_pair_meets_its_expert_on_the_gpu(grid: Any, dtype: torch.dtype) -> None:
    layer = experts_of(grid, 6, 150, 200, dtype, "cuda")
    hopper = torch.cuda.get_device_capability()[0] == 9
    assert layer.kernel_name == ("cuda" if hopper and dtype != torch.float32 else "triton")
    bias = torch.randn(6, 150, device="cuda").to(dtype)
    for M, k in ((1, 2), (90, 4)):
        expert = routing(M, k, 6, "cuda")
        for x in (torch.randn(M, 200, device="cuda").to(dtype), torch.randn(M * k, 200, device="cuda").to(dtype)):
            poison = torch.full((M * k, 150), torch.nan, dtype=dtype, device="cuda")
            del poison
            y = product(layer, x, expert, bias)
            assert error(y, wanted_of(layer, x, expert, bias)) <= BOUND[dtype]
            assert torch.equal(y, product(layer, x, expert, bias)), "two runs differ"


@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize("M", [1, 40])
def test_a_graph_follows_the_routing(M: int) -> None:
    layer = experts_of(GRIDS[0], 8, 64, 128, torch.bfloat16, "cuda")
    x, expert = torch.randn(M, 128, device="cuda").bfloat16(), routing(M, 2, 8, "cuda")

    def run() -> torch.Tensor:
        return product(layer, x, expert)

    run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = run()
    for shift in range(3):
        expert.copy_((expert + shift) % 8)
        x.normal_()
        graph.replay()
        assert torch.equal(y, run()) and error(y, wanted_of(layer, x, expert, None)) <= BOUND[torch.bfloat16]
