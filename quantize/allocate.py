"""How many bits each layer gets so that the average meets a target and the summed error is least.

Each layer has a few widths and, at each, a cost: a sensitivity times an error. The choice of one width per layer under a
budget of bits is a knapsack problem; ShiftAddLLM (You et al. 2024, arXiv 2406.05981, section 4.3) gives it to an integer
solver with a cost read off the Hessian. Costs of a layer fall ever more slowly with its bits, and on their convex hull the
greedy choice, always the widening that saves most per bit, is optimal for every budget it stops at; only the last widening
may not fit. So no solver is needed. Costs here are measured: the relative output errors that compressing at each width
reported (`layer_costs`), which the paper's score estimates.

Cost: sorting as many numbers as there are layers times widths.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from itertools import pairwise
from typing import Any

from aerogel.errors import BadInput


def allocate(costs: Mapping[str, Mapping[int, float]], weights: Mapping[str, int], average: float) -> dict[str, int]:
    """Bits per layer.

    Args:
        costs: {layer: {bits: cost}}.
        weights: how many weights each layer has.
        average: bits per weight, over all layers together, that must not be exceeded.

    Raises:
        BadInput: no layers, or a target that the narrowest widths exceed already.
    """
    if not costs:
        raise BadInput("no layer has a cost, so there is nothing to allocate")
    hulls = {name: _hull(found) for name, found in costs.items()}
    chosen = {name: hull[0][0] for name, hull in hulls.items()}
    budget = average * sum(weights[name] for name in costs) - sum(bits * weights[name] for name, bits in chosen.items())
    if budget < 0:
        raise BadInput(f"an average of {average} bits is below the narrowest widths; raise it or offer narrower ones")
    steps = []
    for name, hull in hulls.items():
        for (bits, cost), (wider, less) in pairwise(hull):
            size = (wider - bits) * weights[name]
            steps.append(((cost - less) / size, name, wider, size))
    blocked: set[str] = set()
    for _, name, wider, size in sorted(steps, key=lambda step: (-step[0], step[1], step[2])):
        # Behind a widening that did not fit, the next one of that layer would have to skip it.
        if name in blocked or size > budget + 1e-6:
            blocked.add(name)
            continue
        chosen[name], budget = wider, budget - size
    return chosen


def layer_costs(reports: Sequence[Mapping[str, Any]]) -> tuple[dict[str, dict[int, float]], dict[str, int]]:
    """Costs and sizes of every layer from reports of the same model compressed at several widths.

    Raises:
        BadInput: a report whose layers have no `loss` (compressed without data), or that lacks layers of the others.
    """
    costs: dict[str, dict[int, float]] = {}
    weights: dict[str, int] = {}
    for report in reports:
        for block in report.get("blocks", ()):
            for layer in block["layers"]:
                if layer.get("loss") is None:
                    raise BadInput(
                        f"{layer['name']} has no loss in a report; compress with a method that sees data, such as gptq"
                    )
                costs.setdefault(layer["name"], {})[int(layer["bits"])] = float(layer["loss"])
                weights[layer["name"]] = round(8 * layer["bytes"] / layer["bits_per_weight"])
    uneven = [name for name, found in costs.items() if len(found) != len(reports)]
    if uneven:
        raise BadInput(f"{uneven[0]} was not compressed at {len(reports)} different widths; give one report per width")
    return costs, weights


def mixed_recipe(recipe: Mapping[str, Any], chosen: Mapping[str, int]) -> dict[str, Any]:
    """A recipe that compresses each layer at its own width: its only quantize stage, once per width with the layers named.

    Raises:
        BadInput: a recipe with no or several quantize stages, whose widths are already mixed.
    """
    stages = list(recipe["stages"])
    places = [index for index, stage in enumerate(stages) if "quantize" in stage]
    if len(places) != 1:
        raise BadInput(f"bits can be shared out for a recipe with one quantize stage, this one has {len(places)}")
    (place,) = places
    widths = sorted(set(chosen.values()))
    named = {bits: sorted(name for name, found in chosen.items() if found == bits) for bits in widths}
    # Each with values of its own: what two stages share would be written as a reference, which recipes do not have.
    own = (deepcopy(stages[place]["quantize"]) for _ in widths)
    split = [{"quantize": {**stage, "bits": bits, "targets": named[bits]}} for stage, bits in zip(own, widths, strict=True)]
    return {**recipe, "stages": [*stages[:place], *split, *stages[place + 1 :]]}


def _hull(costs: Mapping[int, float]) -> list[tuple[int, float]]:
    """The lower convex hull of (bits, cost), from the narrowest width on; widths that save nothing are left out."""
    hull: list[tuple[int, float]] = []
    for point in sorted(costs.items()):
        if hull and point[1] >= hull[-1][1]:
            continue
        while len(hull) > 1 and _saving(hull[-2], hull[-1]) <= _saving(hull[-1], point):
            hull.pop()
        hull.append(point)
    return hull


def _saving(narrow: tuple[int, float], wide: tuple[int, float]) -> float:
    return (narrow[1] - wide[1]) / (wide[0] - narrow[0])
