"""Integers with floating zero points, and HQQ as published, which fits them."""

from __future__ import annotations

import pytest
import torch
from tests.solving import MakeLayer
from torch import Tensor

from aerogel.errors import BadInput
from aerogel.model.layer import Layer
from aerogel.prune.magnitude import Magnitude
from aerogel.quantize.codes import quantized
from aerogel.quantize.formats.affine import Affine
from aerogel.quantize.gptq import Gptq
from aerogel.quantize.grids import IntGrid
from aerogel.quantize.hqq import Hqq
from aerogel.quantize.rtn import RoundToNearest


def shifted(N: int = 12, K: int = 192) -> Tensor:
    """Weights whose groups do not lie around zero."""
    random = torch.Generator().manual_seed(0)
    return (
        torch.randn(N, K, generator=random) * 0.02 + torch.randn(N, K // 64, generator=random).repeat_interleave(64, 1) * 0.02
    )


def published(w_NK: Tensor, bits: int, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """HQQ said once more, in float64 and for whole groups: codes, scales and zero points, before any is stored."""
    w = w_NK.double().reshape(-1, size)
    most = 2**bits - 1
    low, high = w.min(1, keepdim=True).values, w.max(1, keepdim=True).values
    scale, zero = (high - low) / most, -low * most / (high - low)
    if bits == 4:
        zero = zero.round()
    best, beta = float("inf"), 10.0
    for _ in range(20):
        codes = (w / scale + zero).round().clamp(0, most)
        error = w - (codes - zero) * scale
        shrunk = error.sign() * (error.abs() - error.abs() ** (0.7 - 1) / beta).clamp(min=0)
        zero = (codes - (w - shrunk) / scale).mean(1, keepdim=True)
        if error.abs().mean() >= best:
            break
        best, beta = float(error.abs().mean()), beta * 1.01
    return (w / scale + zero).round().clamp(0, most).reshape(w_NK.shape), scale, zero


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("size", [0.02, 3.0])
def test_hqq_is_what_was_published(bits: int, size: float) -> None:
    """With weights of 3.0 errors are large enough that not all are shrunk to nothing."""
    w_NK = shifted() / 0.02 * size
    codes, scale, zero = published(w_NK, bits, 64)
    layer = Hqq(grid=Affine(bits=bits, group_size=64))(Layer(name="a", weight_NK=w_NK))
    assert layer.codes is not None and layer.codes.zero_NG is not None
    torch.testing.assert_close(layer.codes.scale_NG, scale.reshape(12, -1).float(), rtol=1e-5, atol=0)
    torch.testing.assert_close(layer.codes.zero_NG, zero.reshape(12, -1).float(), rtol=2e-3, atol=2e-3)
    assert float((layer.codes.values_NK != codes).float().mean()) < 2e-3


def test_moving_the_zero_point_pays_and_an_integer_one_cannot_follow() -> None:
    layer = Layer(name="a", weight_NK=shifted())
    for bits in (2, 3):
        floating, integer = Affine(group_size=64, bits=bits), IntGrid(group_size=64, bits=bits, symmetric=False)
        error = {
            "moved": Hqq(grid=floating)(layer).notes["weight_error"],
            "range": RoundToNearest(grid=floating, clip="none")(layer).notes["weight_error"],
            "searched": RoundToNearest(grid=floating)(layer).notes["weight_error"],
            "integer": RoundToNearest(grid=integer)(layer).notes["weight_error"],
        }
        assert error["moved"] < 0.96 * error["range"] and error["searched"] < 0.99 * error["integer"], error


def test_one_bit_is_two_numbers_anywhere() -> None:
    two = torch.where(torch.rand(5, 128, generator=torch.Generator().manual_seed(1)) < 0.5, 0.3, 0.75)
    layer = Layer(name="a", weight_NK=two)
    for stage in (Hqq(grid=Affine(bits=1)), RoundToNearest(grid=Affine(bits=1, group_size=None), clip="mse")):
        assert float(stage(layer).notes["weight_error"]) < (1e-10 if isinstance(stage, Hqq) else 0.05)


def test_constant_groups_and_short_last_ones() -> None:
    w_NK = torch.cat([torch.full((3, 64), -0.7), torch.zeros(3, 64), torch.linspace(1, 1.5, 40).expand(3, 40)], 1)
    for scale_dtype in (torch.float32, torch.float16):
        layer = Hqq(grid=Affine(bits=4, scale_dtype=scale_dtype))(Layer(name="a", weight_NK=w_NK))
        back = layer.weight_NK
        torch.testing.assert_close(back[:, :128], w_NK[:, :128], rtol=1e-3, atol=0)
        assert float((back[:, 128:] - w_NK[:, 128:]).abs().max()) < 0.6 * 0.5 / 15


def test_gptq_and_round_to_nearest_take_it_and_calibration_helps(make_layer: MakeLayer) -> None:
    layer = make_layer(24, 128)
    grid = Affine(bits=3, group_size=32, scale_dtype=torch.float16)
    solved, rounded = Gptq(grid=grid)(layer), RoundToNearest(grid=grid)(layer)
    assert solved.codes is not None and torch.equal(solved.codes.decode(), solved.weight_NK)
    assert solved.loss is not None and rounded.loss is not None and solved.loss < 0.8 * rounded.loss


def test_random_rounding_is_right_on_average() -> None:
    w_NK = shifted(4, 64)
    grid = Affine(bits=2, group_size=64)
    layer = Layer(name="a", weight_NK=w_NK)
    rounds = [RoundToNearest(grid=grid, rounding="stochastic", clip="none", seed=seed)(layer).weight_NK for seed in range(400)]
    step = quantized(grid, w_NK, grid.fit(w_NK)).scale_NG.max()
    assert float((torch.stack(rounds).mean(0) - w_NK).abs().max()) < 5 * float(step) * 0.5 / 20


def test_what_it_cannot_hold_is_refused(make_layer: MakeLayer) -> None:
    sparse = Magnitude(pattern="2:4")(make_layer(8, 64))
    for stage in (Hqq(grid=Affine()), RoundToNearest(grid=Affine())):
        with pytest.raises(BadInput, match="floating zero point"):
            stage(sparse)
    with pytest.raises(BadInput, match="between 1 and 8"):
        Affine(bits=9)
