"""Writes a compressed checkpoint out as another one: with dense weights, or in another layout (`model/relayout.py`).

Every packed weight is decoded, ((q - z) * s) in float32, and rounded once to the model's dtype: bit for bit what the
loaded model multiplies with. Names and shapes are those of the dense original: a Conv1D weight is turned back to [K, N],
experts that lay in one tensor are put back into one. All other tensors are copied as they are. One shard is in memory at
a time, and the folder appears under its name only when it is whole.

Shape legend: N out features, K in features.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from aerogel.errors import BadInput
from aerogel.kernels import layouts
from aerogel.model.entropy import (
    MARK,
    Saving,
    coded_parts,
    coded_tensors,
    coding_config,
    decoded_tensor,
    plain_config,
    split_name,
)
from aerogel.model.placement import Placement, decoded, make_plan
from aerogel.model.reader import INDEX_NAME, SINGLE_NAME, CheckpointReader
from aerogel.model.writer import disk_errors, write_json, write_tensors
from aerogel.pack.modelopt import config_beside
from aerogel.pack.source import Source, open_source

SHARD_BYTES = 5 * 1000**3
LEFT_BEHIND = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".onnx")
"""Kinds of files that are not copied: weights in any form."""
LEFT_BEHIND_NAMES = ("config.json", INDEX_NAME)
QUANTIZED_ONLY = ("quantize_config.json", "hf_quant_config.json", "recipe.yaml", "aerogel_report.json")
"""Not copied beside dense weights, and neither is a model card, which speaks of the compressed model."""


def export_dense(path: str | Path, out: str | Path, *, overwrite: bool = False, shard_bytes: int = SHARD_BYTES) -> Path:
    """Decodes the checkpoint in `path` into a dense one in `out`.

    Args:
        path: local folder of a quantized checkpoint: compressed-tensors, GPTQ, AWQ or aerogel's own.
        out: the folder to make.
        overwrite: replace `out` where it exists.
        shard_bytes: data per safetensors file.

    Returns:
        `out`.

    Raises:
        BadInput: not a quantized checkpoint, one that aerogel does not read, or `out` is there and `overwrite` is not.
        RunFailed: the disk.
    """
    path, out = Path(path), Path(out)
    config = read_config(path)
    check_quantized(path, config)
    source = open_source(config.pop("quantization_config"))
    with _draft(path, out, overwrite) as draft:
        _write_shards(_tensors(path, source, config), draft, shard_bytes)
        write_json(draft / "config.json", config)
        with disk_errors(out):
            _copy_rest(path, draft, (*LEFT_BEHIND, ".md"), (*LEFT_BEHIND_NAMES, *QUANTIZED_ONLY))
    return out


def export_layout(
    path: str | Path,
    out: str | Path,
    layout: str,
    *,
    device: str = "cpu",
    overwrite: bool = False,
    shard_bytes: int = SHARD_BYTES,
) -> str:
    """Writes the compressed checkpoint in `path` in another layout to `out`, every bit kept.

    Args:
        path: local folder of a checkpoint by aerogel or compressed-tensors.
        out: the folder to make.
        layout: `portable`, `native` (of this machine's fastest device), `native-cpu` or `native-cuda`.
        device: where codes are rearranged.
        overwrite: replace `out` where it exists.
        shard_bytes: data per safetensors file of a native checkpoint.

    Returns:
        The layout written.

    Raises:
        BadInput: a checkpoint that has the layout already or cannot have it; or `out` is there and `overwrite` is not.
        RunFailed: the disk.
    """
    from aerogel.model.relayout import PORTABLE_INDEX, keep_index, to_native, to_portable

    path, out, layout = Path(path), Path(out), layouts.for_this_machine(layout)
    config, reader = read_config(path), CheckpointReader(path)
    check_quantized(path, config)
    if "entropy" in config["quantization_config"]:
        raise BadInput(f"{path} is entropy coded, which no kernel reads; write it plain first (`aerogel export --to plain`)")
    words = config["quantization_config"].get("layout")
    found = words["name"] if words else layouts.PORTABLE
    if found == layout:
        raise BadInput(f"{path} is {layout} already; copy the folder")
    if words and layout != layouts.PORTABLE:
        raise BadInput(f"{path} is {found}; write it portable first (`--layout portable`), then {layout}")
    with _draft(path, out, overwrite) as draft:
        write_json(draft / "config.json", config)
        if layout == layouts.PORTABLE:
            config = to_portable(reader.entries, config, draft, path / PORTABLE_INDEX, device)
        else:
            keep_index(path / INDEX_NAME, draft)
            dtype = model_dtype(config, reader)
            config = to_native(reader.entries, config, draft, layout, dtype, shard_bytes, device)
        write_json(draft / "config.json", config)
        with disk_errors(out):
            _copy_rest(path, draft, LEFT_BEHIND, (*LEFT_BEHIND_NAMES, PORTABLE_INDEX))
    return layout


def export_coded(
    path: str | Path, out: str | Path, *, overwrite: bool = False, shard_bytes: int = SHARD_BYTES
) -> tuple[Path, list[Saving]]:
    """Entropy codes the checkpoint in `path`, dense or compressed, into `out`; `export_plain` gives the same bytes back.

    Returns:
        `out`, and what was saved on each tensor that was coded.

    Raises:
        BadInput: a checkpoint whose config has no place for it, or that is coded already. RunFailed: the disk.
    """
    path, out = Path(path), Path(out)
    config = read_config(path)
    config["quantization_config"] = coding_config(config.get("quantization_config"))
    reader, savings = CheckpointReader(path), []

    def parts() -> Iterator[tuple[str, Tensor]]:
        for name in reader.names:
            tensors, saving = coded_tensors(name, reader.read(name))
            if saving is not None:
                savings.append(saving)
            yield from tensors.items()

    write_checkpoint(path, out, config, parts(), overwrite, shard_bytes)
    return out, savings


def export_plain(path: str | Path, out: str | Path, *, overwrite: bool = False, shard_bytes: int = SHARD_BYTES) -> Path:
    """Undoes `export_coded`: the same tensors under the same names, bit for bit. Errors as there."""
    path, out = Path(path), Path(out)
    config = read_config(path)
    below = plain_config(config.pop("quantization_config", None) or {})
    if below is not None:
        config["quantization_config"] = below
    reader = CheckpointReader(path)
    coded = coded_parts(reader.names)
    first = {min(parts.values()): base for base, parts in coded.items()}

    def tensors() -> Iterator[tuple[str, Tensor]]:
        for name in reader.names:
            if name in first:
                held = {part.removeprefix(MARK): reader.read(stored) for part, stored in coded[first[name]].items()}
                yield first[name], decoded_tensor(held, first[name])
            elif split_name(name) is None:
                yield name, reader.read(name)

    write_checkpoint(path, out, config, tensors(), overwrite, shard_bytes)
    return out


def write_checkpoint(
    path: Path, out: Path, config: dict[str, Any], tensors: Iterator[tuple[str, Tensor]], overwrite: bool, shard_bytes: int
) -> None:
    """A checkpoint in `out` of these tensors and this config, every other file as in `path`."""
    with _draft(path, out, overwrite) as draft:
        _write_shards(tensors, draft, shard_bytes)
        write_json(draft / "config.json", config)
        with disk_errors(out):
            _copy_rest(path, draft, LEFT_BEHIND, LEFT_BEHIND_NAMES)


@contextlib.contextmanager
def _draft(path: Path, out: Path, overwrite: bool) -> Iterator[Path]:
    """A folder beside `out` that takes its name when everything went well."""
    if out.exists() and not overwrite and (not out.is_dir() or any(out.iterdir())):
        raise BadInput(f"{out} exists and is not empty; choose another folder or pass --overwrite")
    if out.resolve() == path.resolve():
        raise BadInput(f"{out} is the checkpoint itself; choose another folder")
    with disk_errors(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        draft = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    try:
        yield draft
        with disk_errors(out):
            draft.chmod(0o755)
            if out.exists():
                shutil.rmtree(out)
            draft.rename(out)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def read_config(path: Path) -> dict[str, Any]:
    """config.json of a checkpoint. Raises `BadInput` where there is none."""
    try:
        config: dict[str, Any] = json.loads((path / "config.json").read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise BadInput(f"{path} holds no readable config.json ({error}); give the folder of a checkpoint") from error
    stored = config.get("quantization_config") or config_beside(path)
    return config if stored is None else {**config, "quantization_config": stored}


def check_quantized(path: Path, config: Mapping[str, Any]) -> None:
    """Raises `BadInput` for a dense checkpoint."""
    if not config.get("quantization_config"):
        raise BadInput(f"{path} has no quantization_config, so it is dense already; there is nothing to export")


def _tensors(path: Path, source: Source, config: dict[str, Any]) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of the dense checkpoint, in the order of the compressed one's."""
    reader = CheckpointReader(path)
    dtype = model_dtype(config, reader)
    plan = make_plan(skeleton(path, config["model_type"]), reader.entries, source, reader.read)
    placed = {item.name: item for items in plan.placements.values() for item in items if item.scheme is not None}
    groups = source.groups(reader.entries)
    for name in (name for name in plan.homeless if name in groups):
        # The architecture does not use it, yet the dense original had it.
        entries = {local: reader.entry(tensor) for local, tensor in groups[name].items()}
        scheme = source.scheme_of((name,), entries, ("Linear",))
        placed[name] = Placement(name=name, tensors=groups[name], scheme=scheme, parameter="", dense_name=f"{name}.weight")
    plain = source.plain_groups(reader.entries)
    apart = {min(parts.values()): name for name, parts in plain.items()}
    owner = {tensor: name for name, tensors in [*groups.items(), *plain.items()] for tensor in tensors.values()}
    stacks: dict[str, list[Placement]] = {}
    for item in placed.values():
        if item.stack is not None:
            stacks.setdefault(item.dense_name, []).append(item)
    done: set[str] = set()
    for tensor in reader.names:
        if tensor not in owner:
            yield tensor, reader.read(tensor)
            continue
        if owner[tensor] in plain:
            if tensor in apart:
                yield apart[tensor], source.opened({k: reader.read(v) for k, v in plain[apart[tensor]].items()})[""]
            continue
        item = placed[owner[tensor]]
        if item.dense_name not in done:
            done.add(item.dense_name)
            items = sorted(stacks.get(item.dense_name, [item]), key=lambda part: part.stack or 0)
            parts = [decoded(part, source, {k: reader.read(v) for k, v in part.tensors.items()}, dtype) for part in items]
            yield item.dense_name, parts[0] if item.stack is None else torch.stack(parts)


def model_dtype(config: dict[str, Any], reader: CheckpointReader) -> torch.dtype:
    """The dtype a checkpoint's model runs in: config.json's, else that of its widest plain tensor, else float32."""
    named = config.get("dtype") or config.get("torch_dtype") or (config.get("text_config") or {}).get("dtype")
    found = getattr(torch, str(named).removeprefix("torch."), None) if named else None
    if isinstance(found, torch.dtype):
        return found
    plain = [entry.dtype for entry in reader if entry.dtype.is_floating_point and entry.dtype.itemsize >= 2]
    return max(plain, key=lambda dtype: dtype.itemsize, default=torch.float32)


def skeleton(path: Path, model_type: str) -> PreTrainedModel:
    """The dense model on the meta device."""
    try:
        config = AutoConfig.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise BadInput(f"transformers knows no model of type {model_type!r}; its weights cannot be put in place") from error
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    family = getattr(transformers, (config.architectures or [""])[0], None)
    with torch.device("meta"):
        model: PreTrainedModel = family(config) if family is not None else AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call, unused-ignore]
    return model


def _write_shards(tensors: Iterator[tuple[str, Tensor]], folder: Path, limit: int) -> None:
    """One safetensors file, or numbered shards with an index."""
    files: list[tuple[Path, dict[str, int]]] = []
    held: dict[str, Tensor] = {}

    def flush() -> None:
        file = folder / f"part-{len(files):05d}.safetensors"
        write_tensors(file, held)
        files.append((file, {name: tensor.nbytes for name, tensor in held.items()}))
        held.clear()

    for name, tensor in tensors:
        if held and sum(t.nbytes for t in held.values()) + tensor.nbytes > limit:
            flush()
        held[name] = tensor
    flush()
    if len(files) == 1:
        files[0][0].rename(folder / SINGLE_NAME)
        return
    weight_map: dict[str, str] = {}
    for number, (file, sizes) in enumerate(files, 1):
        final = f"model-{number:05d}-of-{len(files):05d}.safetensors"
        file.rename(folder / final)
        weight_map |= dict.fromkeys(sizes, final)
    total = sum(sum(sizes.values()) for _, sizes in files)
    write_json(folder / INDEX_NAME, {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))})


def _copy_rest(path: Path, folder: Path, kinds: tuple[str, ...], names: tuple[str, ...]) -> None:
    """Tokenizer, generation config, chat template, licence: every other plain file of the folder."""
    for file in sorted(path.iterdir()):
        if file.is_file() and file.suffix not in kinds and file.name not in names:
            shutil.copy2(file, folder / file.name)
