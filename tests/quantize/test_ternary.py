"""Ternary weights: BitNet's rounding to the letter, the scale that three values want, and the solver unchanged."""

from __future__ import annotations

import pytest
import torch
from tests.quantize.conftest import MakeLayer

from aerogel.errors import BadInput
from aerogel.model.layer import Layer
from aerogel.pack.config import format_of
from aerogel.quantize.codes import quantized
from aerogel.quantize.formats.ternary import Ternary
from aerogel.quantize.gptq import Gptq
from aerogel.quantize.grids import IntGrid
from aerogel.quantize.problem import relative_loss
from aerogel.quantize.rtn import RoundToNearest


def test_one_scale_for_a_weight_is_the_rounding_of_bitnet() -> None:
    w_NK = torch.randn(12, 40)
    grid = Ternary(scales="tensor")
    codes = quantized(grid, w_NK, grid.fit(w_NK))
    scale = w_NK.abs().mean()
    assert torch.equal(codes.values_NK, (w_NK / scale).round().clamp(-1, 1).to(torch.int8))
    torch.testing.assert_close(codes.scale_NG, scale.expand(12, 1))


def test_absmean_of_a_short_group_counts_its_own_weights() -> None:
    w_NK = torch.randn(3, 40)
    scale_NG = Ternary(scales="absmean", group_size=16).fit(w_NK).scale_NG
    torch.testing.assert_close(scale_NG[:, 2], w_NK[:, 32:].abs().mean(1))


def test_the_searched_scale_is_the_best_for_a_gaussian() -> None:
    w_NK = torch.randn(64, 1024)
    errors = []
    for grid in (Ternary(group_size=128), Ternary(group_size=128, scales="absmean")):
        codes = quantized(grid, w_NK, grid.fit(w_NK, search="mse"))
        assert set(codes.values_NK.unique().tolist()) == {-1, 0, 1}
        errors.append(float((codes.decode() - w_NK).square().mean()))
    assert errors[0] == pytest.approx(0.19, abs=0.005)  # the best three levels on N(0, 1): 0.1902
    assert errors[1] > 1.25 * errors[0]


def test_gptq_solves_ternary_weights_and_keeps_masks(make_layer: MakeLayer) -> None:
    layer: Layer = make_layer()
    assert layer.stats is not None and layer.stats.second_moment_KK is not None
    grid = Ternary(group_size=32)
    rounded, solved = RoundToNearest(grid=grid)(layer), Gptq(grid=grid)(layer)
    losses = [relative_loss(layer.weight_NK, x.weight_NK, layer.stats.second_moment_KK) for x in (rounded, solved)]
    assert losses[1] < 0.7 * losses[0]
    assert solved.codes is not None and int(solved.codes.values_NK.min()) == -1
    mask_NK = torch.rand(layer.weight_NK.shape) < 0.5
    pruned = Gptq(grid=grid)(layer.with_(mask_NK=mask_NK))
    assert bool((pruned.weight_NK[~mask_NK] == 0).all())


def test_files_hold_them_as_integers_of_two_bits() -> None:
    grid, w_NK = Ternary(group_size=16, scale_dtype=torch.bfloat16), torch.randn(5, 40)
    codes = quantized(grid, w_NK, grid.fit(w_NK, search="mse"))
    stored, plain = format_of("pack-quantized"), IntGrid(bits=2, group_size=16, scale_dtype=torch.bfloat16)
    assert stored.config(grid) == stored.config(plain)
    assert torch.equal(stored.decode(stored.encode(codes), plain), codes.decode())


def test_zeros_and_wrong_options() -> None:
    for scales in ("searched", "absmean", "tensor"):
        grid = Ternary(scales=scales)
        assert not quantized(grid, torch.zeros(3, 5), grid.fit(torch.zeros(3, 5))).decode().any()
    for wrong in ({"bits": 3}, {"symmetric": False}, {"scales": "tensor", "group_size": 16}, {"scales": "best"}):
        with pytest.raises(BadInput):
            Ternary(**wrong)  # type: ignore[arg-type]
