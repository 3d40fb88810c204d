"""The weight conversion that turns packed tensors on disk into buffers of `kernels.Linear` or into decoded parameters.

transformers loads a checkpoint by sending every tensor name through renaming rules and at most one `WeightConverter`,
which collects tensors and makes parameters of them. `Decoder` is one more such converter. It knows each tensor of a
packed weight by its whole name, from a `Plan`; where a parameter has a conversion rule of its own (merging experts,
say), the decoded matrices go through that rule.

Shape legend: N out features, K in features.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import PreTrainedModel
from transformers.core_model_loading import ConversionOps, WeightConverter, WeightRenaming

from aerogel.errors import BadInput, RunFailed
from aerogel.kernels.embedding import PackedEmbedding
from aerogel.kernels.expert_linears import ExpertLinears
from aerogel.kernels.experts import ExpertLinear, ExpertRows, replace_experts, stacked
from aerogel.kernels.linear import Linear, stored_shapes
from aerogel.kernels.sidecars import SidecarLinear
from aerogel.model.experts import Stack
from aerogel.model.native import CODES
from aerogel.model.placement import Placement, Plan, decoded, features
from aerogel.model.reader import Entry, read_header
from aerogel.pack.config import format_of
from aerogel.pack.source import Source
from aerogel.quantize import sidecars
from aerogel.quantize.codes import Codes, Grid
from aerogel.quantize.codes import stacked as params_below
from aerogel.quantize.input_scale import InputScale
from aerogel.quantize.rows import Rows
from aerogel.quantize.tables import without_factor


class PlainNames(WeightRenaming):  # type: ignore[misc, unused-ignore]
    """All renaming rules in one, which leaves the names that `Decoder` takes as they are on disk."""

    def __init__(self, renamings: list[WeightRenaming], taken: Mapping[str, str]) -> None:
        super().__init__("\0", "\0")
        self.renamings, self.taken = renamings, taken

    def rename_source_key(self, source_key: str) -> tuple[str, str | None]:
        """The rules in turn, each on what the one before it gave."""
        if source_key not in self.taken:
            for rule in self.renamings:
                source_key, _ = rule.rename_source_key(source_key)
        return source_key, None


class _Whole(ConversionOps):  # type: ignore[misc, unused-ignore]
    """Stands for the conversion that `Decoder.convert` does itself."""

    def convert(  # type: ignore[override, unused-ignore]
        self, input_dict: dict[str, Any], **kwargs: Any
    ) -> dict[str, Any]:
        """Nothing to do."""
        return input_dict


class Decoder(WeightConverter):  # type: ignore[misc, unused-ignore]
    """The weight conversion for everything that is packed: tensors on disk to buffers or decoded parameters.

    transformers keeps one copy per parameter that it makes; the plan is shared among them, the collected tensors are not.
    """

    def __init__(self, plan: Plan, source: Source) -> None:
        super().__init__("\0", "\0", [_Whole()])
        self.plan, self.source = plan, source
        self.targets = {
            tensor: _anchor(items[0])
            for items in plan.placements.values()
            for item in items
            for tensor in item.tensors.values()
        }
        self.parameter_of = {_anchor(items[0]): parameter for parameter, items in plan.placements.items()}
        self.arrived: set[str] = set()
        # The base class forbids setting patterns twice, since it compiles them; these are whole names, found by look-up.
        object.__setattr__(self, "source_patterns", list(self.targets))

    def __deepcopy__(self, memo: dict[int, Any]) -> Decoder:
        """A copy that collects its own tensors."""
        copy = Decoder.__new__(Decoder)
        WeightConverter.__init__(copy, "\0", "\0", [_Whole()])
        copy.plan, copy.source, copy.targets = self.plan, self.source, self.targets
        copy.parameter_of, copy.arrived = self.parameter_of, self.arrived
        return copy

    def rename_source_key(self, source_key: str) -> tuple[str, str | None]:
        """The parameter that a tensor of a packed weight helps to make."""
        target = self.targets.get(source_key)
        return (source_key, None) if target is None else (target, source_key)

    def absent(self) -> list[str]:
        """Parameters that were planned and did not come."""
        return sorted(set(self.plan.placements) - self.arrived)

    def convert(  # type: ignore[override, unused-ignore]
        self, layer_name: str, model: Any = None, **kwargs: Any
    ) -> dict[str, Any]:
        """The buffers or parameters made from what was collected for `layer_name`."""
        parameter = self.parameter_of[layer_name]
        items = self.plan.placements[parameter]
        held = {name: tensors[0] for name, tensors in self.materialize_tensors().items()}
        self.arrived.add(parameter)
        if items[0].packed:
            return self._packed(items[0], held, model)
        if items[0].expert:
            return self._experts(parameter, held, model)
        dtype = model.get_parameter_or_buffer(parameter).dtype
        parts = [decoded(item, self.source, _local(item, held), dtype) for item in items]
        if items[0].stack is not None:
            parts, items = [torch.stack(parts)], items[:1]
        rule = self.plan.rules.get(parameter)
        if rule is None:
            return {parameter: parts[0]}
        rule = deepcopy(rule)
        for item, part in zip(items, parts, strict=True):
            rule.add_tensor(parameter, item.name, item.pattern or "", part)  # type: ignore[arg-type, unused-ignore]
        made: dict[str, Any] = rule.convert(parameter, model=model, **kwargs)
        return made

    def _packed(self, item: Placement, held: Mapping[str, Tensor], model: PreTrainedModel) -> dict[str, Any]:
        layer = model.get_submodule(item.module)
        if not isinstance(layer, Linear) or item.scheme is None:
            raise RunFailed(f"{item.module} was to stay packed but is a {type(layer).__name__}; please report this model")
        tensors = self.source.opened(_local(item, held))
        kept: dict[str, Any] = {}
        for child, sidecar in sidecars.read(tensors, layer.out_features, layer.in_features, item.name).items():
            kept |= {f"{item.module}.{child}.{part}": tensor for part, tensor in vars(sidecar).items()}
        tensors = {name: tensor for name, tensor in tensors.items() if name not in sidecars.NAMES}
        shapes = stored_shapes(item.scheme, layer.out_features, layer.in_features)
        if {name: (tuple(t.shape), t.dtype) for name, t in tensors.items()} != shapes:
            columns = self.source.columns(item.name, tensors, item.scheme)
            N, K = columns.codes.values_NK.shape
            if (layer.out_features, layer.in_features) != (N, K):
                wanted = [layer.out_features, layer.in_features]
                raise BadInput(f"{item.name} is packed as [{N}, {K}], the model wants {wanted}; the config is another model's")
            layer.column_order = columns.order
            tensors = layer.encoded(columns.codes)
        return kept | {f"{item.module}.{name}": tensor for name, tensor in tensors.items()}

    def _experts(self, parameter: str, held: Mapping[str, Tensor], model: PreTrainedModel) -> dict[str, Any]:
        """The buffers of an `ExpertLinear`: what the format stores for each expert, stacked."""
        items, stack = self.plan.placements[parameter], self.plan.stacks[parameter]
        if stack.apart is not None:
            return {name: tensor for item in items for name, tensor in self._packed(item, held, model).items()}
        layer = model.get_submodule(parameter)
        if not isinstance(layer, ExpertLinear):
            raise RunFailed(f"{parameter} was to stay packed but is a {type(layer).__name__}; please report this model")
        fmt = format_of(stack.scheme.format)

        def stored(expert: int) -> dict[str, Tensor]:
            parts = [items[place] for place in stack.parts[expert]]
            codes = _joined([self._codes(item, held, expert) for item in parts], stack.scheme.grid)
            if codes.values_NK.shape != (stack.n, stack.k):
                raise BadInput(
                    f"{parts[0].name} is packed as part of {list(codes.values_NK.shape)}, the model wants"
                    f" [{stack.n}, {stack.k}]; the config is another model's"
                )
            return fmt.encode(codes)

        made = {f"{parameter}.{name}": tensor for name, tensor in stacked(stored, stack.experts).items()}
        if stack.scheme.activations.endswith("-static"):
            scales = [torch.stack([self._input_scale(items[place], held) for place in parts]) for parts in stack.parts]
            # Matrices that are joined read the same inputs; where their scales differ, the largest cuts nothing off.
            made[f"{parameter}.input_scale"] = torch.stack([parts.amax(0) for parts in scales])
        return made if stack.more is None else made | self._expert_rows(f"{parameter}.more", stack, items, held)

    def _input_scale(self, item: Placement, held: Mapping[str, Tensor]) -> Tensor:
        """The scale of a matrix' inputs, float32 [1]."""
        found = InputScale.read(self.source.opened(_local(item, held)))
        if found is None:
            raise BadInput(f"{item.name} has no input_scale, and its inputs are rounded with one; get the checkpoint again")
        return found.scale_1

    def _expert_rows(self, path: str, stack: Stack, items: list[Placement], held: Mapping[str, Tensor]) -> dict[str, Any]:
        """The buffers of its `ExpertRows`: each expert's rows, those of its second part behind those of its first."""
        if stack.more is None:
            return {}
        most, scheme = stack.more
        index_ER = torch.zeros(stack.experts, most, dtype=torch.int32)

        def stored(expert: int) -> dict[str, Tensor]:
            values_RK = torch.zeros(most, stack.k, dtype=torch.int8)
            scale_RG = torch.ones(most, scheme.grid.groups(stack.k), dtype=scheme.grid.scale_dtype)
            done, places = 0, stack.parts[expert]
            for part, place in enumerate(places):
                rows = Rows.read(self.source.opened(_local(items[place], held)))
                if rows is None:
                    continue
                rows.check(stack.n // len(places), stack.k, items[place].name)
                mine = slice(done, done + len(rows.index_R))
                codes = rows.codes()
                values_RK[mine], scale_RG[mine] = codes.values_NK, codes.scale_NG
                index_ER[expert, mine] = rows.index_R + part * (stack.n // len(places))
                done = mine.stop
            return format_of(scheme.format).encode(Codes(values_NK=values_RK, scale_NG=scale_RG, grid=scheme.grid))

        made = {f"{path}.linear.{name}": tensor for name, tensor in stacked(stored, stack.experts).items()}
        return {f"{path}.index_ER": index_ER, **made}

    def _codes(self, item: Placement, held: Mapping[str, Tensor], expert: int) -> Codes:
        if item.scheme is None:
            raise RunFailed(f"{item.name} has no scheme; please report this checkpoint")
        tensors = _local(item, held)
        return self.source.read(self.source.of_expert(tensors, expert) if item.whole else tensors, item.scheme).codes


def _joined(parts: list[Codes], grid: Grid) -> Codes:
    """The rows of several weights, one after the other, on `grid`: their own, or the one whose scales hold their factors."""
    parts = [part if part.grid == grid else without_factor(part, grid) for part in parts]
    params = params_below(parts)
    if params is None:
        raise RunFailed("the matrices of one expert have tables or factors that differ; please report this checkpoint")
    return parts[0] if len(parts) == 1 else Codes.of(torch.cat([part.values_NK for part in parts]), params, parts[0].grid)


def replace_linear(model: PreTrainedModel, item: Placement, bias_on_disk: bool, beside: Mapping[str, Entry]) -> None:
    """Puts an empty `kernels.Linear` in the place of the linear that `item` belongs to, and unties it if it was tied.

    beside: what the checkpoint has beside its codes, by local name.
    """
    old = model.get_submodule(item.module)
    bias = getattr(old, "bias", None) is not None or bias_on_disk
    made = _empty(item, *features(old), bias, old.get_parameter("weight").dtype, beside)
    model.set_submodule(item.module, made)
    # Some models initialise their children's `weight` by name, which a packed linear does not have. Its values come from
    # the file in any case, and transformers leaves a module alone that says it is initialised.
    model.get_submodule(item.module.rpartition(".")[0])._is_hf_initialized = True  # type: ignore[assignment]
    if model.all_tied_weights_keys.pop(item.parameter, None) is not None:
        # A packed head has its own tensors: the embedding stays dense and alone, or reads the head's.
        model.config.get_text_config().tie_word_embeddings = False
        model.config.tie_word_embeddings = False
    if item.embedding is not None:
        model.set_submodule(item.embedding, PackedEmbedding(made))


def _empty(item: Placement, N: int, K: int, bias: bool, dtype: torch.dtype, beside: Mapping[str, Entry]) -> Linear:
    """A linear [N, K] for a packed weight, with room for what is beside its codes."""
    if item.scheme is None:
        raise RunFailed(f"{item.name} has no scheme; please report this checkpoint")
    if not beside:
        return Linear(K, N, item.scheme, bias=bias, dtype=dtype, device="meta")
    empty = {local: torch.empty(entry.shape, dtype=entry.dtype, device="meta") for local, entry in beside.items()}
    return SidecarLinear(K, N, item.scheme, beside=empty, bias=bias, dtype=dtype, device="meta")


def pack_experts(
    model: PreTrainedModel, parameter: str, stack: Stack, beside: Sequence[tuple[Placement, Mapping[str, Entry]]]
) -> None:
    """Puts an empty `ExpertLinear` or `ExpertLinears` in the place of a parameter of an experts module. beside: its matrices,
    and what the checkpoint has beside the codes of each, by local name."""
    path, _, name = parameter.rpartition(".")
    module = model.get_submodule(path)
    dtype = module.get_parameter(name).dtype
    if stack.apart is not None:
        experts = [
            [_empty(beside[place][0], stack.n // len(places), stack.k, False, dtype, beside[place][1]) for place in places]
            for places in stack.parts
        ]
        replace_experts(module, name, ExpertLinears(experts))
        return
    made = ExpertLinear(stack.experts, stack.k, stack.n, stack.scheme, dtype=dtype, device="meta")
    if stack.more is not None:
        most, scheme = stack.more
        made.more = ExpertRows(stack.experts, stack.k, most, scheme, dtype=dtype, device="meta")
    replace_experts(module, name, made)


def read_headers(files: list[Path]) -> dict[str, Entry]:
    """The entries of several safetensors files together. Raises `BadInput` for a damaged one."""
    return {name: entry for file in files for name, entry in read_header(file).items()}


def read_entry(entry: Entry) -> Tensor:
    """One tensor of a safetensors file."""
    with safe_open(entry.file, framework="pt") as file:
        tensor: Tensor = file.get_tensor(entry.name)
    return tensor


def _anchor(item: Placement) -> str:
    """The name in the model's state dict by which transformers collects the tensors of a parameter."""
    if not (item.packed or item.expert) or item.scheme is None:
        return item.parameter
    owner = item.parameter if item.expert and item.own is None else item.module
    if item.scheme.layout is not None:
        return f"{owner}.{CODES[item.scheme.layout]}"
    return f"{owner}.{'weight' if 'weight' in format_of(item.scheme.format).names else 'weight_packed'}"


def _local(item: Placement, held: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {local: held[name] for local, name in item.tensors.items()}
