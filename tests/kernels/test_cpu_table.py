"""What `tune` finds on a CPU is kept for this machine and this library, and is what runs afterwards."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from aerogel.errors import RunFailed
from aerogel.kernels.gemm import cpu_table
from aerogel.kernels.gemm.cpu import Native, structs
from aerogel.kernels.gemm.cpu_table import Choice
from aerogel.kernels.native import library
from aerogel.kernels.problem import Problem
from aerogel.quantize.grids import IntGrid, quantized

pytestmark = pytest.mark.skipif(library.missing() is not None, reason=str(library.missing()))


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("AEROGEL_CACHE", str(tmp_path))
    cpu_table.table.cache_clear()
    yield
    cpu_table.table.cache_clear()


def test_what_is_measured_is_kept_and_used() -> None:
    grid = IntGrid(bits=4, group_size=32, symmetric=False)
    problem = Problem(format="pack-quantized", grid=grid, N=48, K=96, dtype=torch.bfloat16)
    assert cpu_table.choice_for(0, 4, 32, 48, 96, 1) is None
    tuned = Native.tune(problem, [1, 3, 4])
    assert tuned is not None and set(tuned.found) == {1, 4} and tuned.kept == cpu_table.tuned_path()
    for M in (1, 3):
        chosen = cpu_table.choice_for(0, 4, 32, 48, 96, M)
        assert chosen in cpu_table.candidates() and chosen.path in tuned.found[cpu_table.token_class(M)]
    assert cpu_table.choice_for(0, 4, 32, 48, 96, 5) is None and cpu_table.choice_for(1, 4, 32, 48, 96, 1) is None

    key = cpu_table.key_of(0, 4, 32, 48, 96, 1)
    cpu_table.save({key: cpu_table.entry_of(Choice("portable", 3), 1e-6)})
    weight = torch.randn(48, 96)
    layout = Native.pack(quantized(grid, weight, grid.fit(weight)), problem)
    x, y = torch.randn(1, 96).bfloat16(), torch.empty(1, 48).bfloat16()
    rest = (layout["codes"], layout["scale"], layout["zero"], None, y, 48, 32, 0)
    call = structs(x, *rest)[1]
    assert (call.path, call.threads) == (library.PATHS.index("portable"), 3)
    asked = structs(x, *rest, threads=1)[1]
    assert (asked.path, asked.threads) == (-1, 1), "what a caller asks for is what it gets"


def test_tables_of_another_library_are_ignored() -> None:
    key = cpu_table.key_of(0, 4, 32, 48, 96, 1)
    path = cpu_table.save({key: cpu_table.entry_of(Choice(library.best(), 1), 1e-6)})
    assert cpu_table.choice_for(0, 4, 32, 48, 96, 1) == Choice(library.best(), 1)
    held = json.loads(path.read_text())
    path.write_text(json.dumps({**held, "library": library.VERSION - 1}))
    cpu_table.table.cache_clear()
    assert cpu_table.choice_for(0, 4, 32, 48, 96, 1) is None
    path.write_text(json.dumps({**held, "entries": {key: {"choice": {"path": "none such", "threads": 1}}}}))
    cpu_table.table.cache_clear()
    assert cpu_table.choice_for(0, 4, 32, 48, 96, 1) is None


def test_a_path_that_is_wrong_never_gets_into_a_table() -> None:
    choices = [Choice("one", 1), Choice("two", 1)]
    with pytest.raises(RunFailed, match="two"):
        cpu_table.fastest(lambda turn, how: torch.full((2, 2), 1.0 if how.path == "one" else torch.nan), choices)
    best, seconds = cpu_table.fastest(lambda turn, how: torch.ones(2, 2), choices)
    assert best in choices and seconds > 0
