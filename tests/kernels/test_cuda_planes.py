"""Bit planes as codes into tables of their groups: the layout is the weight, the decoder finds it, a GPU multiplies with it."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.kernels.test_cuda_sources import needs_nvrtc, permuted
from torch import Tensor

from aerogel.kernels.cuda import nvrtc, sources
from aerogel.kernels.dispatch import choose
from aerogel.kernels.gemm import cuda_few, cuda_table, cuda_tune, cuda_wgmma
from aerogel.kernels.gemm.cuda import tile_weight
from aerogel.kernels.gemm.cuda_dense import Dense, dequantize
from aerogel.kernels.gemm.cuda_plane import CudaPlane
from aerogel.kernels.gemm.cuda_planes import CudaPlanes, _inner, _spread
from aerogel.kernels.gemm.cuda_weight import TileWeight
from aerogel.kernels.gemm.plane_tables import OF_BLOCKS
from aerogel.kernels.problem import Problem
from aerogel.pack import tiles
from aerogel.pack.nibbles import pack_nibbles, unpack_nibbles
from aerogel.quantize.codes import Codes, quantized
from aerogel.quantize.grids import IntGrid
from aerogel.quantize.planes import PlaneGrid

GRIDS = [
    PlaneGrid(bits=1, group_size=64),
    PlaneGrid(bits=1, group_size=32, offset="float32"),
    PlaneGrid(bits=3, group_size=32, offset="scale", scale_dtype=torch.float16),
    PlaneGrid(bits=3, group_size=128, offset="scale", scale_dtype=torch.bfloat16),
    PlaneGrid(bits=2, group_size=128, offset="float32", scale_dtype=torch.bfloat16),
    PlaneGrid(bits=4, group_size=64, offset="scale", scale_dtype=torch.bfloat16),
    PlaneGrid(bits=4, group_size=48, scale_dtype=torch.bfloat16),
    PlaneGrid(bits=2, group_size=16, power_of_two=True, block_rows=8),
    PlaneGrid(bits=3, group_size=8, power_of_two=True, block_rows=128),
    PlaneGrid(bits=4, group_size=8, power_of_two=True, block_rows=16),
    PlaneGrid(bits=2, group_size=8, offset="scale", scale_dtype=torch.bfloat16, block_rows=64),
    PlaneGrid(bits=4, group_size=8, offset="float32", power_of_two=True, block_rows=32),
    PlaneGrid(bits=2, group_size=72, offset="scale", scale_dtype=torch.bfloat16),
    PlaneGrid(bits=6, group_size=40, offset="scale", scale_dtype=torch.bfloat16),
    PlaneGrid(bits=7, group_size=64, scale_dtype=torch.bfloat16),
    PlaneGrid(bits=3),
    PlaneGrid(bits=1),
]
SIGNS = [
    PlaneGrid(bits=1, group_size=16, scale_dtype=torch.float16),
    PlaneGrid(bits=1, group_size=128, scale_dtype=torch.bfloat16),
    PlaneGrid(bits=1, group_size=32, power_of_two=True, block_rows=8),
]


def weight_of(grid: PlaneGrid, N: int, K: int, device: str = "cpu") -> Codes:
    """Random, with a group of zeros and, where there are offsets, a constant one."""
    w_NK = torch.randn(N, K, generator=torch.Generator().manual_seed(0)).to(device) * 0.05
    if K > 64:
        w_NK[0, :64] = 0
        w_NK[min(1, N - 1), :64] = 0.25
    return quantized(grid, w_NK, grid.fit(w_NK, search="mse"))


def problem_of(grid: PlaneGrid, N: int, K: int, dtype: torch.dtype) -> Problem:
    return Problem(format="planes", grid=grid, N=N, K=K, dtype=dtype, device="cuda")


# ---- the layout ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("by_columns", [False, True])
@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_nibbles_are_the_codes(bits: int, by_columns: bool) -> None:
    for N, K in ((5, 33), (70, 200), (16, 128)):
        codes = torch.randint(0, 1 << bits, (N, K), dtype=torch.uint8)
        packed = pack_nibbles(codes, bits, by_columns=by_columns)
        assert packed.shape == (-(-N // 16), -(-K // 128), 256 * bits)
        assert torch.equal(unpack_nibbles(packed, bits, N, K, by_columns=by_columns), codes)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("shape", [(5, 33), (70, 200), (16, 256)])
def test_the_layout_inverts(shape: tuple[int, int], grid: PlaneGrid, dtype: torch.dtype) -> None:
    codes, problem = weight_of(grid, *shape), problem_of(grid, *shape, dtype)
    layout = CudaPlanes.pack(codes, problem)
    tile_weight(layout, _inner(problem)).check()
    back = CudaPlanes.unpack(layout, problem)
    assert torch.equal(back.values_NK, codes.values_NK) and torch.equal(back.scale_NG, codes.scale_NG)
    assert back.scale_NG.dtype == codes.scale_NG.dtype and (back.zero_NG is None) == (codes.zero_NG is None)
    assert codes.zero_NG is None or torch.equal(back.zero_NG, codes.zero_NG)  # type: ignore[arg-type]
    assert torch.equal(back.decode(), codes.decode())


def test_nothing_lies_beside_numbers_that_are_exact() -> None:
    for grid in (
        PlaneGrid(bits=4, group_size=64, offset="scale", scale_dtype=torch.bfloat16),
        PlaneGrid(bits=3, group_size=128, offset="scale", scale_dtype=torch.bfloat16),
    ):
        codes = weight_of(grid, 128, 256)
        held = sum(tensor.nbytes for tensor in CudaPlanes.pack(codes, problem_of(grid, 128, 256, torch.bfloat16)).values())
        numbers = 4 if grid.bits == 3 else 5
        assert held == 128 * 256 * grid.bits // 8 + 128 * codes.scale_NG.shape[1] * 2 * numbers


@pytest.mark.parametrize("grid", [GRIDS[0], GRIDS[-1], *SIGNS], ids=str)
def test_one_plane_is_signs(grid: PlaneGrid) -> None:
    codes, problem = weight_of(grid, 70, 200), problem_of(grid, 70, 200, torch.bfloat16)
    layout = CudaPlane.pack(codes, problem)
    weight = tile_weight(layout, problem)
    weight.check()
    assert weight.floats == 1 and weight.zero is None and cuda_table.kind_of(weight) == "1f"
    back = CudaPlane.unpack(layout, problem)
    assert torch.equal(back.values_NK, codes.values_NK) and torch.equal(back.scale_NG, codes.scale_NG)
    g = torch.arange(200) // (grid.group_size or 200)
    scale = tiles.unpack_rows_of_tiles(layout["tile_scale"], 70).float()[:, g]
    assert torch.equal((2.0 * tiles.unpack_tiles(layout["tile_codes"], 1, 70, 200) - 1) * scale, codes.decode())
    assert "single" in str(CudaPlane.refuses(problem_of(GRIDS[1], 70, 200, torch.bfloat16)))


# ---- the decoder -----------------------------------------------------------------------------------------------------
def decoded(layout: dict[str, Tensor], bits: int, size: int, N: int, K: int, dtype: torch.dtype) -> Tensor:
    """planes.cuh played on a layout's words, bit by bit: float32 [16 R, 128 C]."""
    codes, blocks = layout["tile_codes"], layout["tile_scale"].dtype == OF_BLOCKS
    R, C = codes.shape[:2]
    w_NK = torch.zeros(16 * R, 128 * C)
    for r, c, lane, s in itertools.product(range(R), range(C), range(32), range(8)):
        g, t, lane_words = lane // 4, lane % 4, []
        raw = codes[r, c]
        for first in range(0, 2 * bits, 4):
            count = min(4, 2 * bits - first)
            piece = raw[128 * first + 4 * count * lane :][: 4 * count].clone().view(torch.int32)
            lane_words += [word & 0xFFFFFFFF for word in piece.tolist()]
        if bits == 3:
            three = lane_words[s // 4 * 3 :][:3]
            word = three[s % 4] & 0x77777777 if s % 4 < 3 else sum((three[j] >> 3 & 0x11111111) << j for j in range(3))
        else:
            each = {1: 4, 2: 2, 4: 1}[bits]
            mask = {1: 0x11111111, 2: 0x33333333, 4: 0xFFFFFFFF}[bits]
            word = lane_words[s // each] >> s % each * bits & mask
        group = min((128 * c + 16 * s) // size, layout["tile_scale"].shape[1] - 1)
        for h in range(2):
            if blocks:
                bytes_of = layout["tile_scale"][r, group].view(torch.uint8).tolist()[16 * h :][:16]
                offset = torch.zeros((), dtype=dtype)
            else:
                a = layout["tile_scale"][r, group, g + 8 * h, None].view(dtype).float()
                sums = [a[0] if bits == 4 else a[3]]
                for plane in range(bits == 4, bits):
                    sums = [both for x in sums for both in (x - a[plane], x + a[plane])]
                raw_sums = torch.stack(sums + [torch.zeros(())] * (8 - len(sums))).to(dtype).view(torch.uint8).reshape(8, 2)
                bytes_of = raw_sums.T.flatten().tolist()
                offset = layout["tile_zero"][r, group, g + 8 * h] if "tile_zero" in layout else torch.zeros((), dtype=dtype)
            low, high = (sum(b << 8 * i for i, b in enumerate(bytes_of[q : q + 4])) for q in (0, 4))
            upper_low, upper_high = (sum(b << 8 * i for i, b in enumerate(bytes_of[q : q + 4])) for q in (8, 12))
            selector = (word & 0x77777777) >> 16 * h
            lows, highs = permuted(low, high, selector), permuted(upper_low, upper_high, selector)
            if bits == 4:
                highs ^= (word << 4 * h) & 0x80808080
            for i, place in enumerate((0x5140, 0x7362)):
                pair = permuted(lows, highs, place)
                for e in range(2):
                    number = torch.tensor(pair >> 16 * e & 0xFFFF).to(torch.int32).to(torch.int16).view(dtype)
                    row, i1 = (g + 8 * i, h) if blocks else (g + 8 * h, i)
                    w_NK[16 * r + row, 128 * c + 16 * s + 8 * i1 + 2 * t + e] = number + offset
    return w_NK[:N, :K]


@pytest.mark.parametrize(
    "place", [place for place, grid in enumerate(GRIDS) if grid.bits <= 4], ids=lambda place: str(GRIDS[place])
)
def test_the_decoder_finds_the_weight(place: int) -> None:
    """In the type of the scales, where that is one of activations, else in both by turns."""
    N, K, grid = 20, 100, GRIDS[place]
    sixteen = (torch.bfloat16, torch.float16)
    dtype = grid.scale_dtype if grid.scale_dtype in sixteen else sixteen[place % 2]
    codes, problem = weight_of(grid, N, K), problem_of(grid, N, K, dtype)
    layout, inner, spread = CudaPlanes.pack(codes, problem), _inner(problem), _spread(problem)
    found = decoded(layout, inner.grid.bits, inner.grid.group_size or 0, N, inner.K, dtype)
    found = found if spread is None else found[:, spread.places()]
    kinds = {torch.float32 if grid.power_of_two else grid.scale_dtype, grid.offset_dtype or dtype}
    if kinds == {dtype} and "tile_zero" not in layout:
        assert torch.equal(found, codes.decode().to(dtype).float())  # one rounding
    error = float((found - codes.decode()).norm() / codes.decode().norm())
    assert error < (4e-3 if dtype == torch.bfloat16 else 5e-4)


def test_offsets_beside_planes_that_say_nothing() -> None:
    grid = PlaneGrid(bits=2, group_size=16, offset="float32")
    values = torch.randint(0, 4, (16, 32), dtype=torch.uint8)
    codes = Codes(values_NK=values, scale_NG=torch.zeros(16, 2, 2), zero_NG=torch.full((16, 2), 0.5), grid=grid)
    problem = problem_of(grid, 16, 32, torch.bfloat16)
    layout = CudaPlanes.pack(codes, problem)
    assert torch.equal(decoded(layout, 2, 16, 16, 32, torch.bfloat16), torch.full((16, 32), 0.5))
    back = CudaPlanes.unpack(layout, problem)
    assert torch.equal(back.scale_NG, codes.scale_NG) and torch.equal(back.values_NK, values)


def test_other_grids_are_refused() -> None:
    other = Problem(format="pack-quantized", grid=IntGrid(bits=4), N=16, K=64, dtype=torch.float16, device="cuda")
    assert "planes" in str(CudaPlanes.refuses(other))


@pytest.mark.parametrize(
    ("grid", "key"),
    [(GRIDS[3], "3b/g128/64x256"), (GRIDS[5], "4b/g64/64x256"), (GRIDS[8], "3b/g16/64x256"), (GRIDS[12], "2b/g80/64x320")],
)
def test_tuning_keeps_what_planes_look_for(grid: PlaneGrid, key: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def tune(weight: TileWeight, tokens: list[int]) -> dict[str, Any]:
        weight.check()
        return {
            cuda_table.key_of(weight, M): {"config": {"ring": False, "row_tiles": 1, "k_warps": 2}, "us": M} for M in tokens
        }

    draw = cuda_tune.random_planes
    monkeypatch.setenv("AEROGEL_CACHE", str(tmp_path))
    monkeypatch.setattr(cuda_tune, "tune", tune)
    monkeypatch.setattr(cuda_tune, "random_planes", lambda *what, **how: draw(*what[:4], "cpu", **how))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA Test 1GB")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
    cuda_table.table.cache_clear()
    problem = problem_of(grid, 64, 256, torch.bfloat16)
    tuned = CudaPlanes.tune(problem, [1, 16, 300])
    assert tuned is not None and sorted(tuned.found) == [1, 16]
    weight = tile_weight(CudaPlanes.pack(weight_of(grid, 64, 256), problem), _inner(problem))
    assert sorted(cuda_table.table("NVIDIA Test 1GB")) == [f"{key}/m1", f"{key}/m16"]
    assert cuda_table.key_of(weight, 1) == f"{key}/m1"
    cuda_table.table.cache_clear()


@needs_nvrtc
def test_the_sources_compile() -> None:
    for place, grid in enumerate((GRIDS[0], GRIDS[3], GRIDS[5], GRIDS[8], SIGNS[0])):
        dtype = (torch.bfloat16, torch.float16)[place % 2]  # kinds of planes alternate between them
        problem = problem_of(grid, 64, 512, dtype)
        signs = grid in SIGNS
        layout = (CudaPlane if signs else CudaPlanes).pack(weight_of(grid, 64, 512), problem)
        weight = tile_weight(layout, problem if signs else _inner(problem))
        few = cuda_few.Config(ring=True, row_tiles=2, k_warps=4)
        many = cuda_wgmma.choose_config(weight, 64, 132)
        assert many is not None
        for name, macros, capability in (
            ("few_registers.cu", cuda_few.defines(weight, few, 4, dtype), (8, 0)),
            ("few_ring.cu", cuda_few.defines(weight, few, 16, dtype), (9, 0)),
            ("wgmma.cu", cuda_wgmma.defines(weight, many, dtype), (9, 0)),
            ("dequantize.cu", cuda_few.decoder_defines(weight, dtype), (9, 0)),
        ):
            assert nvrtc.compiler().compile(name, sources.sources_of(name), macros, capability)[:4] == b"\x7fELF"


# ---- products --------------------------------------------------------------------------------------------------------
@pytest.mark.gpu
@pytest.mark.parametrize("grid", GRIDS + SIGNS, ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_products_on_a_gpu(grid: PlaneGrid, dtype: torch.dtype) -> None:
    """Against float64, at every number of tokens that another kernel serves; and the decoded weight itself."""
    N, K = 200, 528
    codes, problem = weight_of(grid, N, K, "cuda"), problem_of(grid, N, K, dtype)
    name, kernel = choose(problem)
    assert name == ("cuda-plane" if grid.bits == 1 and grid.offset == "none" else "cuda-planes")
    layout, dense = kernel.pack(codes, problem), codes.decode(torch.float64)
    least = 4e-3 if dtype == torch.bfloat16 else 5e-4
    for M in (0, 1, 5, 16, 40, 100, 1100):
        x_MK, bias_N = torch.randn(M, K, device="cuda").to(dtype), torch.randn(N, device="cuda").to(dtype)
        found, wanted = kernel.run(x_MK, layout, problem, bias_N), x_MK.double() @ dense.T + bias_N.double()
        assert found.shape == wanted.shape and found.dtype == dtype
        assert M == 0 or float((found - wanted).norm() / wanted.norm()) < 1.5 * least, M
        assert torch.equal(found, kernel.run(x_MK, layout, problem, bias_N))


@pytest.mark.gpu
@pytest.mark.parametrize("grid", [grid for grid in GRIDS if grid.bits <= 4] + SIGNS, ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_the_decoded_weight_on_a_gpu(grid: PlaneGrid, dtype: torch.dtype) -> None:
    """What the dense path multiplies with is the definition, rounded once where the type holds all numbers."""
    N, K = 70, 400
    codes, problem = weight_of(grid, N, K, "cuda"), problem_of(grid, N, K, dtype)
    layout, spread = CudaPlanes.pack(codes, problem), _spread(problem)
    weight = tile_weight(layout, _inner(problem))
    found = dequantize(weight, dtype)
    found = found if spread is None else found[:, spread.places("cuda")]
    wanted = codes.decode()
    kinds = {torch.float32 if grid.power_of_two else grid.scale_dtype, grid.offset_dtype or dtype}
    if kinds == {dtype} and "tile_zero" not in layout:
        assert torch.equal(found, wanted.to(dtype))
    assert float((found - wanted).norm() / wanted.norm()) < (4e-3 if dtype == torch.bfloat16 else 5e-4)
    if grid.bits == 1 and grid.offset == "none":  # as signs
        assert torch.equal(dequantize(tile_weight(CudaPlane.pack(codes, problem), problem), dtype), wanted.to(dtype))
    x_ML, y_MN = torch.randn(9, weight.K, device="cuda").to(dtype), torch.empty(9, N, device="cuda", dtype=dtype)
    Dense.plan(weight, 9, dtype)(x_ML, None, y_MN)
    whole = dequantize(weight, dtype).double()
    assert float((y_MN - x_ML.double() @ whole.T).norm() / y_MN.double().norm()) < 4e-3
