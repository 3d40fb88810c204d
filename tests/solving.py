"""Layers to solve: correlated inputs with a few loud channels, heavy-tailed weights."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from aerogel.model.layer import Layer, Stats

MakeLayer = Callable[..., Layer]


def _layer(N: int = 48, K: int = 192, *, tokens: int = 1024, seed: int = 0, name: str = "model.layers.0.q_proj") -> Layer:
    random = torch.Generator().manual_seed(seed)
    mix = torch.randn(K // 3, K, generator=random) + 0.5 * torch.eye(K // 3, K)
    loud = torch.exp(0.8 * torch.randn(K, generator=random))
    x = (torch.randn(tokens, K // 3, generator=random) @ mix + 2 * torch.randn(tokens, K, generator=random)) * loud
    tails = torch.distributions.Chi2(5.0)
    torch.manual_seed(seed)
    w = torch.randn(N, K, generator=random) / (tails.sample((N, K)) / 5).sqrt() * 0.05
    return Layer(name=name, weight_NK=w, stats=Stats(tokens=tokens, second_moment_KK=x.T @ x))


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture
def make_layer() -> MakeLayer:
    return _layer


@pytest.fixture
def layer() -> Layer:
    return _layer()
