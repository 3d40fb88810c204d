"""Grouped experts on Hopper without a GPU: what is chosen, what a plan hands over, what compiles, and what is refused."""

from __future__ import annotations

import re
from types import SimpleNamespace

import pytest
import torch
from tests.kernels.test_cuda_sources import needs_nvrtc
from tests.kernels.test_cuda_wgmma import FakeDriver, cpu_weight, fake, meta_weight, ptxas_log  # noqa: F401

from aerogel.kernels import gpu_here
from aerogel.kernels.cuda import nvrtc, sources
from aerogel.kernels.gemm.cuda_wgmma import defines, fits
from aerogel.kernels.grouped import cuda_grouped, cuda_routes
from aerogel.kernels.problem import Problem
from aerogel.quantize.formats.rf8 import Rf8
from aerogel.quantize.grids import IntGrid


def test_runs_are_as_long_as_tokens_are_many() -> None:
    lengths = [cuda_routes.run_tokens(pairs, 8) for pairs in (2, 32, 256, 1024, 4096, 1 << 17)]
    assert lengths[0] == 16 and lengths == sorted(lengths) and set(lengths) <= set(cuda_routes.RUNS)
    for pairs, experts, run in ((5, 8, 16), (300, 128, 32), (5000, 7, 256)):
        drawn = torch.randint(experts, (200, pairs), generator=torch.Generator().manual_seed(0))
        counts = torch.stack([torch.bincount(row, minlength=experts) for row in drawn])
        runs = (counts + run - 1) // run
        assert cuda_routes.expected_runs(pairs, experts, run) == pytest.approx(
            runs.sum(1).float().mean().item(), rel=0.06
        )  # Poisson
        assert int(runs.sum(1).max()) <= cuda_routes.most_runs(pairs, experts, run)


def test_every_shape_has_a_cut_that_fits() -> None:
    for (N, K), bits, size in (((1536, 2048), 4, 128), ((4096, 14336), 8, 0), ((33, 70), 3, 16)):
        weight = meta_weight(N, K, bits, size)
        for run in cuda_routes.RUNS:
            config = cuda_grouped.choose_config(weight, run, 10, 7, 132)
            assert config is not None and config.tokens == run and config.share == 1 and fits(weight, config)


def test_few_long_rows_are_split_among_blocks() -> None:
    down = meta_weight(4096, 14336)
    few, many = (cuda_grouped.choose_config(down, 16, runs, runs, 132) for runs in (2, 8))
    assert few is not None and many is not None and few.split == 2 and many.split == 1  # 28.4 us measured, 46.9 with 4


def test_a_plan_hands_over_runs_and_the_rows_of_one_expert(fake: FakeDriver, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    wanted: list[nvrtc.Defines] = []
    kernel = SimpleNamespace(handle=None, name="packed_matmul", allow_shared=lambda size: None)
    monkeypatch.setattr(
        "aerogel.kernels.gemm.cuda_wgmma_plan.function", lambda source, name, macros, device: wanted.append(macros) or kernel
    )
    whole = cpu_weight(3 * 48, 256)  # three experts of 40 rows, in three row tiles each
    weight = cuda_grouped.replace(whole, N=40)
    plan = cuda_grouped.planned(weight, 3, 10, torch.bfloat16)
    assert wanted[0]["EXPERTS"] == 1 and wanted[0]["TOKENS"] == 16
    x, y, runs = torch.zeros(10, 256).bfloat16(), torch.zeros(10, 40).bfloat16(), torch.zeros(4, 4, dtype=torch.int32)
    plan.launch(x, None, None, y, runs=runs)
    held = plan._arguments
    assert (held.M, held.N, held.y_stride, held.row_tiles, held.k_tiles) == (10, 40, 40, 3, 2)
    assert held.runs == runs.data_ptr() and fake.maps[0][3] == 9  # all row tiles of all experts in one map
    assert fake.launches[0][0][0] == 3 * -(-3 // plan.config.row_tiles)


@needs_nvrtc
def test_sources_compile_without_spills() -> None:
    for capability in ((8, 0), (9, 0), (12, 0)):
        code = nvrtc.compiler().compile("experts.cu", sources.sources_of("experts.cu"), {"FP16": 1}, capability)
        assert all(kernel.encode() in code for kernel in cuda_routes.BLOCKS)
    weight = meta_weight(1536, 2048)
    for run in (16, 160, 192, 256):
        for config in cuda_grouped.cuts(weight, run):
            log = ptxas_log(defines(weight, config, torch.bfloat16) | {"EXPERTS": 1})
            assert " 0 bytes spill stores" in log and "C75" not in log, (config, log)


def test_argument_blocks_are_those_of_the_source() -> None:
    for block in cuda_routes.BLOCKS.values():
        body = re.search(rf"struct {block.__name__} \{{(.*?)\}};", sources.texts()["experts.cu"], re.DOTALL)
        assert body is not None
        fields = re.findall(r"\*?\s*(\w+)\s*[,;]", re.sub(r"//.*", "", body[1]))
        assert fields == [entry[0] for entry in block._fields_]


def test_refusals_name_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_here, "nvidia_missing", lambda: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *device: (8, 0))
    facts = {"format": "any", "N": 8, "K": 64, "dtype": torch.bfloat16, "device": "cuda"}
    grid = IntGrid(bits=4, group_size=32)
    assert "8.0 does not have" in (cuda_grouped.Cuda.refuses(Problem(grid=grid, **facts)) or "")  # type: ignore[arg-type]
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *device: (9, 0))
    assert cuda_grouped.Cuda.refuses(Problem(grid=grid, **facts)) is None  # type: ignore[arg-type]
    monkeypatch.setattr(Rf8, "learned", property(lambda grid: True))
    assert "at most 4 bits" in (cuda_grouped.Cuda.refuses(Problem(grid=Rf8(), **facts)) or "")  # type: ignore[arg-type]


def test_shapes_are_known_without_running() -> None:
    expert = torch.zeros(6, dtype=torch.int64, device="meta")
    order, place, runs = torch.ops.aerogel.route_experts(expert, 4)
    assert order.shape == place.shape == (6,) and runs.shape == (5, 4) and runs.dtype == torch.int32
    x = torch.empty(3, 100, dtype=torch.bfloat16, device="meta")
    rows = torch.ops.aerogel.spread_tokens(x, order)
    assert rows.shape == (6, 104)
    codes = torch.empty(4, 2, 1, 1024, dtype=torch.uint8, device="meta")
    scale = torch.empty(4, 2, 1, 16, dtype=torch.bfloat16, device="meta")
    y = torch.ops.aerogel.grouped_tiles_linear(rows, runs, codes, scale, None, None, None, None, 128, 30)
    assert y.shape == (6, 30)
    weight = torch.empty(3, 2, device="meta")
    assert torch.ops.aerogel.add_experts(y, place, weight).shape == (3, 30)
