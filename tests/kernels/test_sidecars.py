"""A packed linear with sidecars computes its kernel's product plus theirs, for any number of tokens, compiled as well."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from aerogel.kernels.gemm.ref import quantize_int8
from aerogel.kernels.sidecars import SidecarLinear
from aerogel.model.layer import Layer, Stats
from aerogel.pack.format import MATMUL_TOLERANCE, Activations
from aerogel.pack.scheme import Scheme
from aerogel.quantize.columns import KeepColumns
from aerogel.quantize.grids import IntGrid
from aerogel.quantize.outliers import Keep, Outliers
from aerogel.quantize.rtn import RoundToNearest
from aerogel.quantize.sidecars import Keeping


def layer(N: int, K: int, dtype: torch.dtype) -> tuple[SidecarLinear, torch.Tensor]:
    weight_NK = torch.randn(N, K, generator=torch.Generator().manual_seed(0))
    grid = IntGrid(bits=4, group_size=32)
    solved = Keeping(method=RoundToNearest(grid=grid), keep=Keep(outliers="sigma", outlier_sigma=2.0, outlier_share=0.05))(
        Layer(name="any", weight_NK=weight_NK)
    )
    assert solved.codes is not None
    made = SidecarLinear.from_codes(solved.codes, dtype=dtype)
    for sidecar in solved.sidecars:
        made.keep(sidecar.tensors())
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
    beside = {name: torch.empty(s, dtype=d, device="meta") for name, (s, d) in Outliers.shapes(32, 64, 7).items()}
    scheme = Scheme(format="pack-quantized", grid=IntGrid(bits=4, group_size=32))
    empty = SidecarLinear(64, 32, scheme, beside=beside, device="meta")
    assert empty.weight_outliers.value_E.is_meta and empty.weight_outliers.value_E.shape == (7,)


def with_columns(rule: KeepColumns, activations: Activations, N: int = 48, K: int = 96) -> tuple[SidecarLinear, Tensor]:
    weight_NK = torch.randn(N, K, generator=torch.Generator().manual_seed(0))
    peak_K = torch.ones(K)
    peak_K[LOUD] = 40.0
    stats = Stats(tokens=9, second_moment_KK=torch.eye(K), peak_K=peak_K)
    solved = Keeping(method=RoundToNearest(grid=IntGrid(bits=8)), columns=rule)(
        Layer(name="any", weight_NK=weight_NK, stats=stats)
    )
    assert solved.codes is not None
    made = SidecarLinear.from_codes(solved.codes, activations=activations)
    for sidecar in solved.sidecars:
        made.keep(sidecar.tensors())
    return made, solved.weight_NK


LOUD = [3, 50]


def inputs(M: int, K: int = 96) -> Tensor:
    x_MK = torch.randn(M, K, generator=torch.Generator().manual_seed(1))
    x_MK[:, LOUD] *= 40
    return x_MK


@pytest.mark.parametrize("columns", ["threshold", "largest", "dynamic"])
@pytest.mark.parametrize("activations", ["none", "int8"])
@pytest.mark.parametrize("M", [0, 1, 7])
def test_columns_are_what_is_left_out_of_the_rounded_product(columns: Any, activations: Activations, M: int) -> None:
    made, w_NK = with_columns(KeepColumns(columns=columns, column_share=0.02), activations)
    x_MK = inputs(M)
    assert torch.equal(made.dequantize(torch.float32), w_NK)
    quiet_MK, quiet_NK = x_MK.clone(), made.columns().codes.decode()
    wanted_K = (x_MK.abs() > 6).any(0) if columns == "dynamic" else torch.isin(torch.arange(96), torch.tensor(LOUD))
    quiet_MK[:, wanted_K] = 0
    if activations == "int8":
        values_MK, scale_M1 = quantize_int8(quiet_MK)
        quiet_MK = values_MK.float() * scale_M1
    wanted = quiet_MK.double() @ quiet_NK.double().T + x_MK[:, wanted_K].double() @ w_NK[:, wanted_K].double().T
    torch.testing.assert_close(made(x_MK).double(), wanted, rtol=1e-4, atol=1e-3)


def test_without_columns_one_loud_input_costs_the_others_their_steps() -> None:
    """The property that LLM.int8() rests on, statically and dynamically."""
    x_MK = inputs(64)
    errors = {}
    for name in ("none", "threshold", "dynamic"):
        made, _ = with_columns(KeepColumns(columns=name, column_share=0.02), "int8")  # type: ignore[arg-type]
        exact = torch.randn(48, 96, generator=torch.Generator().manual_seed(0))
        exact_MN = x_MK @ exact.T
        errors[name] = float((made(x_MK) - exact_MN).norm())
    # What is found at run time has weights that went through int8; a stored column is exact.
    assert errors["dynamic"] < errors["none"] / 3 and errors["threshold"] < errors["dynamic"] / 3


def test_columns_met_at_run_time_are_held_and_let_go_on_a_move() -> None:
    made, _ = with_columns(KeepColumns(columns="dynamic"), "int8")
    x_MK = torch.ones(1, 96)
    made(x_MK)
    assert len(made.weight_columns._met[0]) == 0
    x_MK[0, 7] = 100
    found = made(x_MK)
    made(torch.ones(1, 96))
    assert made.weight_columns._met[0].tolist() == [7]
    made.to("cpu")
    assert torch.equal(made(x_MK), found)
