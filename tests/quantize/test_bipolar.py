"""Bipolar integers: all odd numbers, and an exact product by counting bits at every pair of widths."""

from __future__ import annotations

import pytest
import torch
from tests.quantize.conftest import MakeLayer

from aerogel.errors import BadInput
from aerogel.kernels.linear import Linear
from aerogel.model.layer import Layer
from aerogel.quantize.bipolar import WIDTHS, bipolar, integers_of, multiply, planes_of, popcount, product
from aerogel.quantize.codes import quantized
from aerogel.quantize.formats.bipolar import Bipolar
from aerogel.quantize.gptq import Gptq


@pytest.mark.parametrize("x_bits", WIDTHS)
@pytest.mark.parametrize("w_bits", WIDTHS)
def test_the_product_is_exact_at_every_pair_of_widths(w_bits: int, x_bits: int) -> None:
    K = 77
    w_NK = 2 * torch.randint(0, 1 << w_bits, (6, K)) - (1 << w_bits) + 1
    x_MK = 2 * torch.randint(0, 1 << x_bits, (4, K)) - (1 << x_bits) + 1
    w_NK[0], x_MK[0] = (1 << w_bits) - 1, (1 << x_bits) - 1
    found = product(planes_of(x_MK, x_bits), planes_of(w_NK, w_bits), K)
    assert torch.equal(found, x_MK.long() @ w_NK.long().T)


@pytest.mark.parametrize("bits", WIDTHS)
def test_rounding_takes_the_nearest_odd_number(bits: int) -> None:
    x_NK = torch.randn(5, 64)
    q_NK, scale_N1 = bipolar(x_NK, bits)
    most = (1 << bits) - 1
    assert bool((q_NK % 2 == 1).all()) and int(q_NK.abs().max()) == most
    assert float((q_NK * scale_N1 - x_NK).abs().div(scale_N1).max()) <= 1 + 1e-5
    zeros, one = bipolar(torch.zeros(2, 3), bits, per_row=False)
    assert one.item() == 1 and bool((zeros.abs() == 1).all())


@pytest.mark.parametrize("bits", WIDTHS)
def test_stored_codes_are_the_nearest_odd_integers_and_multiply_by_counting_bits(bits: int) -> None:
    w_NK = torch.randn(9, 77)
    grid = Bipolar(bits=bits)
    codes = quantized(grid, w_NK, grid.fit(w_NK))
    q_NK, scale_N1 = bipolar(w_NK, bits)
    assert torch.equal(integers_of(codes), q_NK) and torch.equal(codes.scale_NG, scale_N1)
    layer = Linear.from_codes(codes)
    assert torch.equal(layer.dequantize(torch.float32), q_NK * scale_N1)
    x_MK = torch.randn(4, 77)
    q_MK, scale_M1 = bipolar(x_MK, 6)
    found = multiply(x_MK, layer.columns().codes, 6)
    wanted = (q_MK.long() @ q_NK.long().T).float() * scale_M1 * scale_N1.T
    assert torch.equal(found, wanted)
    torch.testing.assert_close(found, layer(q_MK * scale_M1), rtol=1e-4, atol=1e-3)


def test_groups_of_zeros_stay_zero_and_single_ones_cannot(make_layer: MakeLayer) -> None:
    grid = Bipolar(bits=3, group_size=16)
    w_NK = torch.randn(4, 48)
    w_NK[:, 16:32] = 0
    codes = quantized(grid, w_NK, grid.fit(w_NK))
    assert not codes.decode()[:, 16:32].any() and bool(codes.decode()[:, :16].all())
    assert not codes.scale_NG[:, 1].any()
    with pytest.raises(BadInput, match="single weights at zero"):
        grid.fit(w_NK, None, w_NK != 0)
    layer = make_layer(8, 96)
    layer = layer.with_(weight_NK=layer.weight_NK * (torch.arange(96) // 16 != 2))
    solved = Gptq(grid=grid)(layer)
    assert isinstance(solved, Layer) and solved.codes is not None
    assert torch.equal(solved.codes.decode(), solved.weight_NK) and not solved.weight_NK[:, 32:48].any()


def test_popcount_and_refusals() -> None:
    words = torch.tensor([0, 1, -1, -2147483648, 0x7FFFFFFF, 0x12345678], dtype=torch.int32)
    assert popcount(words).tolist() == [0, 1, 32, 1, 31, 13]
    with pytest.raises(BadInput):
        bipolar(torch.ones(1, 1), 9)
    with pytest.raises(BadInput):
        Bipolar(bits=9)
    grouped = Bipolar(bits=3, group_size=2)
    with pytest.raises(BadInput, match="one scale per output"):
        multiply(torch.ones(1, 4), quantized(grouped, torch.ones(2, 4), grouped.fit(torch.ones(2, 4))), 3)
