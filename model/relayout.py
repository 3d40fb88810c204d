"""Brings a compressed checkpoint from the portable layout into a native one, and back, bit for bit.

Both ways read headers, decide where every tensor goes, and then write shard by shard; one weight is in memory at a time.
Which weights are native is decided as a loader would decide it: linears that stay packed in the model. The rest (norms,
embeddings, experts, what stands beside codes) is copied. What lies how is told in `model/native.py`.

Going back restores the very files: the names and the order of tensors follow from the format, and the index of a portable
checkpoint of several files is kept beside the native ones.

Shape legend: N out features, K in features.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, PreTrainedModel

from aerogel.errors import BadInput
from aerogel.kernels import layouts
from aerogel.kernels.decode.merge import siblings
from aerogel.kernels.linear import Linear, problem_of, stored_shapes
from aerogel.model.decoder import read_entry
from aerogel.model.naming import place
from aerogel.model.native import ALIGNMENT, VERSION, Native, alignment
from aerogel.model.placement import Placement, features, make_plan
from aerogel.model.reader import INDEX_NAME, SINGLE_NAME, Entry
from aerogel.model.structure import build_on_meta
from aerogel.model.writer import Table, portable_order, shard_names, write_json, write_placed
from aerogel.pack.config import format_of
from aerogel.pack.scheme import Scheme
from aerogel.pack.source import Source, open_source
from aerogel.quantize.sidecars import NAMES as SIDECARS

PORTABLE_INDEX = "portable.index.json"
"""The index of the portable checkpoint that a native one was made of, where that had several files."""
METHODS = ("compressed-tensors", "aerogel")


@dataclass(frozen=True, slots=True, kw_only=True)
class Weight:
    """One packed weight: its name, shape [N, K], schemes before and after, and its tensors before by local name."""

    name: str
    N: int
    K: int
    before: Scheme
    after: Scheme
    tensors: Mapping[str, Entry]

    def table(self) -> Table:
        """Its tensors after, in the order in which they are made."""
        shapes = stored_shapes(self.after, self.N, self.K)
        return {f"{self.name}.{local}": (kind, shape) for local, (shape, kind) in shapes.items()}

    def converted(self, source: Source, device: str) -> Iterator[tuple[str, Tensor]]:
        """The tensors after, by their names on disk."""
        tensors = {local: read_entry(entry).to(device) for local, entry in self.tensors.items()}
        layer = Linear(self.K, self.N, self.before, device="meta")
        if {local: (tuple(t.shape), t.dtype) for local, t in tensors.items()} != stored_shapes(self.before, self.N, self.K):
            tensors = layer.encoded(source.columns(self.name, tensors, self.before).codes)
        layer.fill(tensors)
        if self.after.layout is None:
            made = format_of(self.after.format).encode(layer.columns().codes)
        else:
            made = layouts.packed(
                layouts.owner(self.after.layout), layer, problem_of(self.after, self.N, self.K, torch.float32)
            )
        for local, tensor in made.items():
            yield f"{self.name}.{local}", tensor


Unit = list[Weight] | Entry
"""What goes to one file as a whole: weights that lie behind each other, or a tensor that is copied."""


def to_native(
    entries: Mapping[str, Entry],
    config: dict[str, Any],
    folder: Path,
    layout: str,
    dtype: torch.dtype,
    limit: int,
    device: str = "cpu",
) -> dict[str, Any]:
    """Writes the tensors of a portable checkpoint into `folder` in a native layout.

    Args:
        entries: every tensor of the portable checkpoint.
        config: its config.json.
        folder: has a config.json of the same architecture already.
        layout: a key of `layouts.LAYOUTS`.
        dtype: that the model runs in.
        limit: bytes of data per file.
        device: where codes are rearranged.

    Returns:
        The config.json of the native checkpoint.

    Raises:
        BadInput: a weight that cannot lie in that layout, or a checkpoint that was quantized by another tool's method.
    """
    quantization = config.get("quantization_config") or {}
    if quantization.get("quant_method") not in METHODS or quantization.get("layout"):
        raise BadInput(
            f"a checkpoint by {quantization.get('quant_method')} cannot be written native; native layouts are made from"
            " portable checkpoints of aerogel or compressed-tensors"
        )
    source = open_source(quantization)
    groups = _groups(folder, entries, source, layout, dtype)
    native = {entry.name for group in groups for weight in group for entry in weight.tensors.values()}
    kept = portable_order({name: (entry.dtype, entry.shape) for name, entry in entries.items() if name not in native})
    units: list[Unit] = [*(entries[name] for name in kept), *groups]
    _write_shards(units, source, folder, limit, device)
    shapes = {weight.name: [weight.N, weight.K] for group in groups for weight in group}
    words = {"name": layout, "version": VERSION, "quant_method": quantization["quant_method"], "shapes": shapes}
    return {**config, "quantization_config": {**quantization, "quant_method": "aerogel", "layout": words}}


def to_portable(
    entries: Mapping[str, Entry], config: dict[str, Any], folder: Path, index: Path, device: str = "cpu"
) -> dict[str, Any]:
    """Writes the tensors of a native checkpoint into `folder` as the portable checkpoint it was made of.

    Args:
        entries, config: of the native checkpoint.
        index: the kept `PORTABLE_INDEX`, which need not be there.
        device: where codes are rearranged.

    Returns:
        The config.json of the portable checkpoint.
    """
    quantization = dict(config["quantization_config"])
    source = open_source(quantization)
    if not isinstance(source, Native):
        raise BadInput("the checkpoint is portable already; there is nothing to convert")
    found = source.groups(entries)
    weights, native = [], set()
    for name, (N, K) in source.shapes.items():
        if name not in found:
            raise BadInput(f"{name} is listed in config.json and has no tensors; the checkpoint is not whole, get it again")
        header = {local: entries[tensor].dtype for local, tensor in found[name].items()}
        scheme = source.scheme((name,), header, ("Linear",))
        held = {local: entries[tensor] for local, tensor in found[name].items() if local not in SIDECARS}
        weights.append(Weight(name=name, N=N, K=K, before=scheme, after=replace(scheme, layout=None), tensors=held))
        native |= {entry.name for entry in held.values()}
    table: Table = {tensor: kind for weight in weights for tensor, kind in weight.table().items()}
    table |= {name: (entry.dtype, entry.shape) for name, entry in entries.items() if name not in native}
    files = _portable_files(table, index)
    for file in dict.fromkeys(files.values()):
        names = portable_order({name: table[name] for name in table if files[name] == file})
        kept = [entries[name] for name in names if name in entries and name not in native]
        parts: list[Unit] = [*kept, *([w] for w in weights if not names.keys().isdisjoint(w.table()))]
        mine = (
            item for item in _tensors(parts, source, device) if item[0] in names
        )  # a weight may be cut by the end of a file
        write_placed(folder / file, names, mine, align=8)
    if index.is_file():
        (folder / INDEX_NAME).write_bytes(index.read_bytes())
    method = quantization.pop("layout")["quant_method"]
    return {**config, "quantization_config": {**quantization, "quant_method": method}}


def keep_index(index: Path, folder: Path) -> None:
    """Keeps the index of a portable checkpoint, if it has one, for the way back."""
    if index.is_file():
        (folder / PORTABLE_INDEX).write_bytes(index.read_bytes())


def _portable_files(table: Table, index: Path) -> dict[str, str]:
    """The file of each tensor."""
    if not index.is_file():
        return dict.fromkeys(table, SINGLE_NAME)
    files = {str(name): Path(file).name for name, file in json.loads(index.read_text("utf-8"))["weight_map"].items()}
    if files.keys() != table.keys():
        odd = sorted(files.keys() ^ table.keys())
        raise BadInput(f"{index} and the checkpoint do not list the same tensors ({odd[0]!r}); delete that file for one shard")
    return files


def _groups(folder: Path, entries: Mapping[str, Entry], source: Source, layout: str, dtype: torch.dtype) -> list[list[Weight]]:
    """The weights that become native, in the order of the model; those that share an input together."""
    config = AutoConfig.from_pretrained(folder)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    model = build_on_meta(config)
    plan = make_plan(model, entries, source, lambda name: read_entry(entries[name]))
    weights = {item.module: _weight(item, model, entries, source, layout, dtype) for item in plan.packed()}
    rows = layouts.owner(layout).rows
    together: dict[str, list[Weight]] = {}
    for names in siblings(_without_memory(model)):
        group = [weights[name] for name in names if name in weights]
        same = len(group) == len(names) and all(weight.after == group[0].after for weight in group)
        if same and not any(weight.N % rows for weight in group[:-1]):
            together |= dict.fromkeys(names, group)
    found: dict[int, list[Weight]] = {}
    for module, weight in weights.items():
        group = together.get(module, [weight])
        found.setdefault(id(group[0]), group)
    return list(found.values())


def _weight(
    item: Placement, model: PreTrainedModel, entries: Mapping[str, Entry], source: Source, layout: str, dtype: torch.dtype
) -> Weight:
    if item.scheme is None:
        raise BadInput(f"{item.name} has no scheme; please report this checkpoint")
    index = item.tensors.get(source.index)
    if index is not None and entries[index].shape not in ((), (0,)):
        raise BadInput(f"{item.name} has its columns in activation order, which native layouts do not keep; leave it portable")
    N, K = features(model.get_submodule(item.module))
    after = replace(item.scheme, layout=layout)
    reason = layouts.owner(layout).refuses_layout(problem_of(after, N, K, dtype))
    if reason is not None:
        raise BadInput(f"{item.name} cannot be stored as {layout}: it {reason}, or leave it portable")
    held = {local: entries[tensor] for local, tensor in item.tensors.items() if local not in SIDECARS}
    return Weight(name=item.name, N=N, K=K, before=item.scheme, after=after, tensors=held)


def _without_memory(model: PreTrainedModel) -> PreTrainedModel:
    """The model with a single zero in the place of every weight, seen as a whole tensor: it runs and holds nothing."""
    for module in model.modules():
        for name, tensor in [*module._parameters.items(), *module._buffers.items()]:
            if tensor is not None and tensor.is_meta:
                place(module, name, torch.zeros((), dtype=tensor.dtype).expand(tensor.shape))
    return model


def _write_shards(units: list[Unit], source: Source, folder: Path, limit: int, device: str) -> None:
    """One file, or several with an index; units are never cut."""
    shards: list[list[Unit]] = [[]]
    held = 0
    for unit in units:
        size = unit.nbytes if isinstance(unit, Entry) else sum(_bytes(weight.table()) for weight in unit)
        if shards[-1] and held + size > limit:
            shards.append([])
            held = 0
        shards[-1].append(unit)
        held += size
    weight_map: dict[str, str] = {}
    total = 0
    for name, shard in zip(shard_names(len(shards)), shards, strict=True):
        table = _in_order(shard)
        write_placed(folder / name, table, _tensors(shard, source, device), align=ALIGNMENT)
        weight_map |= dict.fromkeys(table, name)
        total += _bytes(table)
    if len(shards) > 1:
        write_json(folder / INDEX_NAME, {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))})


def _bytes(table: Table) -> int:
    return sum(kind.itemsize * torch.Size(shape).numel() for kind, shape in table.values())


def _in_order(shard: list[Unit]) -> Table:
    """The tensors of a file in the order in which they lie there.

    Sorted by the largest power of two that divides their sizes (that of a whole row of siblings counts for all of them),
    each begins at a multiple of it: there are no holes in a safetensors file to make that so.
    """
    runs: list[Table] = []
    for unit in shard:
        if isinstance(unit, Entry):
            runs.append({unit.name: (unit.dtype, unit.shape)})
            continue
        runs += [dict(parts) for parts in zip(*(weight.table().items() for weight in unit), strict=True)]
    runs.sort(key=lambda run: -min(alignment(_bytes({name: kind})) for name, kind in run.items()))
    return {name: kind for run in runs for name, kind in run.items()}


def _tensors(shard: list[Unit], source: Source, device: str) -> Iterator[tuple[str, Tensor]]:
    for unit in shard:
        if isinstance(unit, Entry):
            yield unit.name, read_entry(unit)
            continue
        for weight in unit:
            yield from weight.converted(source, device)
