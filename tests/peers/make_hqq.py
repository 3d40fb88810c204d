"""Makes checkpoints with HQQ: `python tests/peers/make_hqq.py OUT`, in its own environment.

Linears are quantized by the library on a CPU and saved as its state dict has them, which is what transformers' HqqConfig
saves; it decodes them itself. In float32, where its decoding rounds no difference u - z on the way.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))  # PYTHONSAFEPATH keeps a script's folder out

import making
import torch
from hqq.core.quantize import BaseQuantizeConfig, HQQLinear
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

CASES: dict[str, dict[str, Any]] = {
    "w8": {"nbits": 8, "group_size": 64},
    "w4": {"nbits": 4, "group_size": 64},
    "w4-channel": {"nbits": 4, "group_size": None},
    "w4-as-floats": {"nbits": 4, "group_size": 32, "view_as_float": True},
    "w3": {"nbits": 3, "group_size": 64},
    "w2": {"nbits": 2, "group_size": 16},
    "w1": {"nbits": 1, "group_size": 32},
}


def make(source: Path, case: Path, given: dict[str, Any]) -> None:
    """One case: quantize every linear but the head, save, record."""
    how = BaseQuantizeConfig(axis=1, **given)
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    names = [name for name, layer in model.named_modules() if isinstance(layer, torch.nn.Linear) and name != "lm_head"]
    for name in names:
        layer = HQQLinear(model.get_submodule(name), how, compute_dtype=torch.float32, device="cpu")
        model.set_submodule(name, layer)
    found = {f"{name}.weight": model.get_submodule(name).dequantize() for name in names}
    folder = case / "checkpoint"
    folder.mkdir()
    save_file(
        {name: tensor.contiguous() for name, tensor in model.state_dict().items()},
        folder / "model.safetensors",
        metadata={"format": "pt"},
    )
    said = json.loads((source / "config.json").read_text())
    said["quantization_config"] = {"quant_config": how, "quant_method": "hqq", "skip_modules": ["lm_head"]}
    (folder / "config.json").write_text(json.dumps(said))
    logits = making.logits_of(making.dense_with(source, model.state_dict(), found))
    making.record(case, found, logits, model.config.vocab_size, decoded_by="HQQLinear.dequantize")


if __name__ == "__main__":
    making.main("hqq", CASES, make, torch.float32)
