"""Floats and tables with scales of bytes through every CUDA kernel, against float64."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from tests.kernels.test_cuda import check, configs
from tests.kernels.tile_weights import dense64

from aerogel.kernels.gemm.block_scales import E8M0
from aerogel.kernels.gemm.cuda_dense import dequantize
from aerogel.kernels.gemm.cuda_tune import random_numbers, random_weight
from aerogel.kernels.gemm.cuda_weight import TileWeight
from aerogel.kernels.gemm.cuda_wgmma import ManyTokens
from aerogel.kernels.gemm.small_floats import pack_floats

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

SHAPES = [(37, 208), (130, 1104)]
KINDS = (
    *("nvfp4", "mxfp4", "mxfp8", "e2m1", "e4m3 per channel", "bytes and e8m0", "table and e4m3", "rows", "rows in groups"),
    *("picked", "picked per channel", "picked and e4m3", "e5m2", "e5m2 and e8m0", "e3m2", "e2m3 and e8m0", "e3m1", "e2m2"),
)


def weight_of(kind: str, N: int, K: int) -> TileWeight:
    """One weight of each way to combine codes and scales."""
    if kind in ("nvfp4", "mxfp4"):
        weight = random_numbers(N, K, kind, 16 if kind == "nvfp4" else 32, "cuda")
    elif kind == "e2m1":
        weight = replace(random_weight(N, K, 4, 48, "cuda"), floats=1)
    elif kind in ("mxfp8", "e4m3 per channel"):
        plain = random_weight(N, K, 8, 32 if kind == "mxfp8" else 0, "cuda")
        codes = (
            torch.randint(0, 127, (N, K), device="cuda", dtype=torch.uint8)
            | torch.randint(0, 2, (N, K), device="cuda").byte() << 7
        )
        weight = replace(plain, codes=pack_floats(codes, 8, 3), floats=3)
        if kind == "mxfp8":
            scale = torch.randint(110, 124, plain.scale.shape, device="cuda", dtype=torch.uint8).view(E8M0)
            weight = replace(weight, scale=scale)
    elif kind == "bytes and e8m0":
        plain = random_weight(N, K, 8, 32, "cuda")
        scale = torch.randint(110, 124, plain.scale.shape, device="cuda", dtype=torch.uint8).view(E8M0)
        weight = replace(plain, scale=scale, table=torch.randn(1, 256, device="cuda").bfloat16().float())
    elif kind[:2] in ("e2", "e3", "e5") and kind != "e2m1":
        mantissa, bits = int(kind[3]), 1 + int(kind[1]) + int(kind[3])
        plain = random_weight(N, K, bits, 32 if "and" in kind else 48, "cuda")
        codes = torch.randint(0, 1 << bits, (N, K), device="cuda", dtype=torch.uint8) & (0xBF if bits == 8 else 0xFF)
        scale = torch.randint(110, 124, plain.scale.shape, device="cuda", dtype=torch.uint8).view(E8M0)
        weight = replace(plain, codes=pack_floats(codes, bits, mantissa), floats=mantissa)
        weight = replace(weight, scale=scale) if "and" in kind else weight
    elif kind in ("rows", "rows in groups"):
        weight = random_numbers(N, K, "rows", 0 if kind == "rows" else 48, "cuda")
    elif kind in ("picked", "picked per channel"):
        weight = random_numbers(N, K, "groups", 32 if kind == "picked" else 0, "cuda")
    else:
        plain = random_numbers(N, K, "groups" if "picked" in kind else "table", 64, "cuda")
        scale = torch.randint(0, 152, plain.scale.shape, device="cuda", dtype=torch.uint8)
        assert plain.table is not None
        weight = replace(
            plain, scale=scale, table=plain.table.bfloat16().float(), factor=torch.full((), 2.0**-8, device="cuda")
        )
    weight.check()
    return weight


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_few_tokens_and_dense(kind: str, dtype: torch.dtype) -> None:
    for N, K in SHAPES:
        weight = weight_of(kind, N, K)
        weight = weight if weight.table is None else replace(weight, table=weight.table.to(dtype).float())
        dense = dense64(weight)
        bound = 4e-3 if dtype == torch.bfloat16 else 6e-4
        assert (dequantize(weight, dtype).double() - dense).norm() <= bound * dense.norm()
        for config, M in itertools.product(configs(), (1, 8, 16)):
            check(weight, dense, config, M, dtype, bias=M == 8)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_many_tokens(kind: str, dtype: torch.dtype) -> None:
    if torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("the kernel for many tokens is for compute capability 9.0")
    for N, K in SHAPES:
        weight = weight_of(kind, N, K)
        dense = dense64(weight)
        x = torch.randn(40, K, device="cuda").to(dtype)
        y = torch.full((40, N), torch.nan, device="cuda", dtype=dtype)
        ManyTokens.plan(weight, 40, dtype)(x, None, y)
        wanted = x.double() @ dense.T
        assert (y.double() - wanted).norm() <= (5e-3 if dtype == torch.bfloat16 else 1e-3) * wanted.norm()
