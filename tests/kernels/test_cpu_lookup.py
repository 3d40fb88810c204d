"""The CPU kernel for tables: every format that is a table against the definition in float64, on every path of this machine."""

from __future__ import annotations

import ctypes
from typing import Any

import pytest
import torch
from tests.quantize.test_tables import GRIDS, weight

from aerogel.errors import BadInput
from aerogel.kernels.dispatch import choose
from aerogel.kernels.gemm.cpu_lookup import NUMERICS, NativeLookup, linear, struct_of
from aerogel.kernels.native import library
from aerogel.kernels.problem import Problem
from aerogel.pack import lookup
from aerogel.quantize.codes import Codes, quantized
from aerogel.quantize.formats.bitmod import Bitmod
from aerogel.quantize.formats.floats import Float
from aerogel.quantize.formats.mx import Mx
from aerogel.quantize.formats.nf4 import Nf4
from aerogel.quantize.formats.nvfp4 import Nvfp4

pytestmark = pytest.mark.skipif(library.missing() is not None, reason=str(library.missing()))

ODD = [
    Nf4(group_size=40),
    Bitmod(bits=3, group_size=72),
    Bitmod(bits=4, group_size=40, scale_dtype=torch.float8_e4m3fn),
    Float(kind="e1m1", group_size=7),
]
SMALL = [*ODD, *(grid for grid in GRIDS if grid.bits in (2, 3, 4) and grid.shared_rows == 1)]
TYPES = (torch.float32, torch.float16, torch.bfloat16)
ROUNDING = {torch.float32: 1e-6, torch.float16: 5e-4, torch.bfloat16: 4e-3}
"""Of the result; relative Frobenius error."""
SHAPES = [(1, 16), (7, 40), (37, 200), (66, 300)]


def per_row(N: int, K: int) -> Codes:
    """Codes with a table of their own for every output, as k-means makes them."""
    random = torch.Generator().manual_seed(N * K)
    values = torch.randint(0, 16, (N, K), dtype=torch.uint8, generator=random)
    grid = Float(kind="e2m1", group_size=None)
    table = torch.randn(N, 16, generator=random).sort(1).values
    return Codes(values_NK=values, scale_NG=torch.rand(N, 1, generator=random) + 0.5, table_TE=table, grid=grid)


def cases(N: int, K: int) -> list[Codes]:
    w = weight(N, K)
    return [*(quantized(grid, w, grid.fit(w)) for grid in SMALL), per_row(N, K)]


def relative(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found.double() - wanted).norm() / wanted.norm().clamp_min(1e-30))


@pytest.mark.parametrize("path", library.PATHS)
@pytest.mark.parametrize("numerics", NUMERICS)
def test_every_path_against_float64(path: str, numerics: str) -> None:
    if path not in library.paths():
        pytest.skip(f"{path}: not built, or this machine has not its instructions")
    number = library.PATHS.index(path)
    for N, K in SHAPES:
        for index, codes in enumerate(cases(N, K)):
            layout, group = lookup.tensors_of(codes), codes.grid.group_size or 0
            dense = codes.decode().double()
            for M in (1, 3, 4, 8, 9, 29, 70):  # panels beyond eight
                dtype = TYPES[(index + M) % 3]
                x = torch.randn(M, K, generator=torch.Generator().manual_seed(M)).to(dtype)
                bias = torch.randn(N, generator=torch.Generator().manual_seed(N)).to(TYPES[M % 3])
                wanted = x.double() @ dense.T + bias.double()
                found = linear(x, layout, bias, N, group, numerics, number, threads=1)
                limit = ROUNDING[dtype] + (1.5e-4 if numerics == "fixed" else 0.0)  # of one token, where few columns count
                assert relative(found, wanted) <= limit, f"{codes.grid} [{M}, {N}, {K}] {dtype}"
                assert torch.equal(found, linear(x, layout, bias, N, group, numerics, number, threads=3))


@pytest.mark.parametrize("numerics", NUMERICS)
def test_picks_among_many_tables_give_the_bits_of_those_among_few(numerics: str) -> None:
    grid = Bitmod(bits=4, group_size=32)
    layout = lookup.tensors_of(quantized(grid, weight(37, 320), grid.fit(weight(37, 320))))
    few = len(layout["number"])
    twice = {name: torch.cat([layout[name]] * 2).contiguous() for name in ("number", "fixed", "unit")}
    odd = torch.arange(layout["pick"].numel(), dtype=torch.uint8).view_as(layout["pick"]) % 2
    many = {**layout, **twice, "pick": layout["pick"] + few * odd}
    for M in (1, 4, 20):
        x = torch.randn(M, 320, generator=torch.Generator().manual_seed(M))
        assert torch.equal(linear(x, many, None, 37, 32, numerics), linear(x, layout, None, 37, 32, numerics))


@pytest.mark.parametrize("dtype", TYPES)
def test_fixed_point_errs_far_less_than_the_result_is_rounded(dtype: torch.dtype) -> None:
    for codes in (quantized(grid, weight(256, 1024), grid.fit(weight(256, 1024))) for grid in (Nf4(), Mx(), Nvfp4(), Bitmod())):
        layout, x = lookup.tensors_of(codes), torch.randn(4, 1024, generator=torch.Generator().manual_seed(1))
        for outlier, limit in ((1.0, 1e-4), (300.0, 3e-4)):  # as transformers have them
            x[:, 5] = outlier
            wanted = x.double() @ codes.decode().double().T
            error = relative(linear(x, layout, None, 256, codes.grid.group_size or 0, "fixed"), wanted)
            assert error < limit, f"{codes.grid}: {error:.1e}"
        wanted = x.to(dtype).double() @ codes.decode().double().T
        assert relative(NativeLookup.run(x.to(dtype), layout, problem_of(codes, dtype)), wanted) <= ROUNDING[dtype] + 1e-4


@pytest.mark.parametrize("shape", [(1, 1), (13, 130), (130, 200)])
def test_layout_is_invertible(shape: tuple[int, int]) -> None:
    for codes in cases(*shape):
        layout = lookup.tensors_of(codes)
        back = lookup.codes_of(layout, codes.grid, *shape, per_row=codes.table_per_row, has_factor=codes.factor is not None)
        for name in ("values_NK", "scale_NG", "table_TE", "pick_NG", "factor"):
            a, b = getattr(back, name), getattr(codes, name)
            assert (a is None) == (b is None), name
            if a is not None:
                assert a.dtype == b.dtype and torch.equal(a.flatten().view(torch.uint8), b.flatten().view(torch.uint8)), name


def test_floats_of_four_bits_are_integers_exactly() -> None:
    for grid in (Mx(), Float(kind="e2m1"), Float(kind="e1m1")):
        integers, unit = lookup.integers_of(grid.tables, alike=False)
        assert torch.allclose(integers * unit[:, None], grid.tables.nan_to_num(), rtol=1e-7, atol=0), grid
        assert int(integers.abs().max()) <= 16, grid  # the smallest there are, so that sums of many products fit


def test_numbers_on_no_grid_are_integers_of_fifteen_bits() -> None:
    integers, _ = lookup.integers_of(Nf4().tables, alike=False)
    assert lookup.LARGEST // 2 < int(integers.abs().max()) <= lookup.LARGEST


def problem_of(codes: Codes, dtype: torch.dtype) -> Problem:
    N, K = codes.values_NK.shape
    return Problem(format="any", grid=codes.grid, N=N, K=K, dtype=dtype)


@pytest.mark.parametrize("path", library.PATHS)
def test_many_tokens_are_multiplied_in_passes(path: str) -> None:
    """More tokens than a pass takes, more columns than a panel, rows that are no whole strips."""
    if path not in library.paths():
        pytest.skip(f"{path}: not built, or this machine has not its instructions")
    codes = quantized(Nf4(group_size=32), weight(37, 650), Nf4(group_size=32).fit(weight(37, 650)))
    layout, x = lookup.tensors_of(codes), torch.randn(1100, 650, generator=torch.Generator().manual_seed(0))
    found = [linear(x, layout, None, 37, 32, "exact", library.PATHS.index(path), threads=threads) for threads in (1, 2, 3)]
    assert relative(found[0], x.double() @ codes.decode().double().T) < 1e-6
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])
    x[530, 7] = float("nan")
    y = linear(x, layout, None, 37, 32, "exact", library.PATHS.index(path))
    assert (y.isnan().any(1).nonzero().flatten() == 530).all()


def test_the_dispatcher_chooses_it_and_many_tokens_are_decoded() -> None:
    for codes in cases(40, 160):
        problem = problem_of(codes, torch.float32)
        name, kernel = choose(problem)
        assert name == "cpu-lookup" and kernel is NativeLookup
        layout = kernel.pack(codes, problem)
        x, bias = torch.randn(90, 160), torch.randn(40)
        wanted = torch.nn.functional.linear(x, codes.decode(), bias)
        torch.testing.assert_close(kernel.run(x, layout, problem, bias), wanted, rtol=1e-5, atol=1e-5)
        identity = torch.eye(160)
        assert torch.equal(kernel.run(identity, layout, problem).T, codes.decode())
    assert "2 to 4 bits, found 8" in (NativeLookup.refuses(Problem(format="any", grid=Mx(kind="e4m3"), N=4, K=32)) or "")
    assert "cuda" in (NativeLookup.refuses(Problem(format="any", grid=Nf4(), N=4, K=32, device="cuda")) or "")


def test_tensors_that_do_not_belong_together_are_refused() -> None:
    codes = quantized(Bitmod(), weight(40, 256), Bitmod().fit(weight(40, 256)))
    layout, x = lookup.tensors_of(codes), torch.randn(2, 256)

    def refused(match: str, **changed: Any) -> None:
        with pytest.raises(BadInput, match=match):
            linear(changed.pop("x", x), {**layout, **changed}, None, 40, 128, "exact")

    refused("codes have another size", codes=layout["codes"][:-1].contiguous())
    refused("scales have another size", scale=layout["scale"][:-1].contiguous())
    refused("scales have another size", pick=layout["pick"][:-1].contiguous())
    refused("tables have another size", fixed=layout["fixed"][:-1].contiguous())
    refused("tables have another size", number=torch.zeros(300, 4, 16, dtype=torch.uint8))
    refused("codes have another size", x=torch.randn(2, 100))
    refused("contiguous", codes=layout["codes"].transpose(0, 1))
    layout["pick"][3, 0, 1] = len(layout["number"])
    weight_struct = struct_of(layout, 40, 256, 128)
    assert library.library().aerogel_native_lookup_check(ctypes.byref(weight_struct)) == 12


def test_what_is_infinite_or_no_number_is_seen() -> None:
    codes = quantized(Nf4(), weight(20, 128), Nf4().fit(weight(20, 128)))
    layout = lookup.tensors_of(codes)
    for bad in (float("inf"), float("nan")):
        x = torch.randn(3, 128)
        x[1, 40] = bad
        for numerics in NUMERICS:
            finite = torch.isfinite(linear(x, layout, None, 20, 64, numerics)).all(1).tolist()
            assert finite == [True, False, True], (bad, numerics)
