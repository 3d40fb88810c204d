"""Makes checkpoints with auto-round: `python tests/peers/make_auto_round.py OUT`, in its own environment.

auto-round's torch backend runs symmetric GPTQ layouts on a CPU: there, decoded weights are what a loaded layer makes of
the identity (each output is one weight times one), and the logits are those of the loaded model. compressed-tensors
files are loaded by transformers and compressed-tensors. It has no CPU backend of its own for AWQ layouts and asymmetric
GPTQ ones: AWQ is decoded by auto-round's `dequantize_gemm`, asymmetric GPTQ by the unpacking below, from its packing
code's definition, and the logits are those of the dense model with these weights.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))  # PYTHONSAFEPATH keeps a script's folder out

import making
import torch
from auto_round import AutoRound
from auto_round.export.export_to_awq.utils import dequantize_gemm
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoRoundConfig

CASES: dict[str, dict[str, Any]] = {
    "gptq-w4": {"format": "auto_gptq", "bits": 4, "sym": True},
    "gptq-w4-asymmetric": {"format": "auto_gptq", "bits": 4, "sym": False},
    "gptq-w3": {"format": "auto_gptq", "bits": 3, "sym": True},
    "gptq-w8-channel": {"format": "auto_gptq", "bits": 8, "sym": True, "group_size": -1},
    "awq-w4": {"format": "auto_awq", "bits": 4, "sym": True},
    "awq-w4-asymmetric": {"format": "auto_awq", "bits": 4, "sym": False},
    "compressed-w4": {"format": "llm_compressor", "bits": 4, "sym": True},
    "compressed-w4-asymmetric": {"format": "llm_compressor", "bits": 4, "sym": False},
    "native-w4": {"format": "auto_round", "bits": 4, "sym": True},
    "native-w4-asymmetric": {"format": "auto_round", "bits": 4, "sym": False},
}


def make(source: Path, case: Path, given: dict[str, Any]) -> None:
    """One case: a few steps of tuning, export, load it back the peer's way, record."""
    options = {"group_size": 32, "data_type": "int", **given}
    layout = options.pop("format")
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float16)
    vocabulary = model.config.vocab_size
    rows = [{"input_ids": row[None], "attention_mask": torch.ones_like(row)[None]} for row in making.calibration(vocabulary, 8)]
    tuner = AutoRound(
        model, making.tokenizer_of(source), dataset=rows, iters=2, nsamples=8, seqlen=64, device_map="cpu", **options
    )
    tuner.quantize_and_save(output_dir=str(case / "made"), format=layout)
    written = next((case / "made").rglob("config.json")).parent
    shutil.move(written, case / "checkpoint")
    shutil.rmtree(case / "made", ignore_errors=True)
    tensors = load_file(case / "checkpoint" / "model.safetensors")
    how = json.loads((case / "checkpoint" / "config.json").read_text())["quantization_config"]
    if how["quant_method"] == "compressed-tensors" or (given["sym"] and layout != "auto_awq"):
        own = {} if how["quant_method"] != "gptq" else {"quantization_config": AutoRoundConfig()}
        loaded = AutoModelForCausalLM.from_pretrained(case / "checkpoint", dtype=torch.float16, **own).eval()
        logits = making.logits_of(loaded)
        found, by = {f"{name}.weight": weight_of(loaded.get_submodule(name)) for name in packed(tensors)}, "loaded model"
    else:
        awq = how["quant_method"] == "awq" or "awq" in how.get("packing_format", "")
        decode = awq_weight if awq else gptq_weight
        found = {f"{name}.weight": decode(tensors, name, how) for name in packed(tensors)}
        logits, by = making.logits_of(making.dense_with(source, tensors, found)), decode.__name__
    making.record(case, found, logits, vocabulary, decoded_by=by)


def packed(tensors: dict[str, torch.Tensor]) -> list[str]:
    """Names of the packed weights."""
    suffixes = (".qweight", ".weight_packed")
    return sorted(name.rpartition(".")[0] for name in tensors if name.endswith(suffixes))


def weight_of(layer: torch.nn.Module) -> torch.Tensor:
    """The weight [N, K] that a loaded layer multiplies with."""
    if isinstance(layer, torch.nn.Linear):
        return layer.weight.data
    with torch.no_grad():
        return layer(torch.eye(layer.infeatures, dtype=torch.float16)).T


def awq_weight(tensors: dict[str, torch.Tensor], name: str, how: dict[str, Any]) -> torch.Tensor:
    """auto-round's own decoding of the gemm layout."""
    parts = [tensors[f"{name}.{local}"] for local in ("qweight", "qzeros", "scales")]
    return dequantize_gemm(*parts, how["bits"], how["group_size"]).T


def gptq_weight(tensors: dict[str, torch.Tensor], name: str, how: dict[str, Any]) -> torch.Tensor:
    """4-bit GPTQ: auto-round packs zero points less one, and unpacks them plus one."""
    shifts = torch.arange(0, 32, 4, dtype=torch.int32)
    qweight, qzeros, scales = (tensors[f"{name}.{local}"] for local in ("qweight", "qzeros", "scales"))
    u_KN = ((qweight[:, None, :] >> shifts[:, None]) & 15).flatten(0, 1)
    z_GN = (((qzeros[:, :, None] >> shifts) & 15) + 1).flatten(1) & 15
    group = torch.arange(len(u_KN)) // how["group_size"]
    return ((u_KN - z_GN[group]).to(scales.dtype) * scales[group]).T


if __name__ == "__main__":
    making.main("auto-round", CASES, make, torch.float16)
