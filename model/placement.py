"""Where the packed weights of a checkpoint go in the transformers model, decided from headers alone.

For each packed weight on disk the name its dense weight would have is sent through transformers' renaming rules, as any
tensor's is. That leads to one of five places:

    a linear's weight      the linear is replaced by `kernels.Linear` and stays packed (a GPT-2 Conv1D as well)
    a part of a parameter  experts that transformers fuses into one 3-D parameter: decoded, and handed to its own rule
    a slice of a stack     `...experts.E.gate_up_proj` where the model has `...experts.gate_up_proj` [E, ., .]: decoded, stacked
    a whole stack          `...experts.gate_up_proj` with all experts in its tensors (gpt-oss, some of ModelOpt)
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
from aerogel.model.experts import Stack
from aerogel.model.reader import Entry
from aerogel.model.stacking import Stacker, own_paths
from aerogel.pack.config import format_of
from aerogel.pack.scheme import Scheme
from aerogel.pack.source import Source, UnevenGroups, order_of
from aerogel.quantize.input_scale import NAMES as INPUT_SCALE
from aerogel.quantize.planes import PlaneGrid
from aerogel.quantize.sidecars import decoding_dtype, with_sidecars

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
        stacks, unpacked = Stacker(self.model, self.header, self.source, self.read).stacks(found, rules)
        for parameter, stack in stacks.items():
            own = {} if stack.apart is None else own_paths(parameter, stack)
            found[parameter] = [replace(item, expert=True, own=own.get(place)) for place, item in enumerate(found[parameter])]
        return Plan(found, rules, homeless, stacks, unpacked)

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
        transposed = transposed or (whole and self.source.turned)
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
        entries = {local: self.header[tensor] for local, tensor in tensors.items()}
        return self.source.scheme_of((name, parameter.removesuffix(".weight")), entries, ("Linear", type(owner).__name__))

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
        experts = range(max(len(tensor) for tensor in tensors.values() if tensor.ndim))
        return torch.stack([decoded(one, source, source.of_expert(tensors, e), dtype) for e in experts])
    decoded_NK = source.columns(placement.name, tensors, placement.scheme).dense(decoding_dtype(tensors, dtype))
    weight = with_sidecars(decoded_NK, tensors, placement.name).to(dtype)
    return weight.T.contiguous() if placement.transposed else weight
