"""Bipolar integers: all odd numbers, and an exact product by counting bits at every pair of widths."""

from __future__ import annotations

import pytest
import torch

from aerogel.errors import BadInput
from aerogel.quantize.bipolar import WIDTHS, bipolar, planes_of, popcount, product


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


def test_popcount_and_refusals() -> None:
    words = torch.tensor([0, 1, -1, -2147483648, 0x7FFFFFFF, 0x12345678], dtype=torch.int32)
    assert popcount(words).tolist() == [0, 1, 32, 1, 31, 13]
    with pytest.raises(BadInput):
        bipolar(torch.ones(1, 1), 9)
