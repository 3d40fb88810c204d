"""Writes a ternary checkpoint in BitNet's layout (`pack/bitnet.py`), which transformers' `BitLinear` runs.

What it takes: codes -1, 0, 1 with one scale per weight, in linears whose outputs are a multiple of four. The bits are kept;
the scale is stored as its reciprocal, rounded once. transformers rounds inputs to int8 per token when it runs the file. Every
linear must be either packed or named in `modules_to_not_convert`, since transformers replaces all others.

Shape legend: N out features, K in features.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from torch import Tensor, nn

from aerogel.errors import BadInput
from aerogel.model.placement import Placement, Plan, make_plan
from aerogel.model.reader import CheckpointReader
from aerogel.pack.bitnet import encode
from aerogel.pack.export import SHARD_BYTES, check_quantized, read_config, skeleton, write_checkpoint
from aerogel.pack.source import Source, open_source
from aerogel.quantize.sidecars import NAMES as SIDECARS


def export_bitnet(path: str | Path, out: str | Path, *, overwrite: bool = False, shard_bytes: int = SHARD_BYTES) -> Path:
    """Writes the ternary checkpoint in `path` to `out` as `quant_method: bitnet`.

    Raises:
        BadInput: a checkpoint with anything packed that BitNet's layout does not hold, with the weight's name; or `out` is
            there and `overwrite` is not. RunFailed: the disk.
    """
    path, out = Path(path), Path(out)
    config = read_config(path)
    check_quantized(path, config)
    source = open_source(config["quantization_config"])
    reader = CheckpointReader(path)
    model = skeleton(path, config["model_type"])
    plan = make_plan(model, reader.entries, source, reader.read)
    items = _ternary(plan, path)
    packed = {item.module for item in items.values()}
    dense = [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and name not in packed]
    config["quantization_config"] = {
        "quant_method": "bitnet",
        "linear_class": "bitlinear",
        "quantization_mode": "offline",
        "modules_to_not_convert": dense,
    }
    write_checkpoint(path, out, config, _tensors(reader, items, source), overwrite, shard_bytes)
    return out


def _ternary(plan: Plan, path: Path) -> Mapping[str, Placement]:
    """The packed linears by the first of their tensors. Raises `BadInput` for what stays packed elsewhere."""
    found: dict[str, Placement] = {}
    for items in plan.placements.values():
        item = items[0]
        if not item.packed or item.transposed:
            raise BadInput(f"{item.name} is no plain linear, and BitNet's layout has place for nothing else")
        if item.tensors.keys() & set(SIDECARS):
            raise BadInput(f"{item.name} has weights beside its codes, which BitNet's layout has no place for")
        found[min(item.tensors.values())] = item
    if plan.homeless or not found:
        raise BadInput(f"{path} has no packed linears that its model has a place for; there is nothing to export")
    return found


def _tensors(reader: CheckpointReader, items: Mapping[str, Placement], source: Source) -> Iterator[tuple[str, Tensor]]:
    taken = {tensor for item in items.values() for tensor in item.tensors.values()}
    for name in reader.names:
        if name in items:
            item = items[name]
            held = source.opened({local: reader.read(tensor) for local, tensor in item.tensors.items()})
            if item.scheme is None:
                raise BadInput(f"{item.name} has no scheme; please report this checkpoint")
            columns = source.columns(item.name, held, item.scheme)
            if columns.order is not None:
                raise BadInput(f"{item.name} has its columns in activation order, which BitNet's layout does not keep")
            for local, tensor in encode(columns.codes, item.name).items():
                yield f"{item.name}.{local}", tensor
        elif name not in taken:
            yield name, reader.read(name)
