"""What a checkpoint is, read from its headers and its config: architecture, tensors, formats, bits per weight, sizes."""

from __future__ import annotations

import json
import math
from collections import Counter, defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from aerogel.errors import BadInput
from aerogel.model.entropy import MARK
from aerogel.model.reader import CheckpointReader
from aerogel.model.source import resolve
from aerogel.pack.hqq import Hqq
from aerogel.pack.modelopt import config_beside
from aerogel.quantize.sidecars import NAMES as SIDECARS

REPORT = "aerogel_report.json"
ARCHITECTURE_KEYS = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "vocab_size",
    "num_experts",
    "num_local_experts",
    "max_position_embeddings",
    "tie_word_embeddings",
)
PACKED = (
    *("weight_packed", "qweight", "weight_scale", "scales", "qzeros", "weight_zero_point", "weight_shape", "g_idx"),
    *("weight_global_scale", "weight_scale_2", "weight_pick", "weight_table", "weight_factor"),
    *SIDECARS,
)
"""Local names of tensors that belong to a quantized weight."""
BESIDE = {
    "outliers": "weight_outlier_start",
    "kept columns": "weight_column_index",
    "rows of more bits": "weight_row_index",
    "stored scale of inputs": "input_scale",
    "rotated inputs": "input_signs",
    "factors of inputs": "pre_quant_scale",
}
"""What stands beside codes -> a tensor that every linear with it has."""
HQQ = Hqq.suffixes
"""Those of HQQ, some of which are names that anything may have."""


def inspect(model: str | Path) -> dict[str, Any]:
    """Facts about a checkpoint, dense or quantized by anyone; loads no weights.

    Returns:
        {"path", "model_type", "architectures", "dtype", "architecture": {...}, "quantization": {...} | None,
         "tensors": count, "parameters": count of stored numbers of dense tensors and logical weights of packed ones,
         "bytes", "bits_per_weight": of the quantized weights or None, "files": [{"name", "bytes"}],
         "kinds": [{"name", "count", "dtype", "bytes"}], "report": its aerogel_report.json or None,
         "experts": None without packed experts, else {"packed": modules that run packed, "dense": {module: why it does not}}}.

    Raises:
        BadInput: nothing there, no config.json, or damaged safetensors.
    """
    folder = resolve(model)
    config: dict[str, Any] = json.loads((folder / "config.json").read_text("utf-8"))
    config = {"quantization_config": config_beside(folder), **config}
    reader = CheckpointReader(folder)
    text: dict[str, Any] = config["text_config"] if isinstance(config.get("text_config"), dict) else config
    weights = _weights(reader, _native_shapes(config))
    packed = {name: facts for name, facts in weights.items() if facts["quantized"]}
    logical = sum(facts["weights"] for facts in packed.values())
    return {
        "path": str(folder),
        "model_type": config.get("model_type"),
        "architectures": config.get("architectures") or [],
        "dtype": config.get("dtype") or config.get("torch_dtype"),
        "architecture": {key: text[key] for key in ARCHITECTURE_KEYS if text.get(key) is not None},
        "quantization": _quantization(config, len(packed), reader),
        "tensors": len(reader.names),
        "parameters": sum(facts["weights"] for facts in weights.values()),
        "bytes": reader.nbytes,
        "bits_per_weight": 8 * sum(facts["bytes"] for facts in packed.values()) / logical if logical else None,
        "files": [{"name": file.name, "bytes": file.stat().st_size} for file in sorted(_files(reader))],
        "kinds": _kinds(reader),
        "report": _report(folder),
        "experts": _experts(folder, config, reader),
    }


def _files(reader: CheckpointReader) -> set[Path]:
    return {entry.file for entry in reader}


def _native_shapes(config: dict[str, Any]) -> dict[str, list[int]]:
    """The weights that lie in a native layout, with their shapes, which their tensors do not tell."""
    shapes: dict[str, list[int]] = ((config.get("quantization_config") or {}).get("layout") or {}).get("shapes") or {}
    return shapes


def _weights(reader: CheckpointReader, native: dict[str, list[int]]) -> dict[str, dict[str, Any]]:
    """Tensors gathered by the module that owns them, with logical weight counts."""
    by_module: dict[str, dict[str, Any]] = defaultdict(dict)
    for entry in reader:
        module, _, leaf = entry.name.rpartition(".")
        by_module[module][leaf] = entry
    found: dict[str, dict[str, Any]] = {}
    for module, leaves in by_module.items():
        stacks = {leaf.removesuffix("_blocks"): entry for leaf, entry in leaves.items() if leaf.endswith("_blocks")}
        for stem, blocks in stacks.items():  # gpt-oss: all experts of a layer in two tensors, two weights to a byte
            held = [leaves.pop(f"{stem}_{part}") for part in ("blocks", "scales") if f"{stem}_{part}" in leaves]
            facts = {"quantized": True, "weights": 2 * math.prod(blocks.shape), "bytes": _bytes_of(held)}
            found[f"{module}.{stem}"] = facts
        ends = ("", "_weight_scale", "_weight_scale_2", "_input_scale")
        for stem in [leaf.removesuffix(ends[1]) for leaf in leaves if leaf.endswith(ends[1])]:  # ModelOpt's: the same in others
            stored = [leaves.pop(stem + end) for end in ends if stem + end in leaves]
            count = math.prod(stored[0].shape) * (2 if stored[0].dtype == torch.uint8 else 1)
            found[f"{module}.{stem}"] = {"quantized": True, "weights": count, "bytes": _bytes_of(stored)}
        hqq = not Hqq.markers.isdisjoint(leaves)
        quantized = hqq or module in native or any(leaf in leaves for leaf in PACKED)
        own = leaves.keys() - {"bias"} if module in native else HQQ if hqq else {leaf for leaf in leaves if _packed(leaf)}
        parts = {leaf: entry for leaf, entry in leaves.items() if not quantized or leaf in own}
        rest = {leaf: entry for leaf, entry in leaves.items() if leaf not in parts}
        if module in native:
            count = math.prod(native[module])
        else:
            count = _logical(leaves, reader) if quantized else _numbers(parts, reader)
        found[module] = {"quantized": quantized, "weights": count, "bytes": _bytes(parts)}
        if rest:
            found[f"{module} (bias)"] = {"quantized": False, "weights": _numbers(rest, reader), "bytes": _bytes(rest)}
    return found


def _packed(leaf: str) -> bool:
    """Whether a tensor beside a quantized weight is a part of it: bit planes and entropy coding count theirs up."""
    return leaf == "weight" or leaf.startswith("weight_") or leaf.partition(MARK)[0] in PACKED


def _bytes(entries: dict[str, Any]) -> int:
    return _bytes_of(entries.values())


def _bytes_of(entries: Iterable[Any]) -> int:
    return sum(entry.nbytes for entry in entries)


def _numbers(leaves: dict[str, Any], reader: CheckpointReader) -> int:
    """How many numbers tensors hold that are stored as they are, or entropy coded."""
    return sum(math.prod(_shape(leaves, leaf, reader) or ()) for leaf in {leaf.partition(MARK)[0] for leaf in leaves})


def _shape(leaves: dict[str, Any], leaf: str, reader: CheckpointReader) -> tuple[int, ...] | None:
    """The shape of a tensor, also of one that is entropy coded; None where there is no such tensor."""
    if leaf in leaves:
        return tuple(leaves[leaf].shape)
    coded = leaves.get(f"{leaf}{MARK}_shape")
    return None if coded is None else tuple(int(size) for size in reader.read(coded.name).tolist()[1:])


def _logical(leaves: dict[str, Any], reader: CheckpointReader) -> int:
    """How many weights a packed module stands for: N * K."""
    if "weight_shape" in leaves:
        return math.prod(int(size) for size in reader.read(leaves["weight_shape"].name).tolist())
    if "W_q" in leaves and "shape" in leaves:  # HQQ
        return math.prod(int(size) for size in reader.read(leaves["shape"].name).tolist())
    if (weight := _shape(leaves, "weight", reader)) is not None:
        pairs = "weight_scale_2" in leaves or _in_groups(leaves)  # ModelOpt's four bits: two to a byte
        return (2 if pairs else 1) * math.prod(weight)
    if (packed := _shape(leaves, "weight_packed", reader)) is not None:
        return 2 * math.prod(packed)  # NVFP4 and MXFP4 of compressed-tensors, which are stored without a width
    codes, scales = (_shape(leaves, leaf, reader) for leaf in ("qweight", "scales"))
    if codes is not None and "g_idx" in leaves:
        return int(leaves["g_idx"].shape[0]) * codes[1]
    if codes is not None and scales is not None:
        # AWQ packs along N, so K is plain; the scales have N columns.
        return codes[0] * scales[1]
    return 0


def _in_groups(leaves: dict[str, Any]) -> bool:
    """Whether a weight is bytes of two codes with scales of groups."""
    weight, scale = leaves.get("weight"), leaves.get("weight_scale")
    return weight is not None and scale is not None and weight.dtype == torch.uint8 and len(scale.shape) == 2


def _quantization(config: dict[str, Any], count: int, reader: CheckpointReader) -> dict[str, Any] | None:
    """The quantization config in a few words, or None for a dense checkpoint."""
    raw = config.get("quantization_config")
    if not isinstance(raw, dict):
        return None
    groups = raw.get("config_groups")
    schemes = [_scheme(group, raw) for group in groups.values()] if isinstance(groups, dict) else _flat_schemes(raw)
    leaves = Counter(entry.name.rpartition(".")[2] for entry in reader)
    return {
        "method": raw.get("quant_method"),
        "format": raw.get("format") or raw.get("checkpoint_format") or raw.get("version"),
        "layout": (raw.get("layout") or {}).get("name", "portable"),
        "schemes": schemes,
        "ignore": raw.get("ignore") or raw.get("modules_to_not_convert") or [],
        "layers": count,
        "beside": {what: leaves[leaf] for what, leaf in BESIDE.items() if leaves[leaf]},
        "entropy_coded": "entropy" in raw,
    }


def _scheme(group: dict[str, Any], raw: dict[str, Any]) -> dict[str, Any]:
    """One group of compressed-tensors."""
    weights, inputs = group.get("weights") or {}, group.get("input_activations") or {}
    options = weights.get("options") or {}
    return {
        "format": group.get("format") or raw.get("format"),
        "type": weights.get("grid") or weights.get("type"),
        "kind": options.get("kind"),
        "bits": weights.get("num_bits"),
        "strategy": weights.get("strategy"),
        "group_size": weights.get("group_size") or options.get("group_size"),
        "symmetric": weights.get("symmetric"),
        "activation_bits": inputs.get("num_bits"),
        "activation_type": inputs.get("type"),
        "targets": len(group.get("targets") or []),
    }


def _flat_schemes(raw: dict[str, Any]) -> list[dict[str, Any]]:
    """GPTQ and AWQ configs have one scheme for everything; a checkpoint that is only entropy coded has none."""
    if "entropy" in raw:
        return []
    return [
        {
            "format": raw.get("checkpoint_format") or raw.get("version"),
            "type": "int",
            "kind": None,
            "bits": raw.get("bits") or raw.get("w_bit"),
            "strategy": None,
            "group_size": raw.get("group_size") or raw.get("q_group_size"),
            "symmetric": raw.get("sym", not raw.get("zero_point", False)),
            "activation_bits": None,
            "activation_type": None,
            "targets": 1,
        }
    ]


def _experts(folder: Path, config: dict[str, Any], reader: CheckpointReader) -> dict[str, Any] | None:
    """Which experts would stay packed when the checkpoint is loaded, and why others would not."""
    if not isinstance(config.get("quantization_config"), dict) or not any(".experts." in name for name in reader.names):
        return None
    from aerogel.model.placement import make_plan
    from aerogel.pack.export import skeleton
    from aerogel.pack.source import open_source

    try:
        source = open_source(config["quantization_config"])
        plan = make_plan(skeleton(folder, config["model_type"]), reader.entries, source, reader.read)
    except BadInput as refusal:
        return {"packed": [], "dense": {"all": str(refusal)}}
    if not plan.stacks and not plan.unpacked:
        return None
    packed = sorted({parameter.rpartition(".")[0] for parameter in plan.stacks})
    return {"packed": packed, "dense": dict(plan.unpacked)}


def _kinds(reader: CheckpointReader) -> list[dict[str, Any]]:
    """Tensors with the block number replaced by `*`, counted: thirty blocks are one line each."""
    counts: Counter[tuple[str, str]] = Counter()
    sizes: Counter[tuple[str, str]] = Counter()
    for entry in reader:
        key = (collapse(entry.name), str(entry.dtype).removeprefix("torch."))
        counts[key] += 1
        sizes[key] += entry.nbytes
    return [{"name": name, "count": counts[name, kind], "dtype": kind, "bytes": sizes[name, kind]} for name, kind in counts]


def collapse(name: str) -> str:
    """`model.layers.3.mlp.down_proj.weight` as `model.layers.*.mlp.down_proj.weight`."""
    return ".".join("*" if part.isdigit() else part for part in name.split("."))


def _report(folder: Path) -> dict[str, Any] | None:
    """The report that aerogel left beside the checkpoint."""
    file = folder / REPORT
    if not file.is_file():
        return None
    try:
        found = json.loads(file.read_text("utf-8"))
    except ValueError as error:
        raise BadInput(f"{file} is not JSON ({error}); delete it or restore it") from error
    return found if isinstance(found, dict) else None
