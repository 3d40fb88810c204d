"""Makes checkpoints with NVIDIA ModelOpt: `python tests/peers/make_modelopt.py OUT`, in its own environment, on a CPU.

`mtq.quantize` calibrates and `export_hf_checkpoint` writes. Weights are decoded by ModelOpt's own tensor classes
(`FP8QTensor`, `NVFP4QTensor`, `MXFP4QTensor`, `MXFP8QTensor`) in float32, times the `pre_quant_scale` of their inputs where
there is one; integers, whose packed form it never reads back, by the few lines below, from the definition of its packing.

The logits are those of ModelOpt's model after the export, in float32: its decoded weights in its own modules, its input
quantizers working where weights have eight bits (we round no others). Its fake quantization of FP4 and MX floats exists for
CUDA only: calibration that must multiply with such weights (AWQ) takes its tensor classes instead, registered as a backend.
Mixtures of experts are computed by the dense model with the decoded weights. Not made: MXFP6 and MXINT8, which ModelOpt 0.47
does not export; SVDQuant, which we refuse; AWQ of experts, where its export stops (`QuantQwen3MoeExperts has no len()`).
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))  # PYTHONSAFEPATH keeps a script's folder out

import making
import modelopt.torch.quantization as mtq
import torch
from modelopt.torch.export import export_hf_checkpoint
from modelopt.torch.quantization.nn import register_quant_backend
from modelopt.torch.quantization.qtensor import FP8QTensor, MXFP4QTensor, MXFP8QTensor, NVFP4QTensor
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, MixtralConfig, Qwen3MoeConfig

Config = dict[str, Any]
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 128, "intermediate_size": 128, "head_dim": 32}
FAMILIES: dict[str, Callable[[], Any]] = {
    "mixtral": lambda: MixtralConfig(**{**making.SHAPE, **EXPERTS, "num_local_experts": 4}),
    "qwen3_moe": lambda: Qwen3MoeConfig(**{**making.SHAPE, **EXPERTS, "num_experts": 4, "norm_topk_prob": True}),
}


def preset(name: str, group: int | None = None, kv: str | None = None, leave: tuple[str, ...] = ()) -> Callable[[], Config]:
    """One of ModelOpt's configs: weights in groups of so many, with a cache of keys and values, without some modules."""

    def make() -> Config:
        config: Config = deepcopy(getattr(mtq, name))
        if kv is not None:
            config = mtq.utils.update_quant_cfg_with_kv_cache_quant(config, getattr(mtq, kv)["quant_cfg"])
        for entry in config["quant_cfg"]:
            numbers = entry.get("cfg")
            for one in numbers if isinstance(numbers, list) else [numbers] if numbers else []:
                blocks = one.get("block_sizes")
                if group is not None and blocks and one.get("num_bits") == 4:
                    blocks[-1] = group
                if blocks and blocks.get("scale_bits"):
                    one["backend"] = "torch"
        config["quant_cfg"] += [{"quantizer_name": pattern, "enable": False} for pattern in leave]
        return config

    return make


def mixed() -> Config:
    """FP8 with NVFP4 in the MLPs: MIXED_PRECISION."""
    config, fp4 = preset("FP8_DEFAULT_CFG")(), preset("NVFP4_MLP_ONLY_CFG")()
    config["quant_cfg"] += [entry for entry in fp4["quant_cfg"] if "mlp" in entry.get("quantizer_name", "")]
    return config


CASES: dict[str, tuple[Callable[[], Config], str]] = {
    "fp8": (preset("FP8_DEFAULT_CFG"), "llama"),
    "fp8-kv": (preset("FP8_DEFAULT_CFG", kv="FP8_KV_CFG"), "llama"),
    "fp8-channel": (preset("FP8_PER_CHANNEL_PER_TOKEN_CFG"), "llama"),
    "fp8-block": (preset("FP8_2D_BLOCKWISE_WEIGHT_ONLY_CFG"), "llama"),
    "fp8-left-out": (preset("FP8_DEFAULT_CFG", leave=("*layers.0*", "*o_proj*")), "llama"),
    "int4-awq": (preset("INT4_AWQ_CFG", group=64), "llama"),
    "int4-blocks": (preset("INT4_BLOCKWISE_WEIGHT_ONLY_CFG", group=32), "llama"),
    "w4a8-awq": (preset("W4A8_AWQ_BETA_CFG"), "llama"),
    "int8": (preset("INT8_DEFAULT_CFG"), "llama"),
    "int8-smooth": (preset("INT8_SMOOTHQUANT_CFG"), "llama"),
    "int8-weights": (preset("INT8_WEIGHT_ONLY_CFG"), "llama"),
    "nvfp4": (preset("NVFP4_DEFAULT_CFG"), "llama"),
    "nvfp4-kv": (preset("NVFP4_DEFAULT_CFG", kv="NVFP4_KV_CFG"), "llama"),
    "nvfp4-awq": (preset("NVFP4_AWQ_LITE_CFG"), "llama"),
    "nvfp4-weights": (preset("W4A16_NVFP4_CFG"), "llama"),
    "nvfp4-mlp": (preset("NVFP4_MLP_ONLY_CFG"), "llama"),
    "nvfp4-fp8": (preset("W4A8_NVFP4_FP8_CFG"), "llama"),
    "mxfp4": (preset("MXFP4_DEFAULT_CFG"), "llama"),
    "mxfp4-fp8": (preset("W4A8_MXFP4_FP8_CFG"), "llama"),
    "mxfp8": (preset("MXFP8_DEFAULT_CFG"), "llama"),
    "mixed": (mixed, "llama"),
    "nvfp4-mixtral": (preset("NVFP4_DEFAULT_CFG"), "mixtral"),
    "nvfp4-qwen3-moe": (preset("NVFP4_DEFAULT_CFG"), "qwen3_moe"),
    "fp8-qwen3-moe": (preset("FP8_DEFAULT_CFG"), "qwen3_moe"),
    "mixed-mixtral": (mixed, "mixtral"),
}


def make(source: Path, case: Path, given: tuple[Callable[[], Config], str]) -> None:
    """One case: calibrate, export, decode, compute, record."""
    config, family = given
    if family != "llama":
        source = save_family(family, case.parent.parent / f"dense-{family}")
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16).eval()
    rows = making.calibration(model.config.vocab_size)
    mtq.quantize(model, config(), lambda quantized: [quantized(row[None]) for row in rows])
    checkpoint = case / "checkpoint"
    export_hf_checkpoint(model, export_dir=checkpoint)
    tensors = load_file(checkpoint / "model.safetensors")
    said = json.loads((checkpoint / "hf_quant_config.json").read_text())["quantization"]
    found = {name: weight_of(tensors, name, said) for name in quantized_names(tensors)}
    smoothed = {f"{name}.weight": smooth(tensors, name, weight).to(torch.bfloat16) for name, weight in found.items()}
    narrow = {name for name in found if tensors[f"{name}.weight"].dtype == torch.uint8}
    if family == "llama":
        computing, by = put_back(model, found, narrow), "ModelOpt's modules with decoded weights, after export"
    else:
        scales = {name: tensors[f"{name}.input_scale"] for name in found.keys() - narrow}
        computing = round_inputs(of_dense(source, case / "dense", tensors, found), scales)
        by = "a dense model of decoded weights, inputs rounded by FP8QTensor"
    logits = making.logits_of(computing)
    making.record(case, smoothed, logits, model.config.vocab_size, decoded_by="ModelOpt's tensor classes", computed_by=by)


def save_family(family: str, folder: Path) -> Path:
    """A random model of another family, as `making.save_tiny` makes a Llama."""
    if not (folder / "model.safetensors").is_file():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(FAMILIES[family]()).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim >= 2:
                    parameter.normal_(0, parameter.shape[-1] ** -0.5)
        model.to(torch.bfloat16).save_pretrained(folder)
    return folder


def fake_by_tensor_class(inputs: torch.Tensor, quantizer: Any) -> torch.Tensor:
    """Fake quantization in plain torch by the classes that write the files."""
    blocks, rows = quantizer.block_sizes, inputs.reshape(-1, inputs.shape[-1])
    sizes = {-1: blocks[-1]}
    if quantizer.num_bits == (4, 3):
        held, scale = MXFP8QTensor.quantize(rows)
        found = held.dequantize(scale=scale, block_sizes=sizes)
    elif blocks["scale_bits"] == (8, 0):
        held, scale = MXFP4QTensor.quantize(rows.contiguous(), blocks[-1])
        found = held.dequantize(scale=scale, block_sizes=sizes)
    else:
        second = quantizer._get_amax(inputs).float().amax() / (6 * 448)
        held, scale, second = NVFP4QTensor.quantize(rows.clone(), blocks[-1], None, second)
        found = held.dequantize(scale=scale, double_scale=second, block_sizes=sizes)
    return found.reshape(inputs.shape).to(inputs.dtype)


def quantized_names(tensors: Mapping[str, torch.Tensor]) -> list[str]:
    """The weights that have a scale on disk."""
    return sorted(name.removesuffix(".weight_scale") for name in tensors if name.endswith(".weight_scale"))


def weight_of(tensors: Mapping[str, torch.Tensor], name: str, said: Mapping[str, Any]) -> torch.Tensor:
    """The weight [N, K] that the file holds, in float32."""
    weight, scale, second = (tensors.get(f"{name}.{local}") for local in ("weight", "weight_scale", "weight_scale_2"))
    N, K = weight.shape
    if weight.dtype == torch.int8:
        return weight.float() * scale[:, None]
    if weight.dtype == torch.float8_e4m3fn and scale.dtype == torch.uint8:
        return MXFP8QTensor(weight.shape, torch.float32, weight).dequantize(torch.float32, scale=scale)
    if weight.dtype == torch.float8_e4m3fn:
        held = FP8QTensor(weight.shape, torch.float32, weight)
        if "pb" in said["quant_algo"]:
            return held.dequantize(torch.float32, scale=scale.reshape(-(-N // 128), -1), block_sizes={-1: 128, -2: 128})
        return held.dequantize(torch.float32, scale=scale[:, None] if scale.ndim else scale)
    if scale.dtype == torch.float32:
        return integers(weight) * scale.repeat_interleave(K // scale.shape[1], 1)
    shape, sizes = torch.Size((N, 2 * K)), {-1: 2 * K // scale.shape[1]}
    if scale.dtype == torch.uint8:
        return MXFP4QTensor(shape, torch.float32, weight).dequantize(torch.float32, scale=scale, block_sizes=sizes)
    held = NVFP4QTensor(shape, torch.float32, weight)
    return held.dequantize(torch.float32, scale=scale, double_scale=second, block_sizes=sizes)


def integers(packed: torch.Tensor) -> torch.Tensor:
    """Bytes [N / 2, K] as signed nibbles [N, K]: two rows of the weight in a byte, the first of them low."""
    rows = torch.stack([packed & 15, packed >> 4], 1).flatten(0, 1).to(torch.int8)
    return ((rows ^ 8) - 8).float()


def smooth(tensors: Mapping[str, torch.Tensor], name: str, weight: torch.Tensor) -> torch.Tensor:
    """The weight that meets inputs as they are: W x' with x' = pre_quant_scale x is (W pre_quant_scale) x."""
    factor = tensors.get(f"{name}.pre_quant_scale")
    return weight if factor is None else weight * factor.float()


def put_back(model: torch.nn.Module, found: Mapping[str, torch.Tensor], narrow: set[str]) -> torch.nn.Module:
    """ModelOpt's model in float32 with decoded weights. Of inputs, those are still quantized that meet weights of eight bits.

    narrow: weights of four bits.
    """
    for name, weight in found.items():
        layer = model.get_submodule(name)
        layer.weight = torch.nn.Parameter(weight)
        levels = layer.weight_quantizer
        for quantizer in levels if isinstance(levels, torch.nn.Sequential) else [levels]:
            quantizer.disable()
        if getattr(layer.input_quantizer, "backend", None) is not None or name in narrow:
            layer.input_quantizer.disable()
    for layer in model.modules():
        for local in ("k_bmm_quantizer", "v_bmm_quantizer"):
            if hasattr(layer, local):
                getattr(layer, local).disable()
    return model.float()


def of_dense(source: Path, folder: Path, tensors: Mapping[str, torch.Tensor], found: Mapping[str, torch.Tensor]) -> Any:
    """A dense model, in float32, with the decoded weights and everything else of the file."""
    folder.mkdir()
    dense = {name: tensor.float() for name, tensor in tensors.items() if name.rpartition(".")[0] not in found}
    dense |= {f"{name}.weight": smooth(tensors, name, weight).contiguous() for name, weight in found.items()}
    save_file(dense, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text((source / "config.json").read_text())
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, experts_implementation="batched_mm").eval()


def round_inputs(model: torch.nn.Module, scales: Mapping[str, torch.Tensor]) -> torch.nn.Module:
    """The model with FP8 inputs in units of these scales; the experts of a layer have one for all."""
    for name, scale in scales.items():
        stem, inside, leaf = name.partition(".experts.")
        before = partial(lambda unit, _, given: (rounded(given[0], unit), *given[1:]), scale)
        if not inside:
            model.get_submodule(name).register_forward_pre_hook(before)
        elif leaf == "0.up_proj":
            model.get_submodule(f"{stem}.experts").register_forward_pre_hook(before)
        elif leaf == "0.down_proj":
            experts = model.get_submodule(f"{stem}.experts")
            experts._apply_gate = partial(lambda gate, unit, u: rounded(gate(u), unit), experts._apply_gate, scale)
    return model


def rounded(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Inputs in FP8 with a fixed scale."""
    held, _ = FP8QTensor.quantize(x.clamp(-448 * scale, 448 * scale), scale)
    return held.dequantize(torch.float32, scale=scale)


register_quant_backend("torch", fake_by_tensor_class)

if __name__ == "__main__":
    making.main("modelopt", CASES, make, torch.bfloat16)
