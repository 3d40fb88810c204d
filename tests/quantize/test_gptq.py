"""GPTQ: what it promises about the loss, about masks, order, groups, precision and failures."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from aerogel.errors import BadInput, RunFailed
from aerogel.model.layer import Layer, Stats
from aerogel.prune.sparsegpt import SparseGpt
from aerogel.quantize.gptq import Gptq
from aerogel.quantize.grids import Fp8Grid, IntGrid
from aerogel.quantize.problem import prepare, relative_loss
from aerogel.quantize.ranges import Search
from aerogel.quantize.rtn import RoundToNearest

W4 = IntGrid(bits=4, group_size=32)
W3 = IntGrid(bits=3, group_size=32)
W2 = IntGrid(bits=2, group_size=32)
PLAIN = {"refit": 0, "clip": "none", "act_order": False, "damping": 0.01, "signed_scales": False}


def textbook(w_NK: Tensor, h_KK: Tensor, scale_NG: Tensor, bits: int, group: int, damping: float) -> Tensor:
    """The published recursion, in float64: Cholesky factor of the inverse, later columns updated at once."""
    w = w_NK.double().clone()
    h = h_KK.double().clone()
    h.diagonal().add_(damping * h.diagonal().mean())
    factor = torch.linalg.cholesky(torch.linalg.inv(h), upper=True)
    out = torch.empty_like(w)
    for i in range(w.shape[1]):
        scale = scale_NG[:, i // group].double()
        out[:, i] = (w[:, i] / scale).round().clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) * scale
        error = (w[:, i] - out[:, i]) / factor[i, i]
        w[:, i:] -= error[:, None] * factor[i, i:]
    return out


def test_equals_the_published_recursion(layer):
    ours = Gptq(grid=W4, **PLAIN)(layer)
    theirs = textbook(layer.weight_NK, layer.stats.second_moment_KK, ours.codes.scale_NG, 4, 32, 0.01)
    assert float((ours.weight_NK.double() - theirs).abs().gt(1e-6).float().mean()) < 1e-3


@pytest.mark.parametrize("grid", [W4, W3, W2, IntGrid(bits=4, symmetric=False, group_size=32), IntGrid(bits=3), Fp8Grid()])
def test_beats_round_to_nearest_on_correlated_inputs(layer, grid):
    assert Gptq(grid=grid)(layer).loss < 0.7 * RoundToNearest(grid=grid)(layer).loss


@pytest.mark.parametrize("grid", [W4, W3, W2])
def test_each_addition_lowers_the_loss(layer, grid):
    plain = Gptq(grid=grid, **PLAIN)(layer).loss
    clipped = Gptq(grid=grid, **{**PLAIN, "clip": "hessian"})(layer).loss
    signed = Gptq(grid=grid, **{**PLAIN, "clip": "hessian", "signed_scales": True})(layer).loss
    ordered = Gptq(grid=grid, refit=0, damping=0.01)(layer).loss
    full = Gptq(grid=grid, damping=0.01)(layer).loss
    assert full < ordered < signed < clipped < plain


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("symmetric", [True, False])
def test_refit_never_hurts_any_row_and_improves_with_rounds(layer, bits, symmetric):
    grid = IntGrid(bits=bits, group_size=32, symmetric=symmetric, scale_dtype=torch.bfloat16)
    h = prepare(layer.stats.second_moment_KK, name="x", damping=0.05, act_order=True).h_KK
    rows = []
    for rounds in (0, 1, 3):
        error = Gptq(grid=grid, refit=rounds)(layer).weight_NK - layer.weight_NK
        rows.append((error @ h * error).sum(1))
    assert bool((rows[1] <= rows[0] * 1.0001).all()) and bool((rows[2] <= rows[1] * 1.0001).all())
    assert rows[2].sum() < rows[1].sum() < rows[0].sum()


def test_weight_is_what_the_codes_decode_to(layer):
    for grid in (W3, IntGrid(bits=4, group_size=50, symmetric=False, scale_dtype=torch.float16), Fp8Grid(strategy="block")):
        done = Gptq(grid=grid)(layer)
        assert torch.equal(done.weight_NK, done.codes.decode())
        assert done.loss == pytest.approx(relative_loss(layer.weight_NK, done.weight_NK, layer.stats.second_moment_KK))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"groups": "updated"},
        {"groups": "updated", "act_order": False},
        {"groups": "updated", "act_order": False, "clip": "mse"},
    ],
)
@pytest.mark.parametrize("K, group", [(192, 32), (150, 32), (192, None), (130, 48), (64, 128), (300, 256), (5, 4), (1, None)])
def test_ragged_shapes(make_layer, options, K, group):
    layer = make_layer(N=7, K=max(K, 3))
    layer = replace(
        layer,
        weight_NK=layer.weight_NK[:, :K].clone(),
        stats=replace(layer.stats, second_moment_KK=layer.stats.second_moment_KK[:K, :K].clone()),
    )
    grid = IntGrid(bits=3, group_size=group, symmetric=False)
    done = Gptq(grid=grid, **options)(layer)
    assert done.codes.scale_NG.shape == (7, grid.groups(K))
    assert done.loss <= RoundToNearest(grid=grid)(layer).loss * 1.02


def test_updated_groups_beat_static_ones_in_natural_order(layer):
    static = Gptq(grid=W3, refit=0, act_order=False)(layer).loss
    assert Gptq(grid=W3, refit=0, act_order=False, groups="updated")(layer).loss < static


def test_updated_groups_are_solved_whole_in_the_order_of_activations(layer):
    """The first group's scales are those of the untouched weight: nothing came before it."""
    size, h_KK = 32, layer.stats.second_moment_KK.clone()
    loud = slice(3 * size, 4 * size)
    h_KK[loud] *= 30
    h_KK[:, loud] *= 30
    loud_layer = replace(layer, stats=replace(layer.stats, second_moment_KK=h_KK))
    grid = IntGrid(bits=3, group_size=size)
    options = {"grid": grid, "refit": 0, "groups": "updated", "clip": "mse"}
    ordered, natural = (Gptq(act_order=order, **options)(loud_layer) for order in (True, False))
    alone = grid.fit(layer.weight_NK[:, loud], None, None, Search(kind="mse", signed=True))
    assert torch.equal(ordered.codes.scale_NG[:, 3], alone.scale_NG[:, 0])
    assert not torch.equal(natural.codes.scale_NG[:, 3], alone.scale_NG[:, 0])
    assert ordered.loss < natural.loss


def test_activation_order_leaves_groups_in_place(layer):
    """Loud channels come first in the solve, but scales belong to consecutive inputs and codes lie in natural order."""
    quiet = replace(layer, weight_NK=layer.weight_NK.clone())
    quiet.weight_NK[:, :32] *= 1e-3
    scale = Gptq(grid=W4, refit=0)(quiet).codes.scale_NG.abs()
    assert bool((scale[:, 0] < 0.01 * scale[:, 1:].amin(1)).all())


@pytest.mark.parametrize("pattern", ["2:4", "unstructured"])
@pytest.mark.parametrize("options", [{}, {"groups": "updated"}, {"groups": "updated", "act_order": False}])
def test_mask_is_honoured_inside_the_loop(layer, pattern, options):
    sparse = SparseGpt(pattern=pattern, refit=True)(layer)
    for grid in (W4, IntGrid(bits=4, group_size=32, symmetric=False)):
        joint = Gptq(grid=grid, **options)(sparse)
        assert torch.equal(joint.mask_NK, sparse.mask_NK)
        assert bool((joint.weight_NK[~sparse.mask_NK] == 0).all())


def test_joint_beats_pruning_then_rounding(layer):
    """2:4 and 4 bits: the dense int4 error < joint < SparseGPT then round to nearest."""
    sparse = SparseGpt(pattern="2:4", refit=True)(layer)
    h = layer.stats.second_moment_KK
    joint = relative_loss(layer.weight_NK, Gptq(grid=W4)(sparse).weight_NK, h)
    after = relative_loss(layer.weight_NK, RoundToNearest(grid=W4)(SparseGpt(pattern="2:4")(layer)).weight_NK, h)
    assert joint < 0.9 * after


def test_after_a_refit_quantizing_the_sparse_weight_is_quantizing_the_dense_one(layer):
    """The loss splits exactly: what refitting leaves is orthogonal to every change on the mask."""
    sparse = SparseGpt(pattern="2:4", refit=True, damping=1e-6)(layer)
    h = layer.stats.second_moment_KK
    done = Gptq(grid=W4)(sparse).weight_NK
    d, left, right = (layer.weight_NK - done), (layer.weight_NK - sparse.weight_NK), (sparse.weight_NK - done)
    energy = [float((x @ h * x).sum()) for x in (d, left, right)]
    assert energy[0] == pytest.approx(energy[1] + energy[2], rel=1e-3)


def test_grouping_changes_nothing(make_layer):
    first = make_layer(N=48, seed=1, name="q")
    others = [replace(make_layer(N=n, seed=n, name=str(n)), stats=first.stats) for n in (16, 33)]
    stranger = make_layer(N=20, seed=9, name="stranger")
    layers = [first, *others, stranger]
    solver = Gptq(grid=W3)
    for alone, together in zip(map(solver, layers), solver.call_group(layers), strict=True):
        assert torch.equal(alone.weight_NK, together.weight_NK)
        assert alone.loss == together.loss and alone.name == together.name


def test_same_input_same_codes(make_layer):
    a, b = (Gptq(grid=W2)(make_layer()) for _ in range(2))
    assert torch.equal(a.codes.values_NK, b.codes.values_NK) and torch.equal(a.codes.scale_NG, b.codes.scale_NG)


def test_threads_change_next_to_nothing(layer):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    one = Gptq(grid=W3)(layer)
    torch.set_num_threads(2)
    two = Gptq(grid=W3)(layer)
    torch.set_num_threads(threads)
    assert one.loss == pytest.approx(two.loss, rel=0.02)


def test_float32_is_enough(layer):
    single, double = (Gptq(grid=W3, precision=p)(layer) for p in ("float32", "float64"))
    assert single.loss == pytest.approx(double.loss, rel=0.01)


def test_rows_in_chunks_are_the_same_rows(layer, monkeypatch):
    whole = Gptq(grid=W4)(layer)
    monkeypatch.setattr("aerogel.quantize.gptq.ROWS", 17)
    parts = Gptq(grid=W4)(layer)
    assert parts.codes.scale_NG.shape == whole.codes.scale_NG.shape
    assert parts.loss == pytest.approx(whole.loss, rel=0.02)


def test_dead_inputs_are_rounded_to_nearest(layer):
    h = layer.stats.second_moment_KK.clone()
    h[:5] = h[:, :5] = 0
    dead = replace(layer, stats=replace(layer.stats, second_moment_KK=h))
    done = Gptq(grid=W4)(dead)
    assert done.notes["dead_inputs"] == 5
    scale = done.codes.scale_NG[:, :1].abs()
    wanted = layer.weight_NK[:, :5]
    inside = wanted.abs() < 6 * scale
    assert bool(((done.weight_NK[:, :5] - wanted).abs() <= 0.51 * scale)[inside].all())


def test_retries_are_stated(layer):
    h = layer.stats.second_moment_KK.clone()
    eigenvalues, vectors = torch.linalg.eigh(h)
    eigenvalues[0] = -0.03 * h.diagonal().mean()
    broken = vectors @ torch.diag(eigenvalues) @ vectors.T
    bent = replace(layer, stats=replace(layer.stats, second_moment_KK=(broken + broken.T) / 2))
    done = Gptq(grid=W4, damping=0.01)(bent)
    assert done.notes["retries"] == 1 and done.notes["damping"] == pytest.approx(0.1)


def test_hopeless_second_moment_fails_by_name(layer):
    h = layer.stats.second_moment_KK.clone()
    h[0, 1] = h[1, 0] = 1e4 * float(h.diagonal().max())
    bent = replace(layer, stats=replace(layer.stats, second_moment_KK=h))
    with pytest.raises(RunFailed, match=r"q_proj.*damping 1.*precision: float64"):
        Gptq(grid=W4)(bent)


@pytest.mark.parametrize(
    "stats, word",
    [
        (None, "kept none"),
        (Stats(tokens=9), "kept none"),
        (Stats(tokens=0, second_moment_KK=torch.zeros(192, 192)), "0 calibration tokens"),
        (Stats(tokens=9, second_moment_KK=torch.zeros(192, 192)), "saw no input"),
        (Stats(tokens=9, second_moment_KK=torch.full((192, 192), torch.nan)), "not finite"),
        (Stats(tokens=9, second_moment_KK=torch.eye(3)), r"192 inputs.*\[3, 3\]"),
    ],
)
def test_useless_statistics_fail_by_name(layer, stats, word):
    with pytest.raises(RunFailed, match=rf"(?s)(?=.*q_proj).*{word}"):
        Gptq(grid=W4)(replace(layer, stats=stats))


def test_weights_with_nan_fail_by_name(layer):
    broken = layer.weight_NK.clone()
    broken[0, 0] = torch.nan
    with pytest.raises(RunFailed, match="q_proj"):
        Gptq(grid=W4)(replace(layer, weight_NK=broken))


def mismatch(w: Tensor, q: Tensor, dense: Tensor, seen: Tensor) -> float:
    return float((dense @ w.T - seen @ q.T).square().sum())


def test_gptaq_lowers_the_mismatch(layer):
    torch.manual_seed(0)
    dense = torch.randn(600, 192) @ (torch.randn(192, 192) / 8)
    seen = dense * (1 - 0.1 * torch.rand(192)) + 0.05 * torch.randn(600, 192) @ (torch.randn(192, 192) / 8)
    stats = Stats(tokens=600, second_moment_KK=seen.T @ seen, cross_moment_KK=(dense - seen).T @ seen)
    layer = Layer(name="x", weight_NK=layer.weight_NK, stats=stats)
    loss = {
        alpha: mismatch(layer.weight_NK, Gptq(grid=W4, gptaq=alpha > 0, gptaq_alpha=alpha or 1.0)(layer).weight_NK, dense, seen)
        for alpha in (0.0, 0.25, 1.0)
    }
    assert loss[1.0] < loss[0.25] < loss[0.0]


def test_gptaq_without_its_statistics_fails_by_name(layer):
    solver = Gptq(grid=W4, gptaq=True)
    assert solver.needs == {"second_moment", "cross_moment"} and Gptq(grid=W4).needs == {"second_moment"}
    with pytest.raises(RunFailed, match="q_proj"):
        solver(layer)


@pytest.mark.parametrize(
    "options, word",
    [
        ({"damping": 0.0}, "damping"),
        ({"refit": -1}, "refit"),
        ({"gptaq_alpha": 2.0}, "gptaq_alpha"),
        ({"groups": "updated", "grid": Fp8Grid(strategy="tensor")}, "static"),
    ],
)
def test_contradictions_are_refused(options, word):
    with pytest.raises(BadInput, match=word):
        Gptq(**{"grid": W4, **options})
