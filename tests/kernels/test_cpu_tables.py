"""The CPU kernels for shared tables: every such format against the definition in float64, on every path of this machine."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from tests.quantize.test_tables import GRIDS, weight

from aerogel.errors import BadInput
from aerogel.kernels.dispatch import choose
from aerogel.kernels.gemm.cpu_lookup import linear as look_up
from aerogel.kernels.gemm.cpu_tables import NativeTables, linear
from aerogel.kernels.gemm.ref import Reference
from aerogel.kernels.linear import Linear
from aerogel.kernels.native import library
from aerogel.kernels.problem import Problem
from aerogel.pack import lookup, native_tables
from aerogel.quantize.codes import Codes, Grid, quantized
from aerogel.quantize.formats.bitmod import Bitmod
from aerogel.quantize.formats.floats import Float
from aerogel.quantize.formats.mx import Mx
from aerogel.quantize.formats.nf4 import Nf4
from aerogel.quantize.formats.nvfp4 import Nvfp4
from aerogel.quantize.formats.rf8 import Rf8
from aerogel.quantize.grids import Fp8Grid
from aerogel.quantize.scales import as_stored, numbers_of_byte
from aerogel.quantize.tables import TableGrid

pytestmark = pytest.mark.skipif(library.missing() is not None, reason=str(library.missing()))

MORE: list[Grid] = [
    Fp8Grid(),
    Fp8Grid(strategy="block", scale_dtype=torch.bfloat16),
    Fp8Grid(strategy="tensor"),
    Rf8(),
    Mx(kind="e4m3"),
    Mx(kind="e5m2"),
    Float(kind="e5m2"),
    Float(kind="e3m2", group_size=24),
    Float(kind="e2m2", group_size=64, scale_dtype=torch.float16),
    Nf4(group_size=40),
    Bitmod(bits=3, group_size=72),
    Bitmod(bits=4, group_size=40, scale_dtype=torch.float8_e4m3fn),
]
SHARED = [*MORE, *(grid for grid in GRIDS if not grid.learned and grid not in MORE)]
TYPES = (torch.float32, torch.float16, torch.bfloat16)
ROUNDING = {torch.float32: 1e-6, torch.float16: 6e-4, torch.bfloat16: 4e-3}
"""Of the result; relative Frobenius error."""
ROUNDED = 2e-3
"""Where numbers are rounded to bfloat16."""
SHAPES = [(1, 16), (7, 40), (37, 200), (66, 300)]
TOKENS = (1, 2, 3, 9, 16, 17, 40, 70)


def codes_on(grid: Grid, N: int, K: int) -> Codes:
    w_NK = weight(N, K)
    return quantized(grid, w_NK, grid.fit(w_NK))


def relative(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found.double() - wanted).norm() / wanted.norm().clamp_min(1e-30))


def problem_of(codes: Codes, dtype: torch.dtype = torch.bfloat16, **more: Any) -> Problem:
    N, K = codes.values_NK.shape
    return Problem(format="any", grid=codes.grid, N=N, K=K, dtype=dtype, **more)


@pytest.mark.parametrize("path", library.PATHS)
@pytest.mark.parametrize("grid", SHARED, ids=str)
def test_every_path_against_float64(path: str, grid: Grid) -> None:
    if path not in library.paths():
        pytest.skip(f"{path}: not built, or this machine has not its instructions")
    number = library.PATHS.index(path)
    held = native_tables.exact(native_tables.table_of(grid)) or path not in ("avx512bf16", "amx")
    for index, (N, K) in enumerate(SHAPES):
        codes = codes_on(grid, N, K)
        layout, group = native_tables.tensors_of(codes), grid.group_size or 0
        dense = codes.decode().double()
        for M in TOKENS:
            dtype = TYPES[(index + M) % 3]
            x = torch.randn(M, K, generator=torch.Generator().manual_seed(M)).to(dtype)
            bias = torch.randn(N, generator=torch.Generator().manual_seed(N)).to(TYPES[M % 3])
            product, added = x.double() @ dense.T, bias.double()
            found = linear(x, layout, bias, N, group, number, threads=1)
            error = (found.double() - (product + added)).norm() / (product.norm() + added.norm() * M**0.5)
            limit = ROUNDING[dtype] + (0.0 if held else 4 * ROUNDED if N == 1 else ROUNDED)
            assert error <= limit, f"[{M}, {N}, {K}] {dtype}: {error:.1e}"
            assert torch.equal(found, linear(x, layout, bias, N, group, number, threads=3)), "threads change bits"


@pytest.mark.parametrize("grid", SHARED, ids=str)
def test_the_layout_inverts(grid: Grid) -> None:
    for N, K in ((1, 1), (13, 130), (130, 200)):
        codes = codes_on(grid, N, K)
        back = native_tables.codes_of(native_tables.tensors_of(codes), grid, N, K)
        for name in ("values_NK", "scale_NG", "table_TE", "pick_NG", "factor"):
            a, b = getattr(back, name), getattr(codes, name)
            assert (a is None) == (b is None), name
            if a is not None:
                assert a.dtype == b.dtype and a.shape == b.shape, name
                assert torch.equal(a.flatten().view(torch.uint8), b.flatten().view(torch.uint8)), name


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.uint8, torch.float8_e8m0fnu, torch.float16], ids=str)
def test_two_tables_and_their_mirrors_are_all_four(dtype: torch.dtype) -> None:
    """What comes back is the same weight, and the same tensors where no scale was below zero."""
    for bits in (3, 4):
        grid = Bitmod(bits=bits, group_size=24, scale_dtype=dtype)
        random = torch.Generator().manual_seed(bits)
        values_NK = torch.randint(1 << bits, (37, 72), generator=random).to(torch.uint8)
        pick_NG = torch.arange(37 * 3).reshape(37, 3).remainder(4).to(torch.uint8)
        scale_NG = as_stored(torch.rand(37, 3, generator=random) + 0.5, dtype)
        codes = Codes(values_NK=values_NK, scale_NG=scale_NG, table_TE=grid.tables, pick_NG=pick_NG, grid=grid)
        if dtype == torch.float16:
            codes = replace(codes, scale_NG=torch.where(pick_NG == 2, -scale_NG, scale_NG))
        layout = native_tables.tensors_of(codes)
        assert layout["pick"].shape == (3, 3) and len(layout["table"]) == 2
        back = native_tables.codes_of(layout, grid, 37, 72)
        assert torch.equal(back.decode(), codes.decode())
        if dtype != torch.float16:
            assert torch.equal(back.values_NK, values_NK)
            assert torch.equal(back.pick_NG if back.pick_NG is not None else values_NK, pick_NG)
        dense_NK = codes.decode()
        for path in library.paths():
            found_MN = linear(torch.eye(72), layout, None, 37, 24, library.PATHS.index(path))
            assert torch.equal(found_MN, dense_NK.T), (bits, path)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.uint8, torch.float8_e8m0fnu], ids=str)
@pytest.mark.parametrize("pack", [native_tables.tensors_of, lookup.tensors_of])
def test_a_scale_that_is_no_number_is_none(dtype: torch.dtype, pack: Any) -> None:
    grid = Nf4(group_size=32, scale_dtype=dtype)
    w_NK = weight(20, 64)
    codes = quantized(grid, w_NK, grid.fit(w_NK))
    byte_NG = codes.scale_NG.clone().view(torch.uint8)
    byte_NG[7, 1] = 0x7F if dtype == torch.float8_e4m3fn else 0xFF
    codes = replace(codes, scale_NG=byte_NG.view(dtype))
    layout = pack(codes)
    assert layout["scale"].dtype == torch.bfloat16
    x_MK = torch.randn(2, 64)
    if pack is native_tables.tensors_of:
        found_MN, back = linear(x_MK, layout, None, 20, 32), native_tables.codes_of(layout, grid, 20, 64)
    else:
        found_MN, back = look_up(x_MK, layout, None, 20, 32, "exact"), lookup.codes_of(layout, grid, 20, 64, False, True)
    assert found_MN[:, 7].isnan().all() and found_MN.isnan().sum() == 2
    assert torch.equal(back.scale_NG.view(torch.uint8), byte_NG)


@pytest.mark.parametrize("path", library.PATHS)
def test_all_bytes_of_ue5m3(path: str) -> None:
    if path not in library.paths():
        pytest.skip(f"{path}: not built, or this machine has not its instructions")
    grid = Float(kind="e2m1", group_size=32, scale_dtype=torch.uint8)
    byte_NG = torch.arange(254, dtype=torch.uint8)[:, None] + 1
    codes = Codes(values_NK=torch.full((254, 32), 2, dtype=torch.uint8), scale_NG=byte_NG, table_TE=grid.tables, grid=grid)
    assert float(grid.tables[0, 2]) == 1.0
    layout = native_tables.tensors_of(codes)
    assert layout["scale"].dtype == torch.uint8
    for M in (1, 20, 70):
        x = torch.zeros(M, 32, dtype=torch.bfloat16)
        x[:, 5] = 1
        found_MN = linear(x, layout, None, 254, 32, library.PATHS.index(path))
        assert torch.equal(found_MN.float(), numbers_of_byte(torch.uint8)[1:255].expand(M, 254)), M


def test_rounding_to_bfloat16_costs_less_than_rounding_the_result() -> None:
    for grid in (Nf4(), Nf4(group_size=40), Nvfp4(), Bitmod()):
        w_NK = torch.randn(256, 1024, generator=torch.Generator().manual_seed(0))
        codes = quantized(grid, w_NK, grid.fit(w_NK))
        layout = native_tables.tensors_of(codes)
        x = torch.randn(20, 1024, generator=torch.Generator().manual_seed(1)).bfloat16()
        wanted = x.double() @ codes.decode().double().T
        dense = relative(wanted.bfloat16(), wanted)
        for M in (1, 20):
            found = linear(x[:M].contiguous(), layout, None, 256, grid.group_size or 0)
            assert relative(found, wanted[:M]) < 1.25 * dense, grid


def test_all_256_bytes_of_e4m3_and_its_nan() -> None:
    for byte in range(256):
        values = torch.full((20, 32), 0, dtype=torch.uint8)
        values[3, 5] = byte
        codes = Codes(values_NK=values.view(torch.float8_e4m3fn), scale_NG=torch.ones(20, 1), grid=Fp8Grid())
        layout = native_tables.tensors_of(codes)
        for path in library.paths():
            for M in (1, 20):
                x = torch.zeros(M, 32, dtype=torch.bfloat16)
                x[:, 5] = 1
                y = linear(x, layout, None, 20, 0, library.PATHS.index(path))
                wanted = codes.values_NK.float()[3, 5]
                assert torch.equal(y[:, 3].float().nan_to_num(nan=-1e9), wanted.expand(M).nan_to_num(nan=-1e9)), (byte, path)
                assert not y[:, 4].any()


@dataclass(frozen=True, kw_only=True)
class Shuffled(TableGrid):
    """256 numbers that no float has in this order; bfloat16 holds them."""

    group_size: int | None = None
    bits = 8

    def numbers(self) -> tuple[tuple[float, ...], ...]:
        return (tuple(float(37 * code % 256 - 128) for code in range(256)),)


FLOATS: list[TableGrid] = [Float(kind=kind, group_size=None) for kind in ("e2m2", "e3m1", "e2m3", "e3m2", "e4m3", "e5m2")]


@pytest.mark.parametrize("grid", [*FLOATS, Rf8(), Shuffled()], ids=str)
def test_every_code_and_what_is_none(grid: TableGrid) -> None:
    numbers = grid.tables[0]
    for path in library.paths():
        for M in (1, 4, 20):
            for column in (4, 5, 6, 7):
                values = torch.zeros(len(numbers), 32, dtype=torch.uint8)
                values[:, column] = torch.arange(len(numbers))
                codes = Codes(values_NK=values, scale_NG=torch.ones(len(numbers), 1), table_TE=grid.tables, grid=grid)
                x = torch.zeros(M, 32, dtype=torch.bfloat16)
                x[:, column] = 1
                found = linear(x, native_tables.tensors_of(codes), None, len(numbers), 0, library.PATHS.index(path)).float()
                wanted = numbers.bfloat16().float().expand(M, -1)
                assert torch.equal(found.nan_to_num(nan=-1e9), wanted.nan_to_num(nan=-1e9)), (path, M, column)


@pytest.mark.parametrize("path", library.PATHS)
@pytest.mark.parametrize("M", [3, 16, 24, 32, 128])
def test_scales_multiplied_into_numbers_round_nothing(path: str, M: int) -> None:
    """One input at a time gives the weight itself, for few tokens, and for so many that scales are folded (exact_bfloat.h)."""
    if path not in library.paths():
        pytest.skip(f"{path}: not built, or this machine has not its instructions")
    random = torch.Generator().manual_seed(0)
    for grid in (
        Nvfp4(),
        Nvfp4(scale_dtype=torch.uint8),
        Mx(kind="e2m1"),
        Mx(kind="e4m3"),
        Bitmod(group_size=32, scale_dtype=torch.bfloat16),
        Bitmod(bits=4, group_size=32, scale_dtype=torch.float8_e4m3fn),
    ):
        codes = codes_on(grid, 40, 128)
        if codes.scale_NG.dtype == torch.float8_e4m3fn:
            every = torch.arange(1, 0x7F, dtype=torch.uint8).view(torch.float8_e4m3fn)
            codes = replace(codes, scale_NG=every[torch.randint(len(every), codes.scale_NG.shape, generator=random)])
        layout = native_tables.tensors_of(codes)
        dense_NK, x_KK = codes.decode(), torch.eye(128).bfloat16()
        for first in range(0, 128, M):
            x_MK = x_KK[first : first + M].contiguous()
            found_MN = linear(x_MK, layout, None, 40, grid.group_size or 0, library.PATHS.index(path))
            assert torch.equal(found_MN, dense_NK.T[first : first + M].bfloat16()), grid


def test_scales_at_the_ends_of_their_range() -> None:
    """Powers of two whose products bfloat16 does not hold as normal numbers are applied to sums."""
    codes = codes_on(Mx(kind="e2m1"), 40, 128)
    ones = replace(codes, scale_NG=torch.ones(40, 4).to(codes.scale_NG.dtype))
    for power in (-126, 126):
        held = replace(codes, scale_NG=torch.full((40, 4), 2.0**power).to(codes.scale_NG.dtype))
        x_MK = torch.randn(70, 128, generator=torch.Generator().manual_seed(0)) * (2.0**-100 if power > 0 else 2.0**110)
        found_MN = linear(x_MK, native_tables.tensors_of(held), None, 40, 32)
        assert relative(found_MN, x_MK.double() @ ones.decode().double().T * 2.0**power) < 1e-6


def test_the_dispatcher_and_the_layer_use_it() -> None:
    for grid in (Fp8Grid(), Fp8Grid(strategy="block"), Mx(kind="e4m3"), Float(kind="e3m2")):
        codes = codes_on(grid, 150, 288)
        layer = Linear.from_codes(codes, bias=torch.randn(150))
        assert layer.kernel_name == "cpu-tables"
        x = torch.randn(5, 288)
        torch.testing.assert_close(layer(x), torch.nn.functional.linear(x, codes.decode(), layer.bias), rtol=1e-5, atol=1e-5)
        assert torch.equal(layer.dequantize(), codes.decode())
        layer.restore()
        assert torch.equal(layer.dequantize(), codes.decode())
    bfloat16 = library.best("exact") in ("avx512bf16", "amx")
    assert choose(problem_of(codes_on(Nf4(), 16, 64)))[0] == ("cpu-tables" if bfloat16 else "cpu-lookup")
    assert choose(problem_of(codes_on(Nf4(), 16, 64), torch.float32))[0] == "cpu-lookup"


@pytest.mark.parametrize("strategy", ["channel", "block", "tensor"])
def test_activations_in_fp8(strategy: Any) -> None:
    codes = codes_on(Fp8Grid(strategy=strategy), 150, 300)
    problem = Problem(format="float-quantized", grid=codes.grid, N=150, K=300, dtype=torch.bfloat16, activations="fp8")
    name, kernel = choose(problem)
    assert name == "cpu-tables"
    stored = problem.stored.encode(codes)
    for M in (1, 7, 40):
        x = torch.randn(M, 300).bfloat16()
        found = kernel.run(x, kernel.pack(codes, problem), problem)
        assert relative(found, Reference.run(x.float(), stored, problem).double()) < 6e-3


def test_what_is_refused() -> None:
    assert "one for each" in _message(lambda: native_tables.tensors_of(_per_row()))
    assert "cuda" in (NativeTables.refuses(Problem(format="any", grid=Fp8Grid(), N=4, K=32, device="cuda")) or "")
    assert "int8" in (NativeTables.refuses(Problem(format="any", grid=Fp8Grid(), N=4, K=32, activations="int8")) or "")
    codes = codes_on(Bitmod(), 40, 256)
    layout, x = native_tables.tensors_of(codes), torch.randn(2, 256)

    def refused(match: str, **changed: Any) -> None:
        with pytest.raises(BadInput, match=match):
            linear(changed.pop("x", x), {**layout, **changed}, None, 40, 128)

    refused("codes have another size", codes=layout["codes"][:-1].contiguous())
    refused("codes have another size", x=torch.randn(2, 100))
    refused("scales have another size", scale=layout["scale"][:-1].contiguous())
    refused("tables have another size", pick=layout["pick"][:-1].contiguous())
    refused("tables have another size", table=torch.zeros(5, 16))
    refused("tables have another size", table=torch.zeros(63))
    refused("tables have another size", table=torch.zeros(4, 16))
    refused("contiguous", codes=layout["codes"].transpose(0, 1))
    assert "their negatives" in (NativeTables.refuses(Problem(format="any", grid=Lopsided(), N=4, K=32)) or "")


@dataclass(frozen=True, kw_only=True)
class Lopsided(Bitmod):
    """Three tables, none of which is another with the other sign."""

    def numbers(self) -> tuple[tuple[float, ...], ...]:
        return tuple((0.0, *(float(x + shift) for x in range(1, 16))) for shift in (1, 2, 3))


def _per_row() -> Codes:
    table = torch.randn(8, 16)
    values = torch.zeros(8, 32, dtype=torch.uint8)
    return Codes(values_NK=values, scale_NG=torch.ones(8, 1), table_TE=table, grid=Float(kind="e2m1", group_size=None))


def _message(act: Any) -> str:
    with pytest.raises(BadInput) as caught:
        act()
    return str(caught.value)


def test_what_is_infinite_or_no_number_is_seen() -> None:
    for grid in (Nf4(), Fp8Grid(), Bitmod()):
        layout = native_tables.tensors_of(codes_on(grid, 20, 128))
        for bad in (float("inf"), float("nan")):
            x = torch.randn(3, 128).bfloat16()
            x[1, 40] = bad
            finite = torch.isfinite(linear(x, layout, None, 20, grid.group_size or 0)).all(1).tolist()
            assert finite == [True, False, True], (grid, bad)
