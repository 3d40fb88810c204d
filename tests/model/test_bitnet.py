"""A BitNet checkpoint, packed by transformers, runs on the kernels for integers."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tests import zoo
from tests.model.tiny import error, logits
from transformers.integrations.bitnet import pack_weights

from aerogel.kernels.linear import Linear
from aerogel.model.loading import load


def test_a_bitnet_checkpoint_is_its_ternary_weights(tmp_path: Path) -> None:
    dense = zoo.save("llama", tmp_path / "dense", dtype=torch.float32)
    config = json.loads((dense / "config.json").read_text())
    plain = load_file(dense / "model.safetensors")
    packed = dict(plain)
    for name in [name for name in plain if name.endswith("proj.weight")]:
        scale = plain[name].abs().mean()
        codes = (plain[name] / scale).round().clamp(-1, 1)
        plain[name] = codes * scale
        packed[name], packed[f"{name}_scale"] = pack_weights(codes.to(torch.int8)), (1 / scale).reshape(1)
    for folder, tensors, extra in [
        ("plain", plain, {}),
        ("packed", packed, {"quantization_config": {"quant_method": "bitnet", "modules_to_not_convert": ["lm_head"]}}),
    ]:
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "config.json").write_text(json.dumps({**config, **extra}))
        save_file(tensors, tmp_path / folder / "model.safetensors", metadata={"format": "pt"})
    model = load(tmp_path / "packed")
    held = [module for module in model.modules() if isinstance(module, Linear)]
    assert len(held) == 14 and all(module.scheme.grid.bits == 2 for module in held)
    assert error(logits(model), logits(load(tmp_path / "plain"))) < 5e-6
