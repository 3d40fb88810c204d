"""Adaptive groups through a whole run: each weight with its own, planned exactly, loaded, and the same after a resume."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests import zoo
from tests.model.tiny import digest, error, ids_file, logits, recipe
from transformers import AutoModelForCausalLM

import aerogel
from aerogel.kernels.experts import ExpertLinear
from aerogel.kernels.linear import Linear
from aerogel.model.compress import compress
from aerogel.model.plan import plan
from aerogel.pack.export import export_dense

LOUD = "model.layers.1.self_attn.k_proj.weight"


def stage(method: str = "rtn", **more: Any) -> dict[str, Any]:
    gain = {"granularity": "adaptive", "granularity_gain": 0.2}
    return {"quantize": {"method": method, "bits": 4, "group_size": 8, **gain, **more}}


def with_a_loud_input(folder: Path, dtype: torch.dtype = torch.float32) -> Path:
    dense = zoo.save("llama", folder / "dense", dtype=dtype)
    held = load_file(dense / "model.safetensors")
    held[LOUD][:, 3] *= 50
    save_file(held, dense / "model.safetensors", metadata={"format": "pt"})
    return dense


@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_each_weight_has_its_own_and_siblings_share(tmp_path: Path, method: str) -> None:
    dense, chosen = with_a_loud_input(tmp_path), recipe(ids_file(tmp_path), stage(method))
    planned, report = plan(dense, chosen), compress(dense, chosen, tmp_path / "out")
    assert planned["size"]["bits_per_weight"] == pytest.approx(report["size"]["bits_per_weight"], rel=1e-9)
    model: Any = aerogel.load(tmp_path / "out")
    sizes = {name: m.scheme.grid.group_size for name, m in model.named_modules() if isinstance(m, Linear)}
    attention = {f"model.layers.1.self_attn.{leaf}_proj" for leaf in "qkvo"}
    assert {name for name, size in sizes.items() if size is not None} == attention
    assert {sizes[name] for name in attention} == {8}
    exported = AutoModelForCausalLM.from_pretrained(export_dense(tmp_path / "out", tmp_path / "again"), dtype="auto")
    assert error(logits(model), logits(exported)) < 2e-5
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert config["quant_method"] == "compressed-tensors"
    assert {g["weights"]["group_size"] for g in config["config_groups"].values()} == {None, 8}
    compress(dense, chosen, tmp_path / "twice")
    assert digest(tmp_path / "out")["model.safetensors"] == digest(tmp_path / "twice")["model.safetensors"]


def test_scales_have_the_checkpoint_s_type(tmp_path: Path) -> None:
    dense, chosen = with_a_loud_input(tmp_path, torch.bfloat16), recipe(None, stage())
    report = compress(dense, chosen, tmp_path / "out")
    assert plan(dense, chosen)["size"]["bits_per_weight"] == pytest.approx(report["size"]["bits_per_weight"], rel=1e-9)
    held = load_file(tmp_path / "out" / "model.safetensors")
    assert {tensor.dtype for name, tensor in held.items() if name.endswith("weight_scale")} == {torch.bfloat16}


def test_experts_of_a_layer_share(tmp_path: Path) -> None:
    dense = zoo.save("mixtral", tmp_path / "dense")
    held = load_file(dense / "model.safetensors")
    loud = next(name for name in held if ".experts." in name and "layers.0" in name and held[name].shape[-1] == 32)
    held[loud][..., 3] *= 50
    save_file(held, dense / "model.safetensors", metadata={"format": "pt"})
    compress(dense, recipe(None, stage()), tmp_path / "out")
    model = aerogel.load(tmp_path / "out")
    stacks = {name: m.scheme.grid.group_size for name, m in model.named_modules() if isinstance(m, ExpertLinear)}
    assert len(stacks) == 4 and sorted(stacks.values(), key=str) == [8, None, None, None]
    assert torch.isfinite(logits(model)).all()
