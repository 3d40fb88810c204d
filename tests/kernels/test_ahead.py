"""Compiling ahead asks each kernel once for all its weights, and its failure is said and changes nothing."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import pytest
import torch

from aerogel.errors import RunFailed
from aerogel.kernels.ahead import compile_ahead
from aerogel.kernels.linear import Linear
from aerogel.kernels.problem import Kernel, Layout, Problem
from aerogel.quantize.grids import IntGrid, quantized


def model_of(layers: int) -> torch.nn.Sequential:
    grid = IntGrid(bits=4, group_size=16)
    weights = [torch.randn(16, 16) for _ in range(layers)]
    return torch.nn.Sequential(*(Linear.from_codes(quantized(grid, w, grid.fit(w))) for w in weights))


def test_every_weight_and_number_of_tokens_is_asked_for_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of(3)
    asked: list[tuple[int, list[int]]] = []

    def warm(weights: Sequence[tuple[Layout, Problem]], tokens: Sequence[int]) -> None:
        asked.append((len(weights), list(tokens)))

    kernel: type[Kernel] = model[0]._kernel
    monkeypatch.setattr(kernel, "warm", staticmethod(warm))
    compile_ahead(model, [512, 1, 0, 512])
    assert asked == [(3, [1, 512])]


def test_a_failure_is_said_and_the_model_still_runs(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    model = model_of(1)

    def warm(weights: Sequence[tuple[Layout, Problem]], tokens: Sequence[int]) -> None:
        raise RunFailed("no compiler today")

    monkeypatch.setattr(model[0]._kernel, "warm", staticmethod(warm))
    with caplog.at_level(logging.WARNING):
        compile_ahead(model, [1])
    assert "no compiler today" in caplog.text and "first used" in caplog.text
    assert model(torch.randn(2, 16)).shape == (2, 16)
