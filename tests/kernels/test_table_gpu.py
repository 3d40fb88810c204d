"""Tables of 16 and 256 numbers through a layer on a GPU: the same weight back, and the product of what it decodes to."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.quantize.test_tables import GRIDS, weight

from aerogel.kernels.linear import Linear
from aerogel.quantize.codes import quantized

pytestmark = pytest.mark.gpu
TOLERANCE = {torch.bfloat16: 1.2e-2, torch.float16: 2e-3}


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_a_layer_multiplies_with_what_its_codes_decode_to(grid: Any, dtype: torch.dtype) -> None:
    w = weight(200, 272).cuda()
    codes = quantized(grid, w, grid.fit(w, search="mse"))
    dense = codes.decode()
    assert torch.equal(dense.cpu(), quantized(grid, dense.cpu(), codes.to("cpu")).decode())
    layer = Linear.from_codes(codes, dtype=dtype)
    assert torch.equal(layer.dequantize(torch.float32), dense)
    for tokens in (1, 5, 16, 100):
        x = torch.randn(tokens, 272, device="cuda", dtype=dtype)
        wanted = x.double() @ dense.double().T
        error = (layer(x).double() - wanted).norm() / wanted.norm()
        assert float(error) < TOLERANCE[dtype], (layer.kernel_name, tokens)
