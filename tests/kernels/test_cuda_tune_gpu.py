"""Tuning on a GPU, both kernels: what is measured is kept, and runs from then on."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tests.kernels.test_cuda import BOUND

from aerogel.kernels.gemm import (
    cuda,
    cuda_bytes,
    cuda_bytes_tune,
    cuda_few,
    cuda_int8,
    cuda_table,
    cuda_tune,
    cuda_wgmma_table,
    cuda_wgmma_tune,
)
from aerogel.kernels.gemm.cuda_dense import dequantize
from aerogel.kernels.gemm.cuda_wgmma import Config
from aerogel.kernels.problem import Problem
from aerogel.quantize.grids import IntGrid

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9,
        reason="needs a GPU of compute capability 9.0",
    ),
]


@pytest.mark.parametrize("outliers", [False, True])
def test_what_tuning_finds_is_kept_and_used(outliers: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A few cuts of each kernel are measured, and the fastest runs from then on."""
    monkeypatch.setenv("AEROGEL_CACHE", str(tmp_path))
    known = cuda_tune.shortlist
    monkeypatch.setattr(cuda_tune, "shortlist", lambda *given: known(*given)[:2])
    monkeypatch.setattr(cuda_wgmma_tune, "TRIED", 2)
    clear = (cuda_table.table.cache_clear, cuda_wgmma_table.table.cache_clear)
    grid = IntGrid(bits=4, group_size=128, scale_dtype=torch.bfloat16)
    problem = Problem(format="pack-quantized", grid=grid, N=640, K=1024, dtype=torch.bfloat16, device="cuda", outliers=outliers)
    weight = cuda_tune.like(problem)
    assert weight is not None and (weight.outliers is not None) is outliers
    try:
        tuned = cuda.Cuda.tune(problem, [4, 64])
        assert tuned is not None and sorted(tuned.found) == [4, 64]
        few, many = cuda_table.config_for(weight, 4), cuda_wgmma_table.cuts_for(weight, 64, torch.cuda.get_device_name())
        assert str(cuda_few.as_data(few)) in tuned.found[4], (few, tuned.found)
        assert [rows for rows, _ in many] == [640] and str(cuda_wgmma_tune.as_data(many[0][1])) in tuned.found[64]
        for M in (4, 64):
            x = torch.randn(M, 1024, device="cuda").bfloat16()
            y = torch.full((M, 640), torch.nan, device="cuda", dtype=torch.bfloat16)
            cuda.choose(weight, M, torch.bfloat16, (9, 0)).plan(weight, M, torch.bfloat16)(x, None, y)
            wanted = x.double() @ dequantize(weight, torch.bfloat16).double().T
            assert (y.double() - wanted).norm() <= 2 * BOUND[torch.bfloat16] * wanted.norm()
    finally:
        for one in clear:
            one()


@pytest.mark.parametrize("outliers", [False, True])
def test_cuts_in_bytes_are_searched_too(outliers: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What was measured decides, and whether bytes or 16 bits serve."""
    monkeypatch.setenv("AEROGEL_CACHE", str(tmp_path))
    known = cuda_tune.shortlist
    monkeypatch.setattr(cuda_tune, "shortlist", lambda *given: known(*given)[:2])
    for module in (cuda_wgmma_tune, cuda_bytes_tune):
        monkeypatch.setattr(module, "TRIED", 2)
    clear = (cuda_table.table.cache_clear, cuda_wgmma_table.table.cache_clear)
    grid, name = IntGrid(bits=8, scale_dtype=torch.bfloat16), torch.cuda.get_device_name()
    problem = Problem(
        format="int-quantized", grid=grid, N=640, K=1024, dtype=torch.bfloat16, device="cuda", activations="int8",
        outliers=outliers,
    )  # fmt: skip
    weight = cuda_tune.like(problem)
    assert weight is not None
    held = replace(weight, group_size=0, in_bytes=True)
    try:
        tuned = cuda_int8.CudaInt8.tune(problem, [2, 60])
        assert tuned is not None and set(tuned.found) == ({64} if outliers else {2, 64}) and "in bytes" in tuned.found[64]
        entry = cuda_wgmma_table.entry_of(held, 60, name)
        assert entry is not None and str(cuda_wgmma_tune.as_data(Config(**entry["config"]))) in tuned.found[64]
        assert (cuda_bytes.SIXTEEN in entry) is not outliers
        faster = entry["us"] < entry.get(cuda_bytes.SIXTEEN, math.inf)
        assert (len(cuda_int8.cuts_in_bytes(held, 64, name, 132)) > 0) is faster
    finally:
        for one in clear:
            one()
