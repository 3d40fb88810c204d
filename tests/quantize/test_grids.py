"""Rounding: nearest codes, exact decoding, stored scales, ragged and degenerate groups."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from aerogel.errors import BadInput
from aerogel.quantize.grids import Codes, Fp8Grid, IntGrid, Params, quantized
from aerogel.quantize.ranges import Search, Step, curvature_blocks

SCALES = [torch.float16, torch.bfloat16, torch.float32]


@st.composite
def cases(draw):
    grid = IntGrid(
        bits=draw(st.integers(2, 8)),
        group_size=draw(st.sampled_from([None, 1, 3, 8, 16, 100])),
        symmetric=draw(st.booleans()),
        scale_dtype=draw(st.sampled_from(SCALES)),
    )
    N, K = draw(st.integers(1, 5)), draw(st.integers(1, 40))
    torch.manual_seed(draw(st.integers(0, 99)))
    w = torch.randn(N, K) * draw(st.sampled_from([1e-3, 1.0, 50.0])) + draw(st.sampled_from([0.0, 3.0]))
    return grid, w


@settings(max_examples=150, deadline=None)
@given(cases())
def test_full_range_is_within_half_a_step(case):
    grid, w = case
    params = grid.fit(w)
    back = grid.decode(grid.encode(w, params), params)
    step = params.scale_NG.float().abs().repeat_interleave(grid.group_size or w.shape[1], 1)[:, : w.shape[1]]
    # A scale rounded down shortens the range by 2^b times what it lost (float16 has few digits left below 6e-5).
    lost = torch.finfo(grid.scale_dtype).eps * step.clamp(min=torch.finfo(grid.scale_dtype).smallest_normal)
    assert bool(((back - w).abs() <= step * 0.5 + 2**grid.bits * lost + 1e-7).all())


@settings(max_examples=100, deadline=None)
@given(cases(), st.sampled_from(["minmax", "mse"]))
def test_decoded_values_are_fixed_points_and_codes_decode_by_formula(case, search):
    grid, w = case
    codes = quantized(grid, w, grid.fit(w, search=search))
    assert codes.values_NK.dtype is torch.int8
    assert int(codes.values_NK.min()) >= grid.q_min and int(codes.values_NK.max()) <= grid.q_max
    assert codes.scale_NG.shape == (len(w), grid.groups(w.shape[1])) and codes.scale_NG.dtype is grid.scale_dtype
    back = codes.decode()
    again = grid.encode(back, Params(scale_NG=codes.scale_NG, zero_NG=codes.zero_NG))
    assert torch.equal(again, codes.values_NK)
    size = grid.group_size or w.shape[1]
    for n in range(len(w)):
        for k in range(w.shape[1]):
            zero = 0 if codes.zero_NG is None else int(codes.zero_NG[n, k // size])
            q = torch.tensor(int(codes.values_NK[n, k]) - zero)
            assert back[n, k] == q.float() * codes.scale_NG[n, k // size].float()
    assert codes.decode(torch.bfloat16).dtype is torch.bfloat16


@settings(max_examples=60, deadline=None)
@given(cases())
def test_search_is_never_worse_than_the_full_range(case):
    grid, w = case
    error = {}
    for search in ("minmax", "mse"):
        codes = quantized(grid, w, grid.fit(w, search=search))
        error[search] = float((codes.decode() - w).square().sum())
    assert error["mse"] <= error["minmax"] * (1 + 1e-5) + 1e-12


def test_symmetric_full_range_is_the_standard_formula():
    w = torch.tensor([[0.3, -1.5, 0.2, 0.75]])
    params = IntGrid(bits=4).fit(w)
    assert params.scale_NG.item() == pytest.approx(1.5 / 7.5)
    assert params.zero_NG is None
    assert IntGrid(bits=4).encode(w, params).tolist() == [[2, -8, 1, 4]]


def test_asymmetric_full_range_is_the_standard_formula():
    w = torch.tensor([[0.0, 1.0, 2.0, 3.0]])
    params = IntGrid(bits=2, symmetric=False).fit(w)
    assert params.zero_NG is not None and params.zero_NG.dtype is torch.int8
    assert (params.scale_NG.item(), params.zero_NG.item()) == (1.0, -2)
    assert IntGrid(bits=2, symmetric=False).encode(w, params).tolist() == [[-2, -1, 0, 1]]


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("search", ["minmax", "mse"])
def test_zero_group_has_scale_one_and_zero_is_always_exact(symmetric, search):
    w = torch.cat([torch.zeros(2, 8), torch.rand(2, 8) + 1], 1)
    w[:, 12] = 0
    codes = quantized(
        IntGrid(bits=3, group_size=8, symmetric=symmetric),
        w,
        IntGrid(bits=3, group_size=8, symmetric=symmetric).fit(w, search=search),
    )
    assert codes.scale_NG[:, 0].tolist() == [1.0, 1.0]
    assert bool((codes.decode()[:, :8] == 0).all()) and bool((codes.decode()[:, 12] == 0).all())


@pytest.mark.parametrize("value", [2.5, -2.5])
def test_constant_group_is_exact_when_asymmetric(value):
    grid = IntGrid(bits=2, group_size=8, symmetric=False)
    w = torch.full((3, 8), value)
    assert torch.allclose(quantized(grid, w, grid.fit(w, search="mse")).decode(), w)


def test_pruned_weights_do_not_widen_the_range():
    w = torch.tensor([[1.0, -1.0, 100.0, 0.5]])
    mask = torch.tensor([[True, True, False, True]])
    assert IntGrid(bits=4).fit(w, mask_NK=mask).scale_NG.item() == pytest.approx(1 / 7.5)
    assert Fp8Grid().fit(w, mask_NK=mask).scale_NG.item() == pytest.approx(1 / 448)


def test_short_last_group_has_its_own_scale():
    w = torch.cat([torch.ones(1, 8), torch.full((1, 3), 0.01)], 1)
    params = IntGrid(bits=8, group_size=8).fit(w, search="mse")
    assert params.scale_NG.shape == (1, 2) and params.scale_NG[0, 1] < 0.001


def test_rows_do_not_depend_on_the_chunk_they_are_in(monkeypatch):
    w = torch.randn(100, 40, generator=torch.Generator().manual_seed(0))
    grid = IntGrid(bits=3, group_size=16)
    whole = grid.fit(w)
    searched = float((quantized(grid, w, grid.fit(w, search="mse")).decode() - w).norm())
    monkeypatch.setattr("aerogel.quantize.codes.CHUNK", 16 * 40)
    assert torch.equal(grid.fit(w).scale_NG, whole.scale_NG)
    # A sum may round otherwise in another chunk and settle a tie, which changes next to nothing.
    assert float((quantized(grid, w, grid.fit(w, search="mse")).decode() - w).norm()) == pytest.approx(searched, rel=1e-3)


def test_negative_scale_uses_the_longer_side():
    w = torch.tensor([[0.9, 0.1, -0.3, 0.2] * 8])
    grid = IntGrid(bits=2)
    errors = {}
    for signed in (True, False):
        params = grid.fit(w, search=Search(signed=signed))
        errors[signed] = float((grid.decode(grid.encode(w, params), params) - w).square().sum())
    assert errors[True] < 0.8 * errors[False]


def test_importance_moves_error_to_where_it_is_cheap():
    w = torch.randn(16, 64)
    importance = torch.ones(64)
    importance[:8] = 1000.0
    grid = IntGrid(bits=3)
    plain, weighted = (grid.fit(w, x, search="mse") for x in (None, importance))
    error = [(grid.decode(grid.encode(w, p), p) - w).square()[:, :8].sum() for p in (plain, weighted)]
    assert error[1] < error[0]


def test_curvature_with_a_diagonal_matrix_is_importance():
    w, importance = torch.randn(8, 24), torch.rand(24) + 0.1
    grid = IntGrid(bits=3, group_size=16)
    by_weight = grid.fit(w, importance, search="mse")
    by_curvature = grid.fit(w, search="mse", curvature_KK=torch.diag(importance))
    assert torch.allclose(by_weight.scale_NG, by_curvature.scale_NG, rtol=1e-4)
    assert curvature_blocks(torch.eye(24), 16)[1].trace() == 8


def test_underflow_keeps_a_scale_and_overflow_says_what_to_write():
    grid = IntGrid(bits=4, scale_dtype=torch.float16)
    assert float(grid.fit(torch.full((1, 4), 1e-9)).scale_NG) > 0
    with pytest.raises(BadInput, match="bfloat16"):
        grid.fit(torch.full((1, 4), 1e9))


@pytest.mark.parametrize("strategy", ["channel", "block", "tensor"])
def test_fp8_shapes_and_error(strategy):
    grid = Fp8Grid(strategy=strategy)
    w = torch.randn(200, 300)
    params = grid.fit(w, search="mse")
    shape = {"channel": (200, 1), "block": (2, 3), "tensor": (1, 1)}[strategy]
    assert params.scale_NG.shape == shape
    codes = quantized(grid, w, params)
    assert codes.values_NK.dtype is torch.float8_e4m3fn
    assert float((codes.decode() - w).norm() / w.norm()) < 0.03
    assert torch.equal(grid.encode(codes.decode(), params).float(), codes.values_NK.float())


@pytest.mark.parametrize(
    "grid", [IntGrid(bits=3, group_size=16), IntGrid(bits=4, symmetric=False), Fp8Grid(), Fp8Grid(strategy="block")]
)
def test_rounder_agrees_with_encode_column_by_column(grid):
    w = torch.randn(130, 150)
    params = grid.fit(w, search="mse")
    rounder = grid.rounder(params, 130, 150)
    columns = torch.stack([rounder.column(k, w[:, k].contiguous(), torch.empty(130)) for k in range(150)], 1)
    assert torch.equal(columns, grid.decode(grid.encode(w, params), params))
    stored = rounder.params()
    assert torch.equal(stored.scale_NG, params.scale_NG)
    assert stored.zero_NG is None or torch.equal(stored.zero_NG, params.zero_NG)


def test_codes_decode_exactly():
    grid = IntGrid(bits=4, group_size=2, symmetric=False, scale_dtype=torch.bfloat16)
    codes = Codes(
        values_NK=torch.tensor([[-8, 7, 0]], dtype=torch.int8),
        scale_NG=torch.tensor([[0.5, -2.0]], dtype=torch.bfloat16),
        zero_NG=torch.tensor([[1, -1]], dtype=torch.int8),
        grid=grid,
    )
    assert codes.decode().tolist() == [[-4.5, 3.0, -2.0]]


@pytest.mark.parametrize(
    "options, word",
    [
        ({"bits": 1}, "bits"),
        ({"bits": 9}, "bits"),
        ({"bits": 4, "group_size": 0}, "group_size"),
        ({"bits": 4, "scale_dtype": torch.int8}, "scale_dtype"),
    ],
)
def test_impossible_grids_are_refused(options, word):
    with pytest.raises(BadInput, match=word):
        IntGrid(**options)


@pytest.mark.parametrize("options", [{"kind": "best"}, {"steps": 0}, {"shrink": 0.0}, {"norm": 0.0}, {"refits": -1}])
def test_impossible_searches_are_refused(options):
    with pytest.raises(BadInput):
        Search(**options)
    with pytest.raises(BadInput):
        Fp8Grid(strategy="row")


def test_steps_join_and_choose():
    a = Step(torch.tensor([1.0, 2.0]), -8.0, 7.0)
    b = Step(torch.tensor([3.0, 4.0]), -8.0, 7.0)
    assert Step.join([a, b], torch.cat).scale.tolist() == [1, 2, 3, 4]
    assert a.where(torch.tensor([False, True]), b).scale.tolist() == [1, 4]
