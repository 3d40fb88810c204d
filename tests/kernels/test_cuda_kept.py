"""Columns that are kept beside integers whose inputs are rounded to bytes, on the CUDA kernels."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from aerogel.kernels.cuda import nvrtc, sources
from aerogel.kernels.gemm import cuda_wgmma_plan
from aerogel.kernels.gemm.cuda_few import Config
from aerogel.kernels.gemm.cuda_few_plan import Plan
from aerogel.kernels.gemm.cuda_int8 import CUTS, cut, row_scale
from aerogel.kernels.gemm.cuda_kept import KEPT, KeptColumns, fragments_of
from aerogel.kernels.gemm.cuda_quantize import INT8, ROUNDED, Quantizer
from aerogel.kernels.gemm.cuda_quantize import macros as rounding_macros
from aerogel.kernels.gemm.cuda_weight import TileWeight, tensors_of
from aerogel.kernels.gemm.cuda_wgmma import Config as Cut
from aerogel.kernels.gemm.cuda_wgmma import deepest, defines
from aerogel.kernels.gemm.ref import quantize_int8
from aerogel.kernels.sidecars import SidecarLinear
from aerogel.quantize.codes import Codes, quantized
from aerogel.quantize.columns import Columns
from aerogel.quantize.grids import IntGrid

GRIDS = [
    IntGrid(bits=8, scale_dtype=torch.bfloat16),
    IntGrid(bits=4, group_size=32, symmetric=False),
    IntGrid(bits=4, group_size=128, scale_dtype=torch.bfloat16),
]


def test_fragments_are_left_factors() -> None:
    kept_NC = torch.randn(20, 19, generator=torch.Generator().manual_seed(0)).bfloat16()
    found = fragments_of(kept_NC)
    assert found.shape == (2, 2, 32, 8)
    for R, step, lane, register, half in (
        (0, 0, 0, 0, 0),
        (0, 1, 5, 0, 1),
        (1, 0, 13, 2, 1),
        (0, 1, 2, 3, 0),
        (1, 1, 31, 3, 1),
    ):
        row, column = 16 * R + lane // 4 + 8 * (register % 2), 16 * step + 2 * (lane % 4) + 8 * (register // 2) + half
        wanted = kept_NC[row, column] if row < 20 and column < 19 else torch.zeros(())
        assert found[R, step, lane, 2 * register + half] == wanted


def test_the_mask_has_a_bit_for_each_column() -> None:
    kept = KeptColumns.of(torch.tensor([0, 15, 16, 47]), 64)
    assert [int(word) & 0xFFFF for word in kept.mask] == [0x8001, 1, 0x8000, 0] and kept.columns == 16


@pytest.mark.parametrize("output", [INT8, ROUNDED])
def test_the_sources_compile(output: int) -> None:
    try:
        compiler = nvrtc.compiler()
    except ImportError as error:
        pytest.skip(str(error))
    how = Quantizer(
        dtype=torch.float16, device=torch.device("cuda"), output=output, columns=96, permuted=output == INT8, keeps=True
    )
    macros = rounding_macros(how, 96)
    assert compiler.compile("quantize.cu", sources.sources_of("quantize.cu"), macros, (9, 0))[:4] == b"\x7fELF"
    codes = weight_of(GRIDS[0], 64, 256)
    layout: Any = tensors_of(codes)
    weight = TileWeight(
        codes=layout["tile_codes"], scale=layout["tile_scale"], zero=None, table=None, pick=None, group_size=0, N=64, K=256
    )
    config = cut(weight, *CUTS[0])
    assert config is not None
    macros = defines(weight, config, torch.bfloat16) | {"INT8": 1, "EXPERTS": 0, "KEPT": 1}
    assert compiler.compile("wgmma.cu", sources.sources_of("wgmma.cu"), macros, (9, 0))[:4] == b"\x7fELF"


def test_a_map_is_of_a_width_not_only_of_a_place(monkeypatch: pytest.MonkeyPatch) -> None:
    """Inputs and those of kept columns come to lie where the other ones were."""
    made: list[Any] = []
    monkeypatch.setattr(cuda_wgmma_plan, "Matrix", lambda **given: SimpleNamespace(encode=lambda: made.append(given) or b"map"))
    plan = object.__new__(cuda_wgmma_plan.Plan)
    plan.config, plan._maps = cut_of(64), {}
    place = torch.zeros(64 * 256, dtype=torch.float16)
    for columns in (256, 32, 256, 32):
        plan._map_of(place[: 64 * columns].reshape(64, columns), "float16")
    assert [given["columns"] for given in made] == [256, 32]


def cut_of(tokens: int) -> Any:
    """As far as a map of inputs depends on a cut."""
    return SimpleNamespace(tokens=tokens, share=1)


def weight_of(grid: IntGrid, N: int, K: int, kept: Tensor | None = None) -> Codes:
    """Random codes, which decode to 0 in the kept columns."""
    w_NK = torch.randn(N, K, generator=torch.Generator().manual_seed(N))
    if kept is not None:
        w_NK[:, kept] = 0
    return quantized(grid, w_NK, grid.fit(w_NK))


def layer_of(grid: IntGrid, N: int, K: int, dtype: torch.dtype, kept: Tensor, bias: bool) -> SidecarLinear:
    """On the GPU."""
    random = torch.Generator().manual_seed(1)
    bias_N = torch.randn(N, generator=random) if bias else None
    layer = SidecarLinear.from_codes(weight_of(grid, N, K, kept), activations="int8", bias=bias_N, dtype=dtype).cuda()
    layer.keep(
        {name: tensor.cuda() for name, tensor in Columns.of(torch.randn(N, K, generator=random), kept).tensors().items()}
    )
    return layer


def wanted_of(layer: SidecarLinear, x_MK: Tensor, kept: Tensor) -> Tensor:
    """The rounded product and the exact one, in float64."""
    quiet_MK = x_MK.index_fill(1, kept.cuda(), 0)
    values, scale = quantize_int8(quiet_MK)
    codes_NK = layer.columns().codes.decode(torch.float64)
    value_NC = layer.weight_columns.value_NC.double()
    rest = 0 if layer.bias is None else layer.bias.double()
    return (values.double() * scale.double()) @ codes_NK.T + x_MK[:, kept.cuda()].double() @ value_NC.T + rest


@pytest.mark.gpu
@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@torch.no_grad()
def test_a_layer_on_a_gpu(grid: IntGrid, dtype: torch.dtype) -> None:
    """Loud inputs in the kept columns; few tokens, many in whole and in ragged tiles; the same bits every time."""
    for N, K, bias in ((200, 584, True), (4096, 1024, False)):
        kept = torch.randperm(K, generator=torch.Generator().manual_seed(2))[:19].sort().values
        layer = layer_of(grid, N, K, dtype, kept, bias)
        assert layer.kernel_name == "cuda-int8" and layer._laid is not None and set(KEPT) <= set(layer._laid)
        for M in (1, 3, 13, 16, 17, 40, 64, 96, 97, 300, 2048):
            x_MK = torch.randn(M, K, generator=torch.Generator("cuda").manual_seed(M), device="cuda")
            x_MK[:, kept.cuda()] *= 50
            x_MK = x_MK.to(dtype)
            found, wanted = layer(x_MK), wanted_of(layer, x_MK, kept)
            # Loud inputs stand for most of the output, so that the bound on the rest is taken without them.
            quiet = wanted - x_MK[:, kept.cuda()].double() @ layer.weight_columns.value_NC.double().T
            error = float((found.double() - wanted).norm())
            assert error <= 4e-3 * float(wanted.norm()) + 1.2e-2 * float(quiet.norm()), (M, error)
            assert all(torch.equal(layer(x_MK), found) for _ in range(3)), M


@pytest.mark.gpu
def test_blocks_that_share_columns() -> None:
    """Of blocks that share the columns of codes the first adds the kept ones; what they send each other are floats by then."""
    N, K, M = 400, 1192, 70
    codes = weight_of(GRIDS[0], N, K)
    layout = {name: tensor.cuda() for name, tensor in tensors_of(codes).items()}
    kept_NC = torch.randn(N, 40, generator=torch.Generator().manual_seed(0)).bfloat16()
    weight = TileWeight(
        codes=layout["tile_codes"], scale=layout["tile_scale"], zero=None, table=None, pick=None, group_size=0, N=N, K=K,
    )  # fmt: skip
    x_MK, x_MC = (torch.randn(M, columns).bfloat16().cuda() for columns in (K, 48))
    values, scale = quantize_int8(x_MK)
    wanted_MN = (values.double() * scale.double()) @ codes.decode(torch.float64).cuda().T
    wanted_MN += x_MC[:, :40].double() @ kept_NC.double().cuda().T
    rounding = Quantizer(dtype=torch.bfloat16, device=x_MK.device, output=INT8, columns=1280, permuted=True)
    for tokens, split in ((64, 1), (64, 3), (96, 4)):
        config = deepest(weight, Cut(tokens=tokens, split=split, batch=2))
        assert config is not None
        fragments, r = fragments_of(kept_NC).cuda(), row_scale(weight)
        plan = cuda_wgmma_plan.Plan(weight, config, M, torch.bfloat16, row_scale=r, kept=fragments)
        y_MN = torch.full((M, N), float("nan"), device="cuda", dtype=torch.bfloat16)
        plan.launch(*rounding(x_MK), None, y_MN, chosen=x_MC)
        error = float((y_MN.double() - wanted_MN).norm() / wanted_MN.norm())
        assert error <= 3e-3, (config, error)


@pytest.mark.gpu
def test_every_cut_for_few_tokens() -> None:
    """Fewer and more warps along K than there are steps of kept columns, blocks that split K, blocks that share x."""
    N, K, grid = 400, 1192, GRIDS[2]
    codes = weight_of(grid, N, K)
    layout = {name: tensor.cuda() for name, tensor in tensors_of(codes).items()}
    kept_NC = torch.randn(N, 40, generator=torch.Generator().manual_seed(0)).bfloat16()
    weight = TileWeight(
        codes=layout["tile_codes"], scale=layout["tile_scale"], zero=None, table=None, pick=None, group_size=128, N=N, K=K,
        kept=fragments_of(kept_NC).cuda(),
    )  # fmt: skip
    weight.check()
    w_NK = codes.decode(torch.float64)
    for M in (1, 8, 16):
        random = torch.Generator().manual_seed(M)
        x_MK, x_MC = (torch.randn(M, columns, generator=random).bfloat16() for columns in (K, 48))
        wanted_MN = x_MK.double() @ w_NK.T + x_MC[:, :40].double() @ kept_NC.double().T
        for ring, row_tiles, row_warps, k_warps, resident, cluster, share in (
            (True, 1, 1, 2, True, 1, 1),
            (True, 2, 2, 4, False, 1, 1),
            (True, 1, 1, 4, True, 2, 1),
            (True, 2, 1, 4, False, 1, 2),
            (False, 1, 1, 1, False, 1, 1),
            (False, 2, 1, 16, False, 1, 1),
        ):
            config = Config(
                ring=ring, row_tiles=row_tiles, row_warps=row_warps, k_warps=k_warps, x_resident=resident, cluster=cluster,
                share=share, stages=2,
            )  # fmt: skip
            y_MN = torch.full((M, N), float("nan"), device="cuda", dtype=torch.bfloat16)
            plan = Plan(weight, config, M, torch.bfloat16)
            plan(x_MK.cuda(), None, y_MN, x_MC.cuda())
            error = float((y_MN.double().cpu() - wanted_MN).norm() / wanted_MN.norm())
            assert error <= 3e-3, (M, config, error)


@pytest.mark.gpu
def test_rounding_leaves_kept_columns_alone() -> None:
    for dtype in (torch.bfloat16, torch.float16):
        x_MK = torch.randn(5, 5000, device="cuda").to(dtype)
        index = torch.tensor([0, 17, 4095, 4096, 4999], device="cuda")
        x_MK[:, index] *= 100
        kept = KeptColumns.of(index, 5008)
        quiet_MK = x_MK.index_fill(1, index, 0)
        for output in (INT8, ROUNDED):
            how: Any = {"dtype": dtype, "device": x_MK.device, "output": output, "columns": 5008}
            chosen = torch.full((5, kept.columns), float("nan"), device="cuda", dtype=dtype)
            found, scale = Quantizer(**how, keeps=True)(x_MK, None, kept, chosen)
            plain, plain_scale = Quantizer(**how)(quiet_MK)
            if output == ROUNDED:
                plain[:, index] = x_MK[:, index]
            assert torch.equal(found, plain) and torch.equal(scale, plain_scale)
            assert torch.equal(chosen[:, :5], x_MK[:, index]) and not chosen[:, 5:].any()
