"""Checkpoints in the float layouts of gpt-oss and ModelOpt, as models: the same logits as what transformers, or the equation of
the layout, makes of the same bytes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests import zoo
from tests.model.test_loading import close, logits, make, reference
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from aerogel.errors import BadInput
from aerogel.kernels.experts import ExpertLinear
from aerogel.kernels.linear import Linear
from aerogel.model.inspect import inspect
from aerogel.model.loading import load
from aerogel.pack.export import export_dense
from aerogel.pack.gpt_oss import blocks_of_codes
from aerogel.quantize.codes import quantized
from aerogel.quantize.formats.mx import Mx
from aerogel.quantize.formats.nvfp4 import Nvfp4
from aerogel.quantize.grids import Fp8Grid


@pytest.fixture(autouse=True)
def whole_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    """gpt-oss with 32 and 64 inputs to its experts: whole blocks of 32."""
    monkeypatch.setitem(zoo.ZOO, "gpt_oss", {**zoo.ZOO["gpt_oss"], "intermediate_size": 64})


def gpt_oss(folder: Path) -> tuple[Path, Path]:
    """A gpt-oss checkpoint in its own MXFP4 layout, and a dense one with what transformers decodes from it."""
    dense = zoo.save("gpt_oss", folder / "dense", dtype=torch.bfloat16)
    held = load_file(dense / "model.safetensors")
    packed, decoded = dict(held), dict(held)
    for name in [n for n in held if n.endswith(("gate_up_proj", "down_proj"))]:
        blocks: list[Tensor] = []
        scales: list[Tensor] = []
        for w_KN in packed.pop(name):
            w_NK = w_KN.T.float().contiguous()
            found = blocks_of_codes(quantized(Mx(), w_NK, Mx().fit(w_NK)))
            blocks.append(found[0])
            scales.append(found[1])
        packed[f"{name}_blocks"], packed[f"{name}_scales"] = torch.stack(blocks), torch.stack(scales)
        decoded[name] = convert_moe_packed_tensors(torch.stack(blocks), torch.stack(scales))
    out, wanted = folder / "packed", folder / "wanted"
    for path, tensors in ((out, packed), (wanted, decoded)):
        path.mkdir()
        save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
        (path / "config.json").write_text((dense / "config.json").read_text())
    configure(out, quant_method="mxfp4", modules_to_not_convert=["model.layers.*.self_attn", "lm_head"])
    return out, wanted


def configure(folder: Path, **quantization: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = quantization
    (folder / "config.json").write_text(json.dumps(config))


def test_gpt_oss_loads_packed_and_gives_the_logits_of_transformers_decoding(tmp_path: Path) -> None:
    packed, wanted = gpt_oss(tmp_path)
    model = load(packed, dtype=torch.float32)
    stacks = [module for module in model.modules() if isinstance(module, ExpertLinear)]
    assert len(stacks) == 4 and {stack.scheme.format for stack in stacks} == {"mxfp4-pack-quantized"}
    assert not [name for name, value in model.named_parameters() if value.ndim == 3]
    dense = AutoModelForCausalLM.from_pretrained(wanted, dtype=torch.float32, experts_implementation="eager")
    close(logits(model), logits(dense), 2e-5)
    facts = inspect(packed)
    experts = 2 * 4 * (2 * 64 * 32 + 32 * 64)  # layers, experts, gate and up, down
    assert facts["quantization"]["layers"] == 4 and facts["bits_per_weight"] == 4.25
    assert facts["parameters"] == sum(value.numel() for value in dense.parameters()) and facts["parameters"] > experts
    assert facts["experts"]["packed"] == [f"model.layers.{i}.mlp.experts" for i in (0, 1)]
    exported = load_file(export_dense(packed, tmp_path / "exported") / "model.safetensors")
    for name, tensor in load_file(wanted / "model.safetensors").items():
        assert torch.equal(exported[name], tensor), name


def test_gpt_oss_experts_that_cannot_stay_packed_are_decoded_and_it_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    packed, wanted = gpt_oss(tmp_path)
    monkeypatch.setattr("aerogel.model.experts.differs", lambda module: "computes something else")
    model = load(packed, dtype=torch.float32)
    assert "decoded into dense weights: computes something else" in caplog.text
    dense = AutoModelForCausalLM.from_pretrained(wanted, dtype=torch.float32)
    close(logits(model), logits(dense), 2e-5)


def test_gpt_oss_in_the_layout_of_openai_is_refused_with_the_folder_to_take(tmp_path: Path) -> None:
    words = {"num_hidden_layers": 24, "num_experts": 32, "experts_per_token": 4, "hidden_size": 2880, "swiglu_limit": 7.0}
    (tmp_path / "config.json").write_text(json.dumps(words))
    save_file({"block.0.mlp.mlp1_weight.blocks": torch.zeros(1, dtype=torch.uint8)}, tmp_path / "model.safetensors")
    for read in (load, inspect):
        with pytest.raises(BadInput, match=r"OpenAI's own layout .* give the folder above it, or openai/gpt-oss-20b"):
            read(tmp_path)


def modelopt_nvfp4(folder: Path, name: str, factors: list[float]) -> tuple[Path, torch.nn.Module]:
    """A checkpoint with ModelOpt's tensors, whose weights take these factors in turn, and the model they stand for."""
    grids = iter(factors * 1000)
    made = make(folder, name, grid_of=lambda m: Nvfp4().pinned(next(grids)))
    file = made.packed / "model.safetensors"
    renamed = {}
    for tensor_name, tensor in load_file(file).items():
        if tensor_name.endswith("weight_global_scale"):
            renamed[tensor_name.replace("weight_global_scale", "weight_scale_2")] = (1 / tensor).reshape(())
            renamed[tensor_name.replace("weight_global_scale", "input_scale")] = torch.tensor(0.01)
        else:
            renamed[tensor_name.replace("weight_packed", "weight")] = tensor
    save_file(renamed, file, metadata={"format": "pt"})
    configure(made.packed, quant_method="modelopt", quant_algo="NVFP4", ignore=["lm_head"])
    return made.packed, reference(made)


@pytest.mark.parametrize("factors", [[2.0**-13], [2.0**-13, 2.0**-12, 2.0**-11]], ids=["shared", "differing"])
@pytest.mark.parametrize("name", ["llama", "qwen3_moe"])
def test_nvfp4_of_modelopt_whatever_its_factors(tmp_path: Path, name: str, factors: list[float]) -> None:
    folder, wanted = modelopt_nvfp4(tmp_path, name, factors)
    model = load(folder)
    stacks = {n: module for n, module in model.named_modules() if isinstance(module, ExpertLinear)}
    assert len(stacks) == (4 if name == "qwen3_moe" else 0)
    wide = {n.rpartition(".")[2] for n, stack in stacks.items() if stack.scheme.grid.scale_dtype == torch.float32}
    # Gate and up are one weight: where their factors differ, the scales take them in. Down has its own in every expert.
    assert wide == ({"gate_up_proj"} if stacks and len(factors) > 1 else set())
    close(logits(model), logits(wanted), 1e-5)


def test_experts_of_servers_with_their_own_global_scales(tmp_path: Path) -> None:
    factors = iter([2.0**-13, 2.0**-12, 2.0**-11] * 1000)
    made = make(tmp_path, "mixtral", grid_of=lambda m: Nvfp4().pinned(next(factors)))
    model = load(made.packed)
    assert sum(isinstance(module, ExpertLinear) for module in model.modules()) == 4
    close(logits(model), logits(reference(made)), 1e-5)


@pytest.mark.parametrize("beside", [False, True], ids=["config.json", "hf_quant_config.json"])
@pytest.mark.parametrize("algorithm", ["FP8", "FP8_PB_WO"])
@pytest.mark.parametrize("name", ["llama", "qwen3_moe"])
def test_fp8_of_modelopt(tmp_path: Path, name: str, algorithm: str, beside: bool) -> None:
    strategy: Any = "tensor" if algorithm == "FP8" else "block"
    made = make(tmp_path, name, grid_of=lambda m: Fp8Grid(strategy=strategy))
    file = made.packed / "model.safetensors"
    held = load_file(file)
    for tensor_name in [n for n in held if n.endswith("weight_scale")]:
        scale = held[tensor_name]
        held[tensor_name] = scale.reshape(()) if algorithm == "FP8" else scale[:, None, :, None].contiguous()
        if algorithm == "FP8_PB_WO" or "experts" in tensor_name:  # used for experts in FP8, that is
            held[tensor_name.replace("weight_scale", "input_scale")] = torch.tensor(0.01)
    save_file(held, file, metadata={"format": "pt"})
    if beside:
        config = json.loads((made.packed / "config.json").read_text())
        del config["quantization_config"]
        (made.packed / "config.json").write_text(json.dumps(config))
        said = {"producer": {"name": "modelopt"}, "quantization": {"quant_algo": algorithm, "kv_cache_quant_algo": "FP8"}}
        (made.packed / "hf_quant_config.json").write_text(json.dumps(said))
    else:
        configure(made.packed, quant_method="modelopt", quant_algo=algorithm)
    model = load(made.packed)
    assert any(isinstance(module, Linear) for module in model.modules())
    experts = [module for module in model.modules() if isinstance(module, ExpertLinear)]
    assert bool(experts) == (name == "qwen3_moe")
    rounded = [module for module in experts if module.input_scale is not None]
    assert rounded == (experts if algorithm == "FP8" else [])
    assert all(torch.equal(module.input_scale, torch.full((module.experts, 1), 0.01)) for module in rounded)
    close(logits(model), logits(reference(made)), 0.15 if rounded else 1e-5)


def test_modelopt_fp8_with_a_stored_scale_of_inputs_rounds_them(tmp_path: Path) -> None:
    dense = zoo.save("llama", tmp_path / "dense", dtype=torch.bfloat16)
    held = load_file(dense / "model.safetensors")
    packed, decoded = dict(held), dict(held)
    scales: dict[str, Tensor] = {}
    for name in [n for n in held if n.endswith("proj.weight")]:
        stem, w = name.removesuffix(".weight"), held[name].float()
        scale, scales[stem] = w.abs().max() / 448, torch.tensor(2.5 / 448)
        packed[name] = (w / scale).to(torch.float8_e4m3fn)
        packed[f"{stem}.weight_scale"], packed[f"{stem}.input_scale"] = scale, scales[stem]
        decoded[name] = packed[name].float() * scale
    out = tmp_path / "packed"
    out.mkdir()
    save_file(packed, out / "model.safetensors", metadata={"format": "pt"})
    (out / "config.json").write_text((dense / "config.json").read_text())
    configure(out, quant_method="modelopt", quant_algo="FP8")
    save_file(decoded, dense / "model.safetensors", metadata={"format": "pt"})
    model, wanted = load(out, dtype=torch.float32), AutoModelForCausalLM.from_pretrained(dense, dtype=torch.float32)

    def rounded(x: Tensor, scale: Tensor) -> Tensor:
        return (x / scale).clamp(-448, 448).to(torch.float8_e4m3fn).float() * scale

    for stem, scale in scales.items():
        wanted.get_submodule(stem).register_forward_pre_hook(lambda _, given, s=scale: (rounded(given[0], s),))
    ids = torch.arange(3, 20)[None]
    with torch.no_grad():
        a, b = model(ids).logits, wanted(ids).logits
    close(a, b, 1e-5)
