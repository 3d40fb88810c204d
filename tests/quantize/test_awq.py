"""AWQ on sites: salient channels, folding, tied channels, failures."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from aerogel.errors import BadInput, RunFailed
from aerogel.model.layer import Layer, Stats
from aerogel.quantize.awq import Awq
from aerogel.quantize.grids import IntGrid
from aerogel.quantize.problem import relative_loss
from aerogel.quantize.rtn import RoundToNearest
from aerogel.quantize.site import Site, scaled_stats

W3 = IntGrid(bits=3, group_size=32)


def site(make_layer, **changes):
    first = make_layer(name="q")
    second = replace(make_layer(N=24, seed=3, name="k"), stats=first.stats)
    return Site(**{"name": "norm", "consumers": (first, second), "grids": (W3, W3), **changes})


def output_error(one: Site, grid=W3) -> float:
    """Squared output error of all consumers when they are rounded behind the site's scale."""
    scale = torch.ones(192) if one.scale_K is None else one.scale_K
    total = 0.0
    for dense, scaled in zip(one.consumers, one.scaled(), strict=True):
        rounded = RoundToNearest(grid=grid, weighted=True)(scaled).weight_NK / scale
        d = dense.weight_NK - rounded
        total += float((d @ dense.stats.second_moment_KK * d).sum())
    return total


def test_improves_on_salient_channels(make_layer):
    plain = site(make_layer)
    scaled = Awq()(plain)
    assert scaled.notes["ratio"] > 0 and scaled.notes["loss_against_unscaled"] < 1
    assert output_error(scaled) < 0.95 * output_error(plain)
    assert float(scaled.scale_K.max() * scaled.scale_K.min()) == pytest.approx(1, rel=1e-4)


def test_nothing_to_gain_means_no_scale():
    torch.manual_seed(0)
    x = torch.randn(4096, 64)
    layer = Layer(name="q", weight_NK=torch.randn(32, 64), stats=Stats(tokens=4096, second_moment_KK=x.T @ x))
    scaled = Awq()(Site(name="s", consumers=(layer,), grids=(W3,)))
    assert scaled.notes["loss_against_unscaled"] > 0.9


def test_folding_leaves_the_output_alone(make_layer):
    scaled = Awq()(site(make_layer))
    x = torch.randn(5, 192)
    for dense, moved in zip(scaled.consumers, scaled.scaled(), strict=True):
        assert torch.allclose((x * scaled.producer_scale()) @ moved.weight_NK.T, x @ dense.weight_NK.T, atol=1e-4)
        # The loss of an error is the same measured before and behind the scale.
        d = 0.01 * torch.randn_like(dense.weight_NK)
        before = relative_loss(dense.weight_NK, dense.weight_NK + d, dense.stats.second_moment_KK)
        behind = relative_loss(moved.weight_NK, moved.weight_NK + d * scaled.scale_K, moved.stats.second_moment_KK)
        assert behind == pytest.approx(before, rel=1e-3)


def test_consumers_keep_sharing_statistics(make_layer):
    first, second = Awq()(site(make_layer)).scaled()
    assert first.stats is second.stats


def test_tied_channels_share_a_scale(make_layer):
    tie = torch.arange(192) // 4
    scaled = Awq()(site(make_layer, tie_K=tie))
    groups = scaled.scale_K.view(-1, 4)
    assert torch.equal(groups, groups[:, :1].expand(-1, 4))
    assert torch.allclose(scaled.producer_scale(), 1 / groups[:, 0])


def test_consumers_that_stay_as_they_are_do_not_vote(make_layer):
    both = site(make_layer)
    one = replace(both, grids=(W3, None))
    alone = Awq()(Site(name="s", consumers=both.consumers[:1], grids=(W3,)))
    assert torch.equal(Awq()(one).scale_K, alone.scale_K)


def test_unscaled_site_passes_through(make_layer):
    plain = site(make_layer)
    assert plain.scaled() is plain.consumers and plain.producer_scale() is None


def test_cross_moments_are_scaled_too():
    stats = Stats(tokens=1, second_moment_KK=torch.ones(2, 2), cross_moment_KK=torch.ones(2, 2))
    moved = scaled_stats(stats, torch.tensor([1.0, 2.0]))
    assert moved.second_moment_KK.tolist() == moved.cross_moment_KK.tolist() == [[1, 2], [2, 4]]


def test_dead_channels_get_a_finite_scale(make_layer):
    one = make_layer()
    h = one.stats.second_moment_KK.clone()
    h[3] = h[:, 3] = 0
    dead = replace(one, stats=replace(one.stats, second_moment_KK=h))
    scale = Awq()(Site(name="s", consumers=(dead,), grids=(W3,))).scale_K
    assert bool(torch.isfinite(scale).all()) and bool((scale > 0).all())


def test_failures_name_the_layer(make_layer):
    blind = replace(make_layer(name="q"), stats=None)
    with pytest.raises(RunFailed, match="q"):
        Awq()(Site(name="s", consumers=(blind,), grids=(W3,)))
    with pytest.raises(RunFailed, match="site s"):
        Site(name="s", consumers=(blind,), grids=())
    with pytest.raises(BadInput, match="steps"):
        Awq(steps=0)
