"""Bits across layers: never above the target, never worse than uniform widths, and optimal where the budget is met."""

from __future__ import annotations

from itertools import product

import pytest
import torch

from aerogel.errors import BadInput
from aerogel.quantize.allocate import allocate, layer_costs, mixed_recipe
from aerogel.quantize.codes import quantized
from aerogel.quantize.planes import PlaneGrid


def total(costs: dict[str, dict[int, float]], chosen: dict[str, int]) -> float:
    return sum(costs[name][bits] for name, bits in chosen.items())


def test_mixed_widths_beat_uniform_ones_on_layers_of_unequal_sensitivity() -> None:
    costs: dict[str, dict[int, float]] = {}
    for index, loudness in enumerate((0.1, 0.3, 1.0, 3.0, 10.0)):
        w_NK = torch.randn(16, 128, generator=torch.Generator().manual_seed(index))
        found = {}
        for bits in (2, 3, 4):
            grid = PlaneGrid(bits=bits, group_size=64, power_of_two=True)
            codes = quantized(grid, w_NK, grid.fit(w_NK, search="mse"))
            found[bits] = loudness * float((codes.decode() - w_NK).square().sum())
        costs[str(index)] = found
    weights = dict.fromkeys(costs, 16 * 128)
    chosen = allocate(costs, weights, 3.0)
    assert sum(chosen.values()) <= 3 * len(chosen)
    assert total(costs, chosen) < 0.9 * total(costs, dict.fromkeys(costs, 3))
    assert chosen["4"] > chosen["0"]


@pytest.mark.parametrize("seed", range(8))
def test_the_greedy_choice_is_the_best_one(seed: int) -> None:
    random = torch.Generator().manual_seed(seed)
    scale = torch.rand(5, generator=random).tolist()
    costs = {str(i): {bits: s * 4.0**-bits for bits in (2, 3, 4)} for i, s in enumerate(scale)}
    weights = dict.fromkeys(costs, 10)
    found = total(costs, allocate(costs, weights, 3.0))
    every = (dict(zip(costs, widths, strict=True)) for widths in product((2, 3, 4), repeat=5) if sum(widths) <= 15)
    assert found == pytest.approx(min(total(costs, chosen) for chosen in every))


def test_reports_give_the_costs() -> None:
    def report(bits: int, loss: float | None) -> dict[str, object]:
        row = {"name": "a", "bits": bits, "bits_per_weight": 4.0, "bytes": 3, "loss": loss}
        return {"blocks": [{"layers": [row]}]}

    assert layer_costs([report(2, 0.5), report(3, 0.1)]) == ({"a": {2: 0.5, 3: 0.1}}, {"a": 6})
    with pytest.raises(BadInput, match="no loss"):
        layer_costs([report(2, None)])
    with pytest.raises(BadInput, match="different widths"):
        layer_costs([report(2, 0.5), report(2, 0.4)])
    base = {"stages": [{"prune": {}}, {"quantize": {"method": "gptq", "bits": 3}}]}
    stages = mixed_recipe(base, {"b": 2, "a": 2, "c": 4})["stages"]
    assert [s["quantize"] for s in stages[1:]] == [
        {"method": "gptq", "bits": 2, "targets": ["a", "b"]},
        {"method": "gptq", "bits": 4, "targets": ["c"]},
    ]
    with pytest.raises(BadInput, match="has 0"):
        mixed_recipe({"stages": []}, {})
    with pytest.raises(BadInput, match="narrowest"):
        allocate({"a": {2: 0.5}}, {"a": 6}, 1.5)
    with pytest.raises(BadInput, match="nothing"):
        allocate({}, {}, 3)
