"""A packed linear with outliers computes its kernel's product plus theirs, for any number of tokens, compiled as well."""

from __future__ import annotations

import pytest
import torch

from aerogel.kernels.outliers import OutlierLinear, Sidecar
from aerogel.model.layer import Layer
from aerogel.pack.format import MATMUL_TOLERANCE
from aerogel.pack.scheme import Scheme
from aerogel.quantize.grids import IntGrid
from aerogel.quantize.outliers import Keep, Keeping
from aerogel.quantize.rtn import RoundToNearest


def layer(N: int, K: int, dtype: torch.dtype) -> tuple[OutlierLinear, torch.Tensor]:
    weight_NK = torch.randn(N, K, generator=torch.Generator().manual_seed(0))
    grid = IntGrid(bits=4, group_size=32)
    solved = Keeping(method=RoundToNearest(grid=grid), keep=Keep(outliers="sigma", outlier_sigma=2.0, outlier_share=0.05))(
        Layer(name="any", weight_NK=weight_NK)
    )
    assert solved.codes is not None and solved.outliers is not None
    made = OutlierLinear.from_codes(solved.codes, dtype=dtype)
    made.weight_outliers = Sidecar(solved.outliers)
    return made, solved.weight_NK


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("M", [0, 1, 5])
@pytest.mark.parametrize(("N", "K"), [(1, 64), (48, 96), (33, 50)])
def test_it_is_the_product_with_the_whole_weight(dtype: torch.dtype, M: int, N: int, K: int) -> None:
    made, w_NK = layer(N, K, dtype)
    assert torch.equal(made.dequantize(torch.float32), w_NK)
    x_MK = torch.randn(2, M, K, generator=torch.Generator().manual_seed(1)).to(dtype)[0]
    wanted = x_MK.double() @ w_NK.double().T
    found = made(x_MK)
    assert found.dtype == dtype and found.shape == wanted.shape
    # The sum is rounded twice: the kernel's part, and the whole.
    assert (found.double() - wanted).norm() <= 2 * MATMUL_TOLERANCE[dtype] * wanted.norm()


def test_it_moves_without_casting_and_compiles() -> None:
    made, _ = layer(48, 96, torch.float32)
    x_MK = torch.randn(1, 96)
    wanted = made(x_MK)
    made.half().float()
    assert made.weight_outliers.value_E.dtype in (torch.bfloat16, torch.float16)
    assert torch.equal(made(x_MK), wanted)
    compiled = torch.compile(made.weight_outliers, backend="eager", fullgraph=True)
    y_MN = torch.randn(1, 48)
    assert torch.equal(compiled(y_MN, x_MK), made.weight_outliers(y_MN, x_MK))


def test_scheme_alone_makes_an_empty_one() -> None:
    empty = OutlierLinear(64, 32, Scheme(format="pack-quantized", grid=IntGrid(bits=4, group_size=32)), device="meta")
    assert empty.weight_outliers.value_E.is_meta
