"""Bit planes: uniform weights become planes exactly, refinement never goes up, and every prefix is a model."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal

import pytest
import torch
from torch import Tensor

from aerogel.errors import BadInput, RunFailed
from aerogel.model.layer import Layer, Stats
from aerogel.quantize.bcq import Bcq, Fit, alternate, fit_planes, greedy
from aerogel.quantize.codes import quantized
from aerogel.quantize.gptq import Gptq
from aerogel.quantize.grids import IntGrid
from aerogel.quantize.nested import Nested
from aerogel.quantize.planes import PlaneGrid, exponent_bytes, first_planes, from_uniform, powers_of_bytes, powers_of_two
from aerogel.quantize.problem import relative_loss

GRIDS = [
    PlaneGrid(bits=1, group_size=16),
    PlaneGrid(bits=3, group_size=32, scale_dtype=torch.bfloat16),
    PlaneGrid(bits=2, offset="scale", scale_dtype=torch.float16),
    PlaneGrid(bits=4, group_size=7, offset="float32", scale_dtype=torch.bfloat16),
    PlaneGrid(bits=3, group_size=8, power_of_two=True, block_rows=4),
    PlaneGrid(bits=8, group_size=64),
]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def layer_of(N: int, K: int, seed: int = 0) -> Layer:
    """A layer whose inputs are correlated and of unequal size."""
    x_TK = normal(4 * K, K, seed=seed + 1) @ normal(K, K, seed=seed + 2) * normal(K, seed=seed + 3).exp()
    return Layer(name="any", weight_NK=normal(N, K, seed=seed), stats=Stats(tokens=4 * K, second_moment_KK=x_TK.T @ x_TK))


def error(codes: Any, w_NK: Tensor) -> float:
    return float((codes.decode() - w_NK).square().sum() / w_NK.square().sum())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", range(2, 9))
def test_a_uniform_weight_is_planes_bit_for_bit(bits: int, symmetric: bool, dtype: torch.dtype) -> None:
    grid = IntGrid(bits=bits, group_size=16, symmetric=symmetric, scale_dtype=dtype)
    w_NK = normal(9, 45)
    codes = quantized(grid, w_NK, grid.fit(w_NK, search="mse"))
    assert torch.equal(from_uniform(codes).decode(), codes.decode())
    wide = quantized(replace(grid, scale_dtype=torch.float32), w_NK, replace(grid, scale_dtype=torch.float32).fit(w_NK))
    torch.testing.assert_close(from_uniform(wide).decode(), wide.decode(), rtol=0, atol=2e-6)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (1, 33), (6, 70), (129, 40)])
def test_what_codes_decode_to_is_encoded_to_itself(grid: PlaneGrid, shape: tuple[int, int]) -> None:
    w_NK = normal(*shape)
    params = grid.fit(w_NK, search="mse")
    codes = quantized(grid, w_NK, params)
    assert torch.equal(quantized(grid, codes.decode(), params).decode(), codes.decode())
    rounder = grid.rounder(params, *shape)
    columns = [rounder.column(k, w_NK[:, k], torch.empty(shape[0])) for k in range(shape[1])]
    assert torch.equal(torch.stack(columns, 1), codes.decode())
    kept = rounder.params()
    assert torch.equal(kept.scale_NG, params.scale_NG)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_zeros_stay_zero_and_a_constant_is_met(grid: PlaneGrid) -> None:
    zeros = torch.zeros(5, 70)
    assert torch.equal(quantized(grid, zeros, grid.fit(zeros, search="mse")).decode(), zeros)
    constant = torch.full((5, 70), -0.5)
    assert torch.equal(quantized(grid, constant, grid.fit(constant, search="mse")).decode(), constant)
    huge = normal(5, 70) * 1e30
    if grid.scale_dtype is torch.float16:
        with pytest.raises(BadInput, match="bfloat16"):
            grid.fit(huge)
    else:
        assert quantized(grid, huge, grid.fit(huge)).decode().isfinite().all()
    with pytest.raises(BadInput, match="single weights at zero"):
        grid.fit(zeros, None, zeros == 1)


@pytest.mark.parametrize("power_of_two", [False, True])
@pytest.mark.parametrize("offset", ["none", "scale"])
def test_alternation_never_raises_the_weighted_error(offset: Literal["none", "scale"], power_of_two: bool) -> None:
    grid = PlaneGrid(bits=3, offset=offset, power_of_two=power_of_two, scale_dtype=torch.bfloat16)
    w_Rm, weight_Rm = normal(64, 32), normal(64, 32, seed=1).exp()
    now: Fit = greedy(grid, w_Rm, weight_Rm)
    first = now.cost_R
    for _ in range(6):
        later = alternate(grid, w_Rm, weight_Rm, now, 1)
        assert bool((later.cost_R <= now.cost_R).all())
        now = later
    assert float(now.cost_R.sum()) < (0.999 if power_of_two else 0.75) * float(first.sum())


def test_planes_of_three_bits_beat_integers_rounded_to_nearest() -> None:
    w_NK = normal(64, 1024)
    grid, integers = PlaneGrid(bits=3, group_size=128), IntGrid(bits=3, group_size=128, symmetric=False)
    found = {rounds: error(quantized(grid, w_NK, fit_planes(grid, w_NK, None, rounds)), w_NK) for rounds in (0, 15)}
    rounded = error(quantized(integers, w_NK, integers.fit(w_NK)), w_NK)
    assert found[15] < 0.8 * rounded < found[0]


def test_importance_moves_the_error_to_where_it_is_cheap() -> None:
    w_NK, importance_K = normal(32, 64), torch.tensor([100.0] * 32 + [1.0] * 32)
    w_NK[:, :32] *= 0.3
    grid = PlaneGrid(bits=2)
    plain, aware = (quantized(grid, w_NK, fit_planes(grid, w_NK, weight, 15)).decode() for weight in (None, importance_K))
    assert (aware - w_NK)[:, :32].norm() < 0.7 * (plain - w_NK)[:, :32].norm()
    assert (aware - w_NK)[:, 32:].norm() > (plain - w_NK)[:, 32:].norm()


def test_a_power_of_two_is_an_exponent() -> None:
    scale = torch.tensor([0.0, 1e-40, 0.74, 0.75, 1.4, 1.5, 3e38, 0.3])
    wanted = torch.tensor([0.0, 0.0, 0.5, 1.0, 1.0, 2.0, 2.0**127, 0.25])
    assert torch.equal(powers_of_two(scale)[:6], wanted[:6]) and powers_of_two(scale)[7] == 0.25
    powers = torch.tensor([0.0, *(2.0**e for e in range(-126, 128))])
    assert torch.equal(powers_of_bytes(exponent_bytes(powers)), powers)
    # Multiplying by such a scale adds to the exponent and leaves the digits alone.
    x = normal(1000)
    mantissa, exponent = torch.frexp(x)
    for power in (-3, 5):
        moved, shifted = torch.frexp(x * 2.0**power)
        assert torch.equal(moved, mantissa) and torch.equal(shifted, exponent + power)
    w_NK = normal(4, 32)
    grid = PlaneGrid(bits=3, group_size=8, power_of_two=True)
    mantissa, _ = torch.frexp(grid.numbers(grid.fit(w_NK, search="mse"))[0])
    assert set(mantissa.unique().tolist()) <= {0.0, 0.5}


def test_gptq_knows_nothing_of_planes_and_helps_them() -> None:
    layer = layer_of(48, 96)
    assert layer.stats is not None and layer.stats.second_moment_KK is not None
    for grid in (PlaneGrid(bits=2, group_size=32), PlaneGrid(bits=2, group_size=8, power_of_two=True, block_rows=16)):
        data_free, solved = Bcq(grid=grid)(layer), Gptq(grid=grid)(layer)
        assert solved.codes is not None and torch.equal(solved.codes.decode(), solved.weight_NK)
        h_KK = layer.stats.second_moment_KK
        losses = [relative_loss(layer.weight_NK, found.weight_NK, h_KK) for found in (data_free, solved)]
        assert losses[1] < 0.6 * losses[0]


def test_shared_scales_are_fitted_when_their_group_is_due() -> None:
    """The loudest group comes first, so its scales fit the untouched weight; later ones fit what its errors leave."""
    layer, loud = layer_of(48, 96), slice(40, 48)
    assert layer.stats is not None and layer.stats.second_moment_KK is not None
    h_KK = layer.stats.second_moment_KK.clone()
    h_KK[loud] *= 20
    h_KK[:, loud] *= 20
    layer = layer.with_(stats=Stats(second_moment_KK=h_KK, tokens=layer.stats.tokens))
    grid = PlaneGrid(bits=3, group_size=8, power_of_two=True, block_rows=16)
    updated = Gptq(grid=grid, groups="updated", clip="mse", refit=0)(layer)
    assert updated.codes is not None and torch.equal(updated.codes.decode(), updated.weight_NK)
    before = grid.fit(layer.weight_NK, search="mse").scale_NG
    same_G = (updated.codes.scale_NG == before).all(2).all(0)
    assert updated.codes.scale_NG.shape == (3, 12, 3)
    assert bool(same_G[5]) and not bool(same_G.all())
    static = Gptq(grid=grid, clip="mse", refit=0)(layer)
    assert updated.loss is not None and static.loss is not None and updated.loss < 1.05 * static.loss


def test_every_prefix_of_nested_planes_is_a_better_model_than_the_last() -> None:
    layer = layer_of(40, 64)
    assert layer.stats is not None and layer.stats.second_moment_KK is not None
    grid = PlaneGrid(bits=4, group_size=16, scale_dtype=torch.bfloat16)
    solved = Nested(grid=grid)(layer)
    assert solved.codes is not None and torch.equal(solved.codes.decode(), solved.weight_NK)
    losses = [
        relative_loss(layer.weight_NK, first_planes(solved.codes, bits).decode(), layer.stats.second_moment_KK)
        for bits in (2, 3, 4)
    ]
    assert losses[1] < 0.6 * losses[0] and losses[2] < 0.6 * losses[1]
    assert [solved.notes[f"loss_at_{bits}_bits"] for bits in (2, 3, 4)] == losses
    base = PlaneGrid(bits=2, group_size=16, offset="scale", scale_dtype=torch.bfloat16)
    assert torch.equal(first_planes(solved.codes, 2).decode(), Gptq(grid=base)(layer).weight_NK)
    integers = Gptq(grid=IntGrid(bits=2, group_size=16, symmetric=False, scale_dtype=torch.bfloat16))(layer)
    assert integers.loss is not None and losses[0] < integers.loss
    assert solved.codes.zero_NG is not None and solved.codes.zero_NG.dtype == torch.bfloat16
    with pytest.raises(BadInput, match="between 1 and 4"):
        first_planes(solved.codes, 5)


@pytest.mark.parametrize(
    ("change", "word"),
    [({"bits": 0}, "bits"), ({"bits": 9}, "bits"), ({"group_size": 0}, "group_size"), ({"block_rows": 3}, "block_rows")],
)
def test_grids_that_make_no_sense_are_refused(change: dict[str, int], word: str) -> None:
    with pytest.raises(BadInput, match=word):
        PlaneGrid(**{"bits": 2, **change})  # type: ignore[arg-type]


def test_methods_refuse_what_they_cannot_do() -> None:
    with pytest.raises(BadInput, match="format: planes"):
        Bcq(grid=IntGrid(bits=3))
    with pytest.raises(BadInput, match="power_of_two"):
        Nested(grid=PlaneGrid(bits=3, power_of_two=True))
    layer = layer_of(8, 16).with_(mask_NK=torch.ones(8, 16, dtype=torch.bool))
    with pytest.raises(BadInput, match="any is pruned"):
        Bcq(grid=PlaneGrid(bits=3))(layer)
    with pytest.raises(RunFailed, match="any"):
        Bcq(grid=PlaneGrid(bits=3))(layer.with_(mask_NK=None, weight_NK=torch.full((8, 16), torch.nan)))
