"""Where the packed weights of a checkpoint go in the transformers model, decided from headers alone.

For each packed weight on disk the name its dense weight would have is sent through transformers' renaming rules, as any
tensor's is. That leads to one of five places:

    a linear's weight      the linear is replaced by `kernels.Linear` and stays packed (a GPT-2 Conv1D as well)
    a part of a parameter  experts that transformers fuses into one 3-D parameter: decoded, and handed to its own rule
    a slice of a stack     `...experts.E.gate_up_proj` where the model has `...experts.gate_up_proj` [E, ., .]: decoded, stacked
    a whole stack          `...experts.gate_up_proj` with all experts in its tensors (gpt-oss)
    any other parameter    decoded

Nothing here reads a weight. Read are column indices (GPTQ's g_idx, K integers each), since whether their groups are even
decides whether a linear can stay packed, and the factors of two-level scales, which must agree where gate and up are joined.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key
from transformers.pytorch_utils import Conv1D

from aerogel.errors import BadInput
from aerogel.model.experts import Stack, stacks_of
from aerogel.model.reader import Entry
from aerogel.pack.config import choose_format, format_of
from aerogel.pack.format import Activations
from aerogel.pack.scheme import Scheme
from aerogel.pack.source import Source, UnevenGroups, order_of
from aerogel.quantize.grids import IntGrid
from aerogel.quantize.input_scale import NAMES as INPUT_SCALE
from aerogel.quantize.planes import PlaneGrid
from aerogel.quantize.rows import NAMES as ROWS
from aerogel.quantize.sidecars import NAMES as SIDECARS
from aerogel.quantize.sidecars import with_sidecars
from aerogel.quantize.tables import TableGrid

FACTORS = ("weight_scale_2", "weight_global_scale", "weight_factor")
"""Local names of the one number that scales in eight bits are multiplied or divided by."""
NUMBERED = re.compile(r"(?P<stem>.+)\.(?P<number>\d+)\.(?P<leaf>[^.]+)")


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """One weight on disk and its place in the model.

    name: the weight on disk, without suffix; for a tensor that is not packed, its whole name.
    tensors: {local name: tensor name on disk}.
    scheme: how it is packed; None for a tensor that is not, but shares its parameter with one that is.
    parameter: the model parameter it makes, or is part of.
    pattern: the conversion rule's pattern that it matched, None when it is the parameter itself.
    packed: whether it stays packed, in a `kernels.Linear` in the place of `parameter`'s module.
    transposed: whether the disk of the dense model has it as [K, N].
    stack: its index in a stack of matrices on disk, or None.
    dense_name: the tensor's name in a dense checkpoint of this model.
    whole: whether its tensors hold all experts of a layer, along their first axis.
    expert: whether it stays packed as one of a layer's experts, see `Plan.stacks`.
    own: path of the linear that it is there, where these are no stack.
    embedding: path of the embedding that looks up rows of it, where it is a tied head; None for any other weight.
    """

    name: str
    tensors: Mapping[str, str]
    scheme: Scheme | None
    parameter: str
    pattern: str | None = None
    packed: bool = False
    transposed: bool = False
    stack: int | None = None
    dense_name: str = ""
    whole: bool = False
    expert: bool = False
    own: str | None = None
    embedding: str | None = None

    @property
    def module(self) -> str:
        """Path of the module that owns the parameter, or its own."""
        return self.own or self.parameter.rpartition(".")[0]


@dataclass(frozen=True, slots=True)
class Plan:
    """All placements of a checkpoint, by the parameter they make, and the rules for parameters made of several.

    homeless: packed weights that the model has no place for. stacks: how the experts that stay packed are made, by parameter.
    unpacked: modules of experts that are decoded into dense weights, and why.
    """

    placements: Mapping[str, list[Placement]]
    rules: Mapping[str, WeightConverter]
    homeless: list[str] = field(default_factory=list)
    stacks: Mapping[str, Stack] = field(default_factory=dict)
    unpacked: Mapping[str, str] = field(default_factory=dict)

    def packed(self) -> list[Placement]:
        """The weights that stay packed."""
        return [items[0] for items in self.placements.values() if items[0].packed]


def make_plan(model: PreTrainedModel, header: Mapping[str, Entry], source: Source, read: Callable[[str], Tensor]) -> Plan:
    """Places every packed weight of a checkpoint.

    Args:
        model: on the meta device, still dense.
        header: the entries of all tensors on disk.
        source: reads this kind of checkpoint.
        read: gives a tensor by its name on disk; called for column indices and factors only.

    Returns:
        The plan; `homeless` lists packed weights that the model has no place for.

    Raises:
        BadInput: a packed weight that the quantization config does not describe, or a shape that does not fit.
    """
    return _Planner(model, header, source, read).plan()


class _Planner:
    def __init__(
        self, model: PreTrainedModel, header: Mapping[str, Entry], source: Source, read: Callable[[str], Tensor]
    ) -> None:
        self.model, self.header, self.source, self.read = model, header, source, read
        rules = get_model_conversion_mapping(model)
        self.renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
        self.converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
        self.by_pattern = {pattern: rule for rule in self.converters for pattern in rule.source_patterns}
        self.wanted = model.state_dict()

    def plan(self) -> Plan:
        """Packed weights first, then the plain tensors that share a parameter with one of them."""
        groups = self.source.groups(self.header)
        found: dict[str, list[Placement]] = {}
        homeless = []
        for name in sorted(groups, key=dot_natural_key):
            placement = self._place(name, groups[name])
            if placement is None:
                homeless.append(name)
            else:
                found.setdefault(placement.parameter, []).append(placement)
        plain = self.source.plain_groups(self.header)
        for name in sorted(plain, key=dot_natural_key):
            parameter, pattern = self._target(name)
            if parameter not in self.wanted:
                homeless.append(name)
                continue
            found.setdefault(parameter, []).append(
                Placement(name=name, tensors=plain[name], scheme=None, parameter=parameter, pattern=pattern)
            )
        used = {tensor for tensors in [*groups.values(), *plain.values()] for tensor in tensors.values()}
        shared = {parameter for parameter, items in found.items() if items[0].pattern is not None}
        for name in self._others(used) if shared else ():
            parameter, pattern = self._target(name)
            if parameter in shared:
                beside = Placement(name=name, tensors={"": name}, scheme=None, parameter=parameter, pattern=pattern)
                found[parameter].append(beside)
        for items in found.values():
            items.sort(key=lambda item: dot_natural_key(item.name))
        rules = {p: self.by_pattern[items[0].pattern] for p, items in found.items() if items[0].pattern is not None}
        stacks, unpacked = self._experts(found, rules)
        for parameter, stack in stacks.items():
            own = {} if stack.apart is None else _own_paths(parameter, stack)
            found[parameter] = [replace(item, expert=True, own=own.get(place)) for place, item in enumerate(found[parameter])]
        return Plan(found, rules, homeless, stacks, unpacked)

    def _experts(
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

    def _others(self, used: set[str]) -> Iterable[str]:
        return (name for name in self.header if name not in used)

    def _target(self, name: str) -> tuple[str, str | None]:
        parameter, pattern = rename_source_key(name, self.renamings, self.converters, self.model.base_model_prefix, self.wanted)
        return (name, None) if parameter not in self.wanted and name in self.wanted else (parameter, pattern)

    def _place(self, name: str, tensors: Mapping[str, str]) -> Placement | None:
        dense_name = f"{name}.weight"
        parameter, pattern = self._target(dense_name)
        stack, whole = None, False
        if parameter not in self.wanted:
            parameter, pattern = self._target(name)
            whole = parameter in self.wanted and self.wanted[parameter].ndim == 3
            dense_name = name if whole else dense_name
        if parameter not in self.wanted:
            numbered = NUMBERED.fullmatch(name)
            if numbered is None:
                return None
            dense_name, stack = f"{numbered['stem']}.{numbered['leaf']}", int(numbered["number"])
            parameter, pattern = self._target(dense_name)
            if parameter not in self.wanted or self.wanted[parameter].ndim != 3:
                return None
        owner = self.model.get_submodule(parameter.rpartition(".")[0])
        scheme = self._scheme(name, tensors, parameter, owner)
        tensors = _wanted(tensors, scheme)
        head = self._head_of(owner, parameter) if stack is None and pattern is None and not whole else None
        if head is not None and self._stays_packed(tensors, scheme, head, self.model.get_submodule(head.rpartition(".")[0])):
            path = parameter.rpartition(".")[0]
            return Placement(
                name=name,
                tensors=tensors,
                scheme=scheme,
                parameter=head,
                packed=True,
                dense_name=dense_name,
                embedding=path,
            )
        transposed = bool(getattr(owner, "is_transposed", False)) if whole or stack is not None else isinstance(owner, Conv1D)
        return Placement(
            name=name,
            tensors=tensors,
            scheme=scheme,
            parameter=parameter,
            pattern=pattern,
            packed=not whole and stack is None and pattern is None and self._stays_packed(tensors, scheme, parameter, owner),
            transposed=transposed,
            stack=stack,
            dense_name=dense_name,
            whole=whole,
        )

    def _head_of(self, owner: nn.Module, parameter: str) -> str | None:
        """The parameter of the output head that is tied to this embedding, if a packed weight can serve both."""
        plain = isinstance(owner, nn.Embedding) and type(owner).forward is nn.Embedding.forward and owner.max_norm is None
        head: nn.Module | None = self.model.get_output_embeddings()  # type: ignore[no-untyped-call, unused-ignore]
        tied = [name for name, stored in (self.model.all_tied_weights_keys or {}).items() if stored == parameter]
        if not plain or head is None or len(tied) != 1:
            return None
        return tied[0] if self.model.get_submodule(tied[0].rpartition(".")[0]) is head else None

    def _scheme(self, name: str, tensors: Mapping[str, str], parameter: str, owner: nn.Module) -> Scheme:
        header = {local: self.header[tensor].dtype for local, tensor in tensors.items()}
        return self.source.scheme((name, parameter.removesuffix(".weight")), header, ("Linear", type(owner).__name__))

    def _stays_packed(self, tensors: Mapping[str, str], scheme: Scheme, parameter: str, owner: nn.Module) -> bool:
        plain = isinstance(owner, nn.Linear) and type(owner).forward is nn.Linear.forward
        if not (plain or isinstance(owner, Conv1D)) or not parameter.endswith(".weight"):
            return False
        index = tensors.get(self.source.index)
        if index is None or self.header[index].shape in ((), (0,)):
            return True
        try:
            order_of(self.read(index), scheme.grid.group_size)
        except UnevenGroups:
            return False
        return True


def _wanted(tensors: Mapping[str, str], scheme: Scheme) -> Mapping[str, str]:
    """The tensors that the scheme reads: planes beyond those that were asked for stay on the disk, and so do scales of inputs
    that are not rounded with them."""
    if not scheme.activations.endswith("-static"):
        tensors = {local: name for local, name in tensors.items() if local not in INPUT_SCALE}
    if not isinstance(scheme.grid, PlaneGrid):
        return tensors
    read = format_of(scheme.format).shapes(1, 1, scheme.grid)
    return {local: name for local, name in tensors.items() if local in read}


def _own_paths(parameter: str, stack: Stack) -> dict[int, str]:
    """Where each matrix of a stack is a linear of its own, by its place."""
    return {place: f"{parameter}.parts.{e}.{part}" for e, places in enumerate(stack.parts) for part, place in enumerate(places)}


def of_expert(tensors: Mapping[str, Tensor], expert: int) -> dict[str, Tensor]:
    """The tensors of one expert among those of a whole stack."""
    return {local: tensor[expert] for local, tensor in tensors.items()}


def features(module: nn.Module) -> tuple[int, int]:
    """(N, K) of an `nn.Linear` or a Conv1D."""
    if isinstance(module, Conv1D):
        return int(module.nf), int(module.nx)
    if isinstance(module, nn.Linear):
        return module.out_features, module.in_features
    raise BadInput(f"a {type(module).__name__} has no packed counterpart; aerogel packs Linear and Conv1D")


def decoded(placement: Placement, source: Source, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
    """The dense tensor of one placement, as a dense checkpoint's disk has it: [N, K], or [K, N] where transposed; [E, ., .] of
    a whole stack."""
    if placement.scheme is None:
        return source.opened(tensors)[""].to(dtype)
    tensors = source.opened(tensors)
    if placement.whole:
        one = replace(placement, whole=False)
        experts = range(len(next(iter(tensors.values()))))
        return torch.stack([decoded(one, source, of_expert(tensors, e), dtype) for e in experts])
    weight = with_sidecars(source.columns(placement.name, tensors, placement.scheme).dense(dtype), tensors, placement.name)
    return weight.T.contiguous() if placement.transposed else weight
