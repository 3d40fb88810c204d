"""Which parameters of a mixture of experts become stacks of packed weights, and which linears of their own: read from headers.

`model/experts.py` says what makes a parameter of the matrices on disk. Here it is asked whether their tensors can lie in one
stack: alike in format, in the order of columns, and in what stands beside the codes.

Shape legend: E experts, N out features, K in features.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.core_model_loading import WeightConverter

from aerogel.errors import BadInput
from aerogel.model.experts import Stack, stacks_of
from aerogel.model.reader import Entry
from aerogel.pack.config import choose_format
from aerogel.pack.format import Activations
from aerogel.pack.scheme import Scheme
from aerogel.pack.source import Source, UnevenGroups, order_of
from aerogel.quantize.grids import IntGrid
from aerogel.quantize.input_scale import NAMES as INPUT_SCALE
from aerogel.quantize.rows import NAMES as ROWS
from aerogel.quantize.sidecars import NAMES as SIDECARS
from aerogel.quantize.tables import TableGrid

if TYPE_CHECKING:
    from aerogel.model.placement import Placement

FACTORS = ("weight_scale_2", "weight_global_scale", "weight_factor")
"""Local names of the one number that scales in eight bits are multiplied or divided by."""


class Stacker:
    """The stacks of a model's experts.

    Args:
        model: on the meta device.
        header: the entries of all tensors on disk. source: reads this kind of checkpoint.
        read: gives a tensor by its name on disk; called for column indices and single numbers only.
    """

    def __init__(
        self, model: PreTrainedModel, header: Mapping[str, Entry], source: Source, read: Callable[[str], Tensor]
    ) -> None:
        self.model, self.header, self.source, self.read = model, header, source, read
        self.wanted = model.state_dict()

    def stacks(
        self, found: Mapping[str, list[Placement]], rules: dict[str, WeightConverter]
    ) -> tuple[dict[str, Stack], dict[str, str]]:
        """The experts that stay packed, and modules whose experts do not, with the reason."""
        by_module: dict[str, dict[str, list[Placement]]] = {}
        for parameter, items in found.items():
            if self.wanted[parameter].ndim == 3:
                by_module.setdefault(items[0].module, {})[parameter] = items
        stacks: dict[str, Stack] = {}
        unpacked = {}
        for path, parameters in by_module.items():
            items = [item for held in parameters.values() for item in held]
            made = stacks_of(self.model, path, parameters, rules)
            made = made if isinstance(made, str) else self._with_rows(self._apart(made, parameters), parameters)
            if any(item.whole for item in items) and not isinstance(made, str):
                made = next((stack.apart for stack in made.values() if stack.apart is not None), made)
            if isinstance(made, str):
                rounded = any(item.scheme is not None and item.scheme.activations != "none" for item in items)
                unpacked[path] = made + (", and their inputs are not rounded as the checkpoint asks" if rounded else "")
            else:
                stacks |= {parameter: self._one_factor(stack, parameters[parameter]) for parameter, stack in made.items()}
        return stacks, unpacked

    def _apart(self, stacks: dict[str, Stack], parameters: Mapping[str, list[Placement]]) -> dict[str, Stack]:
        """The stacks, with the reason why their matrices differ in shape, where they do."""

        def reason(items: list[Placement]) -> str | None:
            if not all(self._in_order(item) for item in items):
                return "columns stand in another order (activation order)"
            beside = any(item.tensors.keys() & set(SIDECARS) - set(INPUT_SCALE) - set(ROWS) for item in items)
            return "weights are kept beside their codes" if beside else None

        return {name: replace(stack, apart=stack.apart or reason(parameters[name])) for name, stack in stacks.items()}

    def _with_rows(self, stacks: dict[str, Stack], parameters: Mapping[str, list[Placement]]) -> dict[str, Stack] | str:
        """The stacks, with how many rows of more bits an expert has; or why those cannot stay packed."""
        found = {}
        for parameter, stack in stacks.items():
            items = parameters[parameter]
            counts = [self._row_count(item) for item in items]
            grids = {self._row_grid(item) for item, count in zip(items, counts, strict=True) if count}
            if grids and items[0].whole:
                return "rows have more bits"
            if len(grids) > 1 and stack.apart is None:
                stack = replace(stack, apart="rows have more bits of several kinds")
            if stack.apart is not None:
                found[parameter] = stack
                continue
            most = max(sum(counts[place] for place in places) for places in stack.parts)
            for grid in grids:
                rounding: Activations = "int8" if stack.scheme.activations == "int8" else "none"
                scheme = Scheme(format=choose_format(grid, rounding).name, grid=grid, activations=rounding)
                stack = replace(stack, more=(most, scheme))
            found[parameter] = stack
        return found

    def _row_count(self, item: Placement) -> int:
        return self.header[item.tensors[ROWS[0]]].shape[0] if ROWS[0] in item.tensors else 0

    def _row_grid(self, item: Placement) -> IntGrid:
        """Of what the rows have more, from the few numbers that say so."""
        _, scale, kind = (item.tensors[name] for name in ROWS[1:])
        _, width, group = self.read(kind).tolist()
        return IntGrid(bits=width, group_size=group or None, scale_dtype=self.header[scale].dtype)

    def _one_factor(self, stack: Stack, items: list[Placement]) -> Stack:
        """The stack, on a grid with wider scales where matrices that are joined (gate and up) have factors that differ."""
        grid = stack.scheme.grid
        joined = any(len(places) > 1 for places in stack.parts)
        if not isinstance(grid, TableGrid) or not grid.two_level or not joined or stack.apart is not None:
            return stack
        factors = [[self._factor(items[place]) for place in places] for places in stack.parts]
        if all(one == parts[0] for parts in factors for one in parts):
            return stack
        wide = replace(grid, scale_dtype=torch.float32)
        activations = stack.scheme.activations
        return replace(stack, scheme=Scheme(format=choose_format(wide, activations).name, grid=wide, activations=activations))

    def _factor(self, item: Placement) -> float:
        local = next((local for local in FACTORS if local in item.tensors), None)
        if local is None:
            raise BadInput(f"{item.name} has none of {', '.join(FACTORS)}; the checkpoint is not whole, get it again")
        return float(self.read(item.tensors[local]))

    def _in_order(self, item: Placement) -> bool:
        index = item.tensors.get(self.source.index)
        if index is None or item.scheme is None or self.header[index].shape in ((), (0,)):
            return True
        try:
            return order_of(self.read(index), item.scheme.grid.group_size) is None
        except UnevenGroups:
            return False


def own_paths(parameter: str, stack: Stack) -> dict[int, str]:
    """Where each matrix of a stack is a linear of its own, by its place."""
    return {place: f"{parameter}.parts.{e}.{part}" for e, places in enumerate(stack.parts) for part, place in enumerate(places)}
