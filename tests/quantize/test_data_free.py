"""Round to nearest and HQQ: methods that look at the weight alone."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from aerogel.errors import BadInput, RunFailed
from aerogel.lazy import load
from aerogel.prune.magnitude import Magnitude
from aerogel.quantize import METHODS, SCALES
from aerogel.quantize.grids import Fp8Grid, IntGrid
from aerogel.quantize.hqq import Hqq
from aerogel.quantize.rtn import RoundToNearest

GRIDS = [IntGrid(bits=b, group_size=32, symmetric=s) for b in (2, 3, 4) for s in (True, False)]


def p_norm(done, layer, p=0.7):
    return float((done.weight_NK - layer.weight_NK).abs().pow(p).sum())


def test_tables_name_what_exists():
    for reference in {**METHODS, **SCALES}.values():
        assert load(reference).__doc__


@pytest.mark.parametrize("grid", GRIDS)
def test_range_search_removes_error(layer, grid):
    full, searched = (RoundToNearest(grid=grid, clip=clip)(layer) for clip in ("none", "mse"))
    assert searched.notes["weight_error"] < full.notes["weight_error"]
    assert searched.codes is not None and torch.equal(searched.weight_NK, searched.codes.decode())


@pytest.mark.parametrize("grid", GRIDS)
def test_weighting_by_inputs_lowers_the_output_error(layer, grid):
    plain, weighted = (RoundToNearest(grid=grid, weighted=w) for w in (False, True))
    assert weighted(layer).loss < plain(layer).loss
    assert (plain.needs, weighted.needs) == (set(), {"second_moment"})


def test_loss_is_known_only_where_there_are_statistics(layer):
    assert RoundToNearest(grid=GRIDS[0])(replace(layer, stats=None)).loss is None
    with pytest.raises(RunFailed, match="q_proj"):
        RoundToNearest(grid=GRIDS[0], weighted=True)(replace(layer, stats=None))


@pytest.mark.parametrize("grid", GRIDS)
def test_hqq_lowers_its_own_objective(layer, grid):
    full = RoundToNearest(grid=grid, clip="none", signed_scales=False)(layer)
    assert p_norm(Hqq(grid=grid)(layer), layer) < p_norm(full, layer)
    assert Hqq(grid=grid)(replace(layer, stats=None)).loss is None


@pytest.mark.parametrize("K", [1, 31, 33, 70])
def test_ragged_inputs(make_layer, K):
    layer = make_layer(N=5, K=96)
    layer = replace(layer, weight_NK=layer.weight_NK[:, :K].clone(), stats=None)
    for stage in (Hqq(grid=GRIDS[3]), RoundToNearest(grid=GRIDS[2])):
        assert stage(layer).codes.scale_NG.shape == (5, -(-K // 32))


@pytest.mark.parametrize("stage", [RoundToNearest, Hqq])
@pytest.mark.parametrize("grid", GRIDS[-2:])
def test_zeros_stay_zero(layer, stage, grid):
    sparse = Magnitude(pattern="2:4")(layer)
    done = stage(grid=grid)(sparse)
    assert bool((done.weight_NK[~sparse.mask_NK] == 0).all()) and torch.equal(done.mask_NK, sparse.mask_NK)


def test_fp8_needs_no_search(layer):
    assert RoundToNearest(grid=Fp8Grid())(layer).notes["weight_error"] < 1e-3


def test_what_cannot_be_stored_is_refused():
    with pytest.raises(BadInput, match="write affine"):
        IntGrid(bits=1)
    with pytest.raises(BadInput, match="format: affine"):
        Hqq(grid=Fp8Grid())
    with pytest.raises(BadInput, match="0 < p <= 1"):
        Hqq(grid=GRIDS[1], p=2.0)
    with pytest.raises(BadInput, match="norm"):
        RoundToNearest(grid=GRIDS[1], norm=0.0)


def test_weights_with_nan_fail_by_name(layer):
    broken = replace(layer, weight_NK=torch.full_like(layer.weight_NK, torch.inf))
    for stage in (RoundToNearest(grid=GRIDS[1]), Hqq(grid=GRIDS[1])):
        with pytest.raises(RunFailed, match="q_proj"):
            stage(broken)
