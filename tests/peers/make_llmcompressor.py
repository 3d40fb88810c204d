"""Makes checkpoints with llmcompressor: `python tests/peers/make_llmcompressor.py OUT`, in its own environment.

The weights are decoded, and the logits computed, by compressed-tensors inside plain transformers, after `from_pretrained`.
The pinned transformers is one that still loads the asymmetric files (docs/compatibility.md has which do not).
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))  # PYTHONSAFEPATH keeps a script's folder out

import making
import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.quantization import QuantizationModifier
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM


def weights(bits: int = 4, group: int | None = 32, symmetric: bool = True, actorder: str | None = None, **more: Any) -> Any:
    """Integer weights for a config group."""
    strategy = "channel" if group is None else "group"
    return QuantizationArgs(
        num_bits=bits, type="int", symmetric=symmetric, strategy=strategy, group_size=group, actorder=actorder, **more
    )


def gptq(actorder: str | None = "static", **given: Any) -> Any:
    """GPTQ on every linear but the head."""
    groups = {"group_0": QuantizationScheme(targets=["Linear"], weights=weights(actorder=actorder, **given))}
    return GPTQModifier(config_groups=groups, ignore=["lm_head"], actorder=actorder)


def plain(**given: Any) -> Any:
    """Round-to-nearest on every linear but the head."""
    groups = {"group_0": QuantizationScheme(targets=["Linear"], weights=weights(**given))}
    return QuantizationModifier(config_groups=groups, ignore=["lm_head"])


def mixed() -> Any:
    """Two widths in one model."""
    groups = {
        "group_0": QuantizationScheme(targets=["re:.*self_attn.*"], weights=weights()),
        "group_1": QuantizationScheme(targets=["re:.*mlp.*"], weights=weights(bits=8, group=None)),
    }
    return QuantizationModifier(config_groups=groups, ignore=["lm_head"])


def preset(scheme: str) -> Any:
    """A scheme that llmcompressor has a name for."""
    return QuantizationModifier(targets="Linear", scheme=scheme, ignore=["lm_head"])


CASES = {
    "w4-gptq": lambda: gptq(),
    "w4-gptq-asymmetric": lambda: gptq(symmetric=False),
    "w4-rtn": lambda: plain(group=64),
    "w4-rtn-channel": lambda: plain(group=None),
    "w4-rtn-asymmetric": lambda: plain(symmetric=False),
    "w3-gptq": lambda: gptq(bits=3),
    "w8-rtn-asymmetric": lambda: plain(bits=8, symmetric=False),
    "w8a8-int8": lambda: preset("W8A8"),
    "fp8-dynamic": lambda: preset("FP8_DYNAMIC"),
    "fp8-block": lambda: preset("FP8_BLOCK"),
    "mixed": mixed,
}


def make(source: Path, case: Path, modifier: Any) -> None:
    """One case: compress, save, load it back the peer's way, record."""
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
    vocabulary = model.config.vocab_size
    rows = [{"input_ids": row, "attention_mask": [1] * len(row)} for row in making.calibration(vocabulary).tolist()]
    oneshot(model=model, dataset=Dataset.from_list(rows), recipe=modifier(), num_calibration_samples=16, max_seq_length=64)
    model.save_pretrained(case / "checkpoint", save_compressed=True)
    names = quantized_names(case / "checkpoint")
    loaded = AutoModelForCausalLM.from_pretrained(case / "checkpoint", dtype="auto")
    making.logits_of(loaded)  # compressed-tensors decompresses on the first forward pass
    found = {f"{name}.weight": loaded.get_submodule(name).weight.data for name in names}
    # In float32 the peer's rounding of activations does not hide a difference, and 8-bit inputs get the same codes.
    logits = making.logits_of(AutoModelForCausalLM.from_pretrained(case / "checkpoint", dtype=torch.float32))
    making.record(case, found, logits, vocabulary, decoded_by="transformers with compressed-tensors")


def quantized_names(folder: Path) -> list[str]:
    """The linears that have a scale on disk."""
    tensors = load_file(folder / "model.safetensors")
    return sorted(name.removesuffix(".weight_scale") for name in tensors if name.endswith(".weight_scale"))


if __name__ == "__main__":
    making.main("llmcompressor", CASES, make, torch.bfloat16)
