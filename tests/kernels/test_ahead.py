"""Compiling ahead asks each kernel once for all its weights, before they are read where it can, and its failure is said and
changes nothing."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.model.test_native import made

from aerogel.errors import BadInput, RunFailed
from aerogel.kernels import ahead, gpu_here, layouts
from aerogel.kernels.ahead import compile_ahead
from aerogel.kernels.cuda import sources
from aerogel.kernels.gemm.cuda import Cuda
from aerogel.kernels.gemm.cuda_planes import CudaPlanes
from aerogel.kernels.linear import Linear
from aerogel.kernels.problem import Kernel, Layout, Problem
from aerogel.model.loading import load
from aerogel.model.quantizer import FIRST_TOKENS, AerogelQuantizer
from aerogel.quantize.formats.nf4 import Nf4
from aerogel.quantize.grids import IntGrid, quantized
from aerogel.quantize.planes import PlaneGrid


def model_of(layers: int) -> torch.nn.Sequential:
    grid = IntGrid(bits=4, group_size=16)
    weights = [torch.randn(16, 16) for _ in range(layers)]
    return torch.nn.Sequential(*(Linear.from_codes(quantized(grid, w, grid.fit(w))) for w in weights))


def test_every_weight_and_number_of_tokens_is_asked_for_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of(3)
    asked: list[tuple[int, list[int]]] = []

    def wanted(weights: Sequence[tuple[Layout, Problem]], tokens: Sequence[int], device: torch.device) -> list[Any]:
        assert device.type == "cpu"
        asked.append((len(weights), list(tokens)))
        return []

    kernel: type[Kernel] = model[0]._kernel
    monkeypatch.setattr(kernel, "wanted", staticmethod(wanted))
    compile_ahead(model, [512, 1, 0, 512])
    assert asked == [(3, [1, 512])]


def test_a_failure_is_said_and_the_model_still_runs(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    model = model_of(1)

    def wanted(weights: Sequence[tuple[Layout, Problem]], tokens: Sequence[int], device: torch.device) -> list[Any]:
        raise RunFailed("no compiler today")

    monkeypatch.setattr(model[0]._kernel, "wanted", staticmethod(wanted))
    with caplog.at_level(logging.WARNING):
        compile_ahead(model, [1])
    assert "no compiler today" in caplog.text and "first used" in caplog.text
    assert model(torch.randn(2, 16)).shape == (2, 16)


@pytest.mark.parametrize(
    "grid", [IntGrid(bits=4, group_size=16), Nf4(group_size=16), PlaneGrid(bits=3, group_size=16)], ids=str
)
def test_what_is_compiled_meanwhile_is_what_the_loaded_model_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, grid: Any
) -> None:
    """Without weights it is known which linears there will be, merged ones too, and how their layouts look on a GPU."""
    packed, outlines = made(tmp_path, grid=grid).packed, {}
    plain = AerogelQuantizer._compile_meanwhile

    def begin(problems: list[Problem], device: torch.device, tokens: tuple[int, ...]) -> threading.Thread:
        assert device == torch.device("cuda", 1) and tokens == FIRST_TOKENS and {p.device for p in problems} == {"cuda"}
        for p in problems:
            kernel = next(kernel for kernel in (Cuda, CudaPlanes) if kernel.refuses(p) is None)
            outlines[p.N, p.K, p.dtype, str(p.grid)] = kernel, p, layouts.outline(kernel, p)
        thread = threading.Thread()
        thread.start()
        return thread

    monkeypatch.setattr(AerogelQuantizer, "_compile_meanwhile", lambda self, model, _: plain(self, model, {"": "cuda:1"}))
    monkeypatch.setattr(ahead, "begin", begin)
    monkeypatch.setattr(gpu_here, "nvidia_missing", lambda: None)
    for merge in (True, False):
        outlines.clear()
        model = load(packed, merge=merge)
        linears = [module for module in model.modules() if isinstance(module, Linear) and module._problem is not None]
        found = {(p.N, p.K, p.dtype, str(p.grid)): linear for linear in linears if (p := linear.problem())}
        assert found.keys() == outlines.keys() and len(found) > 3
        assert model.hf_quantizer._compiling is None  # the model keeps its quantizer, which no thread may stay in
        for key, (kernel, problem, outline) in outlines.items():
            wanted = kernel.pack(found[key].columns().codes, problem)
            kinds = [{name: (tensor.shape, tensor.dtype) for name, tensor in held.items()} for held in (outline, wanted)]
            assert kinds[0] == kinds[1]


def test_nothing_begins_for_other_devices_or_several(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ahead, "begin", lambda *given: pytest.fail("began"))
    quantizer = object.__new__(AerogelQuantizer)
    for devices in (
        None,
        "auto",
        {"": "cpu"},
        {"": "meta"},
        {"model": "cuda:0", "lm_head": "cuda:1"},
        {"a": "cuda:0", "b": "cpu"},
    ):
        quantizer._compile_meanwhile(torch.nn.Module(), devices)  # type: ignore[arg-type]


def test_kernels_are_asked_for_by_outlines(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[list[Problem], list[int], torch.device]] = []

    kernels = [sources.Wanted("a.cu", "a", {"X": x}) for x in (1, 2)]
    loaded: list[Any] = []

    def wanted(weights: Sequence[tuple[Layout, Problem]], tokens: Sequence[int], device: torch.device) -> list[sources.Wanted]:
        assert all(tensor.is_meta for layout, _ in weights for tensor in layout.values())
        asked.append(([problem for _, problem in weights], list(tokens), device))
        return kernels

    monkeypatch.setattr(gpu_here, "nvidia_missing", lambda: None)
    monkeypatch.setattr(Cuda, "wanted", staticmethod(wanted))
    monkeypatch.setattr(sources, "load_all", loaded.extend)
    grid = IntGrid(bits=4, group_size=16, scale_dtype=torch.bfloat16)
    problems = [Problem(format="pack-quantized", grid=grid, N=N, K=64, dtype=torch.bfloat16, device="cuda") for N in (16, 80)]
    unserved = [replace(problems[0], dtype=torch.float64)]  # a kernel that compiles nothing
    ahead.begin([*problems, *unserved], torch.device("cuda", 2), (1, 512)).join()
    assert asked == [(problems, [1, 512], torch.device("cuda", 2))]
    assert loaded == [(kernel, torch.device("cuda", 2)) for kernel in kernels]


def test_a_weight_without_an_outline_is_said(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    def fails(*given: object) -> None:
        raise BadInput("it has no shape")

    monkeypatch.setattr(gpu_here, "nvidia_missing", lambda: None)
    monkeypatch.setattr(layouts, "outline", fails)
    grid = IntGrid(bits=4, group_size=16, scale_dtype=torch.bfloat16)
    problem = Problem(format="pack-quantized", grid=grid, N=16, K=64, dtype=torch.bfloat16, device="cuda")
    with caplog.at_level(logging.WARNING):
        ahead.begin([problem], torch.device("cuda", 0), (1,)).join()
    assert "it has no shape" in caplog.text and "first used" in caplog.text


def test_who_wants_a_kernel_that_is_being_compiled_waits_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[int] = []

    def code(name: str, defines: Any, capability: object) -> bytes:
        time.sleep(0.05)
        compiled.append(defines["X"])
        if len(compiled) == 1:
            raise RunFailed("the first one fails")
        return b"code"

    monkeypatch.setattr(sources, "_loaded", {})
    monkeypatch.setattr(sources, "code", code)
    monkeypatch.setattr(sources, "Function", lambda binary, kernel: object())
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    device = torch.device("cuda", 0)
    with pytest.raises(RunFailed, match="first"):
        sources.function("a.cu", "a", {"X": 1}, device)
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda x: sources.function("a.cu", "a", {"X": x}, device), [1, 1, 1, 2]))
    assert compiled == [1, *sorted(compiled[1:])] and len(compiled) == 3, "a failure is not kept"
    assert found[0] is found[1] is found[2] is not found[3]


@pytest.mark.gpu
@pytest.mark.parametrize("merge", [True, False])
def test_on_a_gpu_no_kernel_is_left_for_behind_the_reading(
    tmp_path: Path, merge: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("AEROGEL_CACHE", str(tmp_path / "compiled"))
    monkeypatch.setattr(sources, "_loaded", {})
    packed = made(tmp_path, grid=PlaneGrid(bits=3, group_size=16, offset="scale", scale_dtype=torch.bfloat16)).packed
    behind: list[int] = []
    plain = ahead.compile_ahead
    monkeypatch.setattr(ahead, "compile_ahead", lambda *given: behind.append(len(sources._loaded)) or plain(*given))
    with caplog.at_level(logging.WARNING, "aerogel.kernels.ahead"):
        load(packed, device="cuda", merge=merge)
    assert behind == [len(sources._loaded)] and behind[0] >= 2  # for one token and for a prompt, the same for all its shapes
    assert f"compiled {behind[0]} kernels" in caplog.text and len(caplog.records) == 1
