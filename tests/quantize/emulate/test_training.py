"""Stochastic rounding is right on average, transforms cancel and spread outliers, and with both four bits train."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from aerogel.errors import BadInput
from aerogel.model.layer import Layer
from aerogel.quantize.codes import quantized
from aerogel.quantize.emulate.training import hadamard, random_signs, rounded_product, stochastic, train_product
from aerogel.quantize.formats.bitmod import Bitmod
from aerogel.quantize.formats.floats import Float
from aerogel.quantize.formats.mx import Mx
from aerogel.quantize.formats.nf4 import Nf4
from aerogel.quantize.formats.nvfp4 import Nvfp4
from aerogel.quantize.grids import IntGrid
from aerogel.quantize.rtn import RoundToNearest

GRIDS: list[Any] = [IntGrid(bits=4, group_size=32), IntGrid(bits=3, group_size=32, symmetric=False), Nvfp4(), Nf4()]
GRIDS += [Float(kind="e2m1", group_size=32), Float(kind="e4m3", group_size=128, block=True)]


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def error(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_it_is_right_on_average_and_only_takes_neighbours(grid: Any) -> None:
    w_NK = torch.randn(3, 70, generator=seeded())
    params = grid.fit(w_NK)
    generator = seeded(1)
    draws = [stochastic(grid, w_NK, params, generator).decode() for _ in range(600)]
    mean, nearest = torch.stack(draws).mean(0), quantized(grid, w_NK, params).decode()
    inside = (w_NK >= torch.stack(draws).amin(0)) & (w_NK <= torch.stack(draws).amax(0))
    assert float(inside.float().mean()) > 0.9  # symmetric integers end half a step before the largest weight
    assert error(mean[inside], w_NK[inside]) < 0.25 * error(nearest[inside], w_NK[inside])
    assert error(draws[0], w_NK) > error(nearest, w_NK)
    assert max(len(set(column.tolist())) for column in torch.stack(draws).flatten(1).T) <= 2
    values = nearest.clone()
    again = stochastic(grid, values, params, generator).decode()
    torch.testing.assert_close(again, values, rtol=1e-5, atol=1e-6)


def test_rtn_takes_it_as_an_option_and_repeats_itself() -> None:
    layer = Layer(name="a", weight_NK=torch.randn(8, 64, generator=seeded()))
    method = RoundToNearest(grid=Nvfp4(), rounding="stochastic")
    first, second = method(layer), method(layer)
    assert torch.equal(first.weight_NK, second.weight_NK) and first.codes is not None
    assert torch.equal(first.codes.decode(), first.weight_NK)
    assert not torch.equal(first.weight_NK, method(layer.with_(name="b")).weight_NK)
    assert not torch.equal(first.weight_NK, RoundToNearest(grid=Nvfp4(), rounding="stochastic", seed=1)(layer).weight_NK)
    with pytest.raises(BadInput, match="one table"):
        RoundToNearest(grid=Bitmod(bits=3), rounding="stochastic")(layer)


@pytest.mark.parametrize("block", [1, 2, 16, 64])
def test_transforms_are_orthonormal_and_cancel(block: int) -> None:
    x, w, signs = torch.randn(5, 64), torch.randn(7, 64), random_signs(64, seeded())
    torch.testing.assert_close(hadamard(x, signs, block) @ hadamard(w, signs, block).T, x @ w.T, rtol=1e-4, atol=1e-4)
    matrix = hadamard(torch.eye(64), signs, block)
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(64))
    assert set((matrix.abs() * block**0.5).round(decimals=4).unique().tolist()) <= {0.0, 1.0}


def test_transforms_help_where_a_few_inputs_are_loud_and_cost_nothing_elsewhere() -> None:
    x, w = torch.randn(64, 256, generator=seeded()), torch.randn(32, 256, generator=seeded(1))
    loud = x.clone()
    loud[:, ::64] *= 30
    lost = {}
    for name, given in (("normal", x), ("loud", loud)):
        for transform in (True, False):
            found = rounded_product(given, w, Mx(), seeded(2), transform=transform)
            lost[name, transform] = error(found, given @ w.T)
    assert lost["loud", True] < 0.9 * lost["loud", False]
    assert lost["normal", True] < 1.1 * lost["normal", False]


def test_gradients_are_right_on_average_only_when_rounded_at_random() -> None:
    x = torch.randn(64, 32, generator=seeded()).sign()
    g = torch.randn(64, 16, generator=seeded(2)) * torch.exp(2 * torch.randn(64, 16, generator=seeded(3)))
    # The other factor of the product is rounded as well: signs are exact, so only the rounding of g is seen.
    wanted, distance = g.T @ x, {}
    for random in (True, False):
        generator = seeded(4)
        found = [
            rounded_product(g.T.contiguous(), x.T.contiguous(), Mx(), generator, random=random, transform=False)
            for _ in range(200)
        ]
        distance[random] = error(torch.stack(found).mean(0), wanted)
    assert distance[True] < 0.4 * distance[False]


def test_a_small_regression_trains_in_four_bits() -> None:
    x = torch.randn(256, 64, generator=seeded())
    target = x @ torch.randn(32, 64, generator=seeded(1)).T * 0.1
    losses = {}
    for random in (True, False):
        w, generator = torch.zeros(32, 64, requires_grad=True), seeded(2)
        optimizer = torch.optim.SGD([w], lr=8.0)
        for _ in range(60):
            loss = (train_product(x, w, Nvfp4(), generator, random=random) - target).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        with torch.no_grad():
            losses[random] = float((x @ w.T - target).square().mean() / target.square().mean())
    assert losses[True] < 0.02 and losses[False] < 0.1


def test_refusals() -> None:
    with pytest.raises(BadInput, match="power of two"):
        hadamard(torch.ones(2, 48), torch.ones(48), 32)
    with pytest.raises(BadInput, match="power of two"):
        hadamard(torch.ones(2, 48), torch.ones(48), 3)
