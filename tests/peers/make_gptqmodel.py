"""Makes checkpoints with gptqmodel: `python tests/peers/make_gptqmodel.py OUT`, in its own environment.

Decoded weights are what a loaded layer of gptqmodel's torch backend makes of the identity, y = I W^T: each output is one
weight times one, so it is exact. The logits are those of the model gptqmodel loads.

Its AWQ refuses to quantize without CUDA (7.6: "AWQ: CUDA is not available."), so there the weights are rounded here and
only packed, written and loaded back by gptqmodel's classes.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))  # PYTHONSAFEPATH keeps a script's folder out
# 7.6 asks for two workers to load models and by default gives a machine with two cores one.
os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")

import making
import torch
from gptqmodel import BACKEND, GPTQModel, QuantizeConfig
from gptqmodel.nn_modules.qlinear.torch_awq import AwqTorchLinear
from gptqmodel.quantization import FORMAT
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

GROUP = 32
AWQ = {"quant_method": "awq", "version": "gemm", "bits": 4, "group_size": GROUP, "zero_point": True}
CASES: dict[str, dict[str, Any]] = {
    "gptq-w4": {},
    "gptq-w4-asymmetric": {"sym": False},
    "gptq-w4-activation-order": {"desc_act": True},
    "gptq-w4-v2": {"format": FORMAT.GPTQ_V2, "sym": False},
    "gptq-w3": {"bits": 3},
    "gptq-w2": {"bits": 2},
    "gptq-w8-channel": {"bits": 8, "group_size": -1, "act_group_aware": False},
    "gptq-dynamic": {"dynamic": {r"+:.*\.down_proj.*": {"bits": 8, "group_size": 64}, r"-:.*\.k_proj.*": {}}},
    "awq-w4-packed": AWQ,
}


def make(source: Path, case: Path, given: dict[str, Any]) -> None:
    """One case: quantize, save, load it back the peer's way, record."""
    out, awq = case / "checkpoint", given is AWQ
    if awq:
        write_awq(source, out)
    else:
        config = QuantizeConfig(**{"bits": 4, "group_size": GROUP, "desc_act": False, "sym": True, "device": "cpu", **given})
        model = GPTQModel.load(str(source), config, dtype=torch.float16)
        rows = making.calibration(model.model.config.vocab_size)
        model.quantize([{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in rows], batch_size=4)
        model.save(str(out))
    backend = BACKEND.AWQ_TORCH if awq else BACKEND.TORCH
    loaded = GPTQModel.load(str(out), backend=backend, device="cpu", dtype=torch.float16).model.eval()
    found = {f"{name}.weight": weight_of(layer) for name, layer in loaded.named_modules() if hasattr(layer, "qweight")}
    making.record(case, found, making.logits_of(loaded), loaded.config.vocab_size, decoded_by=f"gptqmodel {backend.name}")


def weight_of(layer: torch.nn.Module) -> torch.Tensor:
    """The weight [N, K] that a packed layer multiplies with."""
    with torch.no_grad():
        return layer(torch.eye(layer.in_features, dtype=torch.float16)).T


def write_awq(source: Path, out: Path) -> None:
    """The model rounded to 4 bits with zero points, packed by gptqmodel's AWQ layer."""
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float16)
    tensors = dict(model.state_dict())
    for name, linear in model.named_modules():
        if not isinstance(linear, torch.nn.Linear) or name == "lm_head":
            continue
        N, K = linear.weight.shape
        grouped = linear.weight.data.float().reshape(N, K // GROUP, GROUP)
        low, high = grouped.amin(2).clamp(max=0), grouped.amax(2).clamp(min=0)
        scale = ((high - low) / 15).half()
        zero = (-low / scale.float()).round().clamp(0, 15)
        rounded = ((grouped / scale.float()[..., None]).round() + zero[..., None]).clamp(0, 15) - zero[..., None]
        linear.weight.data = (rounded * scale.float()[..., None]).reshape(N, K)
        layer = AwqTorchLinear(4, GROUP, False, False, K, N, register_buffers=True)
        layer.pack(linear, scale.float(), zero)
        tensors.pop(f"{name}.weight")
        tensors |= {f"{name}.{local}": getattr(layer, local).contiguous() for local in ("qweight", "qzeros", "scales")}
    model.config.save_pretrained(out)
    making.tokenizer_of(source).save_pretrained(out)
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps({**config, "quantization_config": AWQ}))


if __name__ == "__main__":
    making.main("gptqmodel", CASES, make, torch.float16)
