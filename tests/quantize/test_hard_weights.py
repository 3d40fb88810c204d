"""Weights that break formats: every table of `GRIDS` must survive them, or name what it cannot take."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.quantize.test_tables import GRIDS

from aerogel.errors import BadInput, RunFailed
from aerogel.model.layer import Layer
from aerogel.quantize.codes import quantized
from aerogel.quantize.rtn import RoundToNearest


def hard_weights() -> dict[str, torch.Tensor]:
    random = torch.Generator().manual_seed(0)
    w = torch.randn(6, 150, generator=random)
    zero = w.clone()
    zero[:, 32:128] = 0
    return {
        "one row, one column": w[:1, :1],
        "one row": w[:1],
        "short last group": w[:, :149],
        "zero groups": zero,
        "all zero": torch.zeros(4, 40),
        "constant": torch.full((4, 70), -2.5),
        "constant groups": torch.arange(5.0)[:, None].expand(5, 64).contiguous(),
        "one outlier": torch.cat([w, torch.full((6, 1), 300.0)], 1),
    }


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("name", hard_weights())
@pytest.mark.parametrize("search", ["minmax", "mse"])
def test_hard_weights_are_rounded_to_something_near(grid: Any, name: str, search: str) -> None:
    w = hard_weights()[name]
    codes = quantized(grid, w, grid.fit(w, search=search))
    back = codes.decode()
    assert bool(back.isfinite().all())
    assert torch.equal(quantized(grid, back, codes).decode(), back)
    # Three-bit floats and shared blocks lose much of a group with an outlier; nothing may come out larger than it went in.
    assert float((back - w).norm()) <= 0.8 * float(w.norm())
    if name == "all zero":
        assert bool((back == 0).all())
    if name == "zero groups" and grid.group_size == 32:
        assert bool((back[:, 32:128] == 0).all())


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("size", [1e-39, 1e-30, 1e30])
def test_tiny_and_huge_weights_are_finite_or_refused(grid: Any, size: float) -> None:
    w = torch.randn(4, 64, generator=torch.Generator().manual_seed(0)) * size
    try:
        codes = quantized(grid, w, grid.fit(w, search="mse"))
    except BadInput as error:
        assert "float16" in str(error) and size > 1
        return
    back = codes.decode()
    assert bool(back.isfinite().all())
    ordinary = grid.scale_dtype in (torch.float32, torch.bfloat16) and size > 1e-35
    if ordinary or (grid.scale_dtype == torch.float8_e8m0fnu and size > 1e-35):
        assert float((back.double() - w.double()).norm()) < 0.6 * float(w.double().norm())


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_no_number_is_refused_by_name(grid: Any, value: float) -> None:
    w = torch.randn(4, 64)
    w[1, 2] = value
    with pytest.raises(RunFailed, match=r"model\.layers\.7\.k_proj"):
        RoundToNearest(grid=grid)(Layer(name="model.layers.7.k_proj", weight_NK=w))
