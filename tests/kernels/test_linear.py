"""The packed linear layer: same numbers as the dense one, memory of the packed weight, and no rounding when it moves."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from aerogel.errors import BadInput
from aerogel.kernels.linear import Linear
from aerogel.kernels.native import library
from aerogel.pack.config import choose_format
from aerogel.pack.scheme import Scheme
from aerogel.quantize.grids import Codes, Fp8Grid, IntGrid, quantized

INT4 = IntGrid(bits=4, group_size=32, symmetric=False, scale_dtype=torch.float16)


def codes_of(grid: Any, N: int = 48, K: int = 96) -> Codes:
    weight = torch.randn(N, K, generator=torch.Generator().manual_seed(0))
    return quantized(grid, weight, grid.fit(weight))


GRIDS = [INT4, IntGrid(bits=8), IntGrid(bits=3, group_size=40), Fp8Grid(), Fp8Grid(strategy="block")]


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_forward_takes_any_leading_dimensions(grid: Any, dtype: torch.dtype) -> None:
    codes, bias = codes_of(grid), torch.randn(48)
    layer = Linear.from_codes(codes, bias=bias, dtype=dtype)
    for lead in [(), (1,), (0,), (2, 3), (2, 1, 4)]:
        x = torch.randn(*lead, 96).to(dtype)
        wanted = torch.nn.functional.linear(x.float(), codes.decode(), bias.to(dtype).float())
        found = layer(x)
        assert found.dtype == dtype and found.shape == wanted.shape
        torch.testing.assert_close(found.float(), wanted, rtol=0.01, atol=0.15 if dtype == torch.bfloat16 else 1e-4)
    assert torch.equal(layer.dequantize(torch.float32), codes.decode())


def test_an_empty_layer_is_filled_from_a_state_dict_and_prepared_on_first_use() -> None:
    codes = codes_of(INT4)
    scheme = Scheme(format="pack-quantized", grid=INT4)
    layer = Linear(96, 48, scheme, device="meta").to_empty(device="cpu")
    assert layer.kernel_name is None
    layer.load_state_dict(choose_format(INT4).encode(codes))
    x = torch.randn(3, 96, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(layer(x), x @ codes.decode().T, rtol=1e-4, atol=1e-4)
    assert layer.kernel_name is not None and "bits=4" in repr(layer)


def test_memory_is_that_of_the_packed_weight() -> None:
    for grid in (INT4, IntGrid(bits=2, group_size=32), IntGrid(bits=8), Fp8Grid()):
        codes = codes_of(grid)
        stored = sum(tensor.nbytes for tensor in choose_format(grid).encode(codes).values())
        layer = Linear.from_codes(codes, bias=torch.zeros(48))
        layer.restore()
        assert layer.packed_bytes == stored
        assert [name for name, _ in layer.named_parameters()] == ["bias"]


def test_order_of_columns_permutes_the_input() -> None:
    codes, order = codes_of(INT4), torch.randperm(96)
    layer = Linear.from_codes(codes, order=order)
    wanted = torch.empty(48, 96)
    wanted[:, order] = codes.decode()
    assert torch.equal(layer.dequantize(), wanted)
    x = torch.randn(4, 96)
    torch.testing.assert_close(layer(x), x @ wanted.T, rtol=1e-4, atol=1e-4)


def test_casting_the_model_changes_the_kernel_and_never_the_weight() -> None:
    codes = codes_of(INT4)
    layer = Linear.from_codes(codes, bias=torch.randn(48))
    assert layer.kernel_name == ("cpu" if library.missing() is None else "torch-chunked")
    layer = torch.nn.Sequential(layer).to(torch.bfloat16)[0]
    assert (
        layer.kernel_name == ("cpu" if library.missing() is None else "torch-int4-cpu") and layer.bias.dtype == torch.bfloat16
    )
    assert torch.equal(layer.dequantize(torch.float32), codes.decode())
    x = torch.randn(2, 96)
    assert layer(x).dtype == torch.float32  # inputs of another type than planned are cast and back
    layer.float()
    assert layer.kernel_name == ("cpu" if library.missing() is None else "torch-chunked") and torch.equal(
        layer.dequantize(), codes.decode()
    )


def test_a_weight_of_another_shape_is_refused() -> None:
    layer = Linear.from_codes(codes_of(INT4))
    layer.restore()
    layer._buffers["weight_shape"] = torch.tensor([48, 95])
    with pytest.raises(BadInput, match=r"\[48, 95\]"):
        layer.prepare()
