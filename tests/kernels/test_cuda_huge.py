"""Indices beyond 2^31 in the kernels whose own tests do not show it: the last rows and tokens of what is larger are right.

Twelve GB of free device memory are enough for each; nothing dense of that size is made but where it is asked for.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from tests.kernels.test_cuda import BOUND
from tests.kernels.tile_weights import dense64
from torch import Tensor

from aerogel.kernels.gemm import cuda_int8, triton_words
from aerogel.kernels.gemm.cuda_dense import Dense, dequantize
from aerogel.kernels.gemm.cuda_tune import random_weight
from aerogel.kernels.gemm.cuda_weight import TileWeight
from aerogel.kernels.gemm.cuda_wgmma_plan import Plan
from aerogel.kernels.grouped import cuda_grouped
from aerogel.kernels.grouped.cuda_routes import most_runs, route_experts
from aerogel.pack import words

pytestmark = [pytest.mark.gpu, pytest.mark.xdist_group("large")]
BEYOND = 1 << 31
LAST = 64
"""Rows and tokens that are looked at."""
ROUNDED = 2e-2
"""Relative error with inputs rounded to int8."""


@pytest.fixture(autouse=True)
def hopper() -> Iterator[None]:
    if not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("needs a GPU of compute capability 9.0")
    if torch.cuda.mem_get_info()[0] < 13 << 30:
        pytest.skip("needs 13 GB of free device memory")
    yield
    torch.cuda.empty_cache()


def tokens(M: int, K: int) -> Tensor:
    return torch.randn(M, K, device="cuda", dtype=torch.bfloat16)


def last_rows(weight: TileWeight) -> Tensor:
    """The last LAST of them in float64."""
    tiles = LAST // 16
    held = {name: None if (tensor := getattr(weight, name)) is None else tensor[-tiles:] for name in ("codes", "scale", "zero")}
    return dense64(replace(weight, N=LAST, **held))


def error(found: Tensor, wanted: Tensor) -> float:
    """NaN where anything is."""
    return float((found.double() - wanted).norm() / wanted.norm())


def rounded_product(x_MK: Tensor, weight: TileWeight) -> Tensor:
    r = cuda_int8.row_scale(weight)
    return cuda_int8.tiles_linear_int8(x_MK, weight.codes, weight.scale, None, r, None, weight.group_size, weight.N)


# ---- inputs rounded to int8 ------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("M", "N", "K"), [(16448, 131072, 128), (131136, 64, 16384)])
def test_many_outputs_or_inputs_of_rounded_products(M: int, N: int, K: int) -> None:
    assert M * max(N, K) > BEYOND
    weight, x_MK = random_weight(N, K, 4, 128, "cuda"), tokens(M, K)
    y_MN = rounded_product(x_MK, weight)
    assert error(y_MN[-LAST:, -LAST:], x_MK[-LAST:].double() @ last_rows(weight).T) <= ROUNDED
    assert error(y_MN[:LAST, -LAST:], x_MK[:LAST].double() @ last_rows(weight).T) <= ROUNDED


@pytest.mark.parametrize("M", [5, 300])
def test_many_codes_of_rounded_products(M: int) -> None:
    weight, x_MK = random_weight(65600, 32768, 8, 0, "cuda"), tokens(M, 32768)
    assert weight.codes.nbytes > BEYOND
    assert error(rounded_product(x_MK, weight)[:, -LAST:], x_MK.double() @ last_rows(weight).T) <= ROUNDED


# ---- experts ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("experts", "N", "K", "pairs", "run"),
    [(66, 16384, 4096, 20, 16), (66, 16384, 4096, 300, 160), (3, 16384, 128, 131200, 160)],
)
def test_many_experts_or_outputs_of_theirs(experts: int, N: int, K: int, pairs: int, run: int) -> None:
    whole = random_weight(experts * N, K, 4, 128, "cuda")
    assert max(whole.codes.nbytes, pairs * N) > BEYOND
    expert = torch.full((pairs,), experts - 1, device="cuda")
    expert[: pairs // 2] = 0
    order, _, runs = route_experts(expert, experts, run)
    x_SK, y_SN = tokens(pairs, K), torch.full((pairs, N), torch.nan, device="cuda", dtype=torch.bfloat16)
    config = cuda_grouped.cuts(replace(whole, N=N), run)[0]
    Plan(replace(whole, N=N), config, pairs, torch.bfloat16, runs=most_runs(pairs, experts, run)).launch(
        x_SK, None, None, y_SN, runs=runs
    )
    assert torch.equal(order.long(), torch.arange(pairs, device="cuda"))
    assert error(y_SN[-LAST // 8 :, -LAST:], x_SK[-LAST // 8 :].double() @ last_rows(whole).T) <= BOUND[torch.bfloat16]
    first = replace(whole, codes=whole.codes[: N // 16], scale=whole.scale[: N // 16], N=N)
    assert error(y_SN[:8, -LAST:], x_SK[:8].double() @ last_rows(first).T) <= BOUND[torch.bfloat16]


# ---- dense weights ---------------------------------------------------------------------------------------------------
def test_many_numbers_of_a_dense_weight() -> None:
    weight = random_weight(65600, 32768, 3, 128, "cuda")
    dense_NK = dequantize(weight, torch.bfloat16)
    assert dense_NK.numel() > BEYOND and torch.equal(dense_NK[-LAST:], last_rows(weight).bfloat16())
    del dense_NK
    x_MK, y_MN = tokens(40, 32768), torch.full((40, 65600), torch.nan, device="cuda", dtype=torch.bfloat16)
    Dense.plan(weight, 40, torch.bfloat16)(x_MK, None, y_MN)
    assert error(y_MN[:, -LAST:], x_MK.double() @ last_rows(weight).T) <= BOUND[torch.bfloat16]


# ---- the portable kernel ---------------------------------------------------------------------------------------------
def in_words(weight: TileWeight) -> Tensor:
    """The last rows of a weight whose codes lie in words."""
    codes = words.unpack_words(weight.codes[-LAST // 16 :], weight.bits, LAST, weight.K)
    scale = weight.scale[-LAST // 16 :].transpose(1, 2).reshape(LAST, -1).repeat_interleave(128, 1)[:, : weight.K]
    return (codes.double() - (1 << (weight.bits - 1))) * scale.double()


@pytest.mark.parametrize(("M", "N", "K"), [(16448, 131072, 128), (131136, 64, 16384), (3, 131136, 32768), (70, 131136, 32768)])
def test_many_numbers_in_words(M: int, N: int, K: int) -> None:
    weight, x_MK = random_weight(N, K, 4, 128, "cuda"), tokens(M, K)
    assert max(M * max(N, K), weight.codes.nbytes) > BEYOND
    y_MN = triton_words.linear(x_MK, weight.codes, weight.scale, None, None, None, None, 128, N)
    for some in itertools.chain([slice(-LAST, None)], [slice(0, LAST)] if M > LAST else []):
        assert error(y_MN[some, -LAST:], x_MK[some].double() @ in_words(weight).T) <= BOUND[torch.bfloat16]
