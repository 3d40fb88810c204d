"""Formats that are tables: every one of them through the same promises."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from aerogel.quantize.codes import Codes, Params, quantized, rows_of, stacked
from aerogel.quantize.formats.bipolar import Bipolar
from aerogel.quantize.formats.bitmod import Bitmod
from aerogel.quantize.formats.floats import Float
from aerogel.quantize.formats.kmeans import KMeans
from aerogel.quantize.formats.mx import Mx
from aerogel.quantize.formats.nf4 import Nf4
from aerogel.quantize.formats.nvfp4 import Nvfp4
from aerogel.quantize.formats.rf8 import Rf8
from aerogel.quantize.scales import TYPES, as_stored, numbers_of_byte, rounded, scale_values

KINDS = ("e5m2", "e4m3", "e3m2", "e2m3", "e3m1", "e2m2", "e2m1", "e3m0", "e1m1", "e2m0")
GRIDS: list[Any] = [Float(kind=kind, group_size=48) for kind in KINDS]  # type: ignore[arg-type]
GRIDS += [Float(kind="e5m2"), Float(kind="e4m3", group_size=128, block=True, scale_dtype=torch.bfloat16)]
GRIDS += [Nf4(), Nf4(scale_dtype=torch.float8_e4m3fn), Nf4(scale_dtype=torch.float16, group_size=None)]
GRIDS += [Mx(), Mx(kind="e4m3"), Nvfp4(), Nvfp4(scale_dtype=torch.uint8), Rf8()]
GRIDS += [KMeans(rounds=10), KMeans(bits=2, scale_dtype=torch.float16)]
GRIDS += [Bitmod(bits=3), Bitmod(group_size=32, scale_dtype=torch.float16)]
GRIDS += [Bipolar(bits=bits, group_size=group) for bits, group in ((3, 32), (4, None), (8, None))]


def weight(N: int, K: int, seed: int = 0) -> torch.Tensor:
    random = torch.Generator().manual_seed(seed)
    return torch.randn(N, K, generator=random) * torch.exp(torch.randn(N, 1, generator=random)) * 0.05


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (3, 70), (130, 200)])
@pytest.mark.parametrize("search", ["minmax", "mse"])
def test_decoding_is_the_formula_and_its_values_are_fixed_points(grid: Any, shape: tuple[int, int], search: str) -> None:
    w = weight(*shape)
    codes = quantized(grid, w, grid.fit(w, search=search))
    assert codes.values_NK.dtype is torch.uint8 and int(codes.values_NK.max()) < 1 << grid.bits
    assert codes.table_TE is not None and codes.table_TE.shape[1] == 1 << grid.bits
    back = codes.decode()
    N, K = shape
    n = torch.arange(N)[:, None] // (grid.shared_rows or N)
    g = torch.arange(K)[None] // (grid.group_size or K)
    scale = scale_values(codes.scale_NG)[n, g]
    scale = scale if codes.factor is None else scale * codes.factor
    table = torch.zeros(1, 1, dtype=torch.int64) if codes.pick_NG is None else codes.pick_NG.long()[n, g]
    table = n if codes.table_per_row else table
    assert torch.equal(back, codes.table_TE[table, codes.values_NK.long()] * scale)
    assert torch.equal(grid.encode(back, codes), codes.values_NK)
    assert (back - w).norm() < 0.6 * w.norm()


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_rounder_gives_what_codes_decode_to(grid: Any) -> None:
    w = weight(130, 200)
    params = grid.fit(w, search="mse")
    for dtype in (torch.float32, torch.float64):
        rounder = grid.rounder(params, 130, 200, dtype)
        columns = [rounder.column(k, w[:, k].to(dtype), torch.empty(130, dtype=dtype)) for k in range(200)]
        found = torch.stack(columns, 1).float()
        # Ties aside, the nearest number is the nearest number; in any case what was found is a number of the grid.
        assert torch.equal(grid.decode(grid.encode(found, params), params), found)
        assert float((found != quantized(grid, w, params).decode()).float().mean()) < 1e-3
        stored = rounder.params()
        for name in ("scale_NG", "table_TE", "pick_NG", "factor"):
            a, b = getattr(stored, name), getattr(params, name)
            assert (a is None) == (b is None) and (a is None or torch.equal(a.float().nan_to_num(9), b.float().nan_to_num(9)))


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_search_is_never_worse_and_nothing_beats_the_nearest_code(grid: Any) -> None:
    w = weight(9, 130)
    error = {}
    for search in ("minmax", "mse"):
        params = grid.fit(w, search=search)
        back = grid.decode(grid.encode(w, params), params)
        error[search] = float((back - w).square().sum())
        for code in range(1 << grid.bits):
            other = grid.decode(torch.full(w.shape, code, dtype=torch.uint8), params)
            # The nearest up to the rounding of the comparison itself.
            worse = (other - w).abs() < (back - w).abs() * (1 - 1e-5) - 1e-12
            assert not bool(worse.any()), code
    assert error["mse"] <= error["minmax"] * (1 + 1e-5)


@pytest.mark.parametrize("dtype", [t for t in TYPES.values() if t.itemsize == 1], ids=str)
def test_eight_bit_scales_round_to_the_nearest_and_never_to_zero(dtype: torch.dtype) -> None:
    numbers = numbers_of_byte(dtype)
    known = numbers[(numbers > 0) & numbers.isfinite()]
    x = torch.exp(torch.randn(2000, generator=torch.Generator().manual_seed(0)) * 6).clamp(max=float(known.max()))
    found = rounded(x, dtype)
    nearest = known[(known[None] - x[:, None].clamp(min=float(known.min()))).abs().argmin(1)]
    assert torch.allclose((found - x).abs(), (nearest - x).abs(), rtol=1e-5, atol=0)
    assert torch.equal(scale_values(as_stored(found, dtype)), found)
    assert rounded(torch.tensor([0.0, 1e-30]), dtype).tolist() == [
        1.0,
        max(float(known.min()), float(rounded(torch.tensor([1e-30]), dtype))),
    ]
    assert as_stored(found, dtype).dtype == dtype


def test_a_table_of_its_own_for_every_row() -> None:
    table = torch.randn(5, 16)
    values = torch.randint(0, 16, (5, 12), dtype=torch.uint8)
    codes = Codes(values_NK=values, scale_NG=torch.ones(5, 1), table_TE=table, grid=Float(group_size=None))
    assert torch.equal(codes.decode(), table.gather(1, values.long()))
    parts = [codes.rows(slice(0, 2)), codes.rows(slice(2, 5))]
    assert torch.equal(torch.cat([part.decode() for part in parts]), codes.decode())
    whole = stacked(parts)
    assert whole is not None and whole.table_TE is not None and torch.equal(whole.table_TE, table)
    again = codes.grid.rounder(codes, 5, 12)
    assert torch.equal(again.column(3, codes.decode()[:, 3], torch.empty(5)), codes.decode()[:, 3])


def test_weights_with_other_factors_are_not_one() -> None:
    grid = Nvfp4()
    small, large = grid.fit(weight(4, 32)), grid.fit(weight(4, 32) * 1000)
    assert stacked([small, large]) is None
    pinned = grid.pinned(float(large.factor))  # type: ignore[arg-type]
    assert pinned == grid
    both = stacked([pinned.fit(weight(4, 32)), large])
    assert both is not None and both.scale_NG.shape == (8, 2)
    assert rows_of(grid, both, slice(4, 8)).factor is both.factor


def test_params_of_integers_are_as_before() -> None:
    params = Params(scale_NG=torch.ones(2, 3))
    assert not params.table_per_row and torch.equal(params.effective_scale(), torch.ones(2, 3))
