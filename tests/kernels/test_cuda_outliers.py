"""Outliers in the orders of the CUDA kernels are the outliers, and on a GPU a product with the whole weight."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from aerogel.errors import BadInput
from aerogel.kernels.beside.ref import Beside
from aerogel.kernels.cuda import nvrtc, sources
from aerogel.kernels.gemm import cuda
from aerogel.kernels.gemm.block_scales import BYTES, UE5M3
from aerogel.kernels.gemm.cuda import Cuda, tile_weight
from aerogel.kernels.gemm.cuda_dense import Dense, dequantize
from aerogel.kernels.gemm.cuda_few import (
    Config,
    Few,
    defines,
    fits,
    grid_of,
    shared_bytes,
    shares_inputs,
    trades,
)
from aerogel.kernels.gemm.cuda_few_plan import Plan
from aerogel.kernels.gemm.cuda_outliers import LEAST, LINE, NAMES, TileOutliers
from aerogel.kernels.gemm.cuda_ranked import SPILLED_BYTES
from aerogel.kernels.gemm.cuda_wgmma import Config as ManyConfig
from aerogel.kernels.gemm.cuda_wgmma import candidates, deepest
from aerogel.kernels.gemm.cuda_wgmma import defines as many_defines
from aerogel.kernels.gemm.cuda_wgmma_plan import Plan as ManyPlan
from aerogel.kernels.gemm.cuda_wgmma_plan import macros_of
from aerogel.kernels.linear import Linear
from aerogel.kernels.problem import Problem
from aerogel.kernels.sidecars import SidecarLinear
from aerogel.pack import tiles
from aerogel.quantize.codes import quantized
from aerogel.quantize.columns import Columns
from aerogel.quantize.formats.mx import Mx
from aerogel.quantize.formats.nf4 import Nf4
from aerogel.quantize.formats.nvfp4 import Nvfp4
from aerogel.quantize.grids import IntGrid
from aerogel.quantize.outliers import Outliers
from aerogel.quantize.planes import PlaneGrid

INT4 = IntGrid(bits=4, group_size=32, scale_dtype=torch.bfloat16)
GRIDS: list[Any] = [
    INT4,
    IntGrid(bits=4, symmetric=False),
    IntGrid(bits=1 + 2, group_size=128, scale_dtype=torch.float16),
    IntGrid(bits=8, scale_dtype=torch.bfloat16),
    IntGrid(bits=2, group_size=64),
    IntGrid(bits=4, group_size=72),
    Nf4(group_size=64),
    Nf4(group_size=32, scale_dtype=torch.float8_e4m3fn),
    Mx(),
    Mx(kind="e4m3"),
    Nvfp4(),
    Nvfp4(scale_dtype=UE5M3),
    PlaneGrid(bits=1, group_size=64),
    PlaneGrid(bits=3, group_size=40, offset="scale"),
]


def beside_of(N: int, K: int, share: float = 0.02, device: str = "cpu", kinds: str = "oc") -> Beside:
    """Random outliers: one row without any, one row and the first tile with all; and columns, the first and the last among
    them, which outliers may share a place with."""
    random = torch.Generator().manual_seed(N + K)
    w_NK = torch.randn(N, K, generator=random).bfloat16()
    mask_NK = torch.rand(N, K, generator=random) < share
    mask_NK[:16, :128] = True
    mask_NK[0] = False
    mask_NK[-1] = True
    outliers, columns = Outliers.of(w_NK, mask_NK), Columns.of(w_NK, torch.tensor(sorted({0, K // 2, K - 1})))
    first = (outliers.start_N1, outliers.column_E, outliers.value_E) if "o" in kinds else (None, None, None)
    last = (columns.index_C, columns.value_NC) if "c" in kinds else (None, None)
    return Beside(*(None if tensor is None else tensor.to(device) for tensor in (*first, *last)))


def dense_of(beside: Beside, N: int, K: int) -> Tensor:
    """What stands there as a dense matrix, float64 [N, K]."""
    dense_NK = torch.zeros(N, K, dtype=torch.float64)
    if beside.start_N1 is not None and beside.column_E is not None and beside.value_E is not None:
        for n in range(N):
            e = slice(int(beside.start_N1[n]), int(beside.start_N1[n + 1]))
            dense_NK[n, beside.column_E[e].long()] += beside.value_E[e].double()
    if beside.index_C is not None and beside.kept_NC is not None:
        dense_NK[:, beside.index_C.long()] += beside.kept_NC.double()
    return dense_NK


def by_rows(laid: TileOutliers, N: int, K: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """What the quads of the rows hold, where they fill up with nothing behind the last k tile: [N, K] in `dtype`."""
    C, start_N1, quads = tiles.tile_counts(N, K)[1], laid.start_N1.long(), laid.by_row_E.reshape(-1, 4)
    assert start_N1[0] == 0 and start_N1[-1] == len(quads)
    dense = torch.zeros(N, C * 128 + 1, dtype=dtype)
    for n in range(N):
        run = quads[start_N1[n] : start_N1[n + 1]].flatten()
        column, value = run & 0xFFFF, (run >> 16).short().view(dtype)
        here = column < C * 128
        assert len(column[here].unique()) == here.sum()
        assert (~here).sum() < 4 and (value[~here] == 0).all() and (column[~here] == C * 128).all()
        dense[n, column] = value
    assert not dense[:, K:].any()
    return dense[:, :K]


def by_sheets(laid: TileOutliers, N: int, K: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """What the words of the sheets hold, whose places are those of the same numbers in fragments: [N, K] in `dtype`."""
    C = tiles.tile_counts(N, K)[1]
    T = -(-N // 64) * C
    flat = torch.zeros(T, 2, 4096, dtype=dtype)
    for pair in range(T):
        words = laid.by_sheet_E[laid.start_T1[pair] : laid.start_T1[pair + 1]].long() & 0xFFFFFFFF
        sheet = words >> 16 & 7
        assert (sheet // 2 == pair % 4).all() and (sheet.diff() >= 0).all() and (sheet.bincount()[-2:] >= LEAST).all()
        place = (sheet % 2, words >> 20)
        assert len(torch.stack(place).unique(dim=1)[0]) == len(words) and (words >> 19 & 1 == 0).all()
        flat[pair][place] = (words & 0xFFFF).int().short().view(dtype)
    beyond = laid.by_sheet_E[laid.start_T1[-1] :]
    assert len(beyond) == 2 * LINE and (beyond == T % 4 * 2 << 16).all()
    h, r, s, g, t, i1, i0, e = (2, 4, 4, 8, 4, 2, 2, 2)
    back = flat.reshape(-1, C, h, r, s, g, t, i1, i0, e).permute(0, 3, 8, 5, 1, 2, 4, 7, 6, 9).reshape(-1, C * 128)
    assert not back[N:].any() and not back[:, K:].any()
    return back[:N, :K]


@pytest.mark.parametrize("kinds", ["o", "c", "oc"])
@pytest.mark.parametrize("shape", [(1, 8), (33, 300), (48, 128)])
def test_both_orders_are_the_outliers(shape: tuple[int, int], kinds: str) -> None:
    N, K = shape
    beside = beside_of(N, K, kinds=kinds)
    place_K = torch.randperm(K, generator=torch.Generator().manual_seed(0))
    for place in (None, place_K):
        laid = TileOutliers.of(beside, N, K, torch.bfloat16, place)
        assert laid is not None
        wanted_NK = dense_of(beside, N, K).float().bfloat16()
        wanted_NK = wanted_NK if place is None else wanted_NK[:, place.argsort()]
        assert torch.equal(by_rows(laid, N, K), wanted_NK)
        assert torch.equal(by_sheets(laid, N, K), wanted_NK)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("grid", [Nf4(group_size=32, scale_dtype=torch.float8_e4m3fn), Mx(), Nvfp4()], ids=str)
def test_beside_scales_of_a_byte_outliers_stand_in_the_unit_of_the_sums(grid: Any, dtype: torch.dtype) -> None:
    """Sheets are added to codes that nothing has multiplied with the weight's factor yet, sums of rows to outputs."""
    N, K, beside = 48, 128, beside_of(48, 128)
    layer = layer_of(grid, N, K, dtype, "cpu", False, False, "")
    problem = replace(layer.problem(), device="cuda")
    layout = laid_out(layer, beside, problem)
    laid, weight = TileOutliers.among(layout), tile_weight(layout, problem)
    assert laid is not None and weight.scale.dtype in BYTES
    weight.check()
    factor = 1.0 if weight.factor is None else float(weight.factor)
    unit = factor * (256.0 if weight.floats and (dtype == torch.bfloat16 or isinstance(grid, Nvfp4)) else 1.0)
    wanted_NK = dense_of(beside, N, K).float()
    assert torch.equal(by_rows(laid, N, K, dtype), wanted_NK.to(dtype))
    assert torch.equal(by_sheets(laid, N, K, dtype), (wanted_NK / unit).to(dtype))
    assert unit != 1.0 or (isinstance(grid, Mx) and dtype == torch.float16)


def test_what_does_not_fit_is_left_to_others() -> None:
    huge = replace(beside_of(4, 16), value_E=None, start_N1=None, column_E=None)
    assert huge.kept_NC is not None
    huge = replace(huge, kept_NC=torch.full_like(huge.kept_NC, 1e30))
    assert TileOutliers.of(huge, 4, 16, torch.float16) is None and TileOutliers.of(huge, 4, 16, torch.bfloat16) is not None
    assert TileOutliers.of(beside_of(4, 16), 4, 1 << 17, torch.bfloat16) is None


def layer_of(grid: Any, N: int, K: int, dtype: torch.dtype, device: str, bias: bool, order: bool, kinds: str) -> SidecarLinear:
    """A layer with outliers and columns on random codes."""
    random = torch.Generator().manual_seed(3)
    w_NK = torch.randn(N, K, generator=random)
    codes = quantized(grid, w_NK, grid.fit(w_NK))
    layer = SidecarLinear.from_codes(
        codes,
        bias=torch.randn(N, generator=random) if bias else None,
        order=torch.randperm(K, generator=random) if order else None,
        dtype=dtype,
    ).to(device)
    beside = beside_of(N, K, device=device, kinds=kinds)
    if beside.start_N1 is not None:
        layer.keep(Outliers(start_N1=beside.start_N1, column_E=beside.column_E, value_E=beside.value_E).tensors())  # type: ignore[arg-type]
    if beside.index_C is not None:
        threshold = torch.zeros(1, device=device)
        layer.keep(Columns(index_C=beside.index_C, value_NC=beside.kept_NC, threshold_1=threshold).tensors())  # type: ignore[arg-type]
    return layer


def laid_out(layer: SidecarLinear, beside: Beside, problem: Problem) -> dict[str, Tensor]:
    """The layer's codes in the kernels' layout, with what stands beside them."""
    layout = Cuda.pack(layer.columns().codes, problem)
    return layout | (Cuda.lay_beside(beside, layout, problem) or {})


def wanted_of(layer: SidecarLinear, x_MK: Tensor, kinds: str) -> tuple[Tensor, float]:
    """x times codes plus what stands beside them, in float64, and its norm if no products had cancelled."""
    N, K = layer.out_features, layer.in_features
    columns = layer.columns()
    codes_NK = columns.codes.decode(torch.float64).cpu()
    if columns.order is not None:
        codes_NK = codes_NK[:, columns.order.cpu().argsort()]
    w_NK = codes_NK + dense_of(beside_of(N, K, kinds=kinds), N, K)
    bias_N = torch.zeros(N, dtype=torch.float64) if layer.bias is None else layer.bias.detach().double().cpu()
    x_MK = x_MK.double().cpu()
    return x_MK @ w_NK.T + bias_N, float((x_MK.square() @ w_NK.T.square() + bias_N.square()).sqrt().norm())


def close(found_MN: Tensor, wanted: tuple[Tensor, float]) -> None:
    error = float((found_MN.detach().double().cpu() - wanted[0]).norm()) / wanted[1]
    assert error <= (6e-3 if found_MN.dtype == torch.bfloat16 else 1e-3), error


def sources_compile(name: str, macros: dict[str, int], capability: tuple[int, int] = (9, 0)) -> None:
    try:
        compiler = nvrtc.compiler()
    except ImportError as error:
        pytest.skip(str(error))
    assert compiler.compile(name, sources.sources_of(name), macros, capability)[:4] == b"\x7fELF"


@pytest.mark.parametrize("grid", [INT4, Nvfp4()], ids=str)
def test_the_sources_compile(grid: Any) -> None:
    layer = layer_of(grid, 64, 256, torch.bfloat16, "cpu", False, False, "oc")
    problem = replace(layer.problem(), device="cuda")
    layout = laid_out(layer, beside_of(64, 256), problem)
    assert set(NAMES) <= set(layout)
    weight = tile_weight(layout, problem)
    weight.check()
    for M, config in (
        (1, Config(ring=True, row_tiles=2, k_warps=8)),
        (3, Config(ring=False, row_tiles=1, k_warps=4)),
        (16, Config(ring=True, row_tiles=2, k_warps=8, x_resident=True, share=2)),
    ):
        sources_compile(f"{config.kernel}.cu", defines(weight, config, M, torch.bfloat16))
        assert shared_bytes(weight, config, M, grid_of(weight, config, 132)) > 256 * 2
    sources_compile("wgmma.cu", many_defines(weight, candidates(weight, 16)[0], torch.float16))


def test_rows_are_cut_where_units_begin() -> None:
    laid = TileOutliers.of(beside_of(200, 300), 200, 300, torch.bfloat16)
    assert laid is not None
    part = laid.rows(64, 200, 3)
    assert torch.equal(part.start_T1, laid.start_T1[3:])
    with pytest.raises(BadInput, match="multiples of 64"):
        laid.rows(80, 200, 3)


def test_a_plan_is_found_by_where_all_outliers_lie(monkeypatch: pytest.MonkeyPatch) -> None:
    """A plan knows addresses, so lists in a new place need a new one, whichever of them has moved."""
    planned: list[object] = []

    def plan(weight: Any, x: Tensor, key: tuple[object, ...]) -> Any:
        planned.append(key)
        return cuda._plans.setdefault(key, lambda x, bias, y: y.zero_())

    monkeypatch.setattr(cuda, "_plans", {})
    monkeypatch.setattr(cuda, "_plan", plan)
    monkeypatch.setattr(torch._C, "_cuda_getDevice", lambda: -1, raising=False)
    codes, scale = torch.zeros(3, 2, 1024, dtype=torch.uint8), torch.ones(3, 8, 16, dtype=torch.bfloat16)
    laid = TileOutliers.of(beside_of(40, 256), 40, 256, torch.bfloat16)
    assert laid is not None
    tensors, x_MK = laid.tensors(), torch.zeros(2, 256, dtype=torch.bfloat16)
    for moved in range(-1, len(tensors)):
        given = [tensor.clone() if which == moved else tensor for which, tensor in enumerate(tensors)]
        for _ in range(2):
            cuda.tiles_linear(x_MK, codes, scale, None, None, None, None, 32, 40, outliers=given)
        assert len(planned) == len(set(planned)) == moved + 2


@pytest.mark.gpu
@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kinds", ["oc"])
def test_a_layer_on_a_gpu(grid: Any, dtype: torch.dtype, kinds: str) -> None:
    """Sizes that fill no tile, every kernel that adds outliers, the same bits again and again."""
    for N, K, bias, order in ((1, 24, True, False), (200, 584, False, True)):
        layer = layer_of(grid, N, K, dtype, "cuda", bias, order, kinds)
        assert layer._laid is not None, layer.kernel_name
        for M in (1, 3, 5, 8, 16, 40, 700):
            x_MK = torch.randn(M, K, generator=torch.Generator("cuda").manual_seed(M), device="cuda").to(dtype)
            found = layer(x_MK)
            close(found, wanted_of(layer, x_MK, kinds))
            assert all(torch.equal(layer(x_MK), found) for _ in range(4)), M


@pytest.mark.gpu
def test_kept_columns_alone_and_compiled() -> None:
    layer = layer_of(INT4, 72, 200, torch.bfloat16, "cuda", True, False, "c")
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    for M in (1, 40):
        x_MK = torch.randn(M, 200, device="cuda").bfloat16()
        close(layer(x_MK), wanted_of(layer, x_MK, "c"))
        assert torch.equal(compiled(x_MK), layer(x_MK))


@pytest.mark.gpu
def test_beside_rounded_inputs() -> None:
    """Outliers meet inputs as they are, beside a product that rounds them."""
    N, K = 72, 200
    w_NK = torch.randn(N, K, generator=torch.Generator().manual_seed(1))
    codes = quantized(IntGrid(bits=8), w_NK, IntGrid(bits=8).fit(w_NK))
    plain = Linear.from_codes(codes, activations="int8", dtype=torch.bfloat16).cuda()
    layer = SidecarLinear.from_codes(codes, activations="int8", dtype=torch.bfloat16).cuda()
    beside = beside_of(N, K, device="cuda", kinds="o")
    layer.keep(Outliers(start_N1=beside.start_N1, column_E=beside.column_E, value_E=beside.value_E).tensors())  # type: ignore[arg-type]
    assert layer.kernel_name == "cuda-int8" and layer._laid is not None
    for M in (1, 3, 16, 40):
        x_MK = torch.randn(M, K, generator=torch.Generator("cuda").manual_seed(M), device="cuda").bfloat16()
        added = x_MK.double().cpu() @ dense_of(beside_of(N, K, kinds="o"), N, K).T
        wanted = plain(x_MK).double().cpu() + added
        close(layer(x_MK), (wanted, float(wanted.norm())))


def compiled_ahead(weight: Any, cuts: Sequence[ManyConfig]) -> None:
    """All kernels at once, as a plan wants them."""
    sources.compile_ahead([("wgmma.cu", macros_of(weight, cut, torch.bfloat16)) for cut in cuts], (9, 0))


@pytest.mark.gpu
def test_every_cut_of_the_kernels() -> None:
    """Configurations of both few-token kernels and of the many-token one, and the decoded weight."""
    N, K = 400, 1192
    layer = layer_of(INT4, N, K, torch.bfloat16, "cuda", False, False, "oc")
    weight = tile_weight(layer.operands(), layer.problem())
    few = [
        Config(ring=ring, row_tiles=row_tiles, k_warps=k_warps, x_resident=resident, cluster=cluster, share=share, stages=2)
        for ring, row_tiles, k_warps, resident, cluster, share in (
            (True, 1, 16, True, 1, 1), (True, 7, 4, True, 1, 1), (True, 7, 8, True, 1, 1), (True, 2, 8, False, 1, 1),
            (True, 2, 4, False, 1, 2), (True, 1, 8, True, 2, 1), (False, 1, 16, False, 1, 1), (False, 2, 16, False, 1, 1),
            (False, 3, 8, False, 1, 1), (True, 2, 8, True, 1, 2), (True, 1, 4, True, 1, 1), (True, 3, 2, True, 1, 1),
        )
    ]  # fmt: skip
    for M in (1, 2, 4, 6, 8, 13, 16):
        x_MK = torch.randn(M, K, device="cuda").bfloat16()
        wanted = wanted_of(layer, x_MK, "oc")
        ran = 0
        for config in few:
            if not fits(weight, config, M, torch.cuda.get_device_capability(), 132):
                assert M > 8 and (trades(config, M) or not shares_inputs(weight, config)), config
                continue
            y_MN = torch.full((M, N), float("nan"), device="cuda", dtype=torch.bfloat16)
            Plan(weight, config, M, torch.bfloat16)(x_MK, None, y_MN)
            close(y_MN, wanted)
            ran += 1
        assert ran >= 5
    x_MK = torch.randn(100, K, device="cuda").bfloat16()
    wanted = wanted_of(layer, x_MK, "oc")
    cuts = candidates(weight, 100)[::5]
    compiled_ahead(weight, cuts)
    for many in cuts:
        plan = ManyPlan(weight, many, 100, torch.bfloat16)
        assert plan.function.attribute("local_bytes") <= SPILLED_BYTES, many
        y_MN = torch.full((100, N), float("nan"), device="cuda", dtype=torch.bfloat16)
        plan(x_MK, None, y_MN)
        close(y_MN, wanted)
    assert [Few.refuses(weight, M, torch.bfloat16, (9, 0)) is None for M in (16, 17)] == [True, False]
    y_MN = torch.empty(100, N, device="cuda", dtype=torch.bfloat16)
    Dense.plan(weight, 100, torch.bfloat16)(x_MK, None, y_MN)
    close(y_MN, wanted)
    codes_NK = layer.columns().codes.decode(torch.float64).cpu()
    both_NK = codes_NK + dense_of(beside_of(N, K), N, K)
    close(dequantize(weight, torch.bfloat16), (both_NK, float(both_NK.norm())))


ALL = slice(None)
UNEVEN: dict[str, Any] = {
    "one": (130, 700),
    "columns": (ALL, [5, 6, 700, 1191]),
    "a tile": (slice(48, 64), slice(256, 384)),
    "a unit": (slice(64, 128), slice(1024, 1152)),
    "a row": (399, ALL),
    "a third": (ALL, slice(None, None, 3)),
}
"""Where outliers stand: sheets that are empty, that have more outliers than a warp has lanes, or all in one step."""
MANY = (
    ManyConfig(tokens=16),
    ManyConfig(tokens=32, blocks=2, split=3, w_tiles=2),
    ManyConfig(tokens=64, share=2, split=2, w_tiles=2, batch=8),
    ManyConfig(tokens=48, warpgroups=3, batch=2, split=2),
    ManyConfig(tokens=48, resident=2, batch=2),
    ManyConfig(tokens=128, blocks=2),
    ManyConfig(tokens=256, lead=3, span=1),
    ManyConfig(tokens=256, batch=2, share=2),
)


@pytest.mark.gpu
@pytest.mark.parametrize("where", UNEVEN)
def test_uneven_outliers(where: str) -> None:
    N, K, M = 400, 1192, 70
    random = torch.Generator().manual_seed(5)
    mask_NK = torch.zeros(N, K, dtype=torch.bool)
    mask_NK[UNEVEN[where]] = True
    outliers = Outliers.of(torch.randn(N, K, generator=random).bfloat16(), mask_NK)
    given = (outliers.start_N1, outliers.column_E, outliers.value_E)
    beside = Beside(*(tensor.cuda() for tensor in given), None, None)
    w_NK = torch.randn(N, K, generator=random)
    layer = SidecarLinear.from_codes(quantized(INT4, w_NK, INT4.fit(w_NK)), dtype=torch.bfloat16).cuda()
    problem = layer.problem()
    layout = laid_out(layer, beside, problem)
    weight = tile_weight(layout, problem)
    both_NK = layer.columns().codes.decode(torch.float64).cpu() + dense_of(Beside(*given, None, None), N, K)
    x_MK = torch.randn(M, K, generator=random).bfloat16()
    wanted = (x_MK.double() @ both_NK.T, float((x_MK.double().square() @ both_NK.T.square()).sum().sqrt()))
    close(dequantize(weight, torch.bfloat16), (both_NK, float(both_NK.norm())))
    spoilt_MK = x_MK.clone()
    spoilt_MK[3, 7], spoilt_MK[66, 900] = float("inf"), float("nan")
    cuts = [config for cut in MANY if (config := deepest(weight, cut)) is not None]
    assert len(cuts) == len(MANY)
    compiled_ahead(weight, cuts)
    for config in cuts:
        plan = ManyPlan(weight, config, M, torch.bfloat16)
        found = []
        for given in (x_MK, x_MK, spoilt_MK, x_MK):
            y_MN = torch.full((M, N), float("nan"), device="cuda", dtype=torch.bfloat16)
            plan(given.cuda(), None, y_MN)
            found.append(y_MN)
        close(found[0], wanted)
        assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[3]), config
        rest = [m for m in range(M) if m not in (3, 66)]
        assert torch.equal(found[2][rest], found[0][rest]) and not found[2][[3, 66]].isfinite().any(), config
