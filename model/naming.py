"""Which tensors of a checkpoint make which parameters of the transformers model, and how.

Most tensors are parameters under the same name. Some families differ: transformers 5 renames, and fuses what lies apart
on disk (the experts of Mixtral are 3 x E matrices on disk, and two 3-D parameters in memory). transformers keeps those
rules as data; here they are applied to names first (on the meta device, no bytes read) and, block by block, to weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

from aerogel.errors import BadInput


@dataclass(frozen=True, slots=True)
class Group:
    """Checkpoint tensors that become model parameters together.

    sources: tensor names on disk, in the order in which the conversion wants them, each with the pattern it matched.
    outputs: the parameters (or buffers) that result.
    converter: transformers' rule for it; None when the one source is the one output as it stands.
    """

    sources: tuple[tuple[str, str], ...]
    outputs: tuple[str, ...]
    converter: WeightConverter | None

    def build(self, model: PreTrainedModel, fetch: Callable[[str], Tensor]) -> dict[str, Tensor]:
        """The output tensors, made from what `fetch` returns for each source name."""
        if self.converter is None:
            return {self.outputs[0]: fetch(self.sources[0][0])}
        rule = deepcopy(self.converter)
        for name, pattern in self.sources:
            rule.add_tensor(self.outputs[0], name, pattern, fetch(name))  # type: ignore[arg-type]
        made: dict[str, Any] = rule.convert(self.outputs[0], model=model, config=model.config)
        return {name: value[0] if isinstance(value, list) else value for name, value in made.items()}


def group_tensors(model: PreTrainedModel, tensors: dict[str, Tensor]) -> tuple[list[Group], list[str]]:
    """Sorts checkpoint tensors into groups, and lists the names that no parameter of `model` wants.

    Args:
        model: the architecture, on the meta device.
        tensors: every tensor of the checkpoint as a meta tensor of its shape and dtype.

    Raises:
        BadInput: tensors whose shapes do not fit the model.
    """
    rules = get_model_conversion_mapping(model)
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    by_pattern = {pattern: rule for rule in converters for pattern in rule.source_patterns}
    wanted = model.state_dict()
    collected: dict[str, list[tuple[str, str]]] = {}
    rule_of: dict[str, WeightConverter | None] = {}
    unused: list[str] = []
    for name in sorted(tensors, key=dot_natural_key):
        target, pattern = rename_source_key(name, renamings, converters, model.base_model_prefix, wanted)
        if target not in wanted and name in wanted:
            target, pattern = name, None
        if target not in wanted:
            unused.append(name)
            continue
        rule_of.setdefault(target, by_pattern[pattern] if pattern is not None else None)
        collected.setdefault(target, []).append((name, pattern or name))
    groups = []
    for target, sources in collected.items():
        draft = Group(tuple(sources), (target,), rule_of[target])
        made = _checked(model, draft, tensors, wanted)
        groups.append(Group(draft.sources, tuple(made), draft.converter))
    return groups, unused


def _checked(model: PreTrainedModel, group: Group, tensors: dict[str, Tensor], wanted: dict[str, Tensor]) -> dict[str, Tensor]:
    """What a group makes, on the meta device; `BadInput` where it has not the shapes that the model's config asks for."""
    first = group.sources[0][0]
    shapes = f"{first!r} of shape {list(tensors[first].shape)}"
    try:
        made = group.build(model, tensors.__getitem__)
    except (RuntimeError, ValueError, IndexError) as error:
        raise BadInput(
            f"{shapes} and the {len(group.sources) - 1} tensors beside it do not make {group.outputs[0]!r}"
            f" ({str(error).strip().splitlines()[0][:120]}); config.json belongs to another model, or a file is damaged"
        ) from error
    for name, value in made.items():
        if name in wanted and value.shape != wanted[name].shape:
            raise BadInput(
                f"{shapes} gives {name!r} the shape {list(value.shape)} where config.json asks for {list(wanted[name].shape)};"
                " config.json belongs to another model, or a file is damaged"
            )
    return made


def materialise(model: PreTrainedModel, groups: Iterable[Group], fetch: Callable[[str], Tensor], dtype: torch.dtype) -> None:
    """Loads the parameters of `groups` into `model`, floating-point ones as `dtype` unless the model insists on its own."""
    for group in groups:
        for name, value in group.build(model, fetch).items():
            place(model, name, value.to(dtype) if value.is_floating_point() else value)


def place(model: torch.nn.Module, name: str, value: Tensor) -> None:
    """Makes `value` the parameter or buffer called `name`, sharing its storage."""
    path, _, leaf = name.rpartition(".")
    module = model.get_submodule(path)
    if leaf in module._parameters:
        module._parameters[leaf] = torch.nn.Parameter(value, requires_grad=False)
    else:
        module._buffers[leaf] = value


def release(model: torch.nn.Module, groups: Iterable[Group]) -> None:
    """Sends the parameters of `groups` back to the meta device, which frees their memory."""
    for group in groups:
        for name in group.outputs:
            path, _, leaf = name.rpartition(".")
            module = model.get_submodule(path)
            value: Tensor | None = module._parameters.get(leaf)
            if value is None:
                value = module._buffers[leaf]
            if value is not None and not value.is_meta:
                place(model, name, value.to("meta"))
