"""{1, i, -1, -i}: the nearest axis, bytes that come back, and the real ternary map that stands for the complex one."""

from __future__ import annotations

import pytest
import torch

from aerogel.errors import BadInput
from aerogel.kernels.linear import Linear
from aerogel.quantize.complex_codes import ComplexCodes, quantize_complex


def test_every_weight_goes_to_its_nearest_axis() -> None:
    w_NK = torch.tensor([[2 + 1j, -2 + 1j, 1 + 3j, 0.5 - 1j]])
    found = quantize_complex(w_NK)
    assert found.values_NK.tolist() == [[0, 2, 1, 3]]
    assert found.scale_2.tolist() == [2.0, 2.0]
    assert torch.equal(found.decode(), torch.tensor([[2, -2, 2j, -2j]], dtype=torch.complex64))


@pytest.mark.parametrize("shape", [(1, 1), (5, 37), (16, 64)])
def test_the_bytes_come_back_and_the_real_map_is_the_complex_one(shape: tuple[int, int]) -> None:
    w_NK = torch.randn(*shape, dtype=torch.complex64)
    codes = quantize_complex(w_NK)
    back = ComplexCodes.load(codes.tensors())
    assert torch.equal(back.values_NK, codes.values_NK) and torch.equal(back.decode(), codes.decode())
    x_MK = torch.randn(3, shape[1], dtype=torch.complex64)
    # y = w conj(x) with the imaginary part turned: Re y = u a + v b, Im y = v a - u b.
    wanted = x_MK.conj() @ codes.decode().T
    layer = Linear.from_codes(codes.real())
    found = layer(torch.cat([x_MK.real, x_MK.imag], 1))
    torch.testing.assert_close(torch.complex(*found.chunk(2, 1)), wanted, rtol=1e-4, atol=1e-4)


def test_zero_weights_and_refusals() -> None:
    assert not quantize_complex(torch.zeros(2, 3, dtype=torch.complex64)).decode().any()
    with pytest.raises(BadInput, match="complex"):
        quantize_complex(torch.ones(2, 3))
    with pytest.raises(BadInput, match="finite"):
        quantize_complex(torch.full((2, 3), torch.nan, dtype=torch.complex64))
    with pytest.raises(BadInput, match="weight_scale"):
        ComplexCodes.load({"weight_packed": torch.zeros(1, 1), "weight_shape": torch.zeros(2)})
