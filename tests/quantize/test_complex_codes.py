"""{1, i, -1, -i}: the nearest axis, and the real maps that stand for it: by halves for integers, by pairs as stored."""

from __future__ import annotations

import pytest
import torch

from aerogel.errors import BadInput
from aerogel.kernels.linear import Linear
from aerogel.pack.config import format_of
from aerogel.quantize.codes import quantized
from aerogel.quantize.complex_codes import quantize_complex
from aerogel.quantize.formats.complex import Complex, codes_of, complex_of, signs_of


def test_every_weight_goes_to_its_nearest_axis() -> None:
    w_NK = torch.tensor([[2 + 1j, -2 + 1j, 1 + 3j, 0.5 - 1j]])
    found = quantize_complex(w_NK)
    assert found.values_NK.tolist() == [[0, 2, 1, 3]]
    assert found.scale_2.tolist() == [2.0, 2.0]
    assert torch.equal(found.decode(), torch.tensor([[2, -2, 2j, -2j]], dtype=torch.complex64))


@pytest.mark.parametrize("shape", [(1, 1), (5, 37), (16, 64)])
def test_the_real_map_is_the_complex_one(shape: tuple[int, int]) -> None:
    w_NK = torch.randn(*shape, dtype=torch.complex64)
    codes = quantize_complex(w_NK)
    x_MK = torch.randn(3, shape[1], dtype=torch.complex64)
    # y = w conj(x) with the imaginary part turned: Re y = u a + v b, Im y = v a - u b.
    wanted = x_MK.conj() @ codes.decode().T
    layer = Linear.from_codes(codes.real())
    found = layer(torch.cat([x_MK.real, x_MK.imag], 1))
    torch.testing.assert_close(torch.complex(*found.chunk(2, 1)), wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shape", [(1, 1), (5, 37), (64, 16), (150, 70)])
def test_pairs_of_a_real_weight_are_stored_in_two_bits_and_compute_the_same(shape: tuple[int, int]) -> None:
    N, K = 2 * shape[0], 2 * shape[1]
    w_NK = torch.randn(N, K)
    codes = quantized(Complex(), w_NK, Complex().fit(w_NK))
    complex_codes = quantize_complex(complex_of(w_NK))
    assert torch.equal(codes_of(signs_of(complex_codes.values_NK)), complex_codes.values_NK)
    assert torch.equal(complex_of(codes.decode()), complex_codes.decode())
    assert torch.equal(quantized(Complex(), codes.decode(), codes).values_NK, codes.values_NK)
    layer = Linear.from_codes(codes)
    assert layer.scheme.format == "complex-packed" and torch.equal(layer.dequantize(torch.float32), codes.decode())
    layer.restore()
    assert torch.equal(layer.dequantize(torch.float32), codes.decode())
    x_MK = torch.randn(3, shape[1], dtype=torch.complex64)
    wanted = x_MK.conj() @ complex_codes.decode().T
    found = torch.view_as_complex(layer(torch.view_as_real(x_MK).flatten(1)).unflatten(1, (-1, 2)))
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    # Whole words hold 16 codes.
    if shape[1] % 16 == 0:
        assert format_of("complex-packed").bits_per_weight(N, K, Complex()) - 0.5 == 8 * 24 / (N * K)


def test_zero_weights_and_refusals() -> None:
    assert not quantize_complex(torch.zeros(2, 3, dtype=torch.complex64)).decode().any()
    with pytest.raises(BadInput, match="complex"):
        quantize_complex(torch.ones(2, 3))
    with pytest.raises(BadInput, match="finite"):
        quantize_complex(torch.full((2, 3), torch.nan, dtype=torch.complex64))
    with pytest.raises(BadInput, match="pairs"):
        Complex().fit(torch.randn(3, 4))
    with pytest.raises(BadInput, match="method: rtn"):
        Complex().rounder(Complex().fit(torch.randn(2, 2)), 2, 2)
