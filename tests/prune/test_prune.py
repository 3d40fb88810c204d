"""Pruning: the order of methods, exact counts, refit, masks that add up, and instructive refusals."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from aerogel.errors import BadInput, RunFailed
from aerogel.lazy import load
from aerogel.prune import METHODS
from aerogel.prune.magnitude import Magnitude
from aerogel.prune.refit import refit_rows
from aerogel.prune.sparsegpt import SparseGpt
from aerogel.prune.wanda import Wanda
from aerogel.quantize.grids import IntGrid
from aerogel.quantize.problem import prepare, relative_loss
from aerogel.quantize.rtn import RoundToNearest

ALL = [Magnitude, Wanda, SparseGpt]


@pytest.mark.parametrize("options", [{}, {"sparsity": 0.7}, {"pattern": "2:4"}, {"pattern": "4:8"}, {"pattern": "row"}])
def test_order_of_methods(layer, options):
    sparsegpt, wanda, magnitude = (method(**options)(layer).loss for method in (SparseGpt, Wanda, Magnitude))
    assert sparsegpt < wanda < magnitude


@pytest.mark.parametrize("method", ALL)
@pytest.mark.parametrize("options", [{}, {"sparsity": 0.7}, {"pattern": "2:4"}, {"pattern": "4:8"}])
def test_refit_always_improves_and_keeps_the_mask(layer, method, options):
    plain, fitted = (method(**options, refit=refit)(layer) for refit in (False, True))
    assert fitted.loss < plain.loss
    assert torch.equal(fitted.mask_NK, plain.mask_NK)
    assert bool((fitted.weight_NK[~fitted.mask_NK] == 0).all())


@pytest.mark.parametrize("method", ALL)
@pytest.mark.parametrize("keep, of", [(2, 4), (4, 8), (1, 4), (3, 6)])
def test_n_of_m_is_exact(layer, method, keep, of):
    mask = method(pattern=f"{keep}:{of}")(layer).mask_NK
    assert bool((mask.view(48, -1, of).sum(2) == keep).all())


@pytest.mark.parametrize("method", ALL)
@pytest.mark.parametrize("sparsity", [0.1, 0.5, 0.77])
def test_share_is_exact(layer, method, sparsity):
    done = method(sparsity=sparsity)(layer)
    assert done.mask_NK.dtype is torch.bool
    assert done.notes["sparsity"] == pytest.approx(sparsity, abs=0.01 if method is Wanda else 1e-3)
    rows = method(sparsity=sparsity, pattern="row")(layer).mask_NK.sum(1)
    assert len(rows.unique()) == 1


@pytest.mark.parametrize("method", [Magnitude, Wanda])
def test_blocks_go_as_one(layer, method):
    mask = method(pattern="4x2")(layer).mask_NK.view(12, 4, 96, 2)
    assert bool((mask.float().mean((1, 3)) * 8 % 8 == 0).all())
    assert float(mask.float().mean()) == 0.5


def test_ties_are_broken_by_position():
    from aerogel.prune.patterns import lowest

    assert lowest(torch.ones(1, 6), 2).tolist() == [[True, True, False, False, False, False]]
    assert lowest(torch.ones(1, 6), 0).sum() == 0


@pytest.mark.parametrize("method", ALL)
def test_an_earlier_mask_stays(layer, method):
    first = Magnitude(sparsity=0.3)(layer)
    second = method(sparsity=0.6)(first)
    assert not bool((second.mask_NK & ~first.mask_NK).any())
    assert second.notes["sparsity"] == pytest.approx(0.6, abs=0.02 if method is not Magnitude else 1e-3)


def test_refit_is_the_least_squares_solution(layer):
    h = prepare(layer.stats.second_moment_KK, name="x", damping=0.05, act_order=False).h_KK.double()
    done = Magnitude(pattern="2:4")(layer)
    mask, w = done.mask_NK, layer.weight_NK.double()
    fitted, steps = refit_rows(w, h, mask, done.weight_NK.double(), tolerance=1e-7)
    assert 0 < steps < 200
    for n in (0, 7, 31):
        kept = mask[n].nonzero()[:, 0]
        exact = torch.linalg.solve(h[kept][:, kept], (h @ w[n])[kept])
        assert torch.allclose(fitted[n, kept], exact, rtol=1e-4, atol=1e-6)


def test_refit_never_raises_a_row(layer, monkeypatch):
    """Conjugate gradients fall with every step, so stopping early is safe too."""
    h = prepare(layer.stats.second_moment_KK, name="x", damping=0.05, act_order=False).h_KK
    done = Wanda()(layer)
    previous = None
    for steps in (0, 1, 2, 5, 20):
        monkeypatch.setattr("aerogel.prune.refit.MOST_STEPS", steps)
        x, _ = refit_rows(layer.weight_NK, h, done.mask_NK, done.weight_NK)
        d = layer.weight_NK - x
        rows = (d @ h * d).sum(1)
        assert previous is None or bool((rows <= previous * 1.0001).all())
        previous = rows


@pytest.mark.parametrize("options", [{"pattern": "2:4"}, {"pattern": "4:8"}])
def test_loud_inputs_first_lose_less(make_layer, options):
    ordered, natural = (
        sum(SparseGpt(**options, act_order=act_order)(make_layer(seed=seed)).loss for seed in range(5))
        for act_order in (True, False)
    )
    assert ordered < natural


def test_shares_differ_between_inputs_but_not_in_sum(layer):
    """Quiet inputs give up more weights than loud ones, which equal shares per block would not allow."""
    mask = SparseGpt(sparsity=0.5)(layer).mask_NK
    loudest = layer.stats.second_moment_KK.diagonal().argsort(descending=True)
    assert int(mask.sum()) == mask.numel() // 2
    assert mask[:, loudest[:64]].float().mean() > 0.6 > 0.4 > mask[:, loudest[-64:]].float().mean()


def test_sparsegpt_in_chunks_of_rows(layer, monkeypatch):
    whole = SparseGpt(pattern="2:4")(layer)
    monkeypatch.setattr("aerogel.prune.sparsegpt.ROWS", 13)
    assert SparseGpt(pattern="2:4")(layer).loss == pytest.approx(whole.loss, rel=1e-3)


def test_loss_is_the_output_error(layer):
    done = SparseGpt()(layer)
    assert done.loss == pytest.approx(relative_loss(layer.weight_NK, done.weight_NK, layer.stats.second_moment_KK))
    assert Magnitude()(replace(layer, stats=None)).loss is None


def test_all_inputs_pruned_of_one_row_survive_refit(layer):
    w = layer.weight_NK.clone()
    w[0] = 0
    done = Wanda(refit=True)(replace(layer, weight_NK=w))
    assert bool(torch.isfinite(done.weight_NK).all()) and bool((done.weight_NK[0] == 0).all())


@pytest.mark.parametrize("method", ALL)
def test_deterministic(make_layer, method):
    a, b = (method(refit=True)(make_layer()) for _ in range(2))
    assert torch.equal(a.weight_NK, b.weight_NK) and torch.equal(a.mask_NK, b.mask_NK)


@pytest.mark.parametrize("method", ALL)
def test_inputs_that_do_not_divide_are_an_error_that_helps(make_layer, method):
    layer = make_layer(K=189)
    with pytest.raises(BadInput, match=r"q_proj has 189 inputs.*ignore"):
        method(pattern="2:4")(layer)
    assert method()(layer).mask_NK is not None


def test_needs():
    assert Magnitude().needs == set()
    assert Magnitude(refit=True).needs == Wanda().needs == SparseGpt().needs == {"second_moment"}
    for reference in METHODS.values():
        assert load(reference).__doc__


@pytest.mark.parametrize(
    "options, word",
    [
        ({"pattern": "4:2"}, "2:4"),
        ({"pattern": "0:4"}, "2:4"),
        ({"pattern": "4:4"}, "2:4"),
        ({"pattern": "0x4"}, "4x1"),
        ({"pattern": "half"}, "unstructured, row"),
        ({"pattern": "2:4", "sparsity": 0.75}, "contradicts"),
        ({"sparsity": 1.0}, "between 0 and 1"),
    ],
)
def test_contradictions_are_refused(options, word):
    for method in (Magnitude, Wanda, SparseGpt):
        with pytest.raises(BadInput, match=word):
            method(**options)


def test_other_refusals(layer):
    with pytest.raises(BadInput, match="method: wanda"):
        SparseGpt(pattern="4x1")
    with pytest.raises(BadInput, match="48x192"):
        Magnitude(pattern="5x1")(layer)
    with pytest.raises(BadInput, match="before the quantize stage"):
        Magnitude()(RoundToNearest(grid=IntGrid(bits=4))(layer))
    for stage in (Wanda(), SparseGpt(), Magnitude(refit=True)):
        with pytest.raises(RunFailed, match="q_proj"):
            stage(replace(layer, stats=None))
