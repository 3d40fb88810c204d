"""Sparse outliers beside integers whose inputs are rounded to bytes, on the CUDA kernels: they meet the inputs as they are."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from aerogel.kernels.cuda import nvrtc, sources
from aerogel.kernels.gemm import cuda_added, cuda_few, cuda_few_plan, cuda_int8, cuda_wgmma, cuda_wgmma_plan
from aerogel.kernels.gemm.cuda_outliers import TileOutliers
from aerogel.kernels.gemm.cuda_quantize import INT8, ROUNDED, Quantizer
from aerogel.kernels.gemm.cuda_quantize import macros as rounding_macros
from aerogel.kernels.gemm.cuda_weight import TileWeight, tensors_of
from aerogel.kernels.gemm.cuda_wgmma import Config
from aerogel.kernels.gemm.ref import quantize_int8
from aerogel.kernels.sidecars import SidecarLinear
from aerogel.quantize.codes import quantized
from aerogel.quantize.grids import IntGrid
from aerogel.quantize.outliers import Outliers

GRIDS = [IntGrid(bits=8, scale_dtype=torch.bfloat16), IntGrid(bits=4, group_size=128, scale_dtype=torch.bfloat16)]


def layer_of(grid: IntGrid, N: int, K: int, dtype: torch.dtype, bias: bool, device: str) -> tuple[SidecarLinear, Tensor]:
    """A layer with 2 % of outliers, one row full of them and one without; the weight of the outliers alone, float64 [N, K]."""
    random = torch.Generator().manual_seed(N)
    mask_NK = torch.rand(N, K, generator=random) < 0.02
    mask_NK[0], mask_NK[-1] = False, True
    w_NK = torch.randn(N, K, generator=random)
    outliers = Outliers.of(5 * w_NK, mask_NK)
    codes = quantized(grid, w_NK.masked_fill(mask_NK, 0), grid.fit(w_NK))
    bias_N = torch.randn(N, generator=random) if bias else None
    layer = SidecarLinear.from_codes(codes, activations="int8", bias=bias_N, dtype=dtype).to(device)
    layer.keep({name: tensor.to(device) for name, tensor in outliers.tensors().items()})
    alone_NK = torch.zeros(N, K)
    outliers.put(alone_NK)
    return layer, alone_NK.double().to(device)


def test_the_sources_that_add_compile() -> None:
    try:
        compiler = nvrtc.compiler()
    except ImportError as error:
        pytest.skip(str(error))
    w_NK = torch.randn(64, 256, generator=torch.Generator().manual_seed(0))
    layout: Any = tensors_of(quantized(GRIDS[0], w_NK, GRIDS[0].fit(w_NK)))
    plain = TileWeight(
        codes=layout["tile_codes"], scale=layout["tile_scale"], zero=None, table=None, pick=None, group_size=0, N=64, K=256
    )  # fmt: skip
    nothing = torch.empty(0, dtype=torch.int32)
    outliers = TileOutliers(start_N1=nothing, by_row_E=nothing, start_T1=nothing, by_sheet_E=nothing)
    exact = replace(plain, exact=True, outliers=outliers)
    ring = cuda_few.Config(ring=True, row_tiles=1, k_warps=2, x_resident=True)
    apart = cuda_wgmma.deepest(replace(exact, group_size=256), cuda_wgmma.Config(tokens=32))
    in_bytes = replace(exact, in_bytes=True)
    beside = cuda_wgmma.deepest(in_bytes, cuda_wgmma.Config(tokens=64, batch=2))
    assert apart is not None and beside is not None
    rounding = Quantizer(dtype=torch.bfloat16, device=torch.device("cuda"), output=ROUNDED, columns=256)
    for source, macros in (
        ("few_ring.cu", cuda_few.defines(exact, ring, 8, torch.bfloat16)),
        ("few_registers.cu", cuda_few.defines(exact, replace(ring, ring=False, x_resident=False), 3, torch.bfloat16)),
        ("wgmma.cu", cuda_wgmma_plan.macros_of(replace(exact, group_size=256), apart, torch.bfloat16)),
        ("wgmma.cu", cuda_wgmma_plan.macros_of(in_bytes, beside, torch.bfloat16, int8=True)),
        ("quantize.cu", rounding_macros(rounding, 256)),
    ):
        assert compiler.compile(source, sources.sources_of(source), macros, (9, 0))[:4] == b"\x7fELF"


def cuts_of(*cuts: tuple[int, ...]) -> list[Config]:
    """Cuts of many tokens: tokens, warpgroups, blocks, resident, share, split and batch of each."""
    names = ("tokens", "warpgroups", "blocks", "resident", "share", "split", "batch")
    return [Config(**dict(zip(names, cut, strict=True))) for cut in cuts]


@pytest.mark.gpu
@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@torch.no_grad()
def test_a_layer_on_a_gpu(grid: IntGrid, dtype: torch.dtype) -> None:
    """Few tokens, many in whole and in ragged tiles, rows that end inside a piece of 16 bytes, long inputs; the same
    bits every time."""
    for N, K, bias in ((203, 584, True), (4096, 1024, False), (48, 9000, False)):
        layer, alone_NK = layer_of(grid, N, K, dtype, bias, "cuda")
        assert layer.kernel_name == "cuda-int8" and layer._laid is not None and set(layer._laid) == set(cuda_added.NAMES)
        w_NK = layer.columns().codes.decode(torch.float64)
        for M in (1, 2, 3, 8, 13, 16, 17, 40, 64, 96, 97, 300, 2048):
            x_MK = torch.randn(M, K, generator=torch.Generator("cuda").manual_seed(M), device="cuda").to(dtype)
            values, scale = quantize_int8(x_MK)
            quiet = (values.double() * scale.double()) @ w_NK.T
            wanted = quiet + x_MK.double() @ alone_NK.T + (0 if layer.bias is None else layer.bias.double())
            found = layer(x_MK)
            error = float((found.double() - wanted).norm())
            assert error <= 6e-3 * float(wanted.norm()) + 1.2e-2 * float(quiet.norm()), (N, M, error / float(wanted.norm()))
            assert all(torch.equal(layer(x_MK), found) for _ in range(3)), M


@pytest.mark.gpu
@torch.no_grad()
def test_every_cut_for_few_tokens() -> None:
    """Inputs of outliers beside those of codes, wherever these are: resident, with stages, by warps, shared, in registers."""
    N, K, grid = 400, 1192, GRIDS[1]
    layer, alone_NK = layer_of(grid, N, K, torch.bfloat16, False, "cuda")
    laid, layout = layer._laid, layer.operands()
    assert laid is not None
    outliers = TileOutliers.given([laid[name] for name in cuda_added.NAMES])
    weight = TileWeight(
        codes=layout["tile_codes"], scale=layout["tile_scale"], zero=None, table=None, pick=None, group_size=128, N=N, K=K,
        outliers=outliers, exact=True,
    )  # fmt: skip
    w_NK = layer.columns().codes.decode(torch.float64)
    for M in (1, 2, 4, 5, 8):
        x_MK, exact_MK = (torch.randn(M, K, generator=torch.Generator().manual_seed(M + i)).bfloat16().cuda() for i in (0, 100))
        wanted_MN = x_MK.double() @ w_NK.T + exact_MK.double() @ alone_NK.T
        for ring, row_tiles, row_warps, k_warps, resident, cluster, share in (
            (True, 1, 1, 2, True, 1, 1),
            (True, 2, 2, 4, False, 1, 1),
            (True, 1, 1, 4, True, 2, 1),
            (True, 2, 1, 4, False, 1, 2),
            (False, 1, 1, 1, False, 1, 1),
            (False, 2, 1, 16, False, 1, 1),
        ):
            config = cuda_few.Config(
                ring=ring, row_tiles=row_tiles, row_warps=row_warps, k_warps=k_warps, x_resident=resident, cluster=cluster,
                share=share, stages=2,
            )  # fmt: skip
            y_MN = torch.full((M, N), float("nan"), device="cuda", dtype=torch.bfloat16)
            cuda_few_plan.Plan(weight, config, M, torch.bfloat16)(x_MK, None, y_MN, exact_MK)
            error = float((y_MN.double() - wanted_MN).norm() / wanted_MN.norm())
            assert error <= 3e-3, (M, config, error)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@torch.no_grad()
def test_cuts_for_many_tokens(dtype: torch.dtype) -> None:
    """Inputs of outliers behind those of codes in every stage, whatever the cut; here they are unrelated."""
    N, K, grid = 400, 1192, GRIDS[1]
    layer, alone_NK = layer_of(grid, N, K, dtype, False, "cuda")
    laid, layout = layer._laid, layer.operands()
    assert laid is not None
    weight = TileWeight(
        codes=layout["tile_codes"], scale=layout["tile_scale"], zero=None, table=None, pick=None, group_size=128, N=N, K=K,
        outliers=TileOutliers.given([laid[name] for name in cuda_added.NAMES]), exact=True,
    )  # fmt: skip
    w_NK = layer.columns().codes.decode(torch.float64)
    for M in (9, 40, 200):
        x_MK, exact_MK = (torch.randn(M, K, generator=torch.Generator().manual_seed(M + i)).to(dtype).cuda() for i in (0, 100))
        wanted_MN = x_MK.double() @ w_NK.T + exact_MK.double() @ alone_NK.T
        for cut in cuts_of(
            (16, 2, 1, 1, 1, 1, 4),
            (32, 3, 1, 1, 1, 2, 2),
            (64, 2, 2, 1, 1, 3, 2),
            (32, 2, 1, 2, 1, 1, 2),
            (32, 4, 1, 1, 1, 1, 2),
            (64, 2, 1, 1, 2, 1, 4),
            (32, 2, 1, 1, 1, 1, 8),
            (128, 2, 1, 1, 1, 1, 4),
        ):
            config = cuda_wgmma.deepest(weight, cut)
            assert config is not None, cut
            y_MN = torch.full((M, N), float("nan"), device="cuda", dtype=dtype)
            plan = cuda_wgmma_plan.Plan(weight, config, M, dtype)
            plan(x_MK, None, y_MN, exact_MK)
            error = float((y_MN.double() - wanted_MN).norm() / wanted_MN.norm())
            assert error <= 3e-3, (M, config, error)
            again_MN = torch.empty_like(y_MN)
            plan(x_MK, None, again_MN, exact_MK)
            assert torch.equal(y_MN, again_MN), (M, config)


@pytest.mark.gpu
@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@torch.no_grad()
def test_cuts_in_bytes(grid: IntGrid, dtype: torch.dtype) -> None:
    """Codes multiplied as bytes and sheets of outliers in 16 bits, whatever the cut; their inputs are unrelated."""
    N, K = 400, 1192
    layer, alone_NK = layer_of(grid, N, K, dtype, True, "cuda")
    laid, layout = layer._laid, layer.operands()
    assert laid is not None and layer.bias is not None
    weight = TileWeight(
        codes=layout["tile_codes"], scale=layout["tile_scale"], zero=None, table=None, pick=None,
        group_size=grid.group_size or 0, N=N, K=K, exact=True, in_bytes=True,
        outliers=TileOutliers.given([laid[name] for name in cuda_added.NAMES]),
    )  # fmt: skip
    weight.check()
    r = cuda_int8.row_scale(weight)
    w_NK = cuda_int8.two_step(weight, r).double() * r[:N, None].double()
    rounding = Quantizer(dtype=dtype, device=alone_NK.device, output=INT8, columns=128 * weight.codes.shape[1], permuted=True)
    for M in (9, 40, 200):
        x_MK, exact_MK = (torch.randn(M, K, generator=torch.Generator().manual_seed(M + i)).to(dtype).cuda() for i in (0, 100))
        values, scale = quantize_int8(x_MK)
        wanted_MN = (values.double() * scale.double()) @ w_NK.T + exact_MK.double() @ alone_NK.T + layer.bias.double()
        for cut in cuts_of(
            (16, 2, 1, 1, 1, 1, 2),
            (16, 2, 2, 1, 1, 3, 4),
            (32, 1, 1, 2, 1, 4, 2),
            (64, 2, 1, 1, 2, 2, 2),
            (64, 2, 1, 1, 1, 1, 4),
            (128, 1, 1, 1, 1, 1, 2),
            (128, 2, 1, 1, 1, 1, 2),
        ):
            config = cuda_wgmma.deepest(weight, cut)
            assert config is not None
            plan = cuda_wgmma_plan.Plan(weight, config, M, dtype, row_scale=r)
            codes, scale_M = rounding(x_MK)
            found = [torch.full((M, N), float("nan"), device="cuda", dtype=dtype) for _ in range(2)]
            for y_MN in found:
                plan.launch(codes, scale_M, layer.bias, y_MN, chosen=cuda_wgmma_plan.in_pieces(exact_MK))
            error = float((found[0].double() - wanted_MN).norm() / wanted_MN.norm())
            assert error <= 3e-3, (M, config, error)
            assert torch.equal(*found), (M, config)


@pytest.mark.gpu
@torch.no_grad()
def test_runs_of_rows_with_cuts_of_their_own() -> None:
    """Rows that fill whole rounds of the device and the rest, codes as bytes: each run finds its scales, outliers and bias."""
    N, K, M, grid = 400, 1192, 50, GRIDS[0]
    layer, alone_NK = layer_of(grid, N, K, torch.bfloat16, True, "cuda")
    laid, layout = layer._laid, layer.operands()
    assert laid is not None and layer.bias is not None
    weight = TileWeight(
        codes=layout["tile_codes"], scale=layout["tile_scale"], zero=None, table=None, pick=None, group_size=0, N=N, K=K,
        exact=True, in_bytes=True, outliers=TileOutliers.given([laid[name] for name in cuda_added.NAMES]),
    )  # fmt: skip
    r = cuda_int8.row_scale(weight)
    first, rest = (cuda_wgmma.deepest(weight, cut) for cut in cuts_of((64, 2, 1, 1, 2, 1, 2), (64, 2, 1, 1, 1, 2, 2)))
    assert first is not None and rest is not None
    plan = cuda_wgmma_plan.Parts(weight, [(256, first), (144, rest)], M, torch.bfloat16, row_scale=r)
    x_MK = torch.randn(M, K, generator=torch.Generator().manual_seed(M)).bfloat16().cuda()
    rounding = Quantizer(dtype=x_MK.dtype, device=x_MK.device, output=INT8, columns=1280, permuted=True)
    y_MN = torch.full((M, N), float("nan"), device="cuda", dtype=torch.bfloat16)
    plan.launch(*rounding(x_MK), layer.bias, y_MN, chosen=cuda_wgmma_plan.in_pieces(x_MK))
    values, scale = quantize_int8(x_MK)
    wanted_MN = (values.double() * scale.double()) @ layer.columns().codes.decode(torch.float64).T
    wanted_MN += x_MK.double() @ alone_NK.T + layer.bias.double()
    for rows in (slice(0, 256), slice(256, N)):
        assert float((y_MN[:, rows].double() - wanted_MN[:, rows]).norm() / wanted_MN[:, rows].norm()) <= 3e-3


@pytest.mark.gpu
@pytest.mark.parametrize("M", [4, 40, 300])
@torch.no_grad()
def test_overlapping_replays_of_a_graph(M: int) -> None:
    """Rounding, outliers and matmul begin before what is in front of them has ended; inputs change with every replay."""
    N, K = 2048, 4096
    layer, _ = layer_of(GRIDS[0], N, K, torch.bfloat16, False, "cuda")
    inputs = [torch.randn(M, K, generator=torch.Generator("cuda").manual_seed(i), device="cuda").bfloat16() for i in range(6)]
    held = torch.empty_like(inputs[0])

    def steps() -> Tensor:
        found = layer(held * 2)
        for _ in range(8):
            found = layer((held * 2).add_(found.mean() * 0))
        return found

    wanted = []
    for x_MK in inputs:
        held.copy_(x_MK)
        wanted.append(steps().clone())
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = steps()
    for _ in range(20):
        for x_MK, one in zip(inputs, wanted, strict=True):
            held.copy_(x_MK)
            graph.replay()
            assert torch.equal(out, one)
