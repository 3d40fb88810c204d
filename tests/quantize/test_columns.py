"""Kept columns: exact, chosen by what calibration saw, never touched by pruning's zeros, beside outliers too."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from tests.quantize.conftest import MakeLayer

from aerogel.errors import BadInput, RunFailed
from aerogel.model.capture import Accumulator
from aerogel.model.layer import Layer, Stats
from aerogel.model.shared_factor import shared_factors, two_level_grid, with_factor
from aerogel.quantize.columns import NAMES, Columns, KeepColumns
from aerogel.quantize.formats.nvfp4 import Nvfp4
from aerogel.quantize.gptq import Gptq
from aerogel.quantize.grids import IntGrid
from aerogel.quantize.input_scale import InputScale, Measured
from aerogel.quantize.outliers import Keep, Outliers
from aerogel.quantize.planes import PlaneGrid
from aerogel.quantize.rtn import RoundToNearest
from aerogel.quantize.sidecars import Keeping, read
from aerogel.recipes.schema import Recipe

GRID = IntGrid(bits=4, group_size=64)


def peaked(layer: Layer) -> Layer:
    stats = layer.stats
    assert stats is not None and stats.second_moment_KK is not None
    return layer.with_(stats=replace(stats, peak_K=3 * (stats.second_moment_KK.diagonal() / stats.tokens).sqrt()))


@pytest.mark.parametrize("method", [RoundToNearest(grid=GRID), Gptq(grid=GRID), RoundToNearest(grid=Nvfp4())], ids=str)
def test_columns_are_exact_and_the_output_is_nearer(method: Any, make_layer: MakeLayer) -> None:
    layer = peaked(make_layer())
    plain, kept = method(layer), Keeping(method=method, columns=KeepColumns(columns="largest", column_share=0.03))(layer)
    (columns,) = kept.sidecars
    assert isinstance(columns, Columns) and kept.codes is not None
    assert len(columns.index_C) == 6 and kept.notes["columns"] == 6
    index = columns.index_C.long()
    assert set(index.tolist()) == set(layer.stats.peak_K.topk(6).indices.tolist())  # type: ignore[union-attr]
    torch.testing.assert_close(kept.weight_NK[:, index], layer.weight_NK[:, index], rtol=2**-8, atol=0)
    assert not kept.codes.decode()[:, index].any()
    assert torch.equal(columns.put(kept.codes.decode()), kept.weight_NK)
    assert kept.loss < 0.8 * plain.loss


def test_threshold_keeps_what_exceeds_it_and_at_most_its_share(make_layer: MakeLayer) -> None:
    layer = peaked(make_layer())
    peak_K = layer.stats.peak_K  # type: ignore[union-attr]
    limit = float(peak_K.sort().values[-4])
    wide = KeepColumns(columns="threshold", column_threshold=limit, column_share=0.1)
    assert wide.choose(layer).tolist() == (peak_K > limit).nonzero()[:, 0].tolist()
    assert len(replace(wide, column_threshold=1e-3).choose(layer)) == wide.count(192) == 20
    assert len(replace(wide, column_threshold=1e9).choose(layer)) == 0


def test_peaks_are_the_largest_inputs_and_merge(make_layer: MakeLayer) -> None:
    x_TK = torch.randn(40, 8)
    x_TK[3, 1] = torch.inf  # a token that is left out leaves no peak either
    halves = []
    for part in x_TK.split(20):
        total = Accumulator(8, cross=False, device=torch.device("cpu"))
        total.skipped = -5
        total.add(part)
        halves.append(total.stats("any"))
    good = torch.cat([x_TK[:3], x_TK[4:]])
    assert torch.equal((halves[0] + halves[1]).peak_K, good.abs().amax(0))  # type: ignore[arg-type]
    assert (Stats(tokens=1) + halves[0]).peak_K is halves[0].peak_K


def test_with_outliers_no_weight_is_kept_twice_and_zeros_stay(make_layer: MakeLayer) -> None:
    layer = peaked(make_layer())
    mask_NK = torch.rand(layer.weight_NK.shape, generator=torch.Generator().manual_seed(2)) > 0.5
    layer = layer.with_(mask_NK=mask_NK, weight_NK=layer.weight_NK * mask_NK)
    both = Keeping(
        method=Gptq(grid=GRID),
        keep=Keep(outliers="sigma", outlier_sigma=1.0),
        columns=KeepColumns(columns="largest", column_share=0.02),
    )
    found = both(layer)
    columns, outliers = found.sidecars
    assert isinstance(columns, Columns) and isinstance(outliers, Outliers)
    assert not torch.isin(outliers.places()[1], columns.index_C).any() and len(outliers.value_E) > 0
    assert not found.weight_NK[~mask_NK].any()
    stored = {**columns.tensors(), **outliers.tensors()}
    assert {n: (tuple(t.shape), t.dtype.itemsize) for n, t in stored.items() if n in NAMES} == {
        n: (s, d.itemsize) for n, (s, d) in both.shapes(48, 192).items() if n in NAMES
    }
    again = found.codes.decode()  # type: ignore[union-attr]
    for sidecar in read(stored, 48, 192, "any").values():
        sidecar.put(again)
    assert torch.equal(again, found.weight_NK)


@pytest.mark.parametrize("columns", ["largest", "dynamic"])
def test_a_stored_scale_of_inputs_is_that_of_the_inputs_which_are_rounded(columns: Any, make_layer: MakeLayer) -> None:
    layer = peaked(make_layer())
    rule = KeepColumns(columns=columns, column_share=0.02, column_threshold=2.0)
    keeping = Keeping(method=RoundToNearest(grid=IntGrid(bits=8)), columns=rule)
    found = Measured(method=keeping, activations="int8-static")(layer)
    kept, scale = found.sidecars
    assert isinstance(kept, Columns) and isinstance(scale, InputScale)
    peak_K = layer.stats.peak_K.clone()  # type: ignore[union-attr]
    peak_K[kept.index_C.long()] = 0
    wanted = 2.0 if columns == "dynamic" else float(peak_K.max())
    assert float(scale.scale_1) == pytest.approx(wanted / 127)
    assert wanted < float(layer.stats.peak_K.max())  # type: ignore[union-attr]


def test_stages_that_pin_a_factor_pin_it_inside() -> None:
    stage = {"quantize": {"method": "rtn", "format": "nvfp4", "outliers": "sigma"}}
    (spec,) = Recipe.load({"aerogel": 1, "stages": [stage]}).stages
    grid = two_level_grid([spec])
    assert grid is not None
    factors = shared_factors([(grid, torch.randn(4, 16))])
    pinned = with_factor(spec, factors).stage
    assert isinstance(pinned, Keeping) and pinned.grid.factor == factors[grid]


def test_refusals(make_layer: MakeLayer) -> None:
    with pytest.raises(BadInput, match="column_share"):
        KeepColumns(column_share=0.9)
    with pytest.raises(BadInput, match="column_threshold"):
        KeepColumns(column_threshold=0.0)
    with pytest.raises(RunFailed, match="peaks"):
        KeepColumns(columns="largest").choose(make_layer())
    with pytest.raises(BadInput, match=r"single weights at zero.*columns"):
        Keeping(method=RoundToNearest(grid=PlaneGrid(bits=1)), columns=KeepColumns(columns="largest"))(peaked(make_layer()))
    with pytest.raises(BadInput, match="dynamic"):
        Recipe.load({"aerogel": 1, "stages": [{"quantize": {"method": "rtn", "bits": 8, "columns": "dynamic"}}]})
    held = Columns.of(torch.randn(4, 9), torch.tensor([8, 2]))
    assert held.index_C.tolist() == [2, 8]
    with pytest.raises(BadInput, match="damaged"):
        held.check(4, 8, "any")
